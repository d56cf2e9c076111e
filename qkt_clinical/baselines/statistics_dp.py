"""Class statistics under differential privacy: noise on counts, sums and second moment, with epsilon told.

Features are projected at random to few dimensions and each image's brought to length 1, so that an image
moves what is sent by a bounded amount; Gaussian noise then hides it (the analytic Gaussian mechanism; Balle
and Wang, ICML 2018, arXiv 1805.06530). Neighbouring data differ in one image that is added or left out. What
is made of the statistics afterwards is as private as they are. The noise is a generator's of a seed: for
figures, not for release.

Pure functions of tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qkt_clinical.baselines.statistics import ClassStatistics, class_statistics
from qkt_clinical.models.generator import generator
from qkt_clinical.models.private_means import noise_scale

DIMENSIONS = 64
"""Of the projection: noise on the second moment grows with their number, what it says hardly."""
SHARES = (0.1, 0.6, 0.3)
"""Of the squared sensitivity that counts, sums and second moment have."""


def projected(features: Tensor, *, seed: int) -> Tensor:
    """Features (N, F) in ``DIMENSIONS`` random directions, which all hospitals share, each of length 1."""
    random = torch.randn(features.shape[1], DIMENSIONS, generator=generator(seed, "projection"))
    found: Tensor = features @ (random / math.sqrt(DIMENSIONS))
    length: Tensor = found.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return found / length


def private_statistics(
    features: Tensor, labels: Tensor, classes: int, *, epsilon: float, delta: float, seed: int
) -> ClassStatistics:
    """Statistics of features (N, F) of length 1 at most, under (epsilon, delta) for single images.

    An image adds 1 to a count, a vector of length 1 to a sum, and a matrix of norm 1 to the moment: scaled by
    the roots of ``SHARES`` the three together have sensitivity 1 and get the same noise.

    Args:
        seed: of the noise.

    Raises:
        ValueError: a feature is longer than 1.
    """
    if float(features.norm(dim=1).max()) > 1 + 1e-5:
        raise ValueError("features longer than 1")
    plain = class_statistics(features, labels, classes)
    sigma, draw = noise_scale(epsilon, delta), generator(seed, "noise")

    def noisy(values: Tensor, share: float) -> Tensor:
        noise = torch.randn(values.shape, generator=draw, dtype=torch.double)
        return values + sigma / math.sqrt(share) * noise

    counts, sums, moment = (
        noisy(v, s) for v, s in zip((plain.counts, plain.sums, plain.moment), SHARES, strict=True)
    )
    upper = moment.triu()  # noise of one triangle alone: the other is the same number sent again
    return ClassStatistics(counts.clamp(min=0), sums, upper + upper.triu(1).T)
