from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qkt_clinical.baselines.params import BaselineParams, DistillParams, FederatedParams, FinetuneParams
from qkt_clinical.benchmark import methods as methods_room
from qkt_clinical.benchmark import runner
from qkt_clinical.benchmark import store as store_room
from qkt_clinical.benchmark.metrics import balanced_accuracy, figures
from qkt_clinical.benchmark.runner import WORK, BenchmarkTask, row_file, run
from qkt_clinical.benchmark.settings import BenchmarkSettings
from qkt_clinical.benchmark.simulate import Origins, SimulatedFederation
from qkt_clinical.benchmark.site_intervals import image_weights, resample
from qkt_clinical.benchmark.sites import RealSite, federation_of_sites, read_sites, site_files
from qkt_clinical.benchmark.summary import (
    DRAWS,
    FIELDS,
    cluster_intervals,
    methods_table,
    share_of_the_way,
    summarise,
)
from qkt_clinical.catalog import BENCHMARK_METHODS, ENCODED_METHODS, METHODS, REFERENCES
from qkt_clinical.cli import main
from qkt_clinical.config.params import MaskParams, TrainParams
from qkt_clinical.datasets.medmnist_file import read_class_names
from qkt_clinical.errors import ConfigError, QktError, SourceError
from qkt_clinical.federation import peers
from qkt_clinical.task import MULTICLASS
from tests.federated_reference import in_process
from tests.shapes import CLASSES, CPU, shapes

pytestmark = pytest.mark.slow

HELD = {"alba": (0, 1, 2), "brno": (0, 1, 2, 3), "cork": (0, 1, 3)}
QUICK = BenchmarkSettings(
    sites=True,
    seeds=(0,),
    budget=0.2,
    device="cpu",
    methods=("local", "own-with-query", "routed"),
    train=TrainParams(epochs=1, batch_size=32, appearance=0.0),
    mask=MaskParams(probes=16),
    baselines=BaselineParams(finetune=FinetuneParams(epochs=1), distill=DistillParams(epochs=1, views=2)),
    rounds=(1,),
)


def write_site(folder: Path, name: str, held: Sequence[int], *, each: int = 16, **more: Any) -> Path:
    """Shapes of these classes, two images a patient, in a stain of the site's own."""
    arrays: dict[str, Any] = {"class_names": np.array(CLASSES)}
    for number, (split, count) in enumerate((("train", each), ("val", 6), ("test", 6))):
        images, labels = shapes(held, count, 10 * sum(map(ord, name)) + number)
        images[:, sum(map(ord, name)) % 3] //= 2
        arrays |= {f"{split}_images": np.moveaxis(images, 1, -1), f"{split}_labels": labels[:, None]}
        if name != "cork":
            arrays[f"{split}_groups"] = np.array([f"{split}{i // 2}" for i in range(len(labels))])
    arrays |= more
    path = folder / f"{name}.npz"
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sites")
    for name, held in HELD.items():
        write_site(place, name, held)
    return place


@pytest.fixture(scope="module")
def sites(folder: Path) -> tuple[RealSite, ...]:
    return read_sites(site_files([folder]))[0]


def federation_of(sites: Sequence[RealSite], **changes: Any) -> SimulatedFederation:
    return federation_of_sites(sites, CLASSES, QUICK.model_copy(update=changes), 0)


def asked(federation: SimulatedFederation) -> list[tuple[str, tuple[int, ...]]]:
    return [(q.student, q.query) for q in federation.questions]


def pixels(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


def with_places(site: RealSite, split: str, places: np.ndarray) -> RealSite:
    """The site with only those images of a split that have these places."""
    part = site.parts[split]
    groups = None if part.groups is None else part.groups[places]
    kept = replace(part, images=part.images[places], labels=part.labels[places], groups=groups)
    return RealSite(site.name, {**site.parts, split: kept})


def at_most(site: RealSite, split: str, klass: int, count: int) -> RealSite:
    labels = site.parts[split].labels
    surplus = np.flatnonzero(labels == klass)[count:]
    return with_places(site, split, np.setdiff1d(np.arange(len(labels)), surplus))


# --- reading --------------------------------------------------------------------------------------


def test_a_folder_or_several_files(folder: Path) -> None:
    files = site_files([folder])
    assert [f.stem for f in files] == ["alba", "brno", "cork"]
    assert site_files(list(reversed(files))) == files
    found, classes = read_sites(files)
    assert classes == CLASSES
    assert [s.name for s in found] == ["alba", "brno", "cork"]


@pytest.mark.parametrize("names", [["alba"], [], ["alba", "alba"]])
def test_one_site_or_one_twice_is_refused(names: list[str], folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"names {len(names)} npz file"):
        site_files([folder / f"{n}.npz" for n in names])


def test_a_site_has_a_plain_name(tmp_path: Path) -> None:
    for name in ("alba~1", "a b"):
        with pytest.raises(ConfigError, match="no name of a site"):
            site_files([tmp_path / f"{name}.npz", tmp_path / "brno.npz"])


def blank(shape: tuple[int, ...], kind: type) -> dict[str, np.ndarray]:
    """In place of the images of a site with three classes."""
    sizes = {"train": 48, "val": 18, "test": 18}
    return {f"{split}_images": np.zeros((count, *shape), kind) for split, count in sizes.items()}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"class_names": np.array(["cross", "disc", "bars", "frame"])}, "other class_names than alba"),
        ({"class_names": None}, "other class_names than alba"),
        ({"class_names": np.array(CLASSES[:2])}, "labels beyond its 2 class_names"),
        ({"class_names": np.array(["disc", "disc", "bars", "frame"])}, "not a list of different names"),
        ({"class_names": np.array(list(CLASSES), dtype=object)}, r"cannot be read as an npz file"),
        (blank((8, 8, 3), np.uint8), "images of another shape than alba"),
        (blank((16, 16, 3), np.float32), "images of another type than alba"),
    ],
)
def test_sites_that_do_not_belong_together_are_refused(
    changed: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    bad = write_site(tmp_path, "zeta", (0, 1, 2), **changed)
    with pytest.raises(SourceError, match=message) as error:
        read_sites([folder / "alba.npz", bad])
    assert error.value.where.file == str(bad)


def test_classes_without_names_are_numbered(tmp_path: Path) -> None:
    files = [write_site(tmp_path, n, HELD[n], class_names=None) for n in ("alba", "brno")]
    assert read_class_names(files[0]) is None
    assert read_sites(files)[1] == ("class-0", "class-1", "class-2", "class-3")


# --- questions ------------------------------------------------------------------------------------


def test_every_class_that_a_site_and_another_hold_is_asked_for(sites: tuple[RealSite, ...]) -> None:
    assert asked(federation_of(sites)) == [
        *(("alba", (c,)) for c in HELD["alba"]),
        *(("brno", (c,)) for c in HELD["brno"]),
        *(("cork", (c,)) for c in HELD["cork"]),
    ]
    alone = federation_of(sites[:2])
    assert ("brno", (3,)) not in asked(alone)  # nobody else holds it


def test_the_hidden_class_is_nowhere_but_in_the_test_images(sites: tuple[RealSite, ...]) -> None:
    federation = federation_of(sites)
    for question in federation.questions:
        asking, whole = federation.hospital(question.asking), federation.hospital(question.student)
        (hidden,) = question.query
        assert asking is not whole
        assert asking.site == whole.name == question.student
        for part in ("train", "calibration", "val"):
            before, after = getattr(whole, part), getattr(asking, part)
            assert hidden in before.labels
            assert hidden not in after.labels
            kept = before.of_classes([c for c in HELD[question.student] if c != hidden])
            assert np.array_equal(after.images, kept.images)
        assert federation.relevant(question) == HELD[question.student]
        members = federation.members(question.asks_as)
        assert [m.site for m in members] == list(HELD)
        assert [m is asking for m in members] == [m.site == question.student for m in members]


@pytest.mark.parametrize("split", ["test", "val"])
def test_own_images_judge(split: Any, sites: tuple[RealSite, ...]) -> None:
    federation = federation_of(sites, split=split)
    images = federation.test if split == "test" else federation.val
    for question in federation.questions:
        found = images.take(federation.judging(question, split))
        own = next(s for s in sites if s.name == question.student).images[split]
        assert question.judges == "own"
        assert np.array_equal(found.images, own.images)
        assert np.array_equal(found.labels, own.labels)


def test_a_global_model_is_not_chosen_by_hidden_images(sites: tuple[RealSite, ...]) -> None:
    federation = federation_of(sites)
    for question in federation.questions:
        found = federation.val.take(federation.choosing(question))
        own = next(s for s in sites if s.name == question.student).images["val"]
        hidden = own.of_classes(question.query)
        assert not pixels(found.images) & pixels(hidden.images)
        assert set(found.labels.tolist()) == set(HELD[question.student])


def test_a_class_that_a_site_lacks_is_judged_by_others(sites: tuple[RealSite, ...]) -> None:
    federation = federation_of(sites, regime="truly-absent")
    assert asked(federation) == [("alba", (3,)), ("cork", (2,))]
    for question in federation.questions:
        assert question.judges == "others"
        assert question.asking == question.student
        index = federation.judging(question, "test")
        labels, origin = federation.test.labels[index], federation.origins["test"].sites[index]
        assert set(labels.tolist()) == {0, 1, 2, 3}
        assert np.array_equal(origin == question.student, ~np.isin(labels, question.query))


def test_a_few_images_of_a_rare_class_stay(sites: tuple[RealSite, ...]) -> None:
    federation = federation_of(sites, regime="rare", samples_per_rare_class=4)
    assert len(federation.questions) == 10
    for question in federation.questions:
        asking, whole = federation.hospital(question.asking), federation.hospital(question.student)
        assert int(np.isin(asking.train.labels, question.query).sum()) == 4
        assert pixels(asking.train.images) < pixels(whole.train.images)
        assert not np.isin(question.query, [*asking.calibration.labels, *asking.val.labels]).any()
    with pytest.raises(ConfigError, match="no rare query"):
        federation_of(sites, regime="rare", samples_per_rare_class=14)  # of 16, calibration images less


def test_no_figure_rests_on_fewer_than_five_images(sites: tuple[RealSite, ...]) -> None:
    few = (at_most(sites[0], "test", 1, 4), *sites[1:])
    federation = federation_of(few)
    assert ("alba", (1,)) not in asked(federation)
    question = next(q for q in federation.questions if q.student == "alba")
    assert federation.relevant(question) == (0, 1, 2)
    labels = federation.test.labels[federation.judging(question, "test")]
    assert np.bincount(labels).tolist() == [6, 0, 6]
    fewer = (at_most(sites[0], "train", 1, 9), *sites[1:])
    assert ("alba", (1,)) not in asked(federation_of(fewer))
    elsewhere = (sites[0], *(at_most(s, "train", 1, 9) for s in sites[1:]))
    assert ("alba", (1,)) not in asked(federation_of(elsewhere))
    two = tuple(at_most(at_most(s, "test", 0, 4), "test", 3, 4) for s in sites)
    assert ("cork", (1,)) not in asked(federation_of(two))  # no local class would be left to judge


def test_calibration_images_come_from_training_images_by_patient(sites: tuple[RealSite, ...]) -> None:
    federation = federation_of(sites)
    for site, hospital in zip(sites, federation.hospitals, strict=True):
        both = pixels(hospital.train.images), pixels(hospital.calibration.images)
        assert both[0] | both[1] == pixels(site.images["train"].images)
        part = site.parts["train"]
        if part.groups is not None:
            owner = dict(zip(map(bytes, site.images["train"].images), part.groups.tolist(), strict=True))
            assert not {owner[i] for i in both[0]} & {owner[i] for i in both[1]}
        assert 0.08 < len(hospital.calibration) / len(part.labels) < 0.25
        assert np.array_equal(federation_of(sites).hospital(site.name).train.images, hospital.train.images)


def test_whom_and_what_to_ask(sites: tuple[RealSite, ...]) -> None:
    one = federation_of(sites, ask=("cork", "alba"), query_classes=("bars", "frame"))
    assert asked(one) == [("alba", (2,)), ("cork", (3,))]
    assert {h.name for h in one.asking} == {"alba~2", "cork~3"}
    assert len(federation_of(sites, max_queries=2).questions) == 2
    assert ("brno", (0, 3)) in asked(federation_of(sites, query_size=2))
    with pytest.raises(ConfigError, match="--ask: no site 'corc', did you mean 'cork'"):
        federation_of(sites, ask=("corc",))
    with pytest.raises(ConfigError, match="--query-classes: no class 'square'"):
        federation_of(sites, query_classes=("square",))
    with pytest.raises(ConfigError, match="no absent query"):
        federation_of(sites, ask=("alba",), query_classes=("frame",))


def test_a_site_without_val_images_of_what_it_keeps_is_named(sites: tuple[RealSite, ...]) -> None:
    only = with_places(sites[0], "val", np.flatnonzero(sites[0].parts["val"].labels == 1))
    with pytest.raises(ConfigError, match="no calibration or val image") as error:
        federation_of((only, *sites[1:]), query_classes=("cross",))
    assert error.value.where.site == "alba~1"


# --- figures and intervals ------------------------------------------------------------------------


def test_a_class_without_images_does_not_count() -> None:
    scores = np.array([[3.0, 0, 1], [0, 1, 0], [0, 0, 2], [0, 0, 2]])
    labels = np.array([0, 0, 2, 2])
    found = figures(scores, labels, (0, 1, 2), (2,), task=MULTICLASS)
    assert (found["query_accuracy"], found["retained_accuracy"], found["balanced_accuracy"]) == (1, 0.5, 0.75)
    assert balanced_accuracy(scores, labels, (0, 1, 2), task=MULTICLASS) == 0.75
    assert balanced_accuracy(scores[:2], labels[:2], (0, 1, 2), task=MULTICLASS) == 0.5


ORIGINS = Origins(np.array(["a"] * 4 + ["b"] * 2), np.array([0, 0, 1, 2, 3, 4]))
LABELS = np.array([0, 0, 1, 1, 0, 1])


def test_patients_of_a_site_are_drawn_as_a_whole() -> None:
    weights = image_weights(ORIGINS, 50)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all()
    assert (weights[:, 4:].sum(axis=1) == 2).all()
    assert len(np.unique(weights, axis=0)) > 5


def outcome_row(method: str, right: str, before: str = "1101") -> dict[str, Any]:
    judged = {"images": [0, 1, 2, 3], "query": [1], "before": before}
    points = dict.fromkeys(FIELDS, 0.0)
    return {"seed": 0, "student": "a", "query": "q", "method": method, "test_images": "own", **points,
            "judged": judged, "right": right, "curve": None}  # fmt: skip


def test_accuracies_under_other_draws_by_hand() -> None:
    row = outcome_row("qkt", "0110")
    found = resample([row], LABELS, ORIGINS)[0, "a", "q", "qkt"]
    weights = image_weights(ORIGINS)
    assert found.shape == (DRAWS, 4)
    there = weights[:, 2] + weights[:, 3] > 0
    query = np.where(there, weights[:, 2] / np.maximum(1, weights[:, 2] + weights[:, 3]), 0.5)
    assert found[:, 0] == pytest.approx(query)
    assert found[:, 1] == pytest.approx(0.5)  # images 0 and 1 are of one patient
    assert found[:, 2] == pytest.approx((found[:, 0] + 0.5) / 2)
    assert found[:, 3] == pytest.approx(0.5)  # before, both were right


def test_the_seeds_of_a_site_are_one_cluster() -> None:
    rows = [{"seed": s, "student": h, "test_images": "own"} for s in (0, 1) for h in ("a", "b")]
    (found,) = cluster_intervals(rows, np.array([[0.0], [1.0], [4.0], [5.0]]))
    assert found == {"mean": 2.5, "low": 2.0, "high": 3.0}
    drawn = np.linspace(0, 1, DRAWS)[:, None, None].repeat(4, axis=1)
    (found,) = cluster_intervals(rows, np.full((4, 1), 0.5), drawn)
    assert found == {
        k: pytest.approx(v, abs=1e-3) for k, v in (("mean", 0.5), ("low", 0.025), ("high", 0.975))
    }


def test_the_share_of_the_way_by_hand() -> None:
    rows = [{"seed": 0, "student": h, "test_images": "own"} for h in "ab"]
    gained, possible = np.array([[0.1, 0.1]]), np.array([[0.2, 0.3]])
    found = share_of_the_way(rows, gained, possible)
    assert found is not None
    assert [found[k] for k in ("low", "mean", "high")] == pytest.approx([1 / 3, 0.4, 0.5], abs=1e-6)
    assert share_of_the_way(rows, gained, np.array([[0.3, -0.1]])) is None  # in a quarter of the draws, none
    assert share_of_the_way(rows, gained, np.array([[0.1, -0.1]])) is None


def test_the_summary_of_sites_says_how_far_along_the_way() -> None:
    rows = [
        {**outcome_row(method, "1100"), "student": site, "balanced_accuracy": value}
        for site, values in (("a", (0.5, 0.9, 0.7)), ("b", (0.4, 0.8, 0.7)))
        for method, value in zip(("local", "own-with-query", "qkt"), values, strict=True)
    ]
    summary = summarise(rows)
    assert summary["qkt"]["share_of_the_way"] == {
        k: pytest.approx(v, abs=1e-6) for k, v in (("mean", 0.625), ("low", 0.5), ("high", 0.75))
    }
    assert "share_of_the_way" not in summary["local"]
    table = methods_table(summary).splitlines()
    assert "| balanced | share of the way | forgetting |" in table[0]
    assert "| 62.5 (50.0 to 75.0) |" in next(line for line in table if "`qkt`" in line)
    assert "share of the way" not in methods_table(summarise([r for r in rows if r["method"] != "local"]))


# --- settings and command line --------------------------------------------------------------------


def test_settings_of_one_kind_of_hospital_are_refused_for_the_other() -> None:
    real: list[dict[str, Any]] = [{"ask": ("a",)}, {"query_classes": ("a",)}, {"regime": "truly-absent"}]
    for wrong in real:
        with pytest.raises(ConfigError, match="not with --data"):
            BenchmarkSettings(**wrong)
    simulated: list[dict[str, Any]] = [{"hospitals": 4}, {"partition": "dirichlet"}, {"beta": 1.0}]
    for changed in simulated:
        with pytest.raises(ConfigError, match="not with --sites"):
            BenchmarkSettings(sites=True, **changed)


def test_references_are_methods_of_sites_alone() -> None:
    assert BenchmarkSettings(sites=True).chosen == (*BENCHMARK_METHODS, *REFERENCES)
    absent = BenchmarkSettings(sites=True, regime="truly-absent")
    assert absent.chosen == (*BENCHMARK_METHODS, "pooled")
    for settings in (absent, BenchmarkSettings()):
        with pytest.raises(ConfigError, match="unknown method 'own-with-query'"):
            _ = settings.model_copy(update={"methods": ("own-with-query",)}).chosen


def test_a_run_may_go_on_with_more_sites_asked() -> None:
    key = QUICK.key("data", "cpu")
    assert QUICK.model_copy(update={"ask": ("alba",), "query_classes": ("bars",)}).key("data", "cpu") == key
    assert QUICK.model_copy(update={"regime": "rare"}).key("data", "cpu") != key


def test_the_command_passes_sites_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: dict[str, Any] = {}

    def pretend(data: Any, out: Path, settings: BenchmarkSettings, **more: Any) -> dict[str, Any]:
        called.update(data=data, settings=settings)
        return {"summary": {}}

    monkeypatch.setattr(runner, "run", pretend)
    words = "benchmark --sites a.npz --sites b.npz --out c --ask a,b --query-classes x --regime rare"
    with pytest.raises(SystemExit) as end:
        main([*words.split(), "--rare-images", "7", "--json"])
    assert end.value.code == 0, capsys.readouterr().err
    assert called["data"] == [Path("a.npz"), Path("b.npz")]
    federated = FederatedParams(appearance=1.0)
    expected = BenchmarkSettings(
        sites=True,
        ask=("a", "b"),
        query_classes=("x",),
        regime="rare",
        samples_per_rare_class=7,
        train=TrainParams(appearance=1.0),
        baselines=BaselineParams(federated=federated, scaffold=federated),
    )
    assert called["settings"] == expected
    with pytest.raises(SystemExit):
        main([*words.split(), "--rare-images", "7", "--appearance", "2", "--min-batches", "20", "--json"])
    federated = FederatedParams(appearance=2.0, min_batches=20)
    assert called["settings"] == expected.model_copy(
        update={
            "train": TrainParams(appearance=2.0, min_batches=20),
            "baselines": BaselineParams(
                finetune=FinetuneParams(min_batches=20), federated=federated, scaffold=federated
            ),
        }
    ), "all that is trained alike"


@pytest.mark.parametrize("words", ["", "--data a.npz --sites b"])
def test_exactly_one_source(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["benchmark", "--out", "c", *words.split()])
    assert end.value.code == 1
    assert "exactly one of --data and --sites is needed" in capsys.readouterr().err


# --- a whole run ----------------------------------------------------------------------------------


class Seen:
    """What reaches each thing that learns: where, of which name, and its images' pixels."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.received: list[tuple[str, set[bytes]]] = []
        self.task: BenchmarkTask | None = None
        for room, name, places in (
            (store_room, "train_teacher", (1, 2)),
            (store_room, "finetune", (1, 2)),
            (store_room, "distill_all", (2,)),
            (methods_room, "answer_query", (2,)),
        ):
            self._watch(patch, room, name, places)

        def federated(participants: Sequence[Any], *rest: Any, **more: Any) -> Any:
            self._note(*(p.train for p in participants))
            return in_process(participants, *rest, **more)

        patch.setattr(peers, "run_federation", federated)
        original = runner._perform

        def perform(task: BenchmarkTask) -> None:
            self.task = task
            original(task)

        patch.setattr(runner, "_perform", perform)

    def _watch(self, patch: pytest.MonkeyPatch, room: Any, name: str, places: tuple[int, ...]) -> None:
        original = getattr(room, name)

        def watched(*arguments: Any, **more: Any) -> Any:
            self._note(*(arguments[i] for i in places))
            return original(*arguments, **more)

        patch.setattr(room, name, watched)

    def _note(self, *given: Any) -> None:
        assert self.task is not None
        found: set[bytes] = set()
        for each in given:
            pairs = (each.train, each.calibration) if hasattr(each, "calibration") else (each,)
            for pair in pairs:
                found |= pixels(pair[0] if isinstance(pair, tuple) else pair)
        name = self.task.name
        if self.task.question is not None:
            name = f"{name}/{self.task.question.asking}"
        self.received.append((name, found))


Whole = tuple[Path, dict[str, Any], Seen]


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Every method on one question."""
    out = tmp_path_factory.mktemp("whole")
    settings = QUICK.model_copy(update={"methods": ("all",), "ask": ("brno",), "query_classes": ("disc",)})
    with pytest.MonkeyPatch.context() as patch:
        seen = Seen(patch)
        result = run([folder], out, settings, workers=1)
    return out, result, seen


def test_nothing_that_answers_has_seen_a_hidden_image(whole: Whole, sites: tuple[RealSite, ...]) -> None:
    brno = next(s for s in sites if s.name == "brno")
    hidden = {
        image
        for split in ("train", "val", "test")
        for image in pixels(brno.images[split].of_classes([0]).images)
    }
    asking = [(name, images) for name, images in whole[2].received if "brno~0" in name]
    learned = {name.split("/")[0] for name, _ in asking}
    assert learned == {
        "full",
        "pooled",
        "finetune",
        "distill-all",
        "fedavg",
        "fedprox",
        "scaffold",
        *METHODS,
    } - set(ENCODED_METHODS)
    assert not any(images & hidden for _, images in asking)
    assert any(images & hidden for name, images in whole[2].received if name == "full/brno")
    everybody = next(images for name, images in asking if name == "pooled/brno~0")
    others = [s.images["train"].images for s in sites if s.name != "brno"]
    assert all(len(pixels(images) & everybody) > 0.75 * len(images) for images in others)


def test_every_method_answers_and_the_row_says_who_judges(whole: Whole) -> None:
    out, result, _ = whole
    assert [r["method"] for r in result["rows"]] == [*BENCHMARK_METHODS, *REFERENCES]
    for row in result["rows"]:
        assert (row["student"], row["query"], row["test_images"]) == ("brno", "disc", "own")
        assert (row["query_images"], row["local_images"]) == (6, 18)
        assert row["balanced_accuracy"] == pytest.approx(
            (row["query_accuracy"] + 3 * row["retained_accuracy"]) / 4, abs=2e-6
        )
        assert not {"judged", "right", "curve"} & set(row)
    local = next(r for r in result["rows"] if r["method"] == "local")
    assert local["query_accuracy"] == local["forgetting"] == 0
    pooled = next(r for r in result["rows"] if r["method"] == "pooled")
    assert pooled["bytes_moved"] > 16 * 16 * 3 * 6 * 10  # the others' images
    assert result["settings"]["sites"] == ["alba", "brno", "cork"]
    assert "hospitals" not in result["settings"]
    assert {m["truth"] for m in result["masks"].values()} == {"recalled"}
    assert "at least five images" in (out / "benchmark.md").read_text()
    assert "## Site by site" in (out / "benchmark.md").read_text()


def test_a_resumed_run_comes_to_the_same(whole: Whole, folder: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole[0], tmp_path / "out")
    rows = sorted((out / WORK / "seed-0" / "rows").rglob("routed.json"))
    assert len(rows) == 1
    before = json.loads(rows[0].read_text())
    rows[0].unlink()
    settings = QUICK.model_copy(update={"ask": ("brno",), "query_classes": ("disc",)})
    with pytest.raises(QktError, match="holds a benchmark"):
        run([folder], out, settings, workers=1)
    done: list[tuple[int, int]] = []
    result = run([folder], out, settings, workers=1, resume=True, progress=lambda d, t: done.append((d, t)))
    assert done == [(6, 7), (7, 7)]  # three teachers, the asking network and three rows, one of them missing
    after = json.loads(rows[0].read_text())
    assert {**after, "seconds": 0} == {**before, "seconds": 0}
    kept = [r for r in whole[1]["rows"] if r["method"] in QUICK.methods]
    assert [{**r, "seconds": 0} for r in result["rows"]] == [
        {**r, "seconds": 0} for m in settings.chosen for r in kept if r["method"] == m
    ]
    shares = [r["summary"]["routed"]["balanced_accuracy"] for r in (whole[1], result)]
    assert shares[0] == shares[1]


def test_answers_on_a_truly_absent_class_are_judged_by_others(folder: Path, tmp_path: Path) -> None:
    settings = QUICK.model_copy(
        update={"regime": "truly-absent", "methods": ("local", "pooled"), "split": "val"}
    )
    result = run([folder], tmp_path, settings, workers=1)
    assert {(r["student"], r["query"]) for r in result["rows"]} == {("alba", "frame"), ("cork", "bars")}
    assert {r["test_images"] for r in result["rows"]} == {"others"}
    networks = {f"{f.parent.name}/{f.name}" for f in (tmp_path / WORK / "seed-0").glob("*/*") if f.is_dir()}
    assert {"full/alba", "full/brno", "full/cork", "pooled/all"} <= networks
    assert not any("~" in name for name in networks)
    question = federation_of(read_sites(site_files([folder]))[0], regime="truly-absent").questions[0]
    stored = json.loads(row_file(tmp_path / WORK, BenchmarkTask(0, "pooled", question)).read_text())
    # Six own val images of each local class, and the two other sites' of the query.
    assert len(stored["right"]) == 30


@pytest.mark.parametrize(("least", "both"), [(1000, True), (1, False)])
def test_a_site_of_few_images_has_one_network_for_itself_and_for_others(
    tmp_path: Path, least: int, both: bool
) -> None:
    files = [write_site(tmp_path, name, held) for name, held in HELD.items()]
    train = TrainParams(epochs=1, batch_size=32, appearance=1.0, appearance_images=least)
    settings = BenchmarkSettings(sites=True, device="cpu", train=train, mask=MaskParams(probes=16))
    store = store_room.ResultStore(
        tmp_path / "work", runner.federations_of(files, settings)(0), settings, CPU
    )
    for variant in ("full", "sent"):
        store.train(f"{variant}/alba")
    own, sent = (store.bundle(f"{variant}/alba").card.weights.sha256 for variant in ("full", "sent"))
    assert (own == sent) is both
