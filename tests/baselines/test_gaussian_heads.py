"""Gaussian heads: mixtures of classes, features drawn from them, and the head that is trained on these."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qkt_clinical.baselines.gaussian_heads import (
    COMPONENTS,
    DRAWN,
    Mixture,
    best_head,
    class_mixtures,
    draw,
    drawn_features,
)
from qkt_clinical.task import MULTICLASS

WIDTH = 6


def clouds(labels: Tensor, seed: int = 0) -> Tensor:
    means = 3 * torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9))
    return means[labels] + torch.randn(len(labels), WIDTH, generator=torch.Generator().manual_seed(seed))


def test_every_class_gets_as_many_gaussians_as_its_images_allow() -> None:
    labels = torch.tensor([0] * 200 + [1] * 25 + [2] * 5 + [3])
    found = class_mixtures(clouds(labels), labels, seed=0)
    assert {c: len(m.weights) for c, m in found.items()} == {0: COMPONENTS, 1: 2, 2: 1}
    assert {c: m.count for c, m in found.items()} == {0: 200, 1: 25, 2: 5}
    assert found[1].bytes == 4 * (1 + 2 + 2 * 2 * WIDTH)
    assert all(bool((m.variances > 0).all()) for m in found.values())


def test_one_gaussian_has_the_mean_and_the_variance_of_its_images() -> None:
    labels = torch.zeros(15, dtype=torch.int64)
    features = 100 * clouds(labels)
    found = class_mixtures(features, labels, seed=0)[0]
    assert torch.allclose(found.means[0], features.mean(dim=0), rtol=1e-3)
    assert torch.allclose(found.variances[0], features.var(dim=0, unbiased=False), rtol=0.02)


def test_what_is_drawn_is_distributed_as_the_mixture() -> None:
    mixture = Mixture(
        40,
        torch.tensor([0.25, 0.75]),
        torch.tensor([[0.0, 10.0], [100.0, 10.0]]),
        torch.tensor([[1.0, 4.0], [1.0, 4.0]]),
    )
    found = draw(mixture, 4000, np.random.default_rng(0))
    assert float((found[:, 0] > 50).double().mean()) == pytest.approx(0.75, abs=0.03)
    assert float(found[:, 1].mean()) == pytest.approx(10.0, abs=0.2)
    assert float(found[:, 1].std()) == pytest.approx(2.0, abs=0.1)


def test_hospitals_are_drawn_from_in_proportion_to_their_images() -> None:
    def at(value: float, count: int) -> Mixture:
        return Mixture(count, torch.ones(1), torch.full((1, 2), value), torch.full((1, 2), 1e-6))

    features, labels = drawn_features([{0: at(1.0, 30)}, {0: at(5.0, 10), 3: at(9.0, 4)}], [0, 2, 3], seed=0)
    assert torch.bincount(labels).tolist() == [DRAWN, 0, 0, DRAWN]
    assert int((features[labels == 0][:, 0] < 3).sum()) == round(0.75 * DRAWN)
    again = drawn_features([{0: at(1.0, 30)}, {0: at(5.0, 10), 3: at(9.0, 4)}], [0, 2, 3], seed=0)
    assert torch.equal(features, again[0])


@pytest.mark.parametrize("held", [(0, 1, 3), (0, 3)])
def test_a_head_of_drawn_features_tells_real_images_apart(held: tuple[int, ...]) -> None:
    labels, fresh = (torch.tensor(held).repeat(n) for n in (40, 100))
    mixtures = class_mixtures(clouds(labels), labels, seed=0)
    train = drawn_features([mixtures], held, seed=0)
    held_out = clouds(labels, seed=2), labels
    weight, bias = best_head(train, held_out, held, 5, task=MULTICLASS)
    scores = (clouds(fresh, seed=1) @ weight.T + bias)[:, list(held)]
    assert float((torch.tensor(held)[scores.argmax(dim=1)] == fresh).double().mean()) > 0.95
    others = [c for c in range(5) if c not in held]
    assert not weight[others].any()
    assert not bias[others].any()
