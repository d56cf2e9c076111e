from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qkt_clinical.cli import main
from qkt_clinical.config import GateParams, Workspace
from qkt_clinical.errors import OutputsError
from qkt_clinical.gate import judge
from qkt_clinical.stages.gate import gate_queries
from tests.sample_run import sample_params, write_sample_run

RULES = GateParams(query_recall=0.6, forgetting=0.05, calibration=0.08, query_images=30)


def evaluation(**changes: Any) -> dict[str, Any]:
    """An answer that meets every rule just so."""
    figures: dict[str, Any] = {
        "recall": {"a": 0.6, "b": 0.7, "own": 0.1},
        "forgetting": 0.05,
        "ece": 0.08,
        "images": {"a": 30, "b": 31, "own": 1},
        **changes,
    }
    return {
        "hospital": "h",
        "query": "q",
        "classes": ["a", "b"],
        "test_images": figures["images"],
        "forgetting": {"value": -1.0, "low": -1.0, "high": figures["forgetting"]},
        "after": {
            "ece": figures["ece"],
            "recall": {
                c: None if v is None else {"value": 1.0, "low": v, "high": 1.0}
                for c, v in figures["recall"].items()
            },
        },
    }


def test_an_answer_that_meets_every_rule_passes() -> None:
    verdict = judge(evaluation(), RULES)
    assert verdict.passed
    assert [(r.rule, r.figure, r.bound, r.threshold) for r in verdict.rules] == [
        ("query_recall", 0.6, "at least", 0.6),
        ("forgetting", 0.05, "at most", 0.05),
        ("calibration", 0.08, "at most", 0.08),
        ("query_images", 30.0, "at least", 30.0),
    ]


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


def test_the_stage_judges_every_query_and_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = sample_params(sites=3)
    write_sample_run(tmp_path, params, loss_at=1)
    verdicts = gate_queries(tmp_path, params)
    assert [(v.hospital, v.query) for v in verdicts] == [("h0", "q0"), ("h1", "q1"), ("h2", "q2")]
    unmet = [[r.rule for r in v.rules if not r.passed] for v in verdicts]
    assert [("query_recall" in names) for names in unmet] == [False, True, False]
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


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_damaged_evaluation_is_one_typed_error(tmp_path: Path, content: str) -> None:
    params = sample_params(sites=2)
    write_sample_run(tmp_path, params)
    (Workspace(tmp_path).reports / "evaluation" / "h0" / "q0.json").write_text(content)
    with pytest.raises(OutputsError, match="no evaluation that can be judged"):
        gate_queries(tmp_path, params)
