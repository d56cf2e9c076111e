"""Mean features of every class over a site's training images, which a teacher's bundle holds.

They say where a class lies among the network's features: what a hospital without an image of the class needs
to tell it from its own (:mod:`qkt_clinical.qkt.discriminant`). What they tell of patients is weighed in
``docs/privacy.md``.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from qkt_clinical.common.disclosure import SMALLEST_COUNT
from qkt_clinical.config.params import MeansPrivacy
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Images, Labels
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.models.private_means import private_means

NOISE_IMAGES = 256
BOUND = 4.0
"""Times the mean length of features of noise: those of a network's own classes are about twice as long."""
LENGTH_SHARE = 0.25
"""Of the squared sensitivity that a feature's length has, its direction having the rest."""
MIN_LENGTH = 1e-12


def mean_features(features: Tensor, labels: Tensor, least: int = 1) -> dict[int, Tensor]:
    """Class to the mean (F,) of its features.

    Args:
        features: (N, F); labels: (N,).
        least: images of a class, at least; classes of fewer are left out.
    """
    means = {}
    for label in labels.unique().tolist():
        of_class = features[labels == label]
        if len(of_class) >= least:
            means[int(label)] = of_class.mean(dim=0)
    return means


def feature_bound(network: Classifier, images: Images, normalisation: str, device: torch.device) -> float:
    """A length that few features exceed, told by the network alone: images of noise say how long they are.

    Args:
        images: (N, C, *spatial), of which only the shape is used.
    """
    noise = np.random.default_rng(0).random((NOISE_IMAGES, *images.shape[1:]), dtype=np.float32)
    features = predict(network, to_input(noise, normalisation), device, features=True)
    return BOUND * float(features.norm(dim=1).mean())


def class_means(
    network: Classifier,
    images: Images,
    labels: Labels,
    normalisation: str,
    device: torch.device,
    privacy: MeansPrivacy,
    draw: torch.Generator,
) -> dict[int, Tensor]:
    """Class to its mean features (F,), float32, of every class of ``SMALLEST_COUNT`` images or more.

    Args:
        network: trained, left as it is.
        images: (N, C, *spatial) as prepared; labels: (N,).
        privacy: how much noise is on them; with noise, lengths are cut to :func:`feature_bound`.
        draw: of the noise.
    """
    features = predict(network, to_input(images, normalisation), device, features=True)
    truth = torch.from_numpy(labels)
    if privacy.epsilon is None:
        return mean_features(features, truth, SMALLEST_COUNT)
    bound = feature_bound(network, images, normalisation, device)
    return noisy_means(features, truth, bound, privacy, SMALLEST_COUNT, draw)


def noisy_means(
    features: Tensor, labels: Tensor, bound: float, privacy: MeansPrivacy, least: int, draw: torch.Generator
) -> dict[int, Tensor]:
    """Class to the mean (F,) of its features, with noise: mean direction times mean length.

    Apart, so that the noise on directions does not depend on how far the bound lies above the lengths.

    Args:
        features: (N, F); labels: (N,).
        bound: lengths are cut to it; told by no image.
        privacy: with an epsilon.
        least: images of a class, at least, by their noisy number.
    """
    assert privacy.epsilon is not None
    lengths = features.norm(dim=1, keepdim=True)
    parts = math.sqrt(1 - LENGTH_SHARE), math.sqrt(LENGTH_SHARE)
    directions = features / lengths.clamp(min=MIN_LENGTH)
    told = torch.cat(
        [parts[0] * directions, parts[1] * (lengths / max(bound, MIN_LENGTH)).clamp(max=1)], dim=1
    )
    means = private_means(told, labels, epsilon=privacy.epsilon, delta=privacy.delta, least=least, draw=draw)
    return {
        label: mean[:-1] / parts[0] * (bound * mean[-1] / parts[1]).clamp(min=0)
        for label, mean in means.items()
    }
