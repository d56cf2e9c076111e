from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qkt_clinical.cli import main
from qkt_clinical.config.params import GateParams
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.datasets.workspace import write_workspace
from qkt_clinical.errors import OutputsError
from qkt_clinical.evaluation.gate import against, judge, measured
from qkt_clinical.records.base import Estimate
from qkt_clinical.records.decisions import Decision, keep_decision
from qkt_clinical.records.evaluation import Evaluation
from qkt_clinical.records.verdict import Champion
from qkt_clinical.stages.gate import gate_queries
from tests.sample_run import sample_params, write_sample_run

RULES = GateParams(query_recall=0.6, forgetting=0.05, calibration=0.08, query_images=30)


def estimate(value: float = 1.0, low: float = 0.0, high: float = 1.0) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def evaluation(**changes: Any) -> Evaluation:
    """An answer that meets every rule just so."""
    figures: dict[str, Any] = {
        "recall": {"a": 0.6, "b": 0.7, "own": 0.1},
        "forgetting": 0.05,
        "ece": 0.08,
        "images": {"a": 30, "b": 31, "own": 1},
        "balanced": 0.9,
        "more": {},
        **changes,
    }
    names = ("a", "b", "own")
    images = [figures["images"].get(c, 0) for c in names]
    scores = {
        "query_accuracy": estimate(),
        "retained_accuracy": estimate(),
        "balanced_accuracy": estimate(figures["balanced"], 0.5),
        "ece": estimate(0.0, 0.0, figures["ece"]),
        "recall": {c: None if v is None else estimate(1.0, v) for c, v in figures["recall"].items()},
        **{name: {} for name in ("precision", "class_auroc", "class_auprc")},
        "confusion": [[n if i == j else 0 for j in range(3)] for i, n in enumerate(images)],
    }
    return Evaluation.model_validate(
        {
            "hospital": "h",
            "query": "q",
            "classes": ["a", "b"],
            "method": "qkt",
            "teachers": [],
            "bytes_moved": 0,
            "budget": 0.05,
            "relevant": names,
            "local": ["own"],
            "test_images": figures["images"],
            "test_data": "t",
            "passes_per_prediction": 1,
            "before": scores,
            "after": scores,
            "gain": estimate(),
            "query_gain": estimate(),
            "forgetting": estimate(-1.0, -1.0, figures["forgetting"]),
            "class_forgetting": {},
            **figures["more"],
        }
    )


def test_an_answer_that_meets_every_rule_passes() -> None:
    verdict = judge(evaluation(), RULES)
    assert verdict.passed
    assert [(r.rule, r.figure, r.bound, r.threshold) for r in verdict.rules] == [
        ("query_recall", 0.6, "at least", 0.6),
        ("forgetting", 0.05, "at most", 0.05),
        ("calibration", 0.08, "at most", 0.08),
        ("query_images", 30.0, "at least", 30.0),
        ("worse_than_champion", None, "at most", 0.0),
    ]
    assert [r.kind for r in verdict.rules] == ["absolute"] * 4 + ["relative"]
    assert verdict.rules[-1].note == "no champion"
    assert verdict.measured is not None
    assert verdict.measured.query_recall["a"] == Estimate(value=1.0, low=0.6, high=1.0)


@pytest.mark.parametrize(
    ("rule", "change", "figure"),
    [
        ("query_recall", {"recall": {"a": 0.9, "b": 0.59, "own": 0.9}}, 0.59),
        ("query_recall", {"recall": {"a": 0.9, "b": None, "own": 0.9}}, None),
        ("forgetting", {"forgetting": 0.051}, 0.051),
        ("calibration", {"ece": 0.081}, 0.081),
        ("query_images", {"images": {"a": 50, "b": 29}}, 29.0),
        ("query_images", {"images": {"a": 50}}, 0.0),
    ],
)
def test_one_rule_that_is_not_met_is_enough(rule: str, change: dict[str, Any], figure: float | None) -> None:
    verdict = judge(evaluation(**change), RULES)
    assert not verdict.passed
    assert [(r.rule, r.figure) for r in verdict.rules if not r.passed] == [(rule, figure)]


def test_of_few_test_images_neither_figure_nor_whether_it_would_do_is_told() -> None:
    """Of ``b`` there are three images. A threshold that is met or not would say how many are recognised."""
    for low in (0.0, 0.99):
        judged = evaluation(recall={"a": 0.9, "b": low}, images={"a": 50, "b": 3})
        verdict = judge(judged, RULES)
        assert [(r.rule, r.figure, r.note) for r in verdict.unmet] == [
            ("query_recall", None, "too few test images"),
            ("query_images", None, "<5"),
        ]
        assert verdict.measured is not None
        assert verdict.measured.query_recall["b"] is None
        assert "query_recall: too few test images, must be at least 0.6" in [r.said for r in verdict.unmet]
    lenient = RULES.model_copy(update={"query_recall": 0.0, "query_images": 0})
    assert judge(judged, lenient).passed, "every figure would do"


def champion(balanced: float = 0.9, data: str | None = "t", digest: str = "old") -> Champion:
    return Champion(digest=digest, measured=measured(evaluation(balanced=balanced, more={"test_data": data})))


@pytest.mark.parametrize(
    ("beside", "allowed", "figure", "met", "note"),
    [
        (champion(0.9), 0.0, 0.0, True, "balanced accuracy 0.900, the champion's is 0.900"),
        (champion(0.8), 0.0, -0.1, True, "balanced accuracy 0.900, the champion's is 0.800"),
        (champion(0.93), 0.0, 0.03, False, "balanced accuracy 0.900, the champion's is 0.930"),
        (champion(0.93), 0.03, 0.03, True, "balanced accuracy 0.900, the champion's is 0.930"),
        (champion(0.1, data="other"), 0.0, None, False, "measured on other data than the champion"),
        (champion(0.1, data=None), 0.0, None, False, "measured on other data than the champion"),
        (Champion(digest="old", measured=None), 0.0, None, False, "the champion's figures were not kept"),
        (champion(0.99, data="other", digest="new"), 0.0, 0.0, True, "it is the champion"),
        (None, 0.0, None, True, "no champion"),
    ],
)
def test_an_answer_beside_the_champion(
    beside: Champion | None, allowed: float, figure: float | None, met: bool, note: str
) -> None:
    params = RULES.model_copy(update={"worse_than_champion": allowed})
    verdict = judge(evaluation(), params, digest="new", champion=beside)
    (rule,) = [r for r in verdict.rules if r.kind == "relative"]
    assert (rule.figure, rule.threshold, rule.passed, rule.note) == (figure, allowed, met, note)
    assert (verdict.passed, verdict.champion) == (met, beside)
    alone = judge(evaluation(), params, digest="new")
    assert against(alone, beside, params) == verdict, "the same rule, whenever it is applied"


def test_another_champion_changes_no_absolute_rule() -> None:
    failed = judge(evaluation(forgetting=0.9), RULES, digest="new")
    beside = against(failed, champion(0.1), RULES)
    assert beside.rules[:4] == failed.rules[:4]
    assert not beside.passed
    assert [r.said for r in beside.unmet] == ["forgetting: 0.9, must be at most 0.05"]


def test_figures_that_nobody_has_are_not_the_same_data() -> None:
    verdict = judge(evaluation(more={"test_data": None}), RULES, digest="new", champion=champion(data=None))
    assert [r.rule for r in verdict.unmet] == ["worse_than_champion"]


def dvc(root: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *words],
        cwd=root,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_dvc_sees_a_decision_and_nothing_else(tmp_path: Path) -> None:
    params = sample_params(sites=2, gate={"query_recall": 0, "forgetting": 1, "query_images": 0})
    write_sample_run(tmp_path, params)
    write_workspace(tmp_path, params.model_dump(mode="json"))
    path = Workspace(tmp_path).reports / "gate" / "h0" / "q0.json"
    dvc(tmp_path, "repro", "--single-item", "gate")
    first = json.loads(path.read_text())
    assert (first["passed"], first["champion"]) == (True, None)
    assert "didn't change" in dvc(tmp_path, "repro", "--single-item", "gate"), "no decision, nothing to do"

    path_of_figures = tmp_path / "reports/evaluation/h0/q0.json"
    better = measured(Evaluation.model_validate_json(path_of_figures.read_bytes()))
    assert better.balanced_accuracy is not None
    raised = better.balanced_accuracy.model_copy(update={"value": 0.99})
    keep_decision(
        tmp_path,
        Decision(
            model="student.h0.q0",
            digest="another-bundle",
            decision="promoted",
            by="gate",
            reason=None,
            measured=better.model_copy(update={"balanced_accuracy": raised}),
        ),
    )
    assert "decisions" in dvc(tmp_path, "status", "gate")
    dvc(tmp_path, "repro", "--single-item", "gate")
    second = json.loads(path.read_text())
    assert not second["passed"]
    assert second["rules"][-1]["figure"] == pytest.approx(0.99 - better.balanced_accuracy.value, abs=0.01)
    other = json.loads((path.parent.parent / "h1" / "q1.json").read_text())
    assert other["passed"], "it concerns one hospital"


def test_the_stage_judges_every_query_and_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = sample_params(sites=3)
    write_sample_run(tmp_path, params, loss_at=1)
    verdicts = gate_queries(tmp_path, params)
    assert [(v.hospital, v.query) for v in verdicts] == [("h0", "q0"), ("h1", "q1"), ("h2", "q2")]
    unmet = [[r.rule for r in v.rules if not r.passed] for v in verdicts]
    assert [("query_recall" in names) for names in unmet] == [False, True, True]
    path = Workspace(tmp_path).reports / "gate" / "h1" / "q1.json"
    assert json.loads(path.read_text()) == verdicts[1].model_dump(mode="json")
    (tmp_path / "params.yaml").write_text(params.model_dump_json())
    with pytest.raises(SystemExit) as ended:
        main(["gate", "--root", str(tmp_path)])
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "h1/q1: not passed" in said
    assert "NOT MET" in said
    lenient = params.model_copy(update={"gate": GateParams(query_recall=0, forgetting=1, query_images=0)})
    assert all(v.passed for v in gate_queries(tmp_path, lenient))


def test_digits_that_are_not_told_do_not_decide_which_of_two_versions_is_better() -> None:
    """What a registry tells of the champion has two decimals."""
    beside = champion(0.9)
    for balanced, met in ((0.8951, True), (0.8949, False)):
        verdict = judge(evaluation(balanced=balanced), RULES, digest="new", champion=beside)
        assert verdict.rules[-1].passed is met
    untold = Champion(digest="old", measured=beside.measured.model_copy(update={"balanced_accuracy": None}))  # type: ignore[union-attr]
    rule = judge(evaluation(), RULES, digest="new", champion=untold).rules[-1]
    assert (rule.passed, rule.note) == (False, "too few test images to compare with the champion")


@pytest.mark.parametrize("content", ["", "[]", "{}", "\xff", "[" * 100_000, '{"classes": 1e999}', "NaN"])
def test_a_damaged_evaluation_is_one_typed_error(tmp_path: Path, content: str) -> None:
    params = sample_params(sites=2)
    write_sample_run(tmp_path, params)
    path = Workspace(tmp_path).reports / "evaluation" / "h0" / "q0.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(OutputsError, match="no evaluation that can be judged") as caught:
        gate_queries(tmp_path, params)
    assert (caught.value.where.stage, caught.value.where.site) == ("gate", "h0")
    assert caught.value.where.file == str(path)


@pytest.mark.parametrize(
    "values",
    [
        {"hospital": "h1"},
        {"query": "q1"},
        {"relevant": ["ig"] * 4},
        {"classes": ["ig", "ig"]},
        {"local": ["basophil", "basophil"]},
        {"classes": [7]},
        {"test_images": {"ig": -1}},
        {"test_images": []},
        {"forgetting": {"value": 0.1, "low": 0.3, "high": 0.2}},
        {"forgetting": {"value": 0.1, "low": -3, "high": 0.2}},
        {"flips": [{"site": "h0", "index": -1, "actual": "ig", "before": "ig", "after": "x"}]},
        {"student": 5},
        {"format": "qkt-evaluation/9"},
    ],
)
def test_so_is_one_whose_figures_cannot_be(tmp_path: Path, values: dict[str, object]) -> None:
    params = sample_params(sites=2)
    write_sample_run(tmp_path, params)
    path = Workspace(tmp_path).reports / "evaluation" / "h0" / "q0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(OutputsError, match="no evaluation that can be judged") as caught:
        gate_queries(tmp_path, params)
    assert caught.value.where.file == str(path)
