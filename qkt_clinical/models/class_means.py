"""Mean features of every class over a site's training images, which a teacher's bundle holds.

They say where a class lies among the network's features: what a hospital without an image of the class needs
to tell it from its own (:mod:`qkt_clinical.qkt.discriminant`). What they tell of patients is weighed in
``docs/privacy.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkt_clinical.common.disclosure import SMALLEST_COUNT
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Images, Labels
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier


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


def class_means(
    network: Classifier, images: Images, labels: Labels, normalisation: str, device: torch.device
) -> dict[int, Tensor]:
    """Class to its mean features (F,), float32, of every class of ``SMALLEST_COUNT`` images or more.

    Args:
        network: trained, left as it is.
        images: (N, C, *spatial) as prepared; labels: (N,).
    """
    features = predict(network, to_input(images, normalisation), device, features=True)
    return mean_features(features, torch.from_numpy(labels), SMALLEST_COUNT)
