"""The measurement of speed and size: what is compared, and when it fails."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import speed
from benchmarks.speed import Bar, Work
from qkt_clinical.config.params import TrainParams
from qkt_clinical.models.networks import build


def test_a_bar_holds_at_its_edge() -> None:
    assert Bar("a", 0.95, least=0.95).holds
    assert not Bar("a", 0.949, least=0.95).holds
    assert Bar("a", 0.4, most=0.4).holds
    assert not Bar("a", 0.401, most=0.4).holds
    assert Bar("a", 0.5, most=0.4).row(judged=True)["holds"] == "NO"
    assert Bar("a", 0.5, most=0.4).row(judged=False)["holds"] == "not judged"


def test_ratios_are_of_the_same_turn() -> None:
    assert speed._median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0


def test_a_teacher_is_a_quarter_of_its_size() -> None:
    work = Work("small", (3, 28, 28), 8)
    found = speed.bundle_bytes(build(work.spec, seed=0), work.shape)
    weights = sum(t.numel() for t in build(work.spec, seed=0).state_dict().values() if t.ndim >= 2)
    assert abs(found[False] - found[True] - 3 * weights) < 0.02 * found[False], "less distances, more means"


@pytest.mark.parametrize("loop", [speed.product, speed.bare, speed.recipe])
def test_every_contender_sees_every_image_once_an_epoch(
    monkeypatch: pytest.MonkeyPatch, loop: speed.Loop
) -> None:
    seen: list[int] = []
    forward = torch.nn.Linear.forward

    def counted(layer: torch.nn.Linear, features: torch.Tensor) -> torch.Tensor:
        seen.append(len(features))
        return forward(layer, features)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    work = Work("small", (3, 28, 28), 20)
    images, labels = work.drawn()
    assert (images.shape, images.dtype, set(labels)) == ((20, 3, 28, 28), np.uint8, set(range(8)))
    loop(work, images, labels, TrainParams(epochs=2, batch_size=8, appearance=0.0))
    assert (sum(seen), max(seen)) == (40, 8)


@pytest.mark.slow
def test_quickly_it_runs_everything_and_judges_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "WORK", (Work("28 px", (3, 28, 28), 8), Work("volumes", (1, 16, 16, 16), 8)))
    assert speed.main(["--quick"]) == 0
    out = capsys.readouterr().out
    assert out.count("not judged") == 8
    assert "| bytes of a teacher, resnet18 |" in out
    monkeypatch.setattr(speed, "bundle_bytes", lambda *_: {True: 9, False: 10})
    assert speed.main(["--quick"]) == 1
