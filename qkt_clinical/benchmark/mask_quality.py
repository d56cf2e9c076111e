"""Quality of masks, measured in simulation, where the truth is known. Pure functions.

All teachers of a federation are pooled: every (teacher, class) pair counts once. No figure is ever NaN;
what a ratio means where there is nothing to divide by is said at each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from qkt_clinical.evaluation.metrics import auroc


@dataclass(frozen=True)
class MaskQuality:
    """Figures in [0, 1] over all (teacher, class) pairs."""

    precision: float
    """Share of the pairs taken as known that are; 1 where none is taken as known."""
    recall: float
    """Share of the known pairs that are found; 1 where there is none."""
    f1: float
    """``2 TP / (2 TP + FP + FN)``; 1 where there is nothing to find and nothing was taken as known."""
    auc: float
    """Probability that a known pair scores above an unknown one, ties half; 0.5 where either kind lacks."""


def _check(scores: Tensor, *others: Tensor) -> None:
    if scores.ndim != 2 or any(o.shape != scores.shape for o in others):
        shapes = ", ".join(str(tuple(t.shape)) for t in (scores, *others))
        raise ValueError(f"expected tensors of one shape (teachers, classes), got {shapes}")
    if not bool(scores.isfinite().all()):
        raise ValueError("scores must be finite")


def _counts(known: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """Precision, recall, F1."""
    right, claimed, real = int((known & truth).sum()), int(known.sum()), int(truth.sum())
    return (
        right / claimed if claimed else 1.0,
        right / real if real else 1.0,
        2 * right / (claimed + real) if claimed + real else 1.0,
    )


def _auc(scores: Tensor, truth: Tensor) -> float:
    if bool(truth.all()) or not bool(truth.any()):
        return 0.5
    pairs = scores.double().numpy().ravel(), truth.numpy().ravel()
    return float(auroc(*pairs, np.ones((1, scores.numel())))[0])


def quality(scores: Tensor, known: Tensor, truth: Tensor) -> MaskQuality:
    """Quality of the masks of T teachers over C classes.

    Args:
        scores: (T, C) float, each teacher's scores; only ``auc`` reads them.
        known: (T, C) bool, what the masks take as known.
        truth: (T, C) bool, what the teachers really know.

    Raises:
        ValueError: shapes differ, or a score is not finite.
    """
    _check(scores, known, truth)
    known, truth = known.bool(), truth.bool()
    precision, recall, f1 = _counts(known, truth)
    return MaskQuality(precision, recall, f1, _auc(scores, truth))


def threshold_curve(scores: Tensor, truth: Tensor, thresholds: Sequence[float]) -> list[dict[str, float]]:
    """Precision, recall and F1 with one lambda for all teachers.

    Args:
        scores: (T, C) float.
        truth: (T, C) bool.
        thresholds: values of lambda; a score at or above counts as known.

    Returns:
        One row per threshold, in their order, with the keys ``lambda``, ``precision``, ``recall``, ``f1``.

    Raises:
        ValueError: as for :func:`quality`.
    """
    _check(scores, truth)
    rows = []
    for threshold in thresholds:
        precision, recall, f1 = _counts(scores.double() >= threshold, truth.bool())
        rows.append({"lambda": float(threshold), "precision": precision, "recall": recall, "f1": f1})
    return rows
