"""Losses of the two phases and closed-form regression: pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def feature_loss(mapped: Tensor, target: Tensor, variance: float) -> Tensor:
    """Mean squared error of mapped student features (N, F) against a source's, in units of its variance."""
    return F.mse_loss(mapped, target) / variance


def logit_loss(logits: Tensor, target: Tensor, scale: float) -> Tensor:
    """Smooth L1 of logits (N, K) on a teacher's sub-space of known classes, in units of their spread."""
    return F.smooth_l1_loss(logits / scale, target / scale)


def ridge(features: Tensor, targets: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Ridge regression in closed form.

    Args:
        features: (N, F); targets: (N, K).
        strength: penalty on the weights in units of the features' mean variance; the bias is free.

    Returns:
        Weight (K, F) and bias (K,), in the features' dtype.
    """
    x, y = features.double(), targets.double()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    covariance = x.T @ x / len(x)
    scale = float(covariance.diagonal().mean()) or 1.0
    penalty = strength * scale * torch.eye(covariance.shape[0], dtype=covariance.dtype)
    weight = torch.linalg.solve(covariance + penalty, x.T @ y / len(x)).T
    return weight.to(features.dtype), (y_mean - weight @ x_mean).to(features.dtype)


def balanced_cross_entropy(scores: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Cross-entropy in which every class of ``labels`` counts alike, however few its images.

    Args:
        scores: (N, C), minus infinity outside the relevant classes.
        labels: (N,), each in ``classes``.
    """
    each = F.cross_entropy(scores, labels, reduction="none")
    means = [each[labels == c].mean() for c in classes if bool((labels == c).any())]
    return torch.stack(means).mean()
