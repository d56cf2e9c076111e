from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qkt_clinical.config.params import TrainParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import images_at_once, predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.task import MULTICLASS, mean_recall
from qkt_clinical.training import classifier
from qkt_clinical.training.classifier import train_teacher
from qkt_clinical.training.loop import (
    Checkpoint,
    History,
    Schedule,
    batches_per_epoch,
    fit,
    learning_rate_factor,
    shuffled,
)
from tests.shapes import CPU, shapes, spec

pytestmark = pytest.mark.slow

PARAMS = TrainParams(epochs=5, batch_size=16, patience=5)


def train(
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    site: str = "aster",
    params: TrainParams = PARAMS,
    validate: bool = True,
) -> tuple[Classifier, History]:
    val = shapes((0, 1, 2), 5, 2)
    return train_teacher(
        spec("densenet-small"),
        shapes((0, 1, 2), 14, 1),
        val if validate else (val[0][:0], val[1][:0]),
        params,
        seed=3,
        site=site,
        device=CPU,
        checkpoint=checkpoint,
        progress=progress,
        task=MULTICLASS,
    )


def same(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole() -> tuple[Classifier, History]:
    return train()


# --- resume ---------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_after(epoch: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        assert total == PARAMS.epochs
        if done == epoch:
            raise Stopped

    return progress


@pytest.mark.parametrize("epochs", [(5,), (1, 2, 4)])
def test_a_stopped_run_ends_in_the_same_weights(
    tmp_path: Path, whole: tuple[Classifier, History], epochs: tuple[int, ...]
) -> None:
    checkpoint = Checkpoint(tmp_path / "scratch", "run")
    for epoch in epochs:
        with pytest.raises(Stopped):
            train(checkpoint, stop_after(epoch))
        assert checkpoint.state.exists()
    told: list[int] = []
    network, history = train(checkpoint, lambda done, total: told.append(done))
    assert told == list(range(epochs[-1] + 1, PARAMS.epochs + 1)), "no epoch is run twice"
    assert same(network, whole[0])
    assert history == whole[1]
    assert list(checkpoint.folder.iterdir()) == []


def test_without_validation_images_too(tmp_path: Path) -> None:
    expected, history = train(validate=False)
    assert history.best_epoch == PARAMS.epochs
    checkpoint = Checkpoint(tmp_path, "run")
    with pytest.raises(Stopped):
        train(checkpoint, stop_after(3), validate=False)
    resumed, again = train(checkpoint, validate=False)
    assert same(resumed, expected)
    assert again == history


def test_a_killed_process_ends_in_the_same_weights(
    tmp_path: Path, repository: Path, whole: tuple[Classifier, History]
) -> None:
    code = """
import sys, time
from pathlib import Path
from qkt_clinical.training.classifier import Checkpoint
from tests.training.test_training import train
train(Checkpoint(Path(sys.argv[1]), "run"), lambda done, total: done == 2 and time.sleep(600))
"""
    checkpoint = Checkpoint(tmp_path, "run")
    # The order of sums depends on the number of threads.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=repository, env=environment)
    try:
        deadline = time.monotonic() + 300
        while (state := checkpoint.load()) is None or state[1]["done"] < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    told: list[int] = []
    network, history = train(checkpoint, lambda done, total: told.append(done))
    assert told == [3, 4, 5]
    assert same(network, whole[0])
    assert history == whole[1]


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that was stopped after two epochs."""
    checkpoint = Checkpoint(tmp_path_factory.mktemp("two"), "run")
    with pytest.raises(Stopped):
        train(checkpoint, stop_after(2))
    return checkpoint.folder


@pytest.mark.parametrize("damage", ["weights", "state", "pair", "none"])
def test_a_torn_checkpoint_counts_as_none(tmp_path: Path, two_epochs: Path, damage: str) -> None:
    checkpoint = Checkpoint(shutil.copytree(two_epochs, tmp_path / "run"), "run")
    earlier = checkpoint.weights.read_bytes()
    match damage:
        case "weights":
            checkpoint.weights.write_bytes(earlier[:-8])
        case "state":
            checkpoint.state.write_text(checkpoint.state.read_text()[:-8])
        case "pair":
            # Killed between the two renames: the weights of epoch 3 beside the state of epoch 2.
            state = checkpoint.state.read_text()
            with pytest.raises(Stopped):
                train(checkpoint, stop_after(3))
            assert checkpoint.weights.read_bytes() != earlier
            checkpoint.state.write_text(state)
        case _:
            checkpoint.weights.unlink()
    assert checkpoint.load() is None
    with pytest.raises(Stopped):  # which it would not after the first epoch, had it gone on after the second
        train(checkpoint, stop_after(1))
    restarted = checkpoint.load()
    assert restarted is not None
    assert restarted[1]["done"] == 1


# --- independence ---------------------------------------------------------------------------------


def test_no_run_depends_on_what_ran_before(whole: tuple[Classifier, History]) -> None:
    torch.manual_seed(12345)
    train(site="birch", params=PARAMS.model_copy(update={"epochs": 1}))
    torch.rand(7)
    again, history = train()
    assert same(again, whole[0])
    assert history == whole[1]


def test_another_site_or_seed_is_another_run() -> None:
    short = PARAMS.model_copy(update={"epochs": 1})
    assert not same(train(site="birch", params=short)[0], train(params=short)[0])
    assert torch.equal(torch.rand(3, generator=generator(1, "a")), torch.rand(3, generator=generator(1, "a")))
    assert not torch.equal(
        torch.rand(3, generator=generator(1, "a")), torch.rand(3, generator=generator(1, "b"))
    )


def test_it_learns(whole: tuple[Classifier, History]) -> None:
    images, labels = shapes((0, 1, 2), 30, 77)
    network, history = whole
    assert not network.training
    assert mean_recall(predict(network, to_input(images), CPU).argmax(1), torch.from_numpy(labels)) > 0.8
    assert history.curves[-1]["loss"] < 0.7 * history.curves[0]["loss"]
    assert [row["epoch"] for row in history.curves] == [1.0, 2.0, 3.0, 4.0, 5.0]


# --- the loop by hand -----------------------------------------------------------------------------


class Walk(nn.Module):
    """One parameter whose gradient is always 1, so that AdamW moves it down by the learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(()))


def walk(
    scores: list[float] | None, epochs: int = 8, patience: int | None = 3, steps: int = 1
) -> tuple[Walk, History, list[bool]]:
    module, modes = Walk(), []
    given = iter(scores or [])

    def score() -> float:
        modes.append(module.training)
        return next(given)

    def batches(epoch: int) -> Iterator[int]:
        yield from range(steps)

    def loss(batch: int) -> Tensor:
        modes.append(module.training)
        return module.place * 1.0

    history = fit(
        module,
        batches,
        steps,
        loss,
        Schedule(epochs, 1.0, 0.0, patience),
        device=CPU,
        score=score if scores is not None else None,
    )
    return module, history, modes


def test_learning_rate_by_hand() -> None:
    # 20 steps, a tenth of them warm-up: 1/2, 1, then a cosine over the 18 that are left.
    factors = [learning_rate_factor(s, 20, 0.1) for s in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[2 + 9] == pytest.approx(0.5)
    assert factors[2 + 6] == pytest.approx(0.75)
    assert factors[2 + 12] == pytest.approx(0.25)
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert 0 < factors[-1] < 0.01
    assert [learning_rate_factor(s, 1, 0.1) for s in range(1)] == [1.0]
    assert learning_rate_factor(20, 20, 0.1) == pytest.approx(0.0)


def test_steps_follow_the_learning_rate() -> None:
    # Adam's step for a gradient that is always 1 is the learning rate itself.
    module, history, _ = walk(None, epochs=4, steps=5)
    expected = -sum(learning_rate_factor(s, 20, 0.1) for s in range(20))
    assert float(module.place.detach()) == pytest.approx(expected, rel=1e-5)
    # The loss is the place before the step, averaged over an epoch: 0, -0.5, -1.5, -2.5, ... in the first.
    places = -np.cumsum([0.0] + [learning_rate_factor(s, 20, 0.1) for s in range(19)])
    assert [r["loss"] for r in history.curves] == pytest.approx(
        places.reshape(4, 5).mean(1).tolist(), rel=1e-5
    )
    assert history.best_epoch == 4


def test_early_stopping_keeps_the_best_epoch() -> None:
    module, history, _ = walk([0.1, 0.5, 0.4, 0.5, 0.3, 0.9])
    assert history.stopped_early
    assert history.best_epoch == 2
    assert [r["score"] for r in history.curves] == [0.1, 0.5, 0.4, 0.5, 0.3]
    two_steps = -sum(learning_rate_factor(s, 8, 0.1) for s in range(2))
    assert float(module.place.detach()) == pytest.approx(two_steps, rel=1e-5)
    _, history, _ = walk([0.1, 0.2, 0.2, 0.1, 0.3, 0.2, 0.2, 0.4], epochs=8)
    assert not history.stopped_early
    assert history.best_epoch == 8
    assert len(history.curves) == 8


def test_training_and_evaluation_modes_take_turns() -> None:
    module, _, modes = walk([0.1, 0.2], epochs=2, steps=2)
    assert modes == [True, True, False, True, True, False]
    assert not module.training


def test_only_what_asks_for_it_is_trained() -> None:
    module = nn.Linear(2, 1)
    module.bias.requires_grad_(False)
    start = {k: v.clone() for k, v in module.state_dict().items()}
    fit(
        module,
        lambda epoch: iter([torch.ones(1, 2)]),
        1,
        lambda batch: module(batch).sum(),
        Schedule(2, 0.1, 0.5),
        device=CPU,
    )
    assert torch.equal(module.bias, start["bias"])
    assert not torch.equal(module.weight, start["weight"])


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 3, 7, 16, 64, 199])
def test_batches_are_as_many_as_announced(batch_size: int) -> None:
    for count in range(1, 201):
        parts = list(shuffled(count, batch_size, generator(0, str(count))))
        assert len(parts) == batches_per_epoch(count, batch_size)
        assert torch.cat(parts).sort().values.tolist() == list(range(count))
        sizes = [len(p) for p in parts]
        assert max(sizes) <= batch_size + 1
        assert count == 1 or min(sizes) > 1


@given(st.integers(1, 5000), st.integers(2, 4096))
def test_announced_batches_cover_the_images(count: int, batch_size: int) -> None:
    number = batches_per_epoch(count, batch_size)
    assert (number - 1) * batch_size < count <= number * batch_size + 1


def test_inputs_by_hand() -> None:
    images = np.array([[[[0, 255], [51, 204]]]], dtype=np.uint8)
    expected = torch.tensor([[[[-1.0, 1.0], [-0.6, 0.6]]]])
    assert torch.allclose(to_input(images), expected, atol=1e-6)
    floats = images.astype(np.float32) / 255
    assert torch.allclose(to_input(floats), expected, atol=1e-6)
    assert torch.equal(to_input(floats, "zscore"), torch.from_numpy(floats))
    assert to_input(images).dtype == torch.float32
    assert images.max() == 255, "what is given is not written to"


def test_predict_in_parts_equals_predict_at_once(whole: tuple[Classifier, History]) -> None:
    network = whole[0]
    inputs = to_input(shapes((0, 1), 300, 0)[0])
    with torch.no_grad():
        expected = network(inputs)
    network.train()
    found, features = predict(network, inputs, CPU), predict(network, inputs, CPU, features=True)
    assert network.training, "the mode is given back"
    network.eval()
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(network.head(features).detach(), found, atol=1e-4)
    assert not found.requires_grad


def test_batches_of_volumes_are_of_fewer_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    plain = classifier.augmented_batches

    def batches(inputs: Tensor, labels: Tensor, size: int, *rest: Any, **more: Any) -> Any:
        seen.add(size)
        return plain(inputs, labels, size, *rest, **more)

    monkeypatch.setattr(classifier, "augmented_batches", batches)
    pixels = shapes((0,), 1, 1)[0][0, 0].size
    for bound, size in ((16 * pixels, 16), (7 * pixels, 7), (pixels, 4)):
        seen.clear()
        monkeypatch.setattr(classifier, "PIXELS_PER_BATCH", bound)
        train(params=TrainParams(epochs=1, batch_size=16))
        assert seen == {size}


@pytest.mark.parametrize(
    ("shape", "at_once"),
    [
        *(((3, 28, 28), 64), ((3, 64, 64), 64), ((1, 65, 65), 62), ((3, 224, 224), 5)),
        *(((1, 64, 64, 64), 2), ((1, 600, 600), 2), ((1280,), 64)),  # the last are features
    ],
)
def test_batches_of_large_images_are_of_fewer(shape: tuple[int, ...], at_once: int) -> None:
    assert images_at_once(torch.empty(9, *shape), 64, 64**3, 2) == at_once


@pytest.mark.parametrize(
    ("count", "batch_size", "least"), [(10, 4, 7), (10, 4, 3), (10, 4, 1), (1, 8, 5), (33, 16, 4)]
)
def test_few_items_come_again_until_there_are_batches_enough(count: int, batch_size: int, least: int) -> None:
    parts = list(shuffled(count, batch_size, generator(0, "again"), least))
    once = batches_per_epoch(count, batch_size)
    assert len(parts) == batches_per_epoch(count, batch_size, least)
    assert least <= len(parts) < least + once or (least <= once and len(parts) == once)
    passes = [torch.cat(parts[i : i + once]) for i in range(0, len(parts), once)]
    assert all(sorted(order.tolist()) == list(range(count)) for order in passes)
    if count > 2 and len(passes) > 1:
        assert not torch.equal(passes[0], passes[1]), "in another order"


@pytest.mark.parametrize(
    ("normalisation", "least", "changes"), [("unit", 20, True), ("unit", 21, False), ("zscore", 20, False)]
)
def test_a_small_site_takes_as_many_steps_as_asked_and_sees_other_stains(
    monkeypatch: pytest.MonkeyPatch, normalisation: str, least: int, changes: bool
) -> None:
    seen: list[tuple[int, float]] = []

    def noted(images: Tensor, strength: float, draw: torch.Generator) -> Tensor:
        seen.append((len(images), strength))
        return images

    monkeypatch.setattr("qkt_clinical.training.classifier.change_appearance", noted)
    images, labels = shapes((0, 1), 10, 3)
    train_teacher(
        spec(),
        (images, labels),
        (images, labels),
        PARAMS.model_copy(
            update={"epochs": 2, "min_batches": 7, "appearance": 0.5, "appearance_images": least}
        ),
        task=MULTICLASS,
        seed=0,
        site="aster",
        normalisation=normalisation,
        device=CPU,
    )
    assert len(seen) == 2 * batches_per_epoch(20, PARAMS.batch_size, 7) == 2 * 8
    assert sum(count for count, _ in seen) == 2 * 4 * 20
    assert {strength for _, strength in seen} == {0.5 if changes else 0.0}
