from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.adversarial_teachers import Screening
from qkt_clinical.baselines.params import AggregatorParams, BaselineParams, DistillParams, FinetuneParams
from qkt_clinical.benchmark import methods as methods_room
from qkt_clinical.benchmark import runner
from qkt_clinical.benchmark.adversarial_teachers import PROBES, SHARE, draw_bad, spoil
from qkt_clinical.benchmark.case import Case
from qkt_clinical.benchmark.methods import at_budgets, qkt
from qkt_clinical.benchmark.metrics import figures, rank_auroc
from qkt_clinical.benchmark.phases import DistillationParams
from qkt_clinical.benchmark.pool import run_tasks
from qkt_clinical.benchmark.runner import RESULT, TABLE, WORK, BenchmarkTask, row_file, run
from qkt_clinical.benchmark.settings import (
    BUDGETS,
    FEDERATED,
    RECALIBRATED,
    SETUPS,
    Bad,
    BenchmarkSettings,
    Setup,
    parse_list,
    parse_numbers,
)
from qkt_clinical.benchmark.simulate import LabelledImages, SimulatedHospital, SimulatedQuery, simulate
from qkt_clinical.benchmark.store import ResultStore
from qkt_clinical.benchmark.summary import (
    FIELDS,
    ablations_table,
    base_of,
    best_baseline,
    budget_curves,
    cluster_intervals,
    markdown,
    mask_figures,
    methods_table,
    queries_table,
    summarise,
)
from qkt_clinical.benchmark.variants import vary, with_fewer_images, wrong_labels
from qkt_clinical.catalog import BASELINES, BENCHMARK_METHODS, ESTIMATORS
from qkt_clinical.cli import main
from qkt_clinical.common.files import write_json
from qkt_clinical.config.params import MaskParams, TrainParams, TransferParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.datasets.medmnist_file import SplitArrays
from qkt_clinical.errors import ConfigError, QktError, QueryError
from qkt_clinical.evaluation.metrics import auroc
from qkt_clinical.federation import peers
from qkt_clinical.models.inference import predict
from qkt_clinical.qkt.answer import answer_query
from qkt_clinical.qkt.masks import mixed
from qkt_clinical.qkt.operating_point import offset_for_budget
from qkt_clinical.qkt.panel import Teacher
from qkt_clinical.qkt.prediction import scores_of
from qkt_clinical.qkt.steps import Answer, OperatingPoint
from qkt_clinical.records.card import DecisionRule
from qkt_clinical.task import MULTICLASS
from tests.federated_reference import in_process
from tests.shapes import CPU, shapes

pytestmark = pytest.mark.slow

EVERY = (0, 1, 2, 3)
ROW = {
    *("seed", "student", "query", "method", "query_accuracy", "retained_accuracy", "balanced_accuracy"),
    *("forgetting", "auroc", "ece", "bytes_moved", "rounds", "seconds"),
    *("passes_per_prediction", "cost_per_prediction"),
}
QUICK = BenchmarkSettings(
    hospitals=3,
    classes_per_hospital=2,
    seeds=(0,),
    max_queries=1,
    budget=0.1,
    device="cpu",
    methods=("local", "routed", "qkt-light"),
    train=TrainParams(epochs=6, batch_size=32, appearance=0.0),
    mask=MaskParams(probes=16),
    distillation=DistillationParams(epochs=1, views=2),
    baselines=BaselineParams(finetune=FinetuneParams(epochs=1), distill=DistillParams(epochs=1, views=2)),
    rounds=(1, 2),
)


def write_npz(path: Path, each: int = 40, *, kind: str = "colour", groups: bool = False) -> Path:
    """Shapes of four classes as 2D colour, 2D grey or 3D grey; with ``groups``, four images a patient."""
    arrays: dict[str, np.ndarray] = {}
    for number, (split, count) in enumerate((("train", each), ("val", each // 4), ("test", each // 4))):
        images, labels = shapes(EVERY, count, number)
        last = np.moveaxis(images, 1, -1)
        if kind != "colour":
            last = last.mean(axis=-1).astype(np.uint8)
        if kind == "volume":
            last = np.repeat(last[:, None], 8, axis=1)
        arrays |= {f"{split}_images": last, f"{split}_labels": labels[:, None]}
        if groups:
            arrays[f"{split}_groups"] = np.array([f"{split}{i // 4}" for i in range(len(labels))])
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("data") / "shapes.npz", groups=True)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Every method and every ablation on colour images of patients."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "run_federation", in_process)
        result = run(data, out, QUICK.model_copy(update={"methods": ("all", "ablations")}), workers=1)
    return out, result


def of(result: dict[str, Any], method: str) -> list[dict[str, Any]]:
    return [r for r in result["rows"] if r["method"] == method]


# --- a whole run ----------------------------------------------------------------------------------


def test_every_method_answers_every_question_once(whole: tuple[Path, dict[str, Any]]) -> None:
    out, result = whole
    assert json.loads((out / RESULT).read_text()) == result
    names = [(r["student"], r["query"], r["method"]) for r in result["rows"]]
    assert len(names) == len(set(names)) == len(BENCHMARK_METHODS + QUICK.ablations)
    assert {n[2] for n in names} == {*BENCHMARK_METHODS, *QUICK.ablations}
    assert all(set(r) == ROW for r in result["rows"])
    for row in result["rows"]:
        assert all(0 <= row[k] <= 1 for k in ("query_accuracy", "retained_accuracy", "auroc", "ece")), row
        parts = 2 * row["retained_accuracy"] + row["query_accuracy"]
        assert row["balanced_accuracy"] == pytest.approx(parts / 3, abs=2e-6)


def test_forgetting_is_what_the_own_model_recalled_less_what_the_answer_does(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    before = {(r["student"], r["query"]): r["retained_accuracy"] for r in of(whole[1], "local")}
    for row in whole[1]["rows"]:
        lost = before[row["student"], row["query"]] - row["retained_accuracy"]
        assert row["forgetting"] == pytest.approx(lost, abs=2e-6)
    assert {r["forgetting"] for r in of(whole[1], "local")} == {0.0}


def test_what_is_moved_and_how_often_a_prediction_passes(whole: tuple[Path, dict[str, Any]]) -> None:
    out, result = whole
    teachers = out / WORK / "seed-0" / "full"
    size = {
        t.name: sum((teachers / t.name / f).stat().st_size for f in ("bundle.json", "weights.safetensors"))
        + (teachers / t.name / "mask.json").stat().st_size
        for t in teachers.iterdir()
    }
    for row in result["rows"]:
        if row["method"] == "fens":  # every hospital gets every network, then the aggregator goes to and fro
            networks = 2 * sum(size.values())
            hidden, classes = AggregatorParams().hidden, 4
            aggregator = 4 * (hidden * (3 * classes + 1 + classes) + classes)
            assert row["rounds"] == 51
            assert row["bytes_moved"] == networks + 50 * 2 * 3 * aggregator
            assert row["passes_per_prediction"] == 3
        elif "fed" not in row["method"] and "scaffold" not in row["method"]:
            assert row["rounds"] == (row["bytes_moved"] > 0)
        others = sum(n for name, n in size.items() if name != row["student"])
        if row["method"] in ("local", "finetune"):
            assert (row["bytes_moved"], row["passes_per_prediction"]) == (0, 1)
        if row["method"] == "ensemble-prob":
            assert (row["bytes_moved"], row["passes_per_prediction"]) == (others, 3)
        if row["method"] in ("distill-all", "one-shot-average"):
            assert (row["bytes_moved"], row["passes_per_prediction"]) == (others, 1)
        if row["method"] == "ablation/fedavg-2":
            traffic = json.loads((out / WORK / "seed-0" / "fedavg" / "2" / "traffic.json").read_text())
            assert traffic == {"rounds": 2, "bytes_moved": row["bytes_moved"]}
            assert row["rounds"] == 2
        if row["method"] == "ablation/mask-none":
            assert (row["bytes_moved"], row["passes_per_prediction"]) == (others, 1)


@pytest.mark.parametrize("kind", ["finetune", "distill-all"])
def test_what_a_hospital_makes_of_teachers_is_made_once(
    whole: tuple[Path, dict[str, Any]], kind: str
) -> None:
    out, result = whole
    rows, folder = of(result, kind), out / WORK / "seed-0" / kind
    assert {p.name for p in folder.iterdir()} == {r["student"] for r in rows}
    for row in rows:
        seconds = json.loads((folder / row["student"] / "seconds.json").read_text())
        assert row["seconds"] == pytest.approx(seconds, abs=1e-3)


def test_what_a_prediction_costs(whole: tuple[Path, dict[str, Any]]) -> None:
    result = whole[1]
    for row in result["rows"]:
        cost, passes = row["cost_per_prediction"], row["passes_per_prediction"]
        alone = row["method"] in BASELINES or row["bytes_moved"] == 0
        if alone:
            assert cost == passes
        elif row["method"] in ("routed", "ablation/routed-one-view"):  # the networks side by side
            assert cost > passes == (4 if row["method"] == "routed" else 1)
        if row["method"] in ("qkt-light", "qkt", "ablation/rank-1") and row["bytes_moved"]:
            assert passes == 1 < cost < 4
        if row["method"] == "ablation/phase1-distill":
            assert (passes, cost) == (1, 1)
    for routed, once in zip(of(result, "routed"), of(result, "ablation/routed-one-view"), strict=True):
        if routed["bytes_moved"]:
            assert routed["cost_per_prediction"] == pytest.approx(4 * once["cost_per_prediction"], abs=2e-3)
    rising = [of(result, f"ablation/{name}") for name in ("rank-0.25", "rank-0.35", "rank-1")]
    for rows in zip(*rising, strict=True):
        costs = [r["cost_per_prediction"] for r in rows]
        assert costs == sorted(costs)


def test_the_better_federation_counts(whole: tuple[Path, dict[str, Any]]) -> None:
    for algorithm in FEDERATED:
        rows = [{k: v for k, v in r.items() if k != "method"} for r in of(whole[1], algorithm)]
        each = [
            [{k: v for k, v in r.items() if k != "method"} for r in of(whole[1], f"ablation/{algorithm}-{n}")]
            for n in (1, 2)
        ]
        assert rows in each


def test_budgets_are_read_off_the_curve(whole: tuple[Path, dict[str, Any]]) -> None:
    out, result = whole
    for name, (base, budget) in RECALIBRATED.items():
        for row, original in zip(of(result, name), of(result, base), strict=True):
            folder = out / WORK / "seed-0" / "rows" / row["student"]
            files = [json.loads(f.read_text()) for f in folder.glob(f"*/{base}.json")]
            (curve,) = [f["curve"] for f in files if f["query"] == row["query"]]
            if curve is None:  # no teacher knew the class
                assert {**row, "method": base} == original
                continue
            assert [p["budget"] for p in curve] == list(BUDGETS)
            point = next(p for p in curve if p["budget"] == budget)
            assert all(row[k] == v for k, v in point.items() if k != "budget")
            assert row["seconds"] == original["seconds"]
            queries = [p["query_accuracy"] for p in curve]
            assert queries == sorted(queries)  # who gives more away finds more of the query
            same = next(p for p in curve if p["budget"] == QUICK.budget)
            assert same["query_accuracy"] == original["query_accuracy"]


def test_masks_are_judged_by_both_truths(whole: tuple[Path, dict[str, Any]]) -> None:
    masks = whole[1]["masks"]
    assert tuple(masks) == ESTIMATORS
    assert [m for m in masks if masks[m]["default"]] == ["combined"]
    for mask in masks.values():
        assert mask["truth"] == "held"
        assert {k: mask[k] for k in ("precision", "recall", "f1", "auc")} == mask["held"]
        assert set(mask["recalled"]) == set(mask["held"])
        assert mask["curve"][0]["lambda"] < mask["curve"][-1]["lambda"]


def test_the_result_names_no_machine_and_no_place(whole: tuple[Path, dict[str, Any]]) -> None:
    out, result = whole
    assert set(result["environment"]) == {
        *("python", "qkt-clinical", "torch", "monai", "numpy", "nvflare", "cpu_count", "device"),
        "workers",
    }
    assert len(result["settings"]["data_sha256"]) == 64
    for file in (RESULT, TABLE):
        text = (out / file).read_text()
        assert str(out) not in text
        assert os.uname().nodename not in text.replace(result["settings"]["data_sha256"], "")


def test_figures_are_drawn(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, result = whole
    files = sorted((out / "plots").iterdir())
    assert [f.stem for f in files] == ["budget", "gain", "lambda", "query-retained"]
    runner.write_plots(tmp_path, result)
    assert all((tmp_path / f.name).read_bytes() == f.read_bytes() for f in files)
    assert all(f.read_bytes()[:4] == b"\x89PNG" for f in files)


# --- resuming -------------------------------------------------------------------------------------


class Counted:
    """Counts the tasks performed in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tasks: list[BenchmarkTask] = []
        original = runner._perform

        def perform(task: BenchmarkTask) -> None:
            self.tasks.append(task)
            original(task)

        monkeypatch.setattr(runner, "_perform", perform)


def without_seconds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    # A teacher's card states how long its training took, so that its size differs by a digit too.
    return [{k: v for k, v in r.items() if k not in ("seconds", "bytes_moved")} for r in rows]


def test_a_resumed_run_computes_only_what_is_missing(
    whole: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(whole[0], tmp_path / "out")
    deleted = next((out / WORK / "seed-0" / "rows").glob("*/*/qkt-light.json"))
    content = json.loads(deleted.read_text())
    deleted.unlink()
    counted = Counted(monkeypatch)
    settings = QUICK.model_copy(update={"methods": ("qkt-light", "local")})
    result = run(data, out, settings, workers=1, resume=True)
    assert [(t.name, t.question.student) for t in counted.tasks if t.question] == [
        ("qkt-light", content["student"])
    ]
    assert len(counted.tasks) == 1
    wanted = [r for r in whole[1]["rows"] if r["method"] in ("local", "qkt-light")]
    assert without_seconds(result["rows"]) == without_seconds(wanted)


def test_an_interrupted_run_goes_on_where_it_was(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 4:  # three teachers and a row
            raise KeyboardInterrupt

    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, QUICK, workers=1, progress=stop)
    assert torch.get_num_threads() == threads
    assert len(list((tmp_path / WORK / "seed-0" / "rows").rglob("*.json"))) == 1
    assert not (tmp_path / RESULT).exists()
    with pytest.raises(ConfigError, match="Add --resume") as error:
        run(data, tmp_path, QUICK, workers=1)
    assert error.value.code == "benchmark-exists"
    with pytest.raises(ConfigError, match="other data or settings") as error:
        run(data, tmp_path, QUICK.model_copy(update={"budget": 0.2}), workers=1, resume=True)
    assert error.value.code == "benchmark-differs"
    counted = Counted(monkeypatch)
    seen: list[tuple[int, int]] = []
    done = run(data, tmp_path, QUICK, workers=1, resume=True, progress=lambda d, t: seen.append((d, t)))
    assert len(counted.tasks) == 2
    assert seen == [(4, 6), (5, 6), (6, 6)]
    assert len(done["rows"]) == 3


@pytest.mark.nightly
def test_worker_processes_change_no_figure(
    whole: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    result = run(data, tmp_path, QUICK, workers=2)
    wanted = [r for r in whole[1]["rows"] if r["method"] in QUICK.methods]
    key = ("student", "query", "method")
    assert without_seconds(sorted(result["rows"], key=lambda r: [r[k] for k in key])) == without_seconds(
        sorted(wanted, key=lambda r: [r[k] for k in key])
    )


def parse_whole(text: str) -> tuple[int, ...]:
    """At the module's top, since worker processes must find it."""
    return parse_numbers(text, "--seeds")


def test_errors_of_workers_come_back_and_a_dead_worker_is_one() -> None:
    with pytest.raises(QktError, match="no whole numbers") as error:
        list(run_tasks(parse_whole, ["x", "y"], workers=2, prepare=dict, arguments=()))  # type: ignore[arg-type]
    assert error.value.code == "config"
    with pytest.raises(QktError, match="ended unexpectedly") as error:
        list(run_tasks(os._exit, [3, 3], workers=2, prepare=dict, arguments=()))
    assert error.value.code == "worker"


# --- other data -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "shape"), [("grey", (1, 16, 16)), ("volume", (1, 8, 16, 16))])
def test_grey_images_and_volumes(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    source = write_npz(tmp_path / "some.npz", 20, kind=kind)
    settings = QUICK.model_copy(
        update={"split": "val", "train": TrainParams(epochs=1, batch_size=32, appearance=0.0)}
    )
    result = run(source, tmp_path / "out", settings, workers=1)
    assert sorted(r["method"] for r in result["rows"]) == sorted(QUICK.methods)
    store = ResultStore(tmp_path / "out" / WORK / "seed-0", federation_of(source), settings, CPU)
    assert set(store.logits("full/h1")) == {"val"}  # tuning touches no test image
    assert store.bundle("full/h1").card.input.shape == shape


def test_rare_two_class_queries_of_a_dirichlet_partition(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "some.npz", 80)
    settings = QUICK.model_copy(
        update={
            "partition": "dirichlet",
            "regime": "rare",
            "beta": 3.0,
            "samples_per_rare_class": 5,
            "max_queries": 2,
            "methods": ("local", "qkt"),
            "train": TrainParams(epochs=1, batch_size=32, appearance=0.0),
        }
    )
    result = run(source, tmp_path / "out", settings, workers=1)
    assert len(result["rows"]) == 4
    assert {m["truth"] for m in result["masks"].values()} == {"recalled"}


def federation_of(source: Path, **changes: Any) -> Any:
    parts, classes = runner.read(source)
    arguments = {"hospitals": 3, "classes_per_hospital": 2, "max_queries": 1, **changes}
    return simulate(parts, classes, **arguments)


def test_a_split_without_a_class_is_refused(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "some.npz", 20)
    arrays = dict(np.load(source, allow_pickle=False))
    kept = arrays["test_labels"][:, 0] != 2
    arrays |= {k: arrays[k][kept] for k in ("test_images", "test_labels")}
    np.savez(source, **arrays)
    with pytest.raises(ConfigError, match="test split has no image of class-2"):
        run(source, tmp_path / "out", QUICK, workers=1)
    assert not (tmp_path / "out").exists()


# --- simulated hospitals --------------------------------------------------------------------------


def part(labels: Sequence[int], groups: Sequence[str] | None = None) -> SplitArrays:
    count = len(labels)
    images = np.arange(count, dtype=np.uint8)[:, None, None] * np.ones((1, 16, 16), dtype=np.uint8)
    return SplitArrays(images, np.array(labels), None if groups is None else np.array(groups))


def test_absent_questions_ask_for_what_a_hospital_lacks_and_another_has(data: Path) -> None:
    federation = federation_of(data, max_queries=None)
    assert len(federation.questions) == 3 * 2
    for question in federation.questions:
        held = federation.hospital(question.student).held
        assert len(held) == 2
        assert not set(question.query) & set(held)
        assert federation.relevant(question) == tuple(sorted({*held, *question.query}))


def test_a_patient_with_a_rare_image_in_training_is_not_used_for_calibration() -> None:
    # Every patient has images of both classes; class 1 becomes rare.
    labels = [0, 0, 1] * 60
    groups = [f"p{i // 3}" for i in range(180)]
    parts = {s: part(labels, [f"{s}{g}" for g in groups]) for s in ("train", "val", "test")}
    made = simulate(
        parts,
        ("a", "b"),
        partition="dirichlet",
        hospitals=2,
        beta=50.0,
        regime="rare",
        samples_per_rare_class=3,
    )
    patient = np.array(groups)
    for hospital in made.hospitals:
        numbers = [s.images[:, 0, 0, 0].astype(int) for s in (hospital.train, hospital.calibration)]
        trained, calibrated = (set(patient[n]) for n in numbers)
        assert not trained & calibrated
        assert (hospital.train.labels == 1).sum() == 3
        assert (hospital.calibration.labels == 0).all()


# --- variants -------------------------------------------------------------------------------------


def hospital(counts: Sequence[int], calibration: int = 40) -> SimulatedHospital:
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.arange(len(labels))[:, None, None, None]
    held_out = np.zeros(calibration, dtype=np.int64)
    split = LabelledImages(np.arange(calibration)[:, None, None, None], held_out)
    return SimulatedHospital("h1", LabelledImages(images, labels), split, split)


def test_wrong_labels_are_as_many_as_said_and_of_held_classes() -> None:
    labels = np.repeat([2, 5, 7], [50, 30, 20])
    noisy = wrong_labels(labels, (2, 5, 7), 0.3, seed=0)
    assert (noisy != labels).sum() == 30
    assert set(noisy.tolist()) == {2, 5, 7}
    assert (wrong_labels(labels, (2, 5, 7), 0.3, seed=0) == noisy).all()


def test_variants_of_a_hospital() -> None:
    full = hospital([100, 40, 3])
    weak = vary(full, "weak", budget=0.02, seed=0)
    assert np.bincount(weak.train.labels).tolist() == [10, 4, 1]
    assert weak.calibration is full.calibration
    noisy = vary(full, "label-noise-10", budget=0.02, seed=0)
    assert (noisy.train.labels != full.train.labels).sum() == 14
    assert (noisy.val.labels != full.val.labels).sum() == 4
    assert noisy.train.images is full.train.images
    assert vary(full, "full", budget=0.02, seed=0) is full
    few = vary(full, "images-30", budget=0.02, seed=0)
    assert np.bincount(few.train.labels).tolist() == [30, 30, 3]


def test_fewer_images_keep_calibration_in_proportion_but_enough_for_the_budget() -> None:
    few = with_fewer_images(hospital([100, 40]), 20, budget=0.1, seed=0)
    assert np.bincount(few.train.labels).tolist() == [20, 20]
    assert len(few.val) == 20
    assert len(few.calibration) == math.ceil(40 * 40 / 140)
    assert len(with_fewer_images(hospital([100, 40]), 20, budget=0.05, seed=0).calibration) == 20
    assert len(with_fewer_images(hospital([100, 40]), 20, budget=0.01, seed=0).calibration) == 40


# --- methods --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(whole: tuple[Path, dict[str, Any]], data: Path) -> Case:
    settings = QUICK.model_copy(update={"methods": ("all", "ablations")})
    federation = federation_of(data)
    store = ResultStore(whole[0] / WORK / "seed-0", federation, settings, CPU)
    return Case(store, federation.questions[0])


def test_stored_logits_are_the_networks(case: Case) -> None:
    network = case.store.bundle(case.student).network
    expected = predict(network, to_input(case.images.images), CPU)
    torch.testing.assert_close(case.logits(case.student), expected)
    assert set(case.images.labels.tolist()) == set(case.relevant)


@pytest.mark.parametrize("flips", [True, False])
def test_stored_answers_of_experts_are_those_of_the_routed_student(
    case: Case, flips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[Answer] = []

    def keep(*args: Any, **named: Any) -> Answer:
        answered.append(answer_query(*args, **named))
        return answered[-1]

    monkeypatch.setattr(methods_room, "answer_query", keep)
    setup = Setup(method="routed", transfer=(("flips", flips), ("discriminant", False)))
    outcome, answer = qkt(case, setup), answered[0]
    sent = methods_room.relevant_teachers(case, setup).values()
    assert [t.site for t in sent] == list(answer.decision.experts)
    experts = [t for t in answer.teachers if t.site in answer.decision.experts]
    expected = scores_of(answer.network, answer.decision, experts, case.inputs, CPU)
    torch.testing.assert_close(outcome.scores, expected)


def test_without_a_teacher_the_own_model_answers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods_room, "known_classes", lambda *_: ())
    outcome = qkt(case, Setup())
    torch.testing.assert_close(outcome.scores, methods_room.local(case).scores)
    assert (outcome.bytes_moved, outcome.passes, outcome.curve) == (0, 1, None)


def test_a_class_that_nobody_teaches_is_never_answered(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    held = case.store.federation.hospital(case.question.student).held
    absent = tuple(c for c in EVERY if c not in held)
    both = Case(case.store, SimulatedQuery(case.question.student, absent))
    monkeypatch.setattr(methods_room, "known_classes", lambda *_: (held[0], absent[0]))
    scores = qkt(both, Setup(method="routed")).scores
    assert scores[:, [*held, absent[0]]].isfinite().all()
    assert (scores[:, absent[1]] == -math.inf).all()


def test_teachers_are_chosen_by_their_masks(case: Case) -> None:
    def chosen(**changes: Any) -> dict[str, Teacher]:
        return methods_room.relevant_teachers(case, Setup(**{"mask": "oracle", **changes}))

    (q,) = case.question.query
    hospitals = [h for h in case.store.federation.hospitals if h.name != case.question.student]
    relevant = {h.name for h in hospitals if set(h.held) & set(case.relevant)}
    holders = {h.name for h in hospitals if q in h.held}
    assert {t.site for t in chosen().values()} == relevant >= holders
    assert all(t.claimed == case.store.federation.hospital(t.site).held for t in chosen().values())
    assert {t.site for t in chosen(rivals=False).values()} == holders
    assert {t.site for t in chosen(method="qkt-light").values()} == holders
    everyone = chosen(mask="none")
    assert {t.claimed for t in everyone.values()} == {EVERY}
    assert set(everyone) == set(case.others)
    weak = chosen(mask="none", teachers="weak")
    assert all(name.startswith("weak/") for name in weak)


def test_who_is_left_out_of_the_query_may_still_speak_for_local_classes(case: Case) -> None:
    (q,) = case.question.query
    most = Setup(mask="none", max_teachers=1)
    scores = {name: case.store.masks(name)["combined"].scores[q] for name in case.others}
    best = max(scores, key=lambda n: scores[n])
    found = methods_room.relevant_teachers(case, most)
    assert set(found) == set(case.others)
    assert {name for name, t in found.items() if q in t.claimed} == {best}
    assert set(methods_room.relevant_teachers(case, replace(most, rivals=False))) == {best}


def test_every_change_of_an_ablation_is_a_setting_of_the_transfer() -> None:
    for setup in SETUPS.values():
        changed = {**TransferParams().model_dump(), **dict(setup.transfer)}
        assert TransferParams.model_validate(changed).model_dump() == changed
    assert SETUPS["ablation/phase1-distill"].phase1 == "distill"
    assert SETUPS["ablation/routed-one-view"].method == "routed"


def test_bad_teachers_are_made_of_trained_ones(case: Case) -> None:
    name = case.others[0]
    honest = case.store.bundle(name).network
    (known, asked) = case.store.federation.hospital(name.split("/")[1]).held, case.question.query[0]
    before = {k: v.clone() for k, v in honest.state_dict().items()}
    shape = case.inputs.shape[1:]

    held = case.store.bundle(name).class_means
    assert set(held) == set(known)
    told: dict[Bad, Mapping[int, Tensor]] = {}

    def made(bad: Bad) -> tuple[Tensor, tuple[int, ...]]:
        network, claimed, means = spoil(honest, known, held, bad, asked, shape=shape, seed=0)
        told[bad] = means
        return predict(network, case.inputs, CPU), claimed

    logits = predict(honest, case.inputs, CPU)
    flipped, claimed = made("flipped-labels")
    assert claimed == known
    torch.testing.assert_close(flipped[:, known[0]], logits[:, known[1]])
    torch.testing.assert_close(flipped[:, known[1]], logits[:, known[0]])
    others = [c for c in EVERY if c not in known]
    torch.testing.assert_close(flipped[:, others], logits[:, others])
    assert torch.equal(told["flipped-labels"][known[0]], held[known[1]])
    lying, claimed = made("lying-mask")
    assert told["lying-mask"] is held
    assert claimed == EVERY
    assert torch.equal(lying, logits)
    biased, claimed = made("noise-bias")
    assert set(claimed) == {*known, asked}
    risen = (biased - logits)[:, asked]
    assert float(risen.min()) > 0
    torch.testing.assert_close(risen, risen[:1].expand_as(risen))
    noise = mixed((PROBES, *shape), torch.Generator().manual_seed(0))
    network, *_ = spoil(honest, known, held, "noise-bias", asked, shape=shape, seed=0)
    driven = predict(network, noise, CPU).argmax(dim=1) == asked
    assert float(driven.float().mean()) == pytest.approx(SHARE, abs=0.01)
    assert all(torch.equal(before[k], v) for k, v in honest.state_dict().items())


def test_one_bad_teacher_is_among_two() -> None:
    names = [f"full/h{i}" for i in range(1, 6)]
    drawn = [draw_bad(names, count, seed=3) for count in (1, 2, 5)]
    assert drawn[0] == drawn[1][:1] == drawn[2][:1]
    assert set(drawn[2]) == set(names)
    assert len({draw_bad(names, 1, seed=s) for s in range(50)}) == 5


def test_bad_teachers_claim_what_they_like_and_the_asking_hospital_reads_them_again(case: Case) -> None:
    def of_kind(bad: Bad) -> dict[str, Teacher]:
        return methods_room.relevant_teachers(case, SETUPS[f"ablation/{bad}-2"])

    honest = methods_room.relevant_teachers(case, Setup())
    assert all(t.verified == t.claimed for t in honest.values())
    lying = of_kind("lying-mask")
    assert {t.claimed for t in lying.values()} == {EVERY}, "both of the others"
    assert all(lying[name].verified == honest[name].claimed for name in honest)
    flipped = of_kind("flipped-labels")
    assert {n: t.claimed for n, t in flipped.items()} == {n: t.claimed for n, t in honest.items()}
    oracle = methods_room.relevant_teachers(case, SETUPS["ablation/mask-oracle"])
    assert all(t.verified is None for t in oracle.values()), "what an ablation says is no false claim"


def test_what_becomes_of_bad_teachers_is_counted(case: Case) -> None:
    screening = Screening(case.store)
    relevant = len(
        [
            t
            for q in case.store.federation.questions
            for t in methods_room.relevant_teachers(Case(case.store, q), Setup())
        ]
    )
    assert sum(screening.tally(None, 0).values()) == relevant
    lying = screening.tally("lying-mask", 2)
    assert sum(lying.values()) == 2 * len(case.store.federation.questions)
    assert lying["bad included"] == 0, "each claims a class that it does not show"
    copied = screening.tally("copied-row", 1)
    assert sum(n for fate, n in copied.items() if fate.startswith("bad")) <= 2


def test_where_no_teacher_can_be_used_the_own_model_answers(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "untrusted"

    def refuse(*_: Any, **__: Any) -> Answer:
        raise QueryError("nobody", remedy="Ask.", code=code)

    monkeypatch.setattr(methods_room, "answer_query", refuse)
    found = qkt(case, Setup(mask="none"))
    assert torch.equal(found.scores, methods_room.local(case).scores)
    assert found.bytes_moved == sum(map(case.store.bytes, case.others))
    code = "no-calibration"
    with pytest.raises(QueryError, match="nobody"):
        qkt(case, Setup(mask="none"))


def test_another_budget_moves_only_the_offset() -> None:
    decision = DecisionRule(
        method="qkt", local=(0, 1), query=(2,), offsets=(0.5,), budget=0.02, own_weight=2.0
    )
    random = torch.Generator().manual_seed(0)
    calibration = torch.randn(99, 3, generator=random)
    scores = torch.randn(50, 3, generator=random)
    preference = calibration[:, 2] - calibration[:, :2].max(dim=1).values
    moved = at_budgets(scores, OperatingPoint(decision, 99, 1, preference[:, None]))
    assert tuple(moved) == BUDGETS
    for budget, changed in moved.items():
        torch.testing.assert_close(changed[:, :2], scores[:, :2])
        shift = (changed - scores)[:, 2]
        assert float(shift.std()) < 1e-6
        # With 99 images a budget of k % pays for k - 1 of them, at the least none.
        given = int((preference + 0.5 + shift.mean() > 0).sum())
        assert given == max(0, round(100 * budget - 0.01) - 1)


def test_the_budget_that_was_asked_for_gives_the_answer_again() -> None:
    random = torch.Generator().manual_seed(1)
    raw, scores = torch.randn(99, 3, generator=random), torch.randn(50, 3, generator=random)
    preference = raw[:, 2:] - raw[:, :2].max(dim=1, keepdim=True).values
    offset = offset_for_budget(preference, 0.05)
    decision = DecisionRule(
        method="qkt", local=(0, 1), query=(2,), offsets=(offset,), budget=0.05, own_weight=2.0
    )
    moved = at_budgets(scores, OperatingPoint(decision, 99, 5, preference))
    torch.testing.assert_close(moved[0.05], scores)


def test_queries_one_by_one_beside_the_best_baseline() -> None:
    def row(method: str, query: str, share: float) -> dict[str, Any]:
        return {"method": method, "query": query, "query_accuracy": share, "balanced_accuracy": share + 0.1}

    rows = [row("qkt", "a", 0.5), row("qkt", "a", 0.7), row("qkt", "b", 0.25)]
    rows += [row("local", q, 0.0) for q in "aab"] + [row("ensemble-prob", q, 0.3) for q in "aab"]
    assert queries_table(rows).splitlines() == [
        "| query | `qkt` | `ensemble-prob` | asked |",
        "| --- | --- | --- | --- |",
        "| a | 60.0 / 70.0 | 30.0 / 40.0 | 2 |",
        "| b | 25.0 / 35.0 | 30.0 / 40.0 | 1 |",
    ]


def test_the_number_of_rounds_is_chosen_on_validation_images(case: Case) -> None:
    labels = torch.from_numpy(case.store.federation.val.labels)
    right = torch.nn.functional.one_hot(labels, 4).float()
    store = ResultStore(case.store.folder, case.store.federation, case.store.settings, CPU)
    stored = {"fedavg/1": {"val": right}, "fedavg/2": {"val": 1 - right}}
    store.logits = stored.__getitem__
    assert store.best_rounds("fedavg") == 1
    stored["fedavg/1"], stored["fedavg/2"] = stored["fedavg/2"], stored["fedavg/1"]
    assert store.best_rounds("fedavg") == 2


# --- figures --------------------------------------------------------------------------------------


def test_figures_by_hand() -> None:
    # Relevant: 1, 3, 5 of six classes; 5 is asked for. The highest scores of all lie outside of them.
    scores = np.full((6, 6), 9.0)
    scores[:, [1, 3, 5]] = [[2, 1, 0], [2, 1, 3], [1, 2, 0], [1, 2, 0], [0, 1, 2], [2, 0, 1]]
    labels = np.array([1, 1, 3, 3, 5, 5])
    found = figures(scores, labels, (1, 3, 5), (5,), task=MULTICLASS)
    assert found["query_accuracy"] == 0.5
    assert found["retained_accuracy"] == 0.75  # 1 of 2 and 2 of 2
    assert found["balanced_accuracy"] == pytest.approx(2 / 3, abs=1e-6)
    # Query less largest local score: local -2, 1, -2, -2; query 1, -1. Wins 3.5 and 3 of 4 each.
    assert found["auroc"] == pytest.approx(6.5 / 8)
    confidence = np.exp([2, 1, 0]) / np.exp([2, 1, 0]).sum()
    highest = np.exp(3) / np.exp([2, 1, 3]).sum()
    assert highest == pytest.approx(confidence[0])  # all six lie in one bin
    assert found["ece"] == pytest.approx(abs(4 / 6 - confidence[0]), abs=1e-6)


def test_auroc_by_ranks_is_the_one_by_pairs() -> None:
    random = np.random.default_rng(0)
    scores = random.integers(0, 9, 200).astype(float)
    positive = random.random(200) < 0.3
    assert rank_auroc(scores, positive) == pytest.approx(auroc(scores, positive, np.ones((1, 200)))[0])


# --- summary --------------------------------------------------------------------------------------


def row(method: str, student: str, query: str, asked: float, kept: float, **more: Any) -> dict[str, Any]:
    return {
        **dict.fromkeys(FIELDS, 0.0),
        **{"seed": 0, "student": student, "query": query, "method": method},
        **{"query_accuracy": asked, "retained_accuracy": kept, "balanced_accuracy": (asked + 2 * kept) / 3},
        **{"curve": None, **more},
    }


ROWS = [
    row("local", "h1", "a", 0.0, 1.0),
    row("fedavg", "h1", "a", 0.4, 0.8),
    row("qkt", "h1", "a", 0.8, 0.9, curve=[{"budget": 0.1, **dict.fromkeys(FIELDS[:4], 0.2)}]),
    row("local", "h1", "b", 0.2, 1.0),
    row("fedavg", "h1", "b", 0.4, 0.8),
    row("qkt", "h1", "b", 0.6, 0.9, curve=[{"budget": 0.1, **dict.fromkeys(FIELDS[:4], 0.6)}]),
    row("local", "h2", "a", 0.1, 0.7),
    row("fedavg", "h2", "a", 0.9, 0.8),
    row("qkt", "h2", "a", 0.7, 0.9),
]


def test_the_summary_by_hand() -> None:
    summary = summarise(ROWS)
    assert summary["qkt"]["n"] == 3
    assert summary["qkt"]["query_accuracy"]["mean"] == pytest.approx(0.7)
    # Means of baselines: 0.2, 0.3, 0.5; distances 0.6, 0.3, 0.2.
    assert summary["qkt"]["query_gain_over_peers"]["mean"] == pytest.approx(1.1 / 3, abs=1e-6)
    # Balanced: fedavg 2/3, 2/3, 2.5/3 beats local 2/3, 2.2/3, 1.5/3.
    assert best_baseline(ROWS) == summary["qkt"]["best_peer"] == "fedavg"
    assert summary["qkt"]["lead_over_best_peer"]["mean"] == pytest.approx(
        (2.6 + 2.4 + 2.5) / 9 - 6.5 / 9, abs=1e-6
    )
    assert "query_gain_over_peers" not in summary["fedavg"]
    assert set(BASELINES) & set(summary) == {"local", "fedavg"}


def test_ablations_are_held_against_the_method_that_they_change() -> None:
    assert base_of("ablation/rank-0.25") == "qkt"
    assert base_of("ablation/routed-one-view") == base_of("ablation/routed-budget-0.10") == "routed"
    assert base_of("ablation/fedavg-finetuned") == "fedavg"
    assert {base_of(a) for a in BenchmarkSettings().ablations} == {"qkt", "routed", *FEDERATED}
    worse = [
        row("ablation/rank-0.25", r["student"], r["query"], r["query_accuracy"] - 0.2, 0.9)
        for r in ROWS
        if r["method"] == "qkt"
    ]
    summary = summarise([*ROWS, *worse, row("ablation/routed-one-view", "h1", "a", 0.5, 0.5)])
    found = summary["ablation/rank-0.25"]
    assert (found["base"], found["change"]["retained_accuracy"]["mean"]) == ("qkt", 0.0)
    assert found["change"]["query_accuracy"] == {
        k: pytest.approx(-0.2, abs=1e-6) for k in ("mean", "low", "high")
    }
    assert "change" not in summary["ablation/routed-one-view"], "routed itself was not run"
    table = ablations_table(summary).splitlines()
    assert len(table) == 3
    assert table[2].startswith("| `rank-0.25` | `qkt` | -20.0 (-20.0 to -20.0) | 0.0 (0.0 to 0.0) |")
    assert "rank" not in methods_table(summary)
    assert "one-view" in methods_table(summary)


def test_intervals_draw_whole_students() -> None:
    # Two students: a quarter of the draws is the first alone, a quarter the second alone.
    low, mean, high = (cluster_intervals(ROWS[::3], np.array([[1.0], [3.0], [8.0]]))[0][k] for k in KEYS)
    assert (low, mean, high) == (2.0, 4.0, 8.0)
    (alone,) = cluster_intervals(ROWS[:1], np.array([[5.0]]))
    assert alone == {"mean": 5.0, "low": 5.0, "high": 5.0}
    assert cluster_intervals(ROWS[::3], np.ones((3, 2)))[1] == {"mean": 1.0, "low": 1.0, "high": 1.0}


KEYS = ("low", "mean", "high")


def test_budget_curves_are_means_over_the_answers_that_have_one() -> None:
    assert budget_curves(ROWS) == {"qkt": [{"budget": 0.1, **dict.fromkeys(FIELDS[:4], 0.4)}]}


def test_mask_figures_by_hand() -> None:
    mask = {"scores": [1.0, 0.5, 0.3], "known": [True, True, False]}
    judged = [{"masks": dict.fromkeys(ESTIMATORS, mask), "held": [True, False, True], "recalled": [True] * 3}]
    absent = mask_figures(judged, BenchmarkSettings())["combined"]
    assert (absent["precision"], absent["recall"], absent["f1"], absent["auc"]) == (0.5, 0.5, 0.5, 0.5)
    assert absent["recalled"]["recall"] == pytest.approx(2 / 3, abs=1e-6)
    at = {p["lambda"]: p["f1"] for p in absent["curve"]}
    assert (at[0.3], at[0.5], at[0.7]) == (0.8, 0.5, pytest.approx(2 / 3, abs=1e-6))
    rare = mask_figures(judged, BenchmarkSettings(regime="rare"))["combined"]
    assert rare["f1"] == rare["recalled"]["f1"] == 0.8


def test_the_table_ranks_by_balanced_accuracy(whole: tuple[Path, dict[str, Any]]) -> None:
    result = {**whole[1], "summary": summarise(ROWS)}
    lines = markdown(result).splitlines()
    start = lines.index(next(line for line in lines if line.startswith("| method | query | retained")))
    assert [line.split("|")[1].strip() for line in lines[start + 2 : start + 5]] == [
        *("`qkt`", "`fedavg`", "`local`")
    ]
    assert lines[start + 2].split("|")[2].strip() == "70.0 (70.0 to 70.0)"
    assert "| `combined` (default) |" in markdown(result)
    assert f"| `data_sha256` | {result['settings']['data_sha256']} |" in lines
    assert (whole[0] / TABLE).read_text() == markdown(whole[1])


# --- settings and command line --------------------------------------------------------------------


def test_methods_are_named_in_groups_or_one_by_one() -> None:
    assert BenchmarkSettings().chosen == BENCHMARK_METHODS
    assert BenchmarkSettings(methods=("ablations",)).chosen == BenchmarkSettings().ablations
    named = BenchmarkSettings(methods=("routed", "local", "routed", "ablation/mask-oracle"))
    assert named.chosen == ("local", "routed", "ablation/mask-oracle")
    assert "ablation/mask-combined" not in SETUPS
    with pytest.raises(ConfigError, match=r"unknown method 'rooted', did you mean 'routed'\?") as error:
        _ = BenchmarkSettings(methods=("rooted",)).chosen
    assert error.value.code == "method"


def test_the_key_names_what_rows_depend_on() -> None:
    key = BenchmarkSettings().key("data", "cpu")
    assert BenchmarkSettings(seeds=(5,), methods=("qkt",)).key("data", "cpu") == key
    changed = [
        BenchmarkSettings(budget=0.05),
        BenchmarkSettings(max_queries=1),
        BenchmarkSettings(train=TrainParams(epochs=2)),
    ]
    keys = {key, BenchmarkSettings().key("other", "cpu"), BenchmarkSettings().key("data", "cuda")}
    assert len(keys | {s.key("data", "cpu") for s in changed}) == 6


def test_lists_on_the_command_line() -> None:
    assert parse_list(" a, b,,c ") == ("a", "b", "c")
    assert parse_numbers("3,0,3", "--seeds") == (3, 0)
    for text in ("", "a", "1,-2", "1.5"):
        with pytest.raises(ConfigError, match="no whole numbers"):
            parse_numbers(text, "--seeds")


def test_the_command_passes_everything_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    called: dict[str, Any] = {}

    def pretend(data: Path, out: Path, settings: BenchmarkSettings, **more: Any) -> dict[str, Any]:
        called.update(more, data=data, out=out, settings=settings)
        return {"summary": {"qkt": {"n": 1}}}

    monkeypatch.setattr(runner, "run", pretend)
    words = "benchmark --data a.npz --out b --partition dirichlet --hospitals 4 --beta 0.5 --regime rare"
    words += " --samples-per-rare-class 10 --query-size 2 --seeds 1,2 --methods qkt,local --network resnet18"
    words += " --max-queries 3 --budget 0.05 --split val --workers 2 --device cpu --resume --json"
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out) == {"qkt": {"n": 1}}
    assert called["settings"] == BenchmarkSettings(
        partition="dirichlet",
        hospitals=4,
        beta=0.5,
        regime="rare",
        samples_per_rare_class=10,
        query_size=2,
        seeds=(1, 2),
        methods=("qkt", "local"),
        train=TrainParams(network="resnet18", appearance=0.0),
        max_queries=3,
        budget=0.05,
        split="val",
        device="cpu",
    )
    assert (called["workers"], called["resume"]) == (2, True)
    assert (called["data"], called["out"]) == (Path("a.npz"), Path("b"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods qtk", "error [method]: unknown method 'qtk', did you mean 'qkt'?"),
        ("--seeds x", "error [config]: --seeds 'x' are no whole numbers"),
        ("--rounds 0", "error [config]: --rounds '0' are no whole numbers from 1 on"),
    ],
)
def test_wrong_words_end_in_one_line(
    words: str, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["benchmark", "--data", str(data), "--out", str(tmp_path / "out"), *words.split()])
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["benchmark", "--data", "a.npz", "--out", "b"])
    assert end.value.code == 1
    assert "Add --resume to go on" in capsys.readouterr().err


def test_row_files_have_safe_names(tmp_path: Path) -> None:
    file = row_file(tmp_path, BenchmarkTask(3, "ablation/mask-none", SimulatedQuery("h2", (1, 4))))
    assert file == tmp_path / "seed-3" / "rows" / "h2" / "1+4" / "ablation_mask-none.json"
    write_json(file, {})
    assert file.is_file()
