"""A frozen encoder in the benchmark: features once, found by image, and the baselines that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkt_clinical.baselines.gaussian_heads import class_mixtures
from qkt_clinical.baselines.statistics import class_statistics, pool
from qkt_clinical.benchmark import methods as methods_room
from qkt_clinical.benchmark import runner
from qkt_clinical.benchmark.case import Case
from qkt_clinical.benchmark.features import FeatureBank, pieces, write_piece
from qkt_clinical.benchmark.metrics import figures
from qkt_clinical.benchmark.runner import FEATURES, KEY, RESULT, WORK, federations_of, run
from qkt_clinical.benchmark.settings import (
    SETUPS,
    STATISTICS_EXACT,
    BenchmarkSettings,
    EncoderUse,
)
from qkt_clinical.benchmark.simulate import SimulatedFederation, channels_first
from qkt_clinical.benchmark.store import ResultStore
from qkt_clinical.catalog import WITH_ENCODER
from qkt_clinical.cli import main
from qkt_clinical.config.params import EncoderParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.datasets.medmnist_file import read_medmnist
from qkt_clinical.errors import ConfigError, EncoderError
from qkt_clinical.models import encoder_network
from qkt_clinical.models.encoder_network import EncoderExtractor
from qkt_clinical.models.encoders import Encoder, encode, load_encoder, shared_extractor
from qkt_clinical.models.inference import predict
from qkt_clinical.qkt.operating_point import as_if_held_out, decide, offset_for_budget, query_scores
from qkt_clinical.qkt.prediction import scores_of
from qkt_clinical.qkt.steps import Answer
from qkt_clinical.records.card import CARD, MASK, WEIGHTS
from qkt_clinical.task import MULTICLASS
from tests.baselines.test_statistics import head_of
from tests.benchmark.test_benchmark import QUICK, write_npz
from tests.shapes import CPU

pytestmark = pytest.mark.slow

SIDE = 16
USED = EncoderUse(name="resnet18", digest="1" * 64, side=SIDE)


class Pools(nn.Module):
    """Features of a random convolution, pooled to a grid of 4 x 4: they say something of shapes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = nn.functional.adaptive_avg_pool2d(self.convolution(images).relu(), 4).flatten(1)
        return found


ENCODER = Encoder("resnet18", Pools().eval(), USED.digest)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("data") / "shapes.npz")


def loaded(*arguments: Any) -> Encoder:
    assert arguments == ("resnet18", Path("weights.safetensors"), USED.digest)
    return ENCODER


def answered(data: Path, out: Path, methods: tuple[str, ...], **more: Any) -> dict[str, Any]:
    settings = QUICK.model_copy(update={"methods": methods, "encoder": USED, "max_queries": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "load_encoder", loaded)
        patch.setattr(encoder_network, "encoder_architecture", lambda name: Pools())
        return run(data, out, settings, encoder_weights=Path("weights.safetensors"), workers=1, **more)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, answered(data, out, ("local", "ensemble-prob", "ensemble-adapted", *WITH_ENCODER))


def test_features_of_every_image_are_found_by_the_image(data: Path, tmp_path: Path) -> None:
    names = list(pieces([data]))
    assert names == ["shapes:train:0", "shapes:val:0", "shapes:test:0"]
    for name in names:
        write_piece(tmp_path, name, [data], ENCODER, SIDE, CPU)
    bank = FeatureBank(tmp_path)
    parts = read_medmnist(data)
    images = channels_first(parts["test"].images)[[5, 0, 5, 3]]
    assert torch.equal(bank.of(images), encode(ENCODER, images, SIDE, CPU))
    assert bank.multiply_adds == SIDE * SIDE * 4 * 27
    with pytest.raises(KeyError):
        bank.of(255 - images)


def test_large_files_are_encoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkt_clinical.benchmark.features.IMAGES_PER_FILE", 30)
    data = write_npz(tmp_path / "small.npz", each=20)
    names = list(pieces([data]))
    assert names[:3] == ["small:train:0", "small:train:1", "small:train:2"]
    for name in names:
        write_piece(tmp_path / "work", name, [data], ENCODER, SIDE, CPU)
    images = channels_first(read_medmnist(data)["train"].images)
    assert len(FeatureBank(tmp_path / "work").of(images)) == len(images) == 80


def federation(data: Path) -> SimulatedFederation:
    return federations_of([data], QUICK.model_copy(update={"max_queries": 2}))(0)


@pytest.mark.parametrize("method", ["statistics", "statistics-centred"])
def test_statistics_answer_as_computed_step_by_step(
    data: Path, whole: tuple[Path, dict[str, Any]], method: str
) -> None:
    out, result = whole
    bank, simulated = FeatureBank(out / WORK / FEATURES), federation(data)
    rows = [r for r in result["rows"] if r["method"] == method]
    assert len(rows) == 2
    for row, question in zip(rows, simulated.questions, strict=True):
        asking = simulated.hospital(question.student)
        members = [asking, *(h for h in simulated.hospitals if h is not asking)]
        features = [bank.of(h.train.images) for h in members]
        means = [f.mean(dim=0) * (method == "statistics-centred") for f in features]
        each = [
            class_statistics(f - m, torch.from_numpy(h.train.labels), 4)
            for f, m, h in zip(features, means, members, strict=True)
        ]
        relevant, query = simulated.relevant(question), question.query
        local = [c for c in asking.held if c not in query]
        own = asking.calibration.of_classes(local)
        learned = asking.train.of_classes(local)  # all of them: fewer than QKT takes
        found = []
        for shrinkage in (0.001, 0.01, 0.05, 0.1, 0.2, 0.5):
            weight, bias = head_of(pool(each), relevant, shrinkage)
            held_out = (bank.of(own.images) - means[0]) @ weight.T + bias
            trained = (bank.of(learned.images) - means[0]) @ weight.T + bias
            kept, more = (query_scores(z, local, query) for z in (held_out, trained))
            more = as_if_held_out(more, torch.from_numpy(learned.labels), kept, torch.from_numpy(own.labels))
            offset = offset_for_budget(torch.cat([kept, more]), QUICK.budget)
            index = simulated.judging(question, "test")
            judged = simulated.test.take(index)
            logits = (bank.of(judged.images) - means[0]) @ weight.T + bias
            scores = decide(logits, local, query, torch.tensor([offset]))
            found.append(figures(scores.numpy(), judged.labels, relevant, query, task=MULTICLASS))
        assert any(
            all(row[k] == pytest.approx(f[k], abs=2e-6) for k in ("query_accuracy", "balanced_accuracy"))
            for f in found
        ), "one of the shrinkages was chosen"
        assert row["bytes_moved"] == sum(s.bytes for s in each[1:])
        assert (row["passes_per_prediction"], row["rounds"]) == (1, 1)
        assert 0 < row["cost_per_prediction"] < 1, "the encoder is smaller than the network here"


def test_other_heads_move_what_they_say(data: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    out, result = whole
    bank, simulated = FeatureBank(out / WORK / FEATURES), federation(data)
    for number, question in enumerate(simulated.questions):
        rows = {r["method"]: r for r in result["rows"] if r["student"] == question.student}
        others = [h for h in simulated.hospitals if h.name != question.student]
        private = rows["statistics-dp"]
        # Noisy numbers of all classes, for which are there is hidden too.
        assert private["bytes_moved"] <= len(others) * 4 * (4 * 65 + 64 * 65 // 2)
        relevant = simulated.relevant(question)
        mixtures = [  # of any seed, for all have one size
            class_mixtures(bank.of(h.train.images), torch.from_numpy(h.train.labels), seed=0) for h in others
        ]
        sizes = [m.bytes for held in mixtures for c, m in held.items() if c in relevant]
        assert rows["gaussian-heads"]["bytes_moved"] == sum(sizes), number
        assert rows["gaussian-heads"]["auroc"] > 0.5


def test_an_adapted_ensemble_is_the_ensemble_with_a_budget_where_nothing_is_adapted(
    data: Path, tmp_path: Path
) -> None:
    settings = QUICK.model_copy(
        update={
            "methods": ("ensemble-prob", "ensemble-adapted"),
            "transfer": QUICK.transfer.model_copy(update={"adaptation": False}),
        }
    )
    rows = {r["method"]: r for r in run(data, tmp_path / "run", settings, workers=1)["rows"]}
    plain, adapted = rows["ensemble-prob"], rows["ensemble-adapted"]
    assert adapted["auroc"] == pytest.approx(plain["auroc"], abs=1e-6), "an offset ranks nothing anew"
    assert adapted["bytes_moved"] == plain["bytes_moved"]
    assert adapted["passes_per_prediction"] == plain["passes_per_prediction"] == 3
    assert adapted["query_accuracy"] != plain["query_accuracy"]


def test_the_best_baseline_may_be_one_with_an_encoder(whole: tuple[Path, dict[str, Any]]) -> None:
    out, result = whole
    assert json.loads((out / RESULT).read_text()) == result
    assert result["settings"]["encoder"] == USED.model_dump()
    assert result["environment"]["timm"]
    volumes = USED.model_copy(update={"name": "medicalnet-resnet10"})
    assert "timm" not in runner.environment(CPU, 1, federated=False, encoder=volumes), "it is MONAI's"
    assert {*WITH_ENCODER} <= set(result["summary"])
    table = (out / "benchmark.md").read_text()
    assert all(f"`{m}`" in table for m in (*WITH_ENCODER, "ensemble-adapted"))


def test_a_run_without_an_encoder_goes_on_with_one_and_not_with_another(
    data: Path, tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    out = tmp_path / "run"
    plain = QUICK.model_copy(update={"methods": ("local",), "max_queries": 2})
    before = run(data, out, plain, workers=1)
    assert not (out / WORK / FEATURES).exists()
    after = answered(data, out, ("local", "statistics"), resume=True)
    assert [r for r in after["rows"] if r["method"] == "local"] == before["rows"]
    expected = [r for r in whole[1]["rows"] if r["method"] == "statistics"]
    found = [r for r in after["rows"] if r["method"] == "statistics"]
    assert [{**r, "seconds": 0} for r in found] == [{**r, "seconds": 0} for r in expected]
    assert run(data, out, plain, workers=1, resume=True)["rows"] == before["rows"]
    assert json.loads((out / WORK / KEY).read_text())["encoder"] == USED.model_dump()
    other = plain.model_copy(update={"encoder": USED.model_copy(update={"side": 32})})
    with pytest.raises(ConfigError, match="other data or settings"):
        run(data, out, other, workers=1, resume=True)


def test_methods_that_need_an_encoder_say_so() -> None:
    assert not {*WITH_ENCODER} & set(BenchmarkSettings().chosen)
    assert {*WITH_ENCODER} <= set(BenchmarkSettings(encoder=USED).chosen)
    with pytest.raises(ConfigError, match="reads the features of an encoder") as caught:
        _ = BenchmarkSettings(methods=("statistics",)).chosen
    assert "--encoder-weights" in caught.value.remedy


@pytest.mark.parametrize("given", [("--encoder", "resnet18"), ("--encoder-weights", "w.safetensors")])
def test_name_and_weights_belong_together(
    data: Path, tmp_path: Path, given: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["benchmark", "--data", str(data), "--out", str(tmp_path / "run"), *given])
    assert caught.value.code == 1
    assert "belong together" in capsys.readouterr().err


def test_weights_that_are_not_there_end_before_anything_is_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["benchmark", "--data", str(data), "--out", str(out), "--encoder", "resnet18"]
    with pytest.raises(SystemExit):
        main([*command, "--encoder-weights", str(tmp_path / "none.safetensors")])
    assert "cannot be read as a plain file" in capsys.readouterr().err
    assert not out.exists()


def test_images_that_the_encoder_cannot_take_end_as_one_error(tmp_path: Path) -> None:
    data = write_npz(tmp_path / "volumes.npz", each=8, kind="volume")
    with pytest.raises(EncoderError, match="expected 2 dimensions"):
        answered(data, tmp_path / "run", ("statistics",))


def test_networks_over_a_frozen_encoder_move_without_it(
    data: Path, lite_weights: Path, tmp_path: Path
) -> None:
    lite = load_encoder("efficientnet-lite0", lite_weights)
    start = EncoderParams(
        name=lite.name, weights=str(lite_weights), digest=lite.digest, side=32, mode="frozen"
    )
    train = QUICK.train.model_copy(update={"epochs": 1, "encoder": start})
    settings = QUICK.model_copy(update={"train": train})
    hospitals = federations_of([data], settings)(0)
    store = ResultStore(tmp_path, hospitals, settings, CPU, pretrained=lite)
    name = f"full/{hospitals.hospitals[0].name}"
    store.train(name)
    assert store.bytes(name, (WEIGHTS,)) < 100_000
    bundle = store.bundle(name)
    assert bundle.card.without_encoder == lite.digest
    found = predict(bundle.network, to_input(store.evaluation.images), CPU)
    torch.testing.assert_close(found, store.logits(name)[settings.split])


def test_an_encoder_stands_beside_the_merged_network(whole: tuple[Path, dict[str, Any]], data: Path) -> None:
    """Its features need not be computed again; the student that would be written says the same."""
    store = ResultStore(
        whole[0] / "work" / "seed-0",
        federation(data),
        QUICK.model_copy(update={"max_queries": 2, "encoder": USED}),
        CPU,
        FeatureBank(whole[0] / "work" / "features"),
        encoder=extractor(),
    )
    case = Case(store, store.federation.questions[0])
    answers: list[Answer] = []
    with pytest.MonkeyPatch.context() as patch:
        original = methods_room.answer_query

        def keep(*args: Any, **named: Any) -> Answer:
            answers.append(original(*args, **named))
            return answers[-1]

        patch.setattr(methods_room, "answer_query", keep)
        patch.setattr(encoder_network, "encoder_architecture", lambda name: Pools())
        exact = methods_room.qkt(case, SETUPS[STATISTICS_EXACT])
        plain = methods_room.qkt(case, SETUPS["qkt"])
    beside = answers[0].refined.encoded
    assert beside is not None
    assert answers[1].refined.encoded is None
    student = answers[0].network
    assert [b.name for b in student.spec.branches][-1] == "encoder"
    written = scores_of(student, answers[0].decision, [], case.inputs, CPU)
    assert torch.allclose(written, exact.scores, atol=1e-4)
    assert not torch.allclose(plain.scores, exact.scores, atol=1e-2)
    # What leaves beside the bundles: of every teacher 64 numbers in half precision for each of four classes.
    teachers = methods_room.relevant_teachers(case, SETUPS[STATISTICS_EXACT])
    assert exact.bytes_moved - plain.bytes_moved == 2 * 64 * 4 * len(teachers) > 0
    noisy = methods_room.relevant_teachers(case, SETUPS["qkt"])
    unmasked = methods_room.relevant_teachers(case, SETUPS["ablation/exact-means"])
    for name, teacher in unmasked.items():
        images, labels = case.store.data(name.split("/")[1]).train.pair
        features = predict(teacher.network, to_input(images), CPU, features=True)
        for c, mean in teacher.class_means.items():
            torch.testing.assert_close(mean, features[torch.from_numpy(labels) == c].mean(dim=0))
            assert not torch.allclose(mean, noisy[name].class_means[c], atol=1e-3)
    assert any(teacher.class_means for teacher in unmasked.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_network, "encoder_architecture", lambda name: Pools())
        alone = methods_room.qkt(case, SETUPS["qkt-means"])
    asked = methods_room.relevant_teachers(case, SETUPS["qkt-means"])
    assert set(asked) == {n for n, t in teachers.items() if set(t.claimed) & set(case.question.query)}
    described = sum(case.store.bytes(name, (CARD, MASK)) for name in asked)
    assert alone.bytes_moved == 2 * 64 * 4 * len(asked) + described, "nobody's network"
    assert alone.cost is not None
    assert plain.cost is not None
    assert 1 < alone.cost < plain.cost


def extractor() -> EncoderExtractor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_network, "encoder_architecture", lambda name: Pools())
        return shared_extractor(ENCODER, SIDE)
