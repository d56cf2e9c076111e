"""Mean features of every class, which a teacher's bundle holds."""

from __future__ import annotations

import numpy as np
import torch

from qkt_clinical.common.disclosure import SMALLEST_COUNT
from qkt_clinical.data.inputs import to_input
from qkt_clinical.models.class_means import class_means, mean_features
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import build
from qkt_clinical.records.card import NetworkSpec

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
    means = class_means(network, images, labels, "unit", CPU)
    assert sorted(means) == [0, 2]
    expected = predict(network, to_input(images[:SMALLEST_COUNT]), CPU, features=True).mean(dim=0)
    assert torch.allclose(means[0], expected, atol=1e-6)
    assert means[0].shape == (network.head.in_features,)
