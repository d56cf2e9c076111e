"""Metrics of an answer on held-out images, with bootstrap intervals over patients. Pure functions.

Predictions are the argmax over the relevant classes R. *Query accuracy* is the mean recall over the query,
*retained accuracy* over the hospital's own classes, *balanced accuracy* over R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
DIGITS = 6


@dataclass(frozen=True)
class TestSet:
    """Held-out images of the relevant classes, without the images.

    ``labels`` (N,) indices into ``relevant``; ``patients`` (N,) any hashable ids.
    """

    labels: NDArray[np.int64]
    patients: NDArray[np.str_]
    classes: int
    query: tuple[int, ...]
    """Positions of the query classes among the relevant ones."""

    @property
    def local(self) -> tuple[int, ...]:
        """Positions of the hospital's own classes."""
        return tuple(c for c in range(self.classes) if c not in self.query)


def patient_weights(patients: NDArray[np.str_], draws: int, seed: int) -> NDArray[np.int64]:
    """How often each image counts in each bootstrap draw, (draws, N): patients drawn with replacement."""
    unique, inverse = np.unique(patients, return_inverse=True)
    random = np.random.default_rng(seed)
    drawn = random.multinomial(len(unique), np.full(len(unique), 1 / len(unique)), size=draws)
    return drawn[:, inverse].astype(np.int64)


def recalls(correct: NDArray[np.bool_], labels: NDArray[np.int64], classes: int, weights: Floats) -> Floats:
    """Recall per class (draws, classes) under weights (draws, N); NaN where a class has no weight."""
    member = (labels[:, None] == np.arange(classes)[None]).astype(np.float64)
    total = weights @ member
    right = weights @ (member * correct[:, None])
    out: Floats = np.divide(right, total, out=np.full_like(total, np.nan), where=total > 0)
    return out


def auroc(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """Area under the ROC curve (draws,) as the Mann-Whitney statistic, ties counted half.

    Written out, since scikit-learn takes one weighting at a time and a bootstrap has hundreds.
    """
    above = scores[positive][:, None] - scores[~positive][None]
    wins = (above > 0) + 0.5 * (above == 0)
    w_pos, w_neg = weights[:, positive], weights[:, ~positive]
    total = w_pos.sum(axis=1) * w_neg.sum(axis=1)
    value = ((w_pos @ wins) * w_neg).sum(axis=1)
    out: Floats = np.divide(value, total, out=np.full(len(total), np.nan), where=total > 0)
    return out


def expected_calibration_error(probabilities: Floats, labels: NDArray[np.int64], bins: int = 15) -> float:
    """Mean gap between confidence and accuracy of the top class over equal-width bins, weighted by size."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(right[which == b].mean() - confidence[which == b].mean()) * (which == b).sum() for b in set(which)
    ]
    return float(sum(gaps) / len(labels))


def _interval(value: float, draws: Floats, confidence: float) -> dict[str, float]:
    draws = draws[np.isfinite(draws)]
    if len(draws) == 0:
        return {"value": round(value, DIGITS), "low": round(value, DIGITS), "high": round(value, DIGITS)}
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {
        "value": round(value, DIGITS),
        "low": round(float(low), DIGITS),
        "high": round(float(high), DIGITS),
    }


def _mean(recall: Floats, which: Sequence[int]) -> Floats:
    """Mean over classes that were drawn at all; NaN where none was."""
    part = recall[:, list(which)]
    present = np.isfinite(part)
    total = np.where(present, part, 0.0).sum(axis=1)
    count = present.sum(axis=1)
    out: Floats = np.divide(total, count, out=np.full(len(part), np.nan), where=count > 0)
    return out


def softmax(scores: Floats) -> Floats:
    """Softmax over the last axis."""
    exp = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out: Floats = exp / exp.sum(axis=-1, keepdims=True)
    return out


def assess(
    test: TestSet, before: Floats, after: Floats, *, draws: int, confidence: float, seed: int
) -> dict[str, Any]:
    """Figures of the site's own model (before) and of the answer (after), and their paired differences.

    Args:
        before, after: scores (N, classes) over the relevant classes.

    Returns:
        ``before`` and ``after`` with query_accuracy, retained_accuracy, balanced_accuracy, auroc, recall
        (one per class), ece and confusion; ``gain`` (balanced accuracy), ``query_gain`` and
        ``forgetting`` (retained accuracy lost). All but ece and confusion as value, low, high.
    """
    ones = np.ones((1, len(test.labels)))
    weights = np.concatenate([ones, patient_weights(test.patients, draws, seed).astype(np.float64)])
    is_query = np.isin(test.labels, test.query)
    result: dict[str, Any] = {}
    curves: dict[str, dict[str, Floats]] = {}
    for name, scores in (("before", before), ("after", after)):
        predicted = scores.argmax(axis=1)
        recall = recalls(predicted == test.labels, test.labels, test.classes, weights)
        means = {
            "query_accuracy": _mean(recall, test.query),
            "retained_accuracy": _mean(recall, test.local),
            "balanced_accuracy": _mean(recall, range(test.classes)),
        }
        with np.errstate(invalid="ignore"):
            best = scores[:, list(test.query)].max(axis=1) - scores[:, list(test.local)].max(axis=1)
        curves[name] = means
        confusion = np.zeros((test.classes, test.classes), dtype=int)
        np.add.at(confusion, (test.labels, predicted), 1)
        result[name] = {
            **{k: _interval(float(v[0]), v[1:], confidence) for k, v in means.items()},
            "recall": [
                _interval(float(recall[0, c]), recall[1:, c], confidence)
                if np.isfinite(recall[0, c])
                else None
                for c in range(test.classes)
            ],
            "auroc": None,
            "ece": round(expected_calibration_error(softmax(scores), test.labels), DIGITS),
            "confusion": confusion.tolist(),
        }
        if is_query.any() and not is_query.all():
            area = auroc(best, is_query, weights)
            result[name]["auroc"] = _interval(float(area[0]), area[1:], confidence)
    for name, key, sign in (
        ("gain", "balanced_accuracy", 1.0),
        ("query_gain", "query_accuracy", 1.0),
        ("forgetting", "retained_accuracy", -1.0),
    ):
        difference = sign * (curves["after"][key] - curves["before"][key])
        result[name] = _interval(float(difference[0]), difference[1:], confidence)
    return result
