from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qkt_clinical.card import CARD
from qkt_clinical.cli import main
from qkt_clinical.config import GateParams, Params, Workspace
from qkt_clinical.decisions import Decision, RegistryError, champions, objections, read_decisions
from qkt_clinical.errors import OutputsError
from qkt_clinical.registry import open_registry
from qkt_clinical.stages.gate import gate_queries
from qkt_clinical.tracking import track
from tests.sample_run import sample_params, write_sample_run

NAME = "student.h0.q0"
LENIENT = {"query_recall": 0.0, "forgetting": 1.0, "query_images": 0}


def decided(digest: str, decision: Any = "promoted", model: str = NAME) -> Decision:
    return Decision(model=model, digest=digest, decision=decision, by="gate", reason=None)


def test_a_rollback_takes_the_last_champion_away() -> None:
    decisions = [decided("a"), decided("x", model="teacher.h1"), decided("b"), decided("c")]
    assert champions(decisions, NAME) == ["a", "b", "c"]
    back = [*decisions, decided("b", "rolled back")]
    assert champions(back, NAME) == ["a", "b"]
    assert champions([*back, decided("c")], NAME) == ["a", "b", "c"]
    assert champions([*back, decided("a", "rolled back")], NAME) == ["a"]


@pytest.mark.parametrize(
    ("candidate", "champion", "count"),
    [
        ({}, None, 0),
        ({"qkt.gate": "failed", "qkt.gate_unmet": "forgetting"}, None, 1),
        ({}, {}, 0),
        ({"qkt.balanced_accuracy": "0.895"}, {}, 0),
        ({"qkt.balanced_accuracy": "0.885"}, {}, 1),
        ({"qkt.balanced_accuracy": "nan"}, {}, 1),
        ({}, {"qkt.data": "other"}, 1),
        ({"qkt.gate": "not judged", "qkt.balanced_accuracy": "0.5"}, {"qkt.data": "other"}, 3),
        ({"qkt.balanced_accuracy": "0.1", "qkt.digest": "same"}, {"qkt.digest": "same"}, 0),
    ],
)
def test_what_speaks_against_a_version(
    candidate: dict[str, str], champion: dict[str, str] | None, count: int
) -> None:
    sound = {"qkt.gate": "passed", "qkt.data": "d", "qkt.balanced_accuracy": "0.9"}
    one = {**sound, "qkt.digest": "new", **candidate}
    other = None if champion is None else {**sound, "qkt.digest": "old", **champion}
    assert len(objections(one, other, GateParams(worse_than_champion=0.01))) == count


@pytest.fixture
def space(tmp_path: Path) -> tuple[Path, Params]:
    """A workspace with a model registered whose gate was passed."""
    params = sample_params(sites=2, gate=LENIENT)
    write_sample_run(tmp_path, params, weights=True)
    (tmp_path / "params.yaml").write_text(params.model_dump_json())
    track(tmp_path, params)
    return tmp_path, params


def rewrite(root: Path, params: Params, change: Callable[[dict[str, Any]], None]) -> None:
    """Make another student of h0's query, with another evaluation, and register it."""
    place = Workspace(root).student("h0", "q0")
    card = json.loads((place / CARD).read_text())
    card["training"] = {"epochs": 1, "seed": 1}
    (place / CARD).write_text(json.dumps(card))
    path = Workspace(root).reports / "evaluation" / "h0" / "q0.json"
    evaluation = json.loads(path.read_text())
    change(evaluation)
    path.write_text(json.dumps(evaluation))
    gate_queries(root, params)
    track(root, params)


def worse(evaluation: dict[str, Any]) -> None:
    evaluation["after"]["balanced_accuracy"]["value"] -= 0.1


def run(root: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    with pytest.raises(SystemExit) as ended:
        main(["registry", *words, "--root", str(root), "--json"])
    out = capsys.readouterr()
    return int(ended.value.code or 0), json.loads(out.out) if out.out else out.err


def test_promoted_replaced_overridden_and_rolled_back(
    space: tuple[Path, Params], capsys: pytest.CaptureFixture[str]
) -> None:
    root, params = space
    _, models = run(root, capsys, "list")
    assert {m["name"] for m in models} == {"teacher.h0", "teacher.h1", NAME, "student.h1.q1"}
    assert next(m for m in models if m["name"] == NAME) == {
        "name": NAME,
        "versions": [1],
        "aliases": {"candidate": 1},
        "gate": ["passed"],
    }
    code, decision = run(root, capsys, "promote", NAME)
    assert (code, decision["decision"], decision["by"]) == (0, "promoted", "gate")
    code, said = run(root, capsys, "promote", NAME)
    assert code == 1
    assert "champion already" in said

    rewrite(root, params, worse)
    code, said = run(root, capsys, "promote", NAME)
    assert code == 1
    assert "gate-not-passed" in said
    assert "balanced accuracy" in said
    assert run(root, capsys, "show", NAME, "champion")[1]["version"] == 1, "the champion stays"
    _, differences = run(root, capsys, "diff", NAME)
    assert "qkt.balanced_accuracy" in differences

    code, said = run(root, capsys, "promote", NAME, "--reviewer", "R. Viewer")
    assert code == 1, "a reviewer without a reason"
    code, decision = run(
        root, capsys, "promote", NAME, "--reviewer", "R. Viewer", "--reason", "better on rare cells"
    )
    assert code == 0
    assert len(decision["overridden"]) == 1
    shown = run(root, capsys, "show", NAME, "champion")[1]
    assert (shown["version"], shown["aliases"]) == (2, ["candidate", "champion"])
    assert shown["tags"]["qkt.reason"] == "better on rare cells"
    assert [d["by"] for d in shown["decisions"]] == ["gate", "R. Viewer"]

    code, _ = run(root, capsys, "rollback", NAME, "--reviewer", "R. Viewer", "--reason", "it was not")
    assert code == 0
    assert run(root, capsys, "show", NAME, "champion")[1]["version"] == 1
    code, said = run(root, capsys, "rollback", NAME, "--reviewer", "R. Viewer", "--reason", "again")
    assert code == 1
    assert "no-earlier-champion" in said


def test_a_champion_survives_the_loss_of_the_database(space: tuple[Path, Params]) -> None:
    root, params = space
    with open_registry(root, params) as registry:
        registry.promote(NAME, "candidate")
    (root / "mlflow.db").unlink()
    track(root, params)
    with open_registry(root, params) as registry:
        assert registry.show(NAME, "champion")["aliases"] == ["candidate", "champion"]


def test_wrong_names_and_damaged_decisions(space: tuple[Path, Params]) -> None:
    root, params = space
    with open_registry(root, params) as registry:
        for name, which in (
            ("student", "1"),
            ("teacher./etc", "1"),
            (NAME, "7"),
            (NAME, "champion"),
            ("student.h0.none", "1"),
        ):
            with pytest.raises(RegistryError):
                registry.show(name, which)
    path = root / "hospitals" / "h0" / "decisions.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[{}]")
    with pytest.raises(OutputsError, match="decisions"):
        read_decisions(root, "h0")
