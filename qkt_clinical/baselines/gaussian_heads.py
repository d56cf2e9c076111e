"""Gaussian mixtures of every class's features, shared once; a head is trained on features drawn from them.

Over a common frozen encoder each hospital fits, per class, a mixture of Gaussians with diagonal covariances
to its features and sends weights, means and variances. Whoever asks draws features of every class from all
hospitals' mixtures, adds its own and trains a linear head on them (FedPFT; Beitollahi et al., 2024,
arXiv 2402.01862).

Pure functions; mixtures and logistic regression are scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qkt_clinical.baselines.statistics import BYTES_PER_NUMBER
from qkt_clinical.qkt.consensus import calibrated_loss
from qkt_clinical.task import Task

COMPONENTS = 5
"""Gaussians of a class, at most one for every ``IMAGES_PER_COMPONENT`` images."""
IMAGES_PER_COMPONENT = 10
DRAWN = 200
"""Features drawn of a class, over all hospitals that hold it in proportion to their images."""
INVERSE_PENALTIES = (0.001, 0.01, 0.1)
"""Of the logistic regression's ridge, to choose from."""
VARIANCE_FLOOR = 1e-3
"""Added to variances of standardised features."""


@dataclass(frozen=True)
class Mixture:
    """Of one class at one hospital; K Gaussians with diagonal covariances over F features."""

    count: int
    """Images that it was fitted to."""
    weights: Tensor
    """(K,), summing to 1."""
    means: Tensor
    """(K, F)."""
    variances: Tensor
    """(K, F)."""

    @property
    def bytes(self) -> int:
        """To send."""
        return BYTES_PER_NUMBER * (1 + self.weights.numel() + 2 * self.means.numel())


def class_mixtures(features: Tensor, labels: Tensor, *, seed: int) -> dict[int, Mixture]:
    """A mixture for every class of two images or more.

    Args:
        features: (N, F); labels: (N,).
        seed: of the mixtures' initial values.
    """
    from sklearn.mixture import GaussianMixture

    found = {}
    for label in labels.unique().tolist():
        seen = features[labels == label].double().numpy()
        if len(seen) < 2:
            continue
        scale = np.maximum(seen.std(axis=0).mean(), 1e-12)
        parts = max(1, min(COMPONENTS, len(seen) // IMAGES_PER_COMPONENT))
        fitted = GaussianMixture(
            parts, covariance_type="diag", reg_covar=VARIANCE_FLOOR, random_state=seed % 2**32
        ).fit(seen / scale)
        found[int(label)] = Mixture(
            len(seen),
            torch.from_numpy(fitted.weights_).float(),
            torch.from_numpy(fitted.means_ * scale).float(),
            torch.from_numpy(fitted.covariances_ * scale**2).float(),
        )
    return found


def draw(mixture: Mixture, count: int, random: np.random.Generator) -> Tensor:
    """Features (count, F) from a mixture."""
    weights = mixture.weights.double().numpy()
    part = torch.from_numpy(random.choice(len(weights), size=count, p=weights / weights.sum()))
    noise = torch.from_numpy(random.standard_normal((count, mixture.means.shape[1]))).float()
    return mixture.means[part] + noise * mixture.variances[part].sqrt()


def drawn_features(
    mixtures: Sequence[Mapping[int, Mixture]], relevant: Sequence[int], *, seed: int
) -> tuple[Tensor, Tensor]:
    """About ``DRAWN`` features (N, F) of every relevant class that some hospital holds, and labels (N,)."""
    random = np.random.default_rng(seed)
    features, labels = [], []
    for label in relevant:
        held = [m[label] for m in mixtures if label in m]
        total = sum(m.count for m in held)
        for mixture in held:
            count = max(1, round(DRAWN * mixture.count / total))
            features.append(draw(mixture, count, random))
            labels.append(torch.full((count,), label))
    return torch.cat(features), torch.cat(labels)


def best_head(
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    local: Sequence[int],
    classes: int,
    *,
    task: Task,
) -> tuple[Tensor, Tensor]:
    """The linear head of the penalty that tells the local classes apart best on held-out images.

    Args:
        train: features (N, F) and labels (N,), at least two classes; every class counts alike.
        held_out: features (M, F) and labels (M,) of the hospital's calibration images, each in ``local``.

    Returns:
        weight (classes, F) and bias (classes,), 0 for classes that were not trained on.
    """
    from sklearn.linear_model import LogisticRegression

    features, labels = train
    centre, scale = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    standardised = ((features - centre) / scale).double().numpy()
    heads, losses = [], []
    for penalty in INVERSE_PENALTIES:
        fitted = LogisticRegression(C=penalty, class_weight="balanced", max_iter=300)
        fitted.fit(standardised, labels.numpy())
        rows, shifts = torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()
        if len(fitted.classes_) == 2:  # scikit-learn has one row for the two
            rows, shifts = torch.cat([-rows, rows]) / 2, torch.cat([-shifts, shifts]) / 2
        weight, bias = torch.zeros(classes, features.shape[1]), torch.zeros(classes)
        weight[fitted.classes_] = rows / scale
        bias[fitted.classes_] = shifts - (rows / scale) @ centre
        heads.append((weight, bias))
        seen, truth = held_out
        losses.append(calibrated_loss(seen @ weight.T + bias, truth, local, task=task))
    return heads[losses.index(min(losses))]
