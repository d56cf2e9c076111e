"""Metrics of an answer on held-out images, with bootstrap intervals over patients. Pure functions.

What is answered is the task's to say, among the relevant classes R. *Query accuracy* is the mean recall over
the query, *retained accuracy* over the hospital's own classes, *balanced accuracy* over R.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.common.disclosure import SMALLEST_COUNT
from qkt_clinical.records.base import Estimate
from qkt_clinical.records.evaluation import Bin, SubgroupScores

if TYPE_CHECKING:
    from qkt_clinical.task import Task

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
    task: Task
    """What the labels mean."""

    @property
    def local(self) -> tuple[int, ...]:
        """Positions of the hospital's own classes."""
        return tuple(c for c in range(self.classes) if c not in self.query)


class Draws(TypedDict):
    """Settings of intervals: bootstrap draws over patients, confidence such as 0.95, and the seed."""

    draws: int
    confidence: float
    seed: int


@dataclass(frozen=True)
class ModelFigures:
    """Figures of one model; of each class in the order of the relevant ones, None where there is none.

    ``auroc`` is that of the query against the rest; ``class_...`` are one class against the rest,
    ``macro_...`` their means over classes; ``confusion`` has truth in rows. For the interval of ``ece`` see
    :func:`error_interval`. A class that is never predicted has no precision and does not count in their mean.
    """

    query_accuracy: Estimate | None
    retained_accuracy: Estimate | None
    balanced_accuracy: Estimate | None
    auroc: Estimate | None
    ece: Estimate
    recall: tuple[Estimate | None, ...]
    precision: tuple[Estimate | None, ...]
    class_auroc: tuple[Estimate | None, ...]
    class_auprc: tuple[Estimate | None, ...]
    class_ece: tuple[float, ...]
    class_reliability: tuple[tuple[Bin, ...], ...]
    macro_precision: Estimate | None
    macro_auroc: Estimate | None
    macro_auprc: Estimate | None
    confusion: tuple[tuple[int, ...], ...]
    reliability: tuple[Bin, ...]


@dataclass(frozen=True)
class Assessment:
    """Figures of a site's own model (before) and of the answer (after), and their paired differences."""

    before: ModelFigures
    after: ModelFigures
    gain: Estimate | None
    """Of balanced accuracy."""
    gain_p: float
    """See :func:`paired_p`."""
    query_gain: Estimate | None
    forgetting: Estimate | None
    """Retained accuracy lost."""
    class_forgetting: tuple[Estimate | None, ...]
    """Recall lost, per class."""


@dataclass(frozen=True)
class SubgroupFigures:
    """Figures of one group of patients, and how many images and patients they rest on."""

    images: int
    patients: int
    before: SubgroupScores
    after: SubgroupScores


def patient_weights(patients: NDArray[np.str_], draws: int, seed: int) -> NDArray[np.int64]:
    """How often each image counts in each bootstrap draw, (draws, N): patients drawn with replacement."""
    unique, inverse = np.unique(patients, return_inverse=True)
    random = np.random.default_rng(seed)
    drawn = random.multinomial(len(unique), np.full(len(unique), 1 / len(unique)), size=draws)
    return drawn[:, inverse].astype(np.int64)


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


def average_precision(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """Area under the precision-recall curve (draws,) by steps, as scikit-learn has it; ties share a step.

    Written out for the same reason as :func:`auroc`.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of the images with one score
    drawn = weights[:, order]
    found = np.cumsum(drawn * positive[order], axis=1)[:, last]
    taken = np.cumsum(drawn, axis=1)[:, last]
    total = found[:, -1:]
    precision = np.divide(found, taken, out=np.zeros_like(found), where=taken > 0)
    steps = np.diff(found, axis=1, prepend=0.0)
    area = (precision * steps).sum(axis=1)
    out: Floats = np.divide(area, total[:, 0], out=np.full(len(area), np.nan), where=total[:, 0] > 0)
    return out


def _binned(confidence: Floats, bins: int) -> NDArray[np.int64]:
    """Which equal-width bin of [0, 1] each confidence falls into."""
    return np.minimum((confidence * bins).astype(np.int64), bins - 1)


def reliability(confidence: Floats, right: NDArray[np.bool_], bins: int = 10) -> tuple[Bin, ...]:
    """Reliability curve: per equal-width bin that holds an answer its mean confidence, accuracy and number.

    Args:
        confidence: (N,) in [0, 1].
        right: (N,) whether that came true.
    """
    which = _binned(confidence, bins)
    return tuple(
        Bin(
            confidence=round(float(confidence[which == b].mean()), DIGITS),
            accuracy=round(float(right[which == b].mean()), DIGITS),
            images=int((which == b).sum()),
        )
        for b in sorted(set(which.tolist()))
    )


def paired_p(
    test: TestSet, before: NDArray[np.bool_], after: NDArray[np.bool_], *, draws: int, seed: int
) -> float:
    """Two-sided p of the gain in balanced accuracy, swapping both models patient by patient.

    Args:
        test: labels and patients.
        before, after: (N,) whether each model is right.
        draws: swaps at most, at random where there are more ways to swap. Without any, or with one patient,
            p is 1.
        seed: of the swaps.
    """
    from scipy.stats import permutation_test

    counts = test.task.counts(test.labels, test.classes)
    change = after.astype(np.float64) - before.astype(np.float64)
    share = change / (counts[test.labels] * np.count_nonzero(counts))
    _, owner = np.unique(test.patients, return_inverse=True)
    of_patient = np.bincount(owner, weights=share)
    if draws == 0 or len(of_patient) < 2:
        return 1.0
    # A single sample has its signs changed: that is what swapping both models does to a difference.
    tested = permutation_test(
        (of_patient,),
        np.sum,
        permutation_type="samples",
        n_resamples=draws,
        rng=np.random.default_rng(seed),
    )
    return round(float(tested.pvalue), DIGITS)


def calibration_errors(
    confidence: Floats, right: NDArray[np.bool_], weights: Floats, bins: int = 15
) -> Floats:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by size.

    Args:
        confidence: (N,) in [0, 1].
        right: (N,) whether that came true.
        weights: (draws, N); every draw holds an image.

    Returns:
        (draws,).
    """
    member = (_binned(confidence, bins)[:, None] == np.arange(bins)[None]).astype(np.float64)
    gaps = np.abs(weights @ (member * (right - confidence)[:, None]))
    out: Floats = gaps.sum(axis=1) / weights.sum(axis=1)
    return out


def expected_calibration_error(confidence: Floats, right: NDArray[np.bool_], bins: int = 15) -> float:
    """:func:`calibration_errors`, every image counted once."""
    return float(calibration_errors(confidence, right, np.ones((1, len(right))), bins)[0])


def class_calibration(
    probability: Floats, member: NDArray[np.bool_], bins: int = 15
) -> tuple[float, tuple[Bin, ...]]:
    """How far one class's probability (N,) is its frequency among those images; ``member`` (N,) are of it.

    Returns:
        Calibration error over equal-width bins, weighted by size, and the reliability curve.
    """
    return expected_calibration_error(probability, member, bins), reliability(probability, member)


def _interval(value: float, draws: Floats, confidence: float) -> Estimate:
    draws = draws[np.isfinite(draws)]
    if len(draws) == 0:
        return Estimate(value=round(value, DIGITS), low=round(value, DIGITS), high=round(value, DIGITS))
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(
        value=round(value, DIGITS), low=round(float(low), DIGITS), high=round(float(high), DIGITS)
    )


def _of_draws(figures: Floats, confidence: float) -> Estimate | None:
    """Of (1 + draws,), the first being the figure itself; None where there is none."""
    value = float(figures[0])
    return _interval(value, figures[1:], confidence) if np.isfinite(value) else None


def _of_classes(figures: Floats, confidence: float) -> tuple[Estimate | None, ...]:
    """The same per class, of (1 + draws, classes)."""
    return tuple(_of_draws(column, confidence) for column in figures.T)


def error_interval(errors: Floats, confidence: float) -> Estimate:
    """A calibration error with its interval, mirrored about the figure and widened to hold it.

    A sample's calibration error is larger than that of all patients, by chance alone, and so is a draw's
    larger than the sample's. The quantiles of the draws, which serve other figures, would count that twice:
    of 150 images, their upper end is about 0.13 for a model that is calibrated perfectly. Mirrored (the
    *basic* bootstrap), they count it off.

    Args:
        errors: (1 + draws,) of :func:`calibration_errors`; the first is the figure itself.
    """
    value = float(errors[0])
    drawn = _interval(value, errors[1:], confidence)
    return Estimate(
        value=drawn.value,
        low=round(max(0.0, min(value, 2 * value - drawn.high)), DIGITS),
        high=round(min(1.0, max(value, 2 * value - drawn.low)), DIGITS),
    )


def _mean(recall: Floats, which: Sequence[int]) -> Floats:
    """Mean over classes that were drawn at all; NaN where none was."""
    part = recall[:, list(which)]
    present = np.isfinite(part)
    total = np.where(present, part, 0.0).sum(axis=1)
    count = present.sum(axis=1)
    out: Floats = np.divide(total, count, out=np.full(len(part), np.nan), where=count > 0)
    return out


def _accuracies(recall: Floats, test: TestSet) -> dict[str, Floats]:
    return {
        "query_accuracy": _mean(recall, test.query),
        "retained_accuracy": _mean(recall, test.local),
        "balanced_accuracy": _mean(recall, range(test.classes)),
    }


def _figures(
    test: TestSet, scores: Floats, weights: Floats, confidence: float
) -> tuple[ModelFigures, Floats]:
    """Figures of one model, and its recalls (1 + draws, classes).

    Args:
        scores: (N, classes) over the relevant classes.
        weights: (1 + draws, N); in the first row every image counts once.
    """
    predicted, probabilities = test.task.answer(scores), test.task.probabilities(scores)
    of_labels = test.task.figures(predicted, test.labels, test.classes, weights)
    recall, right = of_labels.recall, predicted == test.labels
    # Rounded: equal scores may differ in the last bit of their probabilities, and would be no ties then.
    one_to_rest = [(probabilities[:, c].round(12), test.labels == c) for c in range(test.classes)]
    per_label = {
        "precision": of_labels.precision,
        "auroc": np.stack([auroc(*pair, weights) for pair in one_to_rest], axis=1),
        "auprc": np.stack([average_precision(*pair, weights) for pair in one_to_rest], axis=1),
    }
    classes = {name: _of_classes(figures, confidence) for name, figures in per_label.items()}
    macro = {
        name: _of_draws(_mean(figures, range(test.classes)), confidence)
        for name, figures in per_label.items()
    }
    means = {name: _of_draws(mean, confidence) for name, mean in _accuracies(recall, test).items()}
    calibrated = [class_calibration(*pair) for pair in one_to_rest]
    confidence_of, came_true = test.task.confidence(probabilities, test.labels)
    errors = calibration_errors(confidence_of, right, weights)
    found = ModelFigures(
        query_accuracy=means["query_accuracy"],
        retained_accuracy=means["retained_accuracy"],
        balanced_accuracy=means["balanced_accuracy"],
        auroc=_query_auroc(test, scores, weights, confidence),
        ece=error_interval(errors, confidence),
        recall=_of_classes(recall, confidence),
        precision=classes["precision"],
        class_auroc=classes["auroc"],
        class_auprc=classes["auprc"],
        class_ece=tuple(round(error, DIGITS) for error, _ in calibrated),
        class_reliability=tuple(curve for _, curve in calibrated),
        macro_precision=macro["precision"],
        macro_auroc=macro["auroc"],
        macro_auprc=macro["auprc"],
        confusion=tuple(map(tuple, of_labels.confusion.tolist())),
        reliability=reliability(confidence_of, came_true),
    )
    return found, recall


def _query_auroc(test: TestSet, scores: Floats, weights: Floats, confidence: float) -> Estimate | None:
    """AUROC of the query against the rest; None where either has no image."""
    is_query = np.isin(test.labels, test.query)
    if is_query.all() or not is_query.any():
        return None
    with np.errstate(invalid="ignore"):
        best = scores[:, list(test.query)].max(axis=1) - scores[:, list(test.local)].max(axis=1)
    area = auroc(best, is_query, weights)
    return _interval(float(area[0]), area[1:], confidence)


def assess(
    test: TestSet, before: Floats, after: Floats, *, draws: int, confidence: float, seed: int
) -> Assessment:
    """Figures of the site's own model (before) and of the answer (after), and their paired differences.

    Args:
        before, after: scores (N, classes) over the relevant classes.
        draws, confidence, seed: of the intervals, by patient.
    """
    ones = np.ones((1, len(test.labels)))
    weights = np.concatenate([ones, patient_weights(test.patients, draws, seed).astype(np.float64)])
    first, first_recall = _figures(test, before, weights, confidence)
    second, second_recall = _figures(test, after, weights, confidence)
    old, new = _accuracies(first_recall, test), _accuracies(second_recall, test)
    right = [test.task.answer(scores) == test.labels for scores in (before, after)]

    def change(name: str, sign: float = 1.0) -> Estimate | None:
        return _of_draws(sign * (new[name] - old[name]), confidence)

    return Assessment(
        before=first,
        after=second,
        gain=change("balanced_accuracy"),
        gain_p=paired_p(test, right[0], right[1], draws=draws, seed=seed),
        query_gain=change("query_accuracy"),
        forgetting=change("retained_accuracy", -1.0),
        class_forgetting=_of_classes(first_recall - second_recall, confidence),
    )


def false_query_rate(
    test: TestSet, own: NDArray[np.bool_], after: Floats, *, draws: int, confidence: float, seed: int
) -> Estimate | None:
    """False-query rate: share of a hospital's images of its own classes that are taken for the query.

    Args:
        test: labels and patients.
        own: (N,) which images are the hospital's.
        after: scores (N, classes) of the answer.
        draws, confidence, seed: of the interval, by patient.

    Returns:
        None where the hospital has no such image.
    """
    held = own & np.isin(test.labels, test.local)
    if not held.any():
        return None
    given = np.isin(test.task.answer(after[held]), test.query).astype(np.float64)
    weights = patient_weights(test.patients[held], draws, seed).astype(np.float64)
    return _interval(float(given.mean()), weights @ given / weights.sum(axis=1), confidence)


def by_subgroup(
    test: TestSet,
    before: Floats,
    after: Floats,
    columns: Mapping[str, NDArray[np.str_]],
    *,
    draws: int,
    confidence: float,
    seed: int,
) -> dict[str, dict[str, SubgroupFigures]]:
    """Figures of the groups of patients.

    Args:
        test: labels and patients.
        before, after: scores (N, classes).
        columns: column to the group of each image (N,), empty where its hospital has no such column.
        draws, confidence, seed: of the intervals, by patient.

    Returns:
        Column to group to its figures: means over those classes that the group has, None where it has none,
        or fewer than :data:`SMALLEST_COUNT` patients stand behind it.
    """
    sides = {"before": test.task.answer(before), "after": test.task.answer(after)}
    return {
        column: {
            str(group): _group(test, sides, groups == group, draws=draws, confidence=confidence, seed=seed)
            for group in np.unique(groups[groups != ""])
        }
        for column, groups in sorted(columns.items())
    }


def _group(
    test: TestSet,
    predicted: Mapping[str, NDArray[np.int64]],
    member: NDArray[np.bool_],
    *,
    draws: int,
    confidence: float,
    seed: int,
) -> SubgroupFigures:
    labels, patients = test.labels[member], test.patients[member]
    of = {"query_accuracy": test.query, "retained_accuracy": test.local}
    people = {name: len(np.unique(patients[np.isin(labels, classes)])) for name, classes in of.items()}
    # Of the balanced accuracy and one part the other could be told: it is shown where both could be.
    parts = [number for number in people.values() if number]
    people["balanced_accuracy"] = min(parts)
    ones = np.ones((1, len(labels)))
    weights = np.concatenate([ones, patient_weights(patients, draws, seed).astype(np.float64)])

    def side(answers: NDArray[np.int64]) -> SubgroupScores:
        recall = test.task.figures(answers[member], labels, test.classes, weights).recall
        return SubgroupScores(
            **{
                name: _interval(float(mean[0]), mean[1:], confidence)
                if people[name] >= SMALLEST_COUNT
                else None
                for name, mean in _accuracies(recall, test).items()
            }
        )

    return SubgroupFigures(
        images=len(labels),
        patients=len(np.unique(patients)),
        before=side(predicted["before"]),
        after=side(predicted["after"]),
    )
