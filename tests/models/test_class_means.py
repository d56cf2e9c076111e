"""Mean features of every class, which a teacher's bundle holds."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from qkt_clinical.common.disclosure import SMALLEST_COUNT
from qkt_clinical.config.params import MeansPrivacy
from qkt_clinical.data.inputs import to_input
from qkt_clinical.models.class_means import LENGTH_SHARE, class_means, feature_bound, mean_features
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import build
from qkt_clinical.models.private_means import COUNT_SHARE, noise_scale
from qkt_clinical.records.card import NetworkSpec

EXACT = MeansPrivacy(epsilon=None)
CPU = torch.device("cpu")


def test_means_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]])
    means = mean_features(features, torch.tensor([4, 4, 1]))
    assert sorted(means) == [1, 4]
    assert means[4].tolist() == [2.0, 1.0]
    assert means[1].tolist() == [5.0, 5.0]


def test_classes_of_few_images_have_no_mean() -> None:
    labels = torch.tensor([0] * 5 + [1] * 4)
    assert sorted(mean_features(torch.ones(9, 2), labels, 5)) == [0]


def test_means_are_those_of_the_networks_features() -> None:
    network = build(NetworkSpec(name="resnet-small", spatial_dims=2, in_channels=3, classes=3), seed=1).eval()
    images = np.random.default_rng(0).integers(0, 256, (14, 3, 16, 16), dtype=np.uint8)
    labels = np.array(
        [0] * SMALLEST_COUNT + [2] * SMALLEST_COUNT + [1] * (SMALLEST_COUNT - 1), dtype=np.int64
    )
    means = class_means(network, images, labels, "unit", CPU, EXACT, generator(0))
    assert sorted(means) == [0, 2]
    expected = predict(network, to_input(images[:SMALLEST_COUNT]), CPU, features=True).mean(dim=0)
    assert torch.allclose(means[0], expected, atol=1e-6)
    assert means[0].shape == (network.head.in_features,)


def test_means_that_leave_have_noise_scaled_to_a_bound_that_no_image_sets() -> None:
    network = build(NetworkSpec(name="resnet-small", spatial_dims=2, in_channels=3, classes=3), seed=1).eval()
    images = np.random.default_rng(0).integers(0, 256, (60, 3, 16, 16), dtype=np.uint8)
    labels = np.zeros(60, dtype=np.int64)
    bound = feature_bound(network, images, "unit", CPU)
    assert bound == feature_bound(network, np.zeros_like(images[:1]), "unit", CPU), "not of the images"
    exact = class_means(network, images, labels, "unit", CPU, EXACT, generator(0))[0]
    sizes = []
    for epsilon in (8.0, 1.0):
        noisy = class_means(network, images, labels, "unit", CPU, MeansPrivacy(epsilon=epsilon), generator(0))
        sizes.append(float((noisy[0] - exact).norm()))
    # Of every number of the direction, and of the length: noise_scale / sqrt(0.9 * its share) / images.
    for size, epsilon in zip(sizes, (8.0, 1.0), strict=True):
        each = noise_scale(epsilon, 1e-5) / math.sqrt(1 - COUNT_SHARE) / 60
        turned = each / math.sqrt(1 - LENGTH_SHARE) * math.sqrt(len(exact)) * float(exact.norm())
        longer = each / math.sqrt(LENGTH_SHARE) * bound
        assert 0.7 * turned < size < 1.3 * turned + 3 * longer


def test_a_feature_far_beyond_the_bound_moves_a_mean_no_more_than_others() -> None:
    network = build(NetworkSpec(name="resnet-small", spatial_dims=2, in_channels=3, classes=3), seed=1).eval()
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 16, 16), dtype=np.uint8)
    labels = np.zeros(40, dtype=np.int64)
    hardly = MeansPrivacy(epsilon=1000.0)

    def loud_on_white(_module: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
        white = given[0].flatten(1).mean(dim=1, keepdim=True) > 0.9
        return torch.where(white, 1e4, found)

    network.get_submodule("extractor").register_forward_hook(loud_on_white)
    bound = feature_bound(network, images, "unit", CPU)
    images[0] = 255
    mean = class_means(network, images, labels, "unit", CPU, hardly, generator(0))[0]
    others = class_means(network, images[1:], labels[1:], "unit", CPU, hardly, generator(0))[0]
    assert float((mean - others).norm()) < 2.5 * bound / 40
