"""Class means under differential privacy: the noise is what the accountant says, and no more is said."""

from __future__ import annotations

import math

import pytest
import torch

from qkt_clinical.models.private_means import COUNT_SHARE, noise_scale, private_means


def unit(count: int, width: int, seed: int = 0) -> torch.Tensor:
    features = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return features / features.norm(dim=1, keepdim=True)


def made(features: torch.Tensor, labels: torch.Tensor, epsilon: float, seed: int, least: int = 1):  # type: ignore[no-untyped-def]
    draw = torch.Generator().manual_seed(seed)
    return private_means(features, labels, epsilon=epsilon, delta=1e-5, least=least, draw=draw)


def test_without_noise_to_speak_of_they_are_the_means() -> None:
    features, labels = unit(60, 8), torch.arange(60) % 3
    for label, mean in made(features, labels, 1000.0, 1).items():
        assert torch.allclose(mean, features[labels == label].mean(dim=0), atol=0.02)


def test_the_noise_is_as_large_as_epsilon_says() -> None:
    """Of the sum of a class: sigma over the root of its share."""
    count, width, epsilon = 4000, 400, 4.0
    features, labels = unit(count, width), torch.zeros(count, dtype=torch.long)
    exact = features.mean(dim=0)
    away = torch.cat([made(features, labels, epsilon, seed)[0] - exact for seed in range(20)])
    expected = noise_scale(epsilon, 1e-5) / math.sqrt(1 - COUNT_SHARE) / count
    assert float(away.std()) == pytest.approx(expected, rel=0.05)


def test_an_image_moves_count_and_sum_by_one_at_most() -> None:
    """The squared sensitivity of both, at their shares of the noise, is 1."""
    assert COUNT_SHARE * 1.0**2 + (1 - COUNT_SHARE) * 1.0**2 == 1.0
    with pytest.raises(ValueError, match="longer than 1"):
        made(2 * unit(5, 3), torch.zeros(5, dtype=torch.long), 8.0, 0)


def test_classes_of_few_images_are_left_out_by_their_noisy_number() -> None:
    features = unit(43, 4)
    labels = torch.tensor([0] * 40 + [1] * 3)
    found = [sorted(made(features, labels, 8.0, seed, least=5)) for seed in range(200)]
    assert all(0 in classes for classes in found)
    told = sum(1 in classes for classes in found) / 200
    assert 0.05 < told < 0.5, "by chance, so that nobody knows whether there were five"


def test_the_same_draw_gives_the_same_means_and_no_image_none() -> None:
    features, labels = unit(30, 4), torch.arange(30) % 2
    one, two, other = (made(features, labels, 8.0, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[c], two[c]) for c in one)
    assert not torch.equal(one[0], other[0])
    assert made(unit(0, 4), torch.zeros(0, dtype=torch.long), 8.0, 0) == {}
