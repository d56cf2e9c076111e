"""Figures of one answer to one query. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.data.prepared import Labels
from qkt_clinical.evaluation.metrics import DIGITS, Floats, expected_calibration_error
from qkt_clinical.task import Task


def rank_auroc(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve from ranks, ties counted half: no (positives, negatives) matrix."""
    from scipy.stats import rankdata

    count = int(positive.sum())
    others = len(positive) - count
    wins = rankdata(scores)[positive].sum() - count * (count + 1) / 2
    return float(wins / (count * others))


def balanced_accuracy(scores: Floats, labels: Labels, relevant: Sequence[int], *, task: Task) -> float:
    """Mean recall of the relevant classes that have images; arguments as of :func:`figures`."""
    target = np.searchsorted(list(relevant), labels)
    answers = task.answer(np.asarray(scores, dtype=np.float64)[:, list(relevant)])
    recall = task.figures(answers, target, len(relevant), np.ones((1, len(labels)))).recall[0]
    return round(float(recall[np.unique(target)].mean()), DIGITS)


def figures(
    scores: Floats, labels: Labels, relevant: Sequence[int], query: Sequence[int], *, task: Task
) -> dict[str, float]:
    """Accuracies over the relevant classes, discrimination and calibration.

    Args:
        scores: (N, C) on images of the relevant classes; those of other classes are not read.
        labels: (N,), a query class and a local one among them; a class without images does not count.
        relevant: class indices, sorted.
        query: those asked for.

    Returns:
        ``query_accuracy``, ``retained_accuracy`` and ``balanced_accuracy`` (mean recalls over
        the relevant classes that have images), ``auroc`` of query against local images by the largest
        query score above the largest local one, and ``ece``.
    """
    relevant, within = list(relevant), np.asarray(scores, dtype=np.float64)[:, list(relevant)]
    target = np.searchsorted(relevant, labels)
    asked = [relevant.index(q) for q in query]
    local = [i for i in range(len(relevant)) if i not in asked]
    there = set(target.tolist())
    ones = np.ones((1, len(labels)))
    confidence, right = task.confidence(task.probabilities(within), target)
    recall = task.figures(task.answer(within), target, len(relevant), ones).recall[0]
    preference = within[:, asked].max(axis=1) - within[:, local].max(axis=1)
    return {
        "query_accuracy": round(float(recall[[i for i in asked if i in there]].mean()), DIGITS),
        "retained_accuracy": round(float(recall[[i for i in local if i in there]].mean()), DIGITS),
        "balanced_accuracy": round(float(recall[sorted(there)].mean()), DIGITS),
        "auroc": round(rank_auroc(preference, np.isin(target, asked)), DIGITS),
        "ece": round(expected_calibration_error(confidence, right), DIGITS),
    }
