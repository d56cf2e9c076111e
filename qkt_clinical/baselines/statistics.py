"""Class statistics over the features of a common frozen encoder, shared once: a head without training.

Every hospital sends, per class, the number and the sum of its images' features, and one second moment of
all. Summed over the hospitals these are the statistics of all images in one place, however classes are
divided, and they give the linear discriminants of the pooled images (FedCGS; Guan, Zhou and Gu, AAAI 2025,
arXiv 2503.06962). *Centred*, each hospital first takes its own mean off its features: a shift between
scanners goes, and with it what the mean says of which classes the hospital holds.

Pure functions of tensors. Equal priors, since recall of every class counts alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkt_clinical.qkt.consensus import calibrated_loss
from qkt_clinical.task import Task

SHRINKAGES = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5)
"""Shares of the covariance that is the same for all features, to choose from."""
BYTES_PER_NUMBER = 4
"""In single precision, as they would be sent."""


@dataclass(frozen=True)
class ClassStatistics:
    """Of a hospital's images, or of several hospitals' together; float64."""

    counts: Tensor
    """(C,) numbers of images."""
    sums: Tensor
    """(C, F) of features."""
    moment: Tensor
    """(F, F): sum of every image's features times themselves."""

    @property
    def bytes(self) -> int:
        """To send: counts and sums of the classes that are there, half of the symmetric moment."""
        held, (_, width) = int((self.counts > 0).sum()), self.sums.shape
        return BYTES_PER_NUMBER * (held * (1 + width) + width * (width + 1) // 2)


def class_statistics(features: Tensor, labels: Tensor, classes: int) -> ClassStatistics:
    """Statistics of features (N, F) and labels (N,), over C classes."""
    seen = features.double()
    member = torch.nn.functional.one_hot(labels, classes).double()
    return ClassStatistics(member.sum(dim=0), member.T @ seen, seen.T @ seen)


def pool(each: Sequence[ClassStatistics]) -> ClassStatistics:
    """The statistics of all images together."""
    return ClassStatistics(
        torch.stack([s.counts for s in each]).sum(dim=0),
        torch.stack([s.sums for s in each]).sum(dim=0),
        torch.stack([s.moment for s in each]).sum(dim=0),
    )


def without_small(statistics: ClassStatistics, least: float) -> ClassStatistics:
    """Without the classes of fewer images: of noisy counts these may be noise alone."""
    kept = (statistics.counts >= least).double()
    return replace(statistics, counts=statistics.counts * kept, sums=statistics.sums * kept[:, None])


def covariance_within(statistics: ClassStatistics) -> Tensor:
    """The covariance (F, F) within classes, of all that are there: ``(moment - sum_c n_c m_c m_c') / N``."""
    counts, present = statistics.counts, statistics.counts > 0
    sums = statistics.sums[present]
    covariance = (statistics.moment - (sums / counts[present, None]).T @ sums) / counts.sum()
    jitter = 1e-9 * covariance.diagonal().mean().clamp(min=1e-12) * torch.eye(len(covariance))
    if not bool(torch.linalg.cholesky_ex(covariance + jitter).info):
        return covariance
    # Noise for privacy can make variances negative: the nearest covariance has none.
    values, vectors = torch.linalg.eigh(covariance)
    nearest: Tensor = vectors * values.clamp(min=0) @ vectors.T
    return nearest


def linear_head(
    statistics: ClassStatistics, covariance: Tensor, relevant: Sequence[int], shrinkage: float
) -> tuple[Tensor, Tensor]:
    """Linear discriminants of the relevant classes: weight (C, F) and bias (C,), float32, 0 for the others.

    By hand, since scikit-learn's take features of images and not their sums.

    Args:
        covariance: from :func:`covariance_within`.
        relevant: classes, of each of which there is an image.
        shrinkage: in [0, 1], share of a covariance that is the same for all features.
    """
    means = statistics.sums / statistics.counts.clamp(min=1)[:, None]
    level = covariance.diagonal().mean().clamp(min=1e-12)
    system = (1 - shrinkage) * covariance + shrinkage * level * torch.eye(len(covariance), dtype=torch.double)
    chosen = means[list(relevant)]
    directions = torch.linalg.solve(system, chosen.T).T
    weight, bias = torch.zeros(means.shape), torch.zeros(len(means))
    weight[list(relevant)] = directions.to(weight)
    bias[list(relevant)] = (-0.5 * (directions * chosen).sum(dim=1)).to(bias)
    return weight, bias


def best_head(
    statistics: ClassStatistics,
    relevant: Sequence[int],
    local: Sequence[int],
    features: Tensor,
    labels: Tensor,
    *,
    task: Task,
) -> tuple[Tensor, Tensor]:
    """The head of the shrinkage that tells the local classes apart best on the hospital's held-out images.

    Args:
        relevant: local classes and the query.
        features: (M, F) of calibration images; labels: (M,), each in ``local``.
    """
    covariance = covariance_within(statistics)
    heads = [linear_head(statistics, covariance, relevant, s) for s in SHRINKAGES]
    losses = [calibrated_loss(features @ w.T + b, labels, local, task=task) for w, b in heads]
    return heads[losses.index(min(losses))]
