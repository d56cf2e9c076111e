"""Class means under differential privacy: noise on numbers of images and on sums, with epsilon told.

Features have length 1, so that an image moves what is sent by a bounded amount; Gaussian noise then hides it
(the analytic Gaussian mechanism; Balle and Wang, ICML 2018, arXiv 1805.06530). Neighbouring data differ in
one image that is added or left out; it is in one class, so that the classes together spend no more than one.
Not covered: which classes there are.

Pure functions of tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

COUNT_SHARE = 0.1
"""Of the squared sensitivity that a class's number of images has, the sum of its features having the rest."""


def noise_scale(epsilon: float, delta: float) -> float:
    """Standard deviation of Gaussian noise that gives (epsilon, delta) at sensitivity 1.

    The smallest sigma with ``Phi(1 / (2 sigma) - epsilon sigma) - e^epsilon Phi(-1 / (2 sigma) - epsilon
    sigma) <= delta`` (Balle and Wang, theorem 8), by bisection. By hand: Opacus bounds many steps on samples,
    which for a single release is more noise than needed.
    """
    from scipy.stats import norm

    def spent(sigma: float) -> float:
        first = norm.cdf(0.5 / sigma - epsilon * sigma)
        return float(first - math.exp(epsilon + norm.logcdf(-0.5 / sigma - epsilon * sigma)))

    low, high = 1e-4, 1e4
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spent(middle) <= delta else (middle, high)
    return high


def private_means(
    features: Tensor, labels: Tensor, *, epsilon: float, delta: float, least: int, draw: torch.Generator
) -> dict[int, Tensor]:
    """Class to the mean (F,), float32, of its features, under (epsilon, delta) for single images.

    Args:
        features: (N, F) of length 1 at most; labels: (N,).
        least: images of a class, at least, by its noisy number; classes of fewer are left out.
        draw: of the noise; whoever knows its seed can take the noise off.

    Raises:
        ValueError: a feature is longer than 1.
    """
    if len(features) and float(features.norm(dim=1).max()) > 1 + 1e-5:
        raise ValueError("features longer than 1")
    sigma, means = noise_scale(epsilon, delta), {}
    for label in labels.unique().tolist():
        of_class = features[labels == label].double()
        noise = torch.randn(1 + features.shape[1], generator=draw, dtype=torch.double)
        count = len(of_class) + sigma / math.sqrt(COUNT_SHARE) * float(noise[0])
        if count >= least:
            total = of_class.sum(dim=0) + sigma / math.sqrt(1 - COUNT_SHARE) * noise[1:]
            means[int(label)] = (total / count).float()
    return means
