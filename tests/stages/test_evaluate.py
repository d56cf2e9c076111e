"""Two hospitals with random networks: what stands in an evaluation, and where it is from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qkt_clinical.catalog import HELD_BACK
from qkt_clinical.cli import main
from qkt_clinical.common.files import digest_folder, write_json
from qkt_clinical.config.params import Params
from qkt_clinical.config.query import QueryRef
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import load_held_back, load_prepared, write_prepared
from qkt_clinical.errors import PreparedError, QktError, QueryError
from qkt_clinical.models.bundle import load_bundle
from qkt_clinical.qkt.prediction import predict_scores
from qkt_clinical.records.evaluation import Evaluation
from qkt_clinical.records.outputs import read_outputs
from qkt_clinical.records.published import published
from qkt_clinical.report import write_figure, write_report
from qkt_clinical.stages.evaluate import NoTestImages, evaluate_one, evaluate_queries
from qkt_clinical.stages.gate import gate_queries
from qkt_clinical.tracking.runs import answer_item
from tests.sample_run import SHAPE, sample_params, write_sample_run

pytestmark = pytest.mark.slow

TEST = 24
"""Test images of each class; every other patient has two."""


def prepare(root: Path, params: Params, index: int, groups: dict[str, Any], seed: int = 0) -> None:
    """A hospital's prepared images, all of them test images but one of every class."""
    classes = [(index + k) % len(params.classes) for k in range(3)]
    labels = np.repeat(classes, TEST + 1)
    count = len(labels)
    test = np.array([i for i in range(count) if i % (TEST + 1)])
    patients = np.array([f"p{i}" for i in range(count)])
    patients[2::4] = patients[1::4][: len(patients[2::4])]
    rest = np.array([i for i in range(count) if i % (TEST + 1) == 0])
    patients[rest] = [f"train{i}" for i in rest]
    empty = np.array([], dtype=np.int64)
    write_prepared(
        Workspace(root).prepared(params.sites[index]),
        site=params.sites[index],
        source_kind="images",
        classes=params.classes,
        images=np.random.default_rng(10 * seed + index).integers(0, 256, (count, *SHAPE), dtype=np.uint8),
        labels=labels,
        groups=patients,
        splits={"train": rest, "calibration": empty, "val": empty, "test": test},
        spacing_mm=None,
        normalisation="unit",
        transforms=(),
        outcomes=[],
        subgroups={
            name: np.array([value[i % len(value)] for i in range(count)]) for name, value in groups.items()
        },
    )


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params, dict[str, Any]]:
    root = tmp_path_factory.mktemp("evaluated")
    params = sample_params(sites=2, evaluate={"bootstrap": 50}, device="cpu")
    write_sample_run(root, params, weights=True)
    prepare(root, params, 0, {"sex": ["F", "M"], "scanner": ["A"] * (3 * (TEST + 1) - 3) + ["B"] * 3})
    prepare(root, params, 1, {"sex": ["F", "M", "unknown"]})
    evaluate_queries(root, params)
    return root, params, read(root)


def read(root: Path) -> dict[str, Any]:
    path = Workspace(root).reports / "evaluation" / "h0" / "q0.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_an_evaluation_names_the_student_that_it_measured(
    evaluated: tuple[Path, Params, dict[str, Any]],
) -> None:
    root, _, found = evaluated
    assert found["student"] == digest_folder(Workspace(root).student("h0", "q0"))


def test_the_operating_point_has_false_query_rates(
    evaluated: tuple[Path, Params, dict[str, Any]],
) -> None:
    _, _, found = evaluated
    point = found["operating_point"]
    assert point["offsets"] == dict.fromkeys(found["classes"], -1.25)
    assert (point["budget"], point["given_away_own"], point["own_images"]) == (0.05, 0.043478, 469)
    assert point["test_images"] == 3 * TEST
    rows = dict(zip(found["relevant"], found["after"]["confusion"], strict=True))
    asked = [found["relevant"].index(c) for c in found["classes"]]
    given = sum(rows[c][k] for c in found["local"] for k in asked)
    assert point["given_away_test"]["value"] == pytest.approx(given / (3 * TEST), abs=1e-6)


@pytest.mark.parametrize(
    ("given", "images", "told"),
    [(0.25, 12, (0.25, 12)), (0.25, 3, (0.25, "<5")), (None, "<5", (None, "<5")), (0.1, "≥5", (0.1, "≥5"))],
)
def test_own_images_are_told_as_they_may_be(
    evaluated: tuple[Path, Params, dict[str, Any]],
    tmp_path: Path,
    given: float | None,
    images: int | str,
    told: tuple[float | None, int | str],
) -> None:
    root, params, _ = evaluated
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    path = Workspace(tmp_path).student("h0", "q0") / "phases.json"
    phases = json.loads(path.read_text())
    phases["phase2"] |= {"false_query_rate": given, "own_images": images}
    write_json(path, phases)
    evaluate_one(tmp_path, QueryRef(hospital="h0", query="q0"), params, sites=params.sites)
    found = read(tmp_path)["operating_point"]
    assert (found["given_away_own"], found["own_images"]) == told


def keys(value: Any) -> Any:
    """Which keys there are, at every depth; of lists and of what is named by class those of the first."""
    if isinstance(value, dict):
        return {k: keys(v) for k, v in value.items()}
    return keys(value[0]) if isinstance(value, list) and value and isinstance(value[0], dict) else None


def test_what_the_stage_writes_is_all_that_its_model_and_the_sample_hold(
    evaluated: tuple[Path, Params, dict[str, Any]], tmp_path: Path
) -> None:
    """Else pages and cards would be tested with fields that no run has."""
    _, params, found = evaluated
    assert Evaluation.model_validate(found).model_dump(mode="json") == found
    write_sample_run(tmp_path, params)
    sample = read(tmp_path)
    assert set(found) == set(sample)
    for part in ("before", "after", "gain", "operating_point"):
        assert set(found[part]) == set(sample[part]), part
    assert keys(found["flips"]) == keys(sample["flips"])
    assert keys(found["after"]["reliability"]) == keys(sample["after"]["reliability"])


def test_groups_are_those_of_hospitals_that_have_the_column(
    evaluated: tuple[Path, Params, dict[str, Any]],
) -> None:
    root, params, found = evaluated
    groups = found["subgroups"]
    assert set(groups) == {"sex", "scanner"}
    assert set(groups["sex"]) == {"F", "M", "unknown"}
    images = sum(g["images"] for g in groups["sex"].values())
    assert images == sum(found["test_images"].values())
    others = groups["scanner"]["A"]
    assert others["images"] == others["patients"] == "≥5", "the total less it would tell the other group"
    few = groups["scanner"]["B"]
    assert few["images"] == few["patients"] == "<5"
    assert set(few["after"].values()) == {None}
    for side in ("before", "after"):
        figure = groups["sex"]["F"][side]["balanced_accuracy"]
        assert figure["low"] <= figure["value"] <= figure["high"]
    view = next(q for q in read_outputs(root, params).queries if q.evaluation.hospital == "h0").evaluation
    assert view.subgroups["scanner"]["B"].images == "<5"
    assert view.operating_point is not None
    assert view.operating_point.budget == 0.05
    assert set(view.after.class_ece) == set(found["relevant"])


def test_flips_are_the_images_that_one_model_has_right(
    evaluated: tuple[Path, Params, dict[str, Any]],
) -> None:
    root, params, found = evaluated
    sites = {s: load_prepared(Workspace(root).prepared(s)) for s in params.sites}
    places = [(f["site"], f["index"]) for f in found["flips"]]
    assert places == sorted(set(places))
    for flip in found["flips"]:
        site = sites[flip["site"]]
        assert flip["index"] in site.splits["test"]
        assert flip["actual"] == params.classes[site.labels[flip["index"]]]
        assert (flip["before"] == flip["actual"]) != (flip["after"] == flip["actual"])
    right = [sum(rows[i] for i, rows in enumerate(found[s]["confusion"])) for s in ("before", "after")]
    gained = sum(f["after"] == f["actual"] for f in found["flips"])
    assert found["flips"], "random networks differ"
    assert gained - (len(found["flips"]) - gained) == right[1] - right[0]


def test_the_digest_is_of_the_test_images(evaluated: tuple[Path, Params, dict[str, Any]]) -> None:
    root, params, found = evaluated
    evaluate_queries(root, params)
    assert read(root) == found, "the same again"
    prepare(root, params, 1, {"sex": ["F"]})
    evaluate_queries(root, params)
    assert read(root)["test_data"] == found["test_data"], "groups are no images"
    prepare(root, params, 1, {}, seed=1)
    evaluate_queries(root, params)
    assert read(root)["test_data"] != found["test_data"]
    (Workspace(root).student("h0", "q0") / "phases.json").write_text("{}")
    with pytest.raises(QueryError, match="no readable record"):
        evaluate_queries(root, params)


def test_a_query_that_cannot_be_measured_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    params = sample_params(sites=3, evaluate={"bootstrap": 20}, device="cpu")
    write_sample_run(tmp_path, params, weights=True)
    space = Workspace(tmp_path)
    for index in (0, 1, 2):
        prepare(tmp_path, params, index, {})
    # h1 asks for a class of h2's alone, whose images are elsewhere.
    shutil.rmtree(space.prepared("h2"))
    left: list[tuple[str, str, str]] = []

    def note(ref: QueryRef, why: QktError) -> None:
        left.append((ref.hospital, ref.query, why.code))

    rows = evaluate_queries(tmp_path, params, skipped=note)
    unmeasured = {h for h, _, _ in left}
    assert {r.hospital for r in rows} == set(params.sites) - unmeasured
    assert ("h2", "q2", "no-test-images") in left
    assert 0 < len(rows) < 3
    listed = json.loads((space.reports / "queries.json").read_text())
    assert listed == [row.model_dump(mode="json") for row in rows]
    assert set(json.loads((space.reports / "metrics.json").read_text())) == {
        "mean",
        *(f"{r.hospital}-{r.query}" for r in rows),
    }
    assert not (space.reports / "evaluation" / "h2" / "q2.json").exists(), "an older one"
    with pytest.raises(NoTestImages):
        evaluate_one(tmp_path, QueryRef(hospital="h2", query="q2"), params, sites=params.sites)

    left.clear()
    verdicts = gate_queries(tmp_path, params, skipped=note)
    assert {v.hospital for v in verdicts} == {r.hospital for r in rows}
    assert {(h, code) for h, _, code in left} == {(h, "not-measured") for h in unmeasured}
    assert not (space.reports / "gate" / "h2" / "q2.json").exists()
    outputs = read_outputs(tmp_path, params)
    assert {a.plan.hospital for a in outputs.unmeasured} == unmeasured
    assert write_report(tmp_path, params).is_file()
    items = {a.name: answer_item(a, outputs) for a in outputs.unmeasured}
    assert items["h2-q2"].tags["qkt.gate"] == "not judged"

    # Where nothing at all can be measured, every stage still ends well, with its folders there.
    for site in params.sites:
        shutil.rmtree(space.prepared(site), ignore_errors=True)
    assert evaluate_queries(tmp_path, params) == ()
    assert gate_queries(tmp_path, params) == []
    assert list((space.reports / "evaluation").rglob("*.json")) == []
    assert list((space.reports / "gate").rglob("*.json")) == []
    (tmp_path / "params.yaml").write_text(params.model_dump_json())
    assert write_report(tmp_path, params).is_file()
    assert write_figure(tmp_path).is_file()


def test_stages_name_what_they_leave_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = sample_params(sites=2, evaluate={"bootstrap": 20}, device="cpu")
    write_sample_run(tmp_path, params, weights=True)
    (tmp_path / "params.yaml").write_text(params.model_dump_json())
    for site in params.sites:
        shutil.rmtree(Workspace(tmp_path).prepared(site))
    cases: tuple[tuple[tuple[str, ...], list[str], int], ...] = (
        (("evaluate",), ["h0/q0", "h1/q1"], 0),
        (("gate",), ["h0/q0", "h1/q1"], 1),
        (("evaluate", "h0"), ["h0/q0"], 0),
        (("evaluate", "h0", "q0"), [], 1),
    )
    for words, left, code in cases:
        with pytest.raises(SystemExit) as ended:
            main([*words, "--root", str(tmp_path)])
        assert (ended.value.code or 0) == code
        said = capsys.readouterr().err
        if left:
            assert [line.split(": left out [")[0] for line in said.splitlines()] == left
        else:
            assert said.startswith("error [no-test-images]: ")


# --- own images against others' ---------------------------------------------------------------------


def hold_back(root: Path, params: Params, counts: dict[str, int], *, patient: str = "apart") -> None:
    """Images of these classes that h0 holds back, each of a patient of its own."""
    site = params.sites[0]
    labels = np.array([params.classes.index(c) for c, n in counts.items() for _ in range(n)], dtype=np.int64)
    count = len(labels)
    write_prepared(
        Workspace(root).held_back(site),
        site=site,
        source_kind="images",
        classes=params.classes,
        images=np.random.default_rng(77).integers(0, 256, (count, *SHAPE), dtype=np.uint8),
        labels=labels,
        groups=np.array([f"{patient}{i}" for i in range(count)]),
        splits={HELD_BACK: np.arange(count)},
        spacing_mm=None,
        normalisation="unit",
        transforms=(),
        outcomes=[],
        parts=(HELD_BACK,),
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params]:
    root = tmp_path_factory.mktemp("two")
    params = sample_params(sites=2, evaluate={"bootstrap": 30}, device="cpu")
    write_sample_run(root, params, weights=True)
    prepare(root, params, 0, {})
    prepare(root, params, 1, {})
    return root, params


def measure(root: Path, params: Params) -> dict[str, Any]:
    evaluate_one(root, QueryRef(hospital="h0", query="q0"), params, sites=params.sites)
    return read(root)


def test_enough_own_images_of_the_query_judge_and_others_stand_beside(
    two: tuple[Path, Params], tmp_path: Path
) -> None:
    root, params = shutil.copytree(two[0], tmp_path, dirs_exist_ok=True), two[1]
    today = measure(root, params)
    assert (today["test_images_from"], today["others"], today["held_back"]) == ("others", None, {})
    (asked,) = today["classes"]
    local = today["local"][0]
    hold_back(root, params, {asked: 7, local: 6, "platelet" if asked != "platelet" else "ig": 9})
    found = measure(root, params)
    assert found["test_images_from"] == "own"
    assert found["test_sites"] == ["h0"]
    assert found["test_images"][asked] == 7
    assert found["test_images"][local] == TEST + 6
    assert found["held_back"] == {asked: 7, local: 6}
    assert found["test_data"] != today["test_data"]
    others = found["others"]
    assert others["test_sites"] == ["h1"]
    assert others["test_images"][asked] == today["test_images"][asked]
    # Both models' answers to others' images of the query are what judged before.
    for side in ("before", "after"):
        assert others[side]["recall"][asked]["value"] == today[side]["recall"][asked]["value"]
        for name in found["local"]:
            assert others[side]["recall"][name]["value"] == found[side]["recall"][name]["value"]
    # Counted by hand from the network's own answers.
    student = load_bundle(Workspace(root).student("h0", "q0"))
    apart = load_held_back(Workspace(root).held_back("h0"))
    assert apart is not None
    kind = params.classes.index(asked)
    decision = student.card.decision
    assert decision is not None
    inputs = to_input(apart.images[apart.labels == kind], "unit")
    scores = predict_scores(student, inputs, torch.device("cpu"))[:, list(decision.relevant)]
    right = (scores.argmax(1).numpy() == found["relevant"].index(asked)).mean()
    assert found["after"]["query_accuracy"]["value"] == pytest.approx(float(right), abs=1e-6)
    assert {f["split"] for f in found["flips"]} <= {"test", "held_back"}
    for flip in (f for f in found["flips"] if f["split"] == "held_back"):
        assert params.classes[apart.labels[flip["index"]]] == flip["actual"]
    row = evaluate_queries(root, params)[0]
    assert row.test_images == "own"
    assert row.others is not None
    listed = json.loads((Workspace(root).reports / "queries.json").read_text())
    assert [r["test_images"] for r in listed] == ["own", "others"]
    metrics = json.loads((Workspace(root).reports / "metrics.json").read_text())
    assert metrics["h0-q0"]["query_accuracy"] == found["after"]["query_accuracy"]["value"]
    verdict = next(v for v in gate_queries(root, params) if v.hospital == "h0")
    images = next(rule for rule in verdict.rules if rule.rule == "query_images")
    assert images.figure == 7
    (root / "params.yaml").write_text(params.model_dump_json())
    write_report(root, params)
    for page in ("index.html", "queries/h0/q0.html"):
        text = (Workspace(root).reports / page).read_text()
        own, theirs = "on the hospital’s own images", "on other hospitals’ images, whose scanner and stain"
        assert 0 < text.index(own) < text.index(theirs)


@pytest.mark.parametrize("images", [0, 4])
def test_too_few_own_images_leave_the_figures_as_they_were(
    images: int, two: tuple[Path, Params], tmp_path: Path
) -> None:
    root, params = shutil.copytree(two[0], tmp_path, dirs_exist_ok=True), two[1]
    today = measure(root, params)
    hold_back(root, params, {today["classes"][0]: images, today["local"][0]: 8})
    assert measure(root, params) == today


def test_a_handful_of_own_test_images_counts_with_those_held_back(
    two: tuple[Path, Params], tmp_path: Path
) -> None:
    """A class that is rare at the hospital: three images of its test split, three held back."""
    root, params = shutil.copytree(two[0], tmp_path, dirs_exist_ok=True), two[1]
    today = measure(root, params)
    (asked,) = today["classes"]
    site = load_prepared(Workspace(root).prepared("h0"))
    labels = site.labels.copy()
    spare = [i for i in site.splits["test"].tolist() if params.classes[labels[i]] == today["local"][0]][:3]
    labels[spare] = params.classes.index(asked)
    np.save(site.folder / "labels.npy", labels)
    assert measure(root, params)["test_images_from"] == "others"
    hold_back(root, params, {asked: 3})
    found = measure(root, params)
    assert found["test_images_from"] == "own"
    assert found["test_images"][asked] == 6
    evaluation = Evaluation.model_validate(found)
    assert evaluation.shown_images[asked] == "≥5", "with the test split's number it would tell 3"
    told = published(evaluation)
    assert told.test_images[asked] == "≥5"
    verdict = next(v for v in gate_queries(root, params) if v.hospital == "h0")
    rule = next(r for r in verdict.rules if r.rule == "query_images")
    assert (rule.figure, rule.note) == (None, "≥5")


def test_held_back_images_of_patients_of_the_site_are_an_error(
    two: tuple[Path, Params], tmp_path: Path
) -> None:
    root, params = shutil.copytree(two[0], tmp_path, dirs_exist_ok=True), two[1]
    asked = measure(root, params)["classes"][0]
    hold_back(root, params, {asked: 9}, patient="p")
    with pytest.raises(PreparedError, match="same patients"):
        measure(root, params)
