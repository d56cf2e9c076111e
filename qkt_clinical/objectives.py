"""Losses, rows and operating points of the two phases: pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

ROUNDING = 1e-5
"""Relative; single precision rounds by a hundredth of it."""


def margin(logits: Tensor, query: int, known: Sequence[int]) -> Tensor:
    """How much a teacher prefers the query class to all else that it knows.

    Args:
        logits: (N, C) of one teacher.
        query: index of the query class.
        known: indices of the classes that the teacher knows.

    Returns:
        (N,): ``z_query - max z_rival`` over the rivals, the other known classes; a teacher that knows
        nothing else is compared with the mean of its other logits.
    """
    rivals = rivals_of(query, known)
    if rivals:
        return logits[:, query] - logits[:, rivals].max(dim=1).values
    others = [c for c in range(logits.shape[1]) if c != query]
    return logits[:, query] - logits[:, others].mean(dim=1)


def rivals_of(query: int, known: Sequence[int]) -> list[int]:
    """The known classes other than the query."""
    return [c for c in sorted(set(known)) if c != query]


def margin_row(weight: Tensor, bias: Tensor, query: int, known: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The linear form of :func:`margin`: the head's query row minus the mean of its rivals' rows.

    A single row can be carried into the student's head; a maximum cannot.

    Args:
        weight, bias: of the teacher's head, (C, F) and (C,).

    Returns:
        Row (F,) and bias ().
    """
    rivals = rivals_of(query, known) or [c for c in range(len(weight)) if c != query]
    return weight[query] - weight[rivals].mean(dim=0), bias[query] - bias[rivals].mean()


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


def query_scores(
    logits: Tensor, local: Sequence[int], query_logits: Tensor, surprise: Sequence[float]
) -> Tensor:
    """``z_q - surprise_q * max z_local`` (N, Q): above minus the offset, an image goes to the query.

    Args:
        logits: (N, C) of the student.
        query_logits: (N, Q).
        surprise: one per query class.
    """
    most = logits[:, list(local)].max(dim=1, keepdim=True).values
    return query_logits - most * torch.tensor(surprise, dtype=logits.dtype, device=logits.device)


def allowed(budget: float, count: int) -> int:
    """How many of ``count`` calibration images may go to the query.

    The k-th largest of n scores is exceeded by a new image of the same kind with probability k / (n + 1)
    (conformal prediction), so that k images given away are paid for as k + 1. With fewer than 1 / budget
    images no offset can promise the budget; then none may go.
    """
    return max(0, math.floor(budget * (count + 1)) - 1)


def offsets_for_budget(scores: Tensor, budget: float) -> tuple[Tensor, float]:
    """The operating point: offsets at which at most ``budget`` of the images go to the query.

    Every query class first gets an equal part of the budget, then all offsets are shifted together as
    far as the whole budget allows (Neyman-Pearson: a bound on what is given away, most of the query for
    it).

    Args:
        scores: (N, Q) from :func:`query_scores` on the student's own held-out images, none of a query
            class.
        budget: share of these images, in (0, 1).

    Returns:
        Offsets (Q,) and the share of the images given away, at most ``budget``; see :func:`allowed`.
    """
    count, classes = scores.shape
    offsets = -scores.sort(dim=0, descending=True).values[allowed(budget / classes, count)]
    highest = (scores + offsets).max(dim=1).values
    bound = highest.sort(descending=True).values[allowed(budget, count)]
    # A hair lower, so that rounding in ``decide`` does not give the image at the bound away.
    hair = ROUNDING * float(scores.abs().max().clamp(min=1))
    offsets = offsets - bound - hair
    return offsets, given_away(scores, offsets)


def given_away(scores: Tensor, offsets: Tensor) -> float:
    """Share of images that go to the query at these offsets."""
    return float(((scores + offsets).max(dim=1).values > 0).double().mean())


def decide(
    logits: Tensor,
    query_logits: Tensor,
    local: Sequence[int],
    query: Sequence[int],
    surprise: Sequence[float],
    offsets: Tensor,
) -> Tensor:
    """Scores (N, C) over the relevant label space, minus infinity elsewhere; the answer is the argmax.

    Args:
        logits: (N, C) of the student.
        query_logits: (N, Q).
        offsets: (Q,).
    """
    scores = torch.full_like(logits, -math.inf)
    own = logits[:, list(local)]
    scores[:, list(local)] = own
    most = own.max(dim=1, keepdim=True).values
    scores[:, list(query)] = most + query_scores(logits, local, query_logits, surprise) + offsets.to(logits)
    return scores


def balanced_cross_entropy(scores: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Cross-entropy in which every class of ``labels`` counts alike, however few its images.

    Args:
        scores: (N, C), minus infinity outside the relevant classes.
        labels: (N,), each in ``classes``.
    """
    each = F.cross_entropy(scores, labels, reduction="none")
    means = [each[labels == c].mean() for c in classes if bool((labels == c).any())]
    return torch.stack(means).mean()
