from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qkt_clinical.cli import main
from qkt_clinical.common.files import digest_folder
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.errors import OutputsError, QktError
from qkt_clinical.records.card import CARD
from qkt_clinical.records.decisions import (
    CHAMPION,
    Decision,
    RegistryError,
    champion_of,
    champions,
    decisions_file,
    keep_decision,
    read_decisions,
)
from qkt_clinical.stages.gate import gate_queries
from qkt_clinical.tracking.mirror import track
from qkt_clinical.tracking.registry import open_registry
from tests.sample_run import sample_params, write_sample_run
from tests.tracked import copy_tracked

pytestmark = pytest.mark.slow

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


def test_decisions_made_before_figures_were_kept_are_read(tmp_path: Path) -> None:
    path = decisions_file(tmp_path, "h0")
    path.parent.mkdir()
    old = {"model": NAME, "digest": "a", "decision": "promoted", "by": "gate", "reason": None}
    path.write_text(json.dumps([old]))
    (decision,) = read_decisions(tmp_path, "h0")
    assert (decision.measured, decision.overridden) == (None, ())
    champion = champion_of(tmp_path, NAME)
    assert champion is not None
    assert (champion.digest, champion.measured) == ("a", None)
    assert champion_of(tmp_path, "student.h0.other") is None


def _decide(root: Path, number: int) -> None:
    for i in range(10):
        keep_decision(root, decided(f"{number}-{i}"))


def test_no_decision_is_lost_among_several_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    deciders = [context.Process(target=_decide, args=(tmp_path, n)) for n in range(4)]
    for one in deciders:
        one.start()
    for one in deciders:
        one.join(60)
    assert {one.exitcode for one in deciders} == {0}
    kept = [d.digest for d in read_decisions(tmp_path, "h0")]
    assert sorted(kept) == sorted(f"{n}-{i}" for n in range(4) for i in range(10))
    assert [p.name for p in (tmp_path / "decisions").iterdir()] == ["h0.json"]


def test_a_verdict_is_the_gates_own_record_and_not_a_tag(space: tuple[Path, Params]) -> None:
    """Whoever may write to the registry may write its tags."""
    root, params = space
    path = Workspace(root).reports / "gate" / "h0" / "q0.json"
    verdict = json.loads(path.read_text())
    assert verdict["passed"]
    failed = [rule | {"passed": False} for rule in verdict["rules"]]
    for record, code, words in (
        (None, "gate-not-passed", "not judged by the gate"),
        (verdict | {"digest": "0" * 64}, "gate-not-passed", "another student"),
        (verdict | {"passed": False, "rules": failed}, "gate-not-passed", "forgetting"),
        (verdict | {"rules": []}, "verdict", "read"),
        (verdict | {"rules": failed}, "verdict", "read"),
        (verdict | {"query": "q1"}, "verdict", "read"),
        ("{", "verdict", "read"),
        ([], "verdict", "read"),
    ):
        path.unlink(missing_ok=True)
        if record is not None:
            path.write_text(record if isinstance(record, str) else json.dumps(record))
        with open_registry(root, params) as registry:
            assert registry.version(NAME, "1").tags["qkt.gate"] == "passed", "as the registry says"
            with pytest.raises(QktError, match=words) as caught:
                registry.promote(NAME, "1")
            assert CHAMPION not in registry.client.get_registered_model(NAME).aliases
        assert caught.value.code == code
    assert champions(read_decisions(root, "h0"), NAME) == []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params]:
    root, params = tmp_path_factory.mktemp("made"), sample_params(sites=2, gate=LENIENT)
    write_sample_run(root, params, weights=True)
    (root / "params.yaml").write_text(params.model_dump_json())
    track(root, params)
    return root, params


@pytest.fixture
def space(made: tuple[Path, Params], tmp_path: Path) -> tuple[Path, Params]:
    """A workspace with a model registered whose gate was passed."""
    return copy_tracked(made[0], tmp_path), made[1]


def rewrite(root: Path, params: Params, change: Callable[[dict[str, Any]], None]) -> None:
    """Make another student of h0's query, with another evaluation, and register it."""
    place = Workspace(root).student("h0", "q0")
    card = json.loads((place / CARD).read_text())
    card["training"] = {"epochs": 1, "seed": 1}
    (place / CARD).write_text(json.dumps(card))
    path = Workspace(root).reports / "evaluation" / "h0" / "q0.json"
    evaluation = json.loads(path.read_text())
    change(evaluation)
    evaluation["student"] = digest_folder(place)
    path.write_text(json.dumps(evaluation))
    gate_queries(root, params)
    track(root, params)


def evaluation_of(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Workspace(root).reports / "evaluation/h0/q0.json").read_text())
    return found


def worse(evaluation: dict[str, Any]) -> None:
    evaluation["after"]["balanced_accuracy"]["value"] -= 0.1


def other_images(evaluation: dict[str, Any]) -> None:
    evaluation["test_data"] = "of other images"


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

    exact = evaluation_of(root)["after"]["balanced_accuracy"]["value"]
    before, after = round(exact, 2), round(exact - 0.1, 2)  # as they are told in MLflow
    rewrite(root, params, worse)
    code, said = run(root, capsys, "promote", NAME)
    assert code == 1
    assert "gate-not-passed" in said
    reason = (
        f"worse_than_champion: 0.1 (balanced accuracy {after:.3f}, the champion's is {before:.3f}), "
        "must be at most 0"
    )
    assert reason in said
    assert run(root, capsys, "show", NAME, "champion")[1]["version"] == 1, "the champion stays"
    tags = run(root, capsys, "show", NAME)[1]["tags"]
    assert tags["qkt.refused"] == reason, "and the version says why"
    assert (tags["qkt.gate"], tags["qkt.gate_unmet"]) == ("failed", "worse_than_champion")
    judged = json.loads((Workspace(root).reports / "gate" / "h0" / "q0.json").read_text())
    (rule,) = [r for r in judged["rules"] if r["kind"] == "relative"]
    assert (rule["figure"], rule["threshold"], rule["passed"]) == (pytest.approx(0.1), 0.0, False)
    assert judged["champion"]["measured"]["balanced_accuracy"]["value"] == exact
    _, differences = run(root, capsys, "diff", NAME)
    assert "qkt.balanced_accuracy" in differences

    code, said = run(root, capsys, "promote", NAME, "--reviewer", "R. Viewer")
    assert code == 1, "a reviewer without a reason"
    code, decision = run(
        root, capsys, "promote", NAME, "--reviewer", "R. Viewer", "--reason", "better on rare cells"
    )
    assert code == 0
    assert decision["overridden"] == [reason]
    shown = run(root, capsys, "show", NAME, "champion")[1]
    assert (shown["version"], shown["aliases"]) == (2, ["candidate", "champion"])
    assert shown["tags"]["qkt.reason"] == "better on rare cells"
    assert shown["tags"]["qkt.overridden"] == reason
    assert "qkt.refused" not in shown["tags"]
    assert [d["by"] for d in shown["decisions"]] == ["gate", "R. Viewer"]

    code, _ = run(root, capsys, "rollback", NAME, "--reviewer", "R. Viewer", "--reason", "it was not")
    assert code == 0
    assert run(root, capsys, "show", NAME, "champion")[1]["version"] == 1
    code, said = run(root, capsys, "rollback", NAME, "--reviewer", "R. Viewer", "--reason", "again")
    assert code == 1
    assert "no-earlier-champion" in said


def test_what_is_in_use_now_counts_not_what_was_when_the_gate_judged(space: tuple[Path, Params]) -> None:
    """Two versions pass the gate alone; once the better one is promoted, the other is refused."""
    root, params = space
    first = (Workspace(root).reports / "gate" / "h0" / "q0.json").read_bytes()
    rewrite(root, params, worse)
    path = Workspace(root).reports / "gate" / "h0" / "q0.json"
    second = path.read_bytes()
    path.write_bytes(first)  # as a checkout of the first answer brings it back
    with open_registry(root, params) as registry:
        assert [m["gate"] for m in registry.models() if m["name"] == NAME] == [["passed", "passed"]]
        decision = registry.promote(NAME, "1")
        assert decision.measured is not None
        path.write_bytes(second)
        with pytest.raises(RegistryError, match="worse_than_champion"):
            registry.promote(NAME, "2")
        assert "worse_than_champion" in registry.show(NAME, "2")["tags"]["qkt.refused"]
        assert registry.show(NAME, "champion")["version"] == 1
    rewrite(root, params, other_images)
    with open_registry(root, params) as registry, pytest.raises(RegistryError, match="other data"):
        registry.promote(NAME, "candidate")


def test_a_champion_decided_on_elsewhere_is_neither_replaced_nor_taken_back(
    space: tuple[Path, Params], capsys: pytest.CaptureFixture[str]
) -> None:
    root, params = space
    assert run(root, capsys, "promote", NAME)[0] == 0
    rewrite(root, params, worse)
    kept = decisions_file(root, "h0")
    there = kept.read_text()
    kept.unlink()  # another workspace, which nobody told
    code, said = run(root, capsys, "promote", NAME)
    assert code == 1
    assert "decisions-behind" in said
    stranger = decided("f" * 64).model_dump(mode="json")
    kept.write_text(json.dumps([stranger]))
    track(root, params)
    assert run(root, capsys, "show", NAME, "champion")[1]["version"] == 1
    kept.write_text(there)
    track(root, params)
    assert run(root, capsys, "show", NAME, "champion")[1]["version"] == 1


def test_a_teacher_needs_a_reviewer(space: tuple[Path, Params]) -> None:
    root, params = space
    with open_registry(root, params) as registry:
        with pytest.raises(RegistryError, match="not judged by the gate"):
            registry.promote("teacher.h1", "1")
        decision = registry.promote("teacher.h1", "1", by="R. Viewer", reason="trained on all years")
        assert (decision.measured, decision.overridden) == (None, ("not judged by the gate",))


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


def link(path: Path) -> None:
    path.with_name("elsewhere").write_text("[]")
    path.symlink_to(path.with_name("elsewhere"))


def written(text: str | bytes) -> Callable[[Path], None]:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda path: (path.write_bytes(data), None)[1]


SOUND = {"model": NAME, "digest": "a", "decision": "promoted", "by": "gate", "reason": None}


def listed(**changed: Any) -> Callable[[Path], None]:
    return written(json.dumps([SOUND | changed]))


def huge(path: Path) -> None:
    path.write_text("[")
    os.truncate(path, 1 << 40)


BOUND = {"value": 0.5, "low": 0.4, "high": 0.6}
TWICE = json.dumps(BOUND)
DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty objects": written("[{}]"),
    "empty": written(""),
    "cut off": written(json.dumps([SOUND])[:-9]),
    "no list": written(json.dumps({"0": SOUND})),
    "no text": written(b"\xff\xfe"),
    "deep": written("[" * 200_000),
    "a name that is a path": listed(model="student.h0.../../x"),
    "a name that is a query": listed(model="student.h0.q0' or '1'='1"),
    "a digest that is a query": listed(digest="a' or '1'='1"),
    "another hospital's": listed(model="student.h1.q1"),
    "wrong types": listed(by=7),
    "an unknown word": listed(decision="approved"),
    "an unknown key": listed(more=1),
    "an endless reason": listed(reason="x" * 20_000),
    "no number": listed(measured={"balanced_accuracy": BOUND | {"low": "low"}}),
    "a class named twice": written(
        json.dumps([SOUND])[:-2]
        + f', "measured": {{"balanced_accuracy": {TWICE}, "forgetting": {TWICE}, "data": null, '
        + f'"query_recall": {{"ig": {TWICE}, "ig": null}}}}}}]'
    ),
    "huge": huge,
    "a link": link,
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_decisions_that_cannot_be_read_are_one_typed_error(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = decisions_file(tmp_path, "h0")
    path.parent.mkdir()
    damage(path)
    before = path.lstat().st_mtime_ns
    for read in (lambda: read_decisions(tmp_path, "h0"), lambda: keep_decision(tmp_path, decided("b"))):
        with pytest.raises(OutputsError, match="decisions") as caught:
            read()
        assert (caught.value.where.file, caught.value.where.site) == (str(path), "h0")
    assert path.lstat().st_mtime_ns == before, "and nothing is written over it"


def test_a_decision_that_the_disk_refuses_is_one_typed_error(tmp_path: Path) -> None:
    (tmp_path / "decisions").write_text("in its place")
    with pytest.raises(QktError) as caught:
        keep_decision(tmp_path, decided("a"))
    assert caught.value.code in ("system", "outputs")
