"""Statistics under differential privacy: noise against the mechanism's definition, bounds, what is left."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm

from qkt_clinical.baselines.statistics import class_statistics, pool, without_small
from qkt_clinical.baselines.statistics_dp import (
    DIMENSIONS,
    SHARES,
    noise_scale,
    private_statistics,
    projected,
)
from qkt_clinical.common.seeding import derive
from tests.baselines.test_statistics import head_of


@pytest.mark.parametrize(("epsilon", "delta"), [(8.0, 1e-5), (1.0, 1e-5), (0.1, 1e-6), (50.0, 1e-3)])
def test_noise_is_the_least_that_the_definition_allows(epsilon: float, delta: float) -> None:
    def spent(sigma: float) -> float:  # the privacy loss of N(0, sigma^2) against N(1, sigma^2)
        a, b = 0.5 / sigma - epsilon * sigma, -0.5 / sigma - epsilon * sigma
        return float(norm.cdf(a) - math.exp(epsilon) * norm.cdf(b))

    sigma = noise_scale(epsilon, delta)
    assert spent(sigma) <= delta * (1 + 1e-6)
    assert spent(sigma * 0.999) > delta


def test_at_epsilon_1_noise_is_below_that_of_the_classical_mechanism() -> None:
    assert noise_scale(1.0, 1e-5) < math.sqrt(2 * math.log(1.25 / 1e-5))


def test_an_image_moves_all_that_is_sent_by_1_at_most() -> None:
    features = projected(torch.randn(5, 300, generator=torch.Generator().manual_seed(0)), seed=1)
    labels = torch.tensor([0, 0, 1, 1, 2])
    whole, less = (class_statistics(features[:n], labels[:n], 3) for n in (5, 4))
    parts = [(a - b).square().sum() for a, b in zip(vars(whole).values(), vars(less).values(), strict=True)]
    assert float(sum(s * p for s, p in zip(SHARES, parts, strict=True))) == pytest.approx(1.0, abs=1e-5)
    assert sum(SHARES) == pytest.approx(1.0)


def test_features_are_projected_alike_everywhere_and_have_length_1() -> None:
    features = torch.randn(40, 1280, generator=torch.Generator().manual_seed(0))
    found = projected(features, seed=3)
    assert found.shape == (40, DIMENSIONS)
    assert torch.allclose(found.norm(dim=1), torch.ones(40), atol=1e-5)
    assert torch.equal(found[:7], projected(features[:7], seed=3))
    assert not torch.equal(found, projected(features, seed=4))
    angles = features @ features.T / features.norm(dim=1).outer(features.norm(dim=1))
    assert (found @ found.T - angles).abs().mean() < 0.15, "a projection keeps angles about as they are"


def test_noise_is_of_the_size_that_is_told_and_of_the_seed_alone() -> None:
    features, labels = torch.zeros(4, DIMENSIONS), torch.tensor([0, 1, 2, 3])
    drawn = [private_statistics(features, labels, 400, epsilon=1.0, delta=1e-5, seed=s) for s in range(3)]
    sigma = noise_scale(1.0, 1e-5)
    for found in drawn:
        assert float(found.sums.std()) == pytest.approx(sigma / math.sqrt(SHARES[1]), rel=0.03)
        upper = found.moment[torch.triu_indices(DIMENSIONS, DIMENSIONS).unbind()]
        assert float(upper.std()) == pytest.approx(sigma / math.sqrt(SHARES[2]), rel=0.05)
        assert torch.equal(found.moment, found.moment.T)
        assert float(found.counts.min()) >= 0
    again = private_statistics(features, labels, 400, epsilon=1.0, delta=1e-5, seed=1)
    assert torch.equal(again.sums, drawn[1].sums)
    assert not torch.equal(drawn[0].sums, drawn[1].sums)


def test_features_longer_than_1_are_refused() -> None:
    with pytest.raises(ValueError, match="longer than 1"):
        private_statistics(torch.full((2, 4), 1.0), torch.tensor([0, 1]), 2, epsilon=1.0, delta=1e-5, seed=0)


def test_with_enough_images_classes_are_still_told_apart() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(400)
    features = projected(
        torch.randn(3, 200, generator=draw)[labels] + 0.7 * torch.randn(1200, 200, generator=draw), seed=0
    )

    def right(epsilon: float) -> float:
        each = [
            private_statistics(
                features[i::2], labels[i::2], 5, epsilon=epsilon, delta=1e-5, seed=derive(0, str(i))
            )
            for i in range(2)
        ]
        weight, bias = head_of(without_small(pool(each), 5), [0, 1, 2], 0.1)
        answers = (features @ weight.T + bias)[:, :3].argmax(dim=1)
        return float((answers == labels).double().mean())

    assert right(8.0) > 0.9
    assert right(0.01) < 0.6, "noise that hides everybody hides the classes too"


def test_classes_that_may_be_noise_alone_are_left_out() -> None:
    found = class_statistics(torch.ones(6, 2), torch.tensor([0, 0, 0, 0, 0, 1]), 3)
    kept = without_small(found, 5)
    assert kept.counts.tolist() == [5, 0, 0]
    assert kept.sums.tolist() == [[5, 5], [0, 0], [0, 0]]
    assert torch.equal(kept.moment, found.moment)
