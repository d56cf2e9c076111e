"""Evaluations, verdicts and teachers' metrics as they may leave the hospital, for MLflow and model cards.

Made by the rules of :mod:`qkt_clinical.common.disclosure` alone. All figures have two decimals. No figure
rests on fewer than five images, and no mean includes a class of so few. Where 1 to 4 images of a class were
recognised, or missed, its recall is not told, nor a second one where a mean over both would tell it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from qkt_clinical.common.disclosure import (
    SMALLEST_COUNT,
    hide_a_second,
    shown_bounds,
    shown_count,
    shown_figure,
    shown_share,
    suppress,
    too_few,
)
from qkt_clinical.config.base import Fraction
from qkt_clinical.records.base import Difference, Estimate, Number, Proportion, Record
from qkt_clinical.records.evaluation import (
    Bin,
    Evaluation,
    ImagesFrom,
    OperatingPointResult,
    OthersFigures,
    Scores,
    SubgroupResult,
    SubgroupScores,
)
from qkt_clinical.records.training import TeacherMetrics
from qkt_clinical.records.verdict import Champion, Measured, Verdict

P_DECIMALS = 3


class PublishedBin(Record):
    """A bin of a reliability curve without its number of images."""

    confidence: Fraction
    accuracy: Fraction


class PublishedScores(Record):
    """Figures of one model with suppression; None where undefined or suppressed.

    ``confusion`` has truth in rows, in whole percent of each row's images.
    """

    query_accuracy: Proportion | None
    retained_accuracy: Proportion | None
    balanced_accuracy: Proportion | None
    auroc: Proportion | None
    ece: Proportion
    recall: dict[str, Proportion | None]
    precision: dict[str, Proportion | None]
    class_auroc: dict[str, Proportion | None]
    class_auprc: dict[str, Proportion | None]
    class_ece: dict[str, Fraction | None]
    class_reliability: dict[str, tuple[PublishedBin, ...] | None]
    macro_precision: Proportion | None
    macro_auroc: Proportion | None
    macro_auprc: Proportion | None
    confusion: tuple[tuple[Number | None, ...] | None, ...]
    reliability: tuple[PublishedBin, ...]


class PublishedOthersScores(Record):
    """What is told of one model on other hospitals' images of the query; None where suppressed."""

    query_accuracy: Proportion | None
    balanced_accuracy: Proportion | None
    recall: dict[str, Proportion | None]
    """Of the classes asked for; that of the others rests on the images that all figures rest on."""


class PublishedOthers(Record):
    """Figures on other hospitals' images of the query, beside those on the hospital's own."""

    test_images: dict[str, str]
    """Of the classes asked for."""
    test_sites: tuple[str, ...]
    before: PublishedOthersScores
    after: PublishedOthersScores


class PublishedEvaluation(Record):
    """``evaluation.json`` of a run in MLflow. Which images flipped stays in the hospital."""

    format: str
    hospital: str
    query: str
    student: str | None
    classes: tuple[str, ...]
    method: str
    teachers: tuple[str, ...]
    bytes_moved: Number
    budget: Fraction
    relevant: tuple[str, ...]
    local: tuple[str, ...]
    test_images: dict[str, str]
    test_sites: tuple[str, ...]
    test_data: str | None
    passes_per_prediction: Number
    before: PublishedScores
    after: PublishedScores
    gain: Difference | None
    forgetting: Difference | None
    query_gain: Difference | None
    gain_p: Fraction | None
    class_forgetting: dict[str, Difference | None]
    operating_point: OperatingPointResult | None
    subgroups: dict[str, dict[str, SubgroupResult]]
    test_images_from: ImagesFrom = "others"
    others: PublishedOthers | None = None


def _shown(estimate: Estimate | None, value: float | None = None) -> Estimate | None:
    """An estimate to two decimals, with ``value`` for its own where that is told otherwise."""
    if estimate is None:
        return None
    middle = shown_figure(estimate.value) if value is None else value
    low, high = shown_bounds(min(estimate.low, middle), max(estimate.high, middle))
    return Estimate(value=middle, low=low, high=high)


def _all_shown(
    figures: Mapping[str, Estimate | None], images: Mapping[str, int]
) -> dict[str, Estimate | None]:
    return {name: _shown(figure) for name, figure in suppress(figures, images).items()}


def _counts(scores: Scores, evaluation: Evaluation) -> dict[str, tuple[int, int]]:
    """Class to how many images it was answered for, and how many of these are of it."""
    nothing = (0,) * len(scores.confusion)
    columns = [sum(column) for column in zip(*(row or nothing for row in scores.confusion), strict=True)]
    right = [0 if row is None else row[i] for i, row in enumerate(scores.confusion)]
    return dict(zip(evaluation.relevant, zip(columns, right, strict=True), strict=True))


def _hidden_recalls(scores: Scores, evaluation: Evaluation) -> set[str]:
    """Classes whose recall is suppressed, or would reveal another's."""
    images = evaluation.test_images
    right = {c: n for c, (_, n) in _counts(scores, evaluation).items()}
    hidden = {c for c in evaluation.relevant if shown_share(right[c], images.get(c, 0)) is None}
    if evaluation.few:
        return hidden  # no mean is told
    for parts in (evaluation.classes, evaluation.local, evaluation.relevant):
        if len(parts) > 1:
            hidden |= hide_a_second(hidden, parts, images)
    return hidden


def _confusion(row: Sequence[int] | None, truth: int, *, hidden: bool) -> tuple[int | None, ...] | None:
    """A row in whole percent; None for a cell that may not be told, or would tell the only other one."""
    total = sum(row or ())
    if row is None or not total or too_few(total):
        return None
    shares = [shown_share(n, total) for n in row]
    places = {str(i): n for i, n in enumerate(row)}
    alone = {str(i) for i, share in enumerate(shares) if share is None or (hidden and i == truth)}
    untold = hide_a_second(alone, places, places)
    return tuple(None if str(i) in untold else round(100 * n / total) for i, n in enumerate(row))


def _bins(rows: Sequence[Bin] | None) -> tuple[PublishedBin, ...] | None:
    if rows is None:
        return None
    return tuple(
        PublishedBin(confidence=shown_figure(b.confidence), accuracy=shown_figure(b.accuracy))
        for b in rows
        if b.images >= SMALLEST_COUNT
    )


def _precisions(scores: Scores, evaluation: Evaluation) -> tuple[dict[str, Estimate | None], bool]:
    """Precisions as they may be told, and whether their mean may be."""
    counts = _counts(scores, evaluation)
    there = [c for c, figure in scores.precision.items() if figure is not None and c in counts]
    alone = {c for c in there if shown_share(counts[c][1], counts[c][0]) is None}
    alone |= {c for c in there if too_few(evaluation.test_images.get(c, 0))}
    hidden = hide_a_second(alone, there, {c: n for c, (n, _) in counts.items()})
    shown = {
        c: None if c in hidden or c not in there else _shown(figure) for c, figure in scores.precision.items()
    }
    return shown, len(hidden) != 1


def _published_scores(scores: Scores, evaluation: Evaluation, hidden: Collection[str]) -> PublishedScores:
    images, few = evaluation.test_images, evaluation.few
    precision, mean_precision = _precisions(scores, evaluation)
    # A part of which one recall alone is not told, and the mean of all, would tell that recall.
    parts_told = not few and all(
        sum(c in hidden for c in part) != 1 for part in (evaluation.classes, evaluation.local)
    )
    ece = _shown(scores.ece)
    assert ece is not None, "every evaluation has one"
    return PublishedScores(
        query_accuracy=_shown(scores.query_accuracy) if parts_told else None,
        retained_accuracy=_shown(scores.retained_accuracy) if parts_told else None,
        balanced_accuracy=None if few else _shown(scores.balanced_accuracy),
        auroc=None if set(few) & set(evaluation.classes) else _shown(scores.auroc),
        ece=ece,
        recall={c: None if c in hidden else _shown(figure) for c, figure in scores.recall.items()},
        precision=precision,
        class_auroc=_all_shown(scores.class_auroc, images),
        class_auprc=_all_shown(scores.class_auprc, images),
        class_ece={
            c: None if e is None else shown_figure(e) for c, e in suppress(scores.class_ece, images).items()
        },
        class_reliability={c: _bins(rows) for c, rows in suppress(scores.class_reliability, images).items()},
        macro_precision=_shown(scores.macro_precision) if mean_precision and not few else None,
        macro_auroc=None if few else _shown(scores.macro_auroc),
        macro_auprc=None if few else _shown(scores.macro_auprc),
        confusion=tuple(
            _confusion(row, i, hidden=c in hidden)
            for i, (c, row) in enumerate(zip(evaluation.relevant, scores.confusion, strict=True))
        ),
        reliability=_bins(scores.reliability) or (),
    )


def _change(estimate: Estimate | None, first: Estimate | None, second: Estimate | None) -> Estimate | None:
    """A difference, told where both figures are; its value is that of what is told of them."""
    if estimate is None or first is None or second is None:
        return None
    return _shown(estimate, shown_figure(second.value - first.value))


def _point(evaluation: Evaluation) -> OperatingPointResult | None:
    """The operating point with its false-query rate on the test images as it may be shown.

    The rate on the calibration images was suppressed, if need be, when it was counted.
    """
    point = evaluation.operating_point
    if point is None or point.given_away_test is None:
        return point
    images = sum(evaluation.test_images.get(c, 0) for c in evaluation.local)
    told = shown_share(round(point.given_away_test.value * images), images)
    given = None if told is None else _shown(point.given_away_test, told)
    return point.model_copy(update={"given_away_test": given})


def _subgroup(group: SubgroupResult) -> SubgroupResult:
    """Figures of a group, judged as if all its images were of one class: they may be."""

    def shown(estimate: Estimate | None) -> Estimate | None:
        images = group.images
        if estimate is None or images in ("0", 0):
            return None
        if isinstance(images, int) and shown_share(round(estimate.value * images), images) is None:
            return None
        return _shown(estimate)

    def side(scores: SubgroupScores) -> SubgroupScores:
        return SubgroupScores(
            query_accuracy=shown(scores.query_accuracy),
            retained_accuracy=shown(scores.retained_accuracy),
            balanced_accuracy=shown(scores.balanced_accuracy),
        )

    return group.model_copy(update={"before": side(group.before), "after": side(group.after)})


def _others_scores(
    scores: Scores, others: OthersFigures, evaluation: Evaluation, told: PublishedScores
) -> PublishedOthersScores:
    """Figures of one model on others' images.

    The recalls of the hospital's own classes are the same here and there, so that two means over different
    recalls of the query could tell one that is hidden: the mean of all is told where no recall is hidden.
    """
    asked = evaluation.classes
    images = {c: others.test_images.get(c, 0) for c in asked}
    right = {c: (scores.confusion[i] or ())[i] for i, c in enumerate(evaluation.relevant) if c in images}
    alone = {c for c in asked if shown_share(right[c], images[c]) is None}
    hidden = hide_a_second(alone, asked, images)
    few = any(map(too_few, images.values()))
    whole = not hidden and None not in told.recall.values() and told.balanced_accuracy is not None
    return PublishedOthersScores(
        query_accuracy=None if few or len(hidden) == 1 else _shown(scores.query_accuracy),
        balanced_accuracy=_shown(scores.balanced_accuracy) if whole else None,
        recall={c: None if c in hidden else _shown(scores.recall.get(c)) for c in asked},
    )


def _others(
    evaluation: Evaluation, before: PublishedScores, after: PublishedScores
) -> PublishedOthers | None:
    others = evaluation.others
    if others is None:
        return None
    return PublishedOthers(
        test_images={c: shown_count(others.test_images.get(c, 0)) for c in evaluation.classes},
        test_sites=others.test_sites,
        before=_others_scores(others.before, others, evaluation, before),
        after=_others_scores(others.after, others, evaluation, after),
    )


def published(evaluation: Evaluation) -> PublishedEvaluation:
    """An evaluation as it may leave the hospital.

    Args:
        evaluation: as the stage wrote it, with all that it counted.
    """
    hidden = [_hidden_recalls(scores, evaluation) for scores in (evaluation.before, evaluation.after)]
    before = _published_scores(evaluation.before, evaluation, hidden[0])
    after = _published_scores(evaluation.after, evaluation, hidden[1])
    return PublishedEvaluation(
        **evaluation.model_dump(
            include={
                *("format", "hospital", "query", "student", "classes", "method", "teachers", "bytes_moved"),
                *("budget", "relevant", "local", "test_sites", "test_data", "passes_per_prediction"),
                "test_images_from",
            }
        ),
        test_images=evaluation.shown_images,
        others=_others(evaluation, before, after),
        before=before,
        after=after,
        gain=_change(evaluation.gain, before.balanced_accuracy, after.balanced_accuracy),
        forgetting=_change(evaluation.forgetting, after.retained_accuracy, before.retained_accuracy),
        query_gain=_change(evaluation.query_gain, before.query_accuracy, after.query_accuracy),
        gain_p=None if evaluation.gain_p is None else round(evaluation.gain_p, P_DECIMALS),
        class_forgetting={
            c: _change(figure, after.recall.get(c), before.recall.get(c))
            for c, figure in evaluation.class_forgetting.items()
        },
        operating_point=_point(evaluation),
        subgroups={
            column: {name: _subgroup(group) for name, group in groups.items()}
            for column, groups in evaluation.subgroups.items()
        },
    )


# --- verdicts and teachers --------------------------------------------------------------------------


def _measured(evaluation: PublishedEvaluation, data: str | None) -> Measured:
    return Measured(
        balanced_accuracy=evaluation.after.balanced_accuracy,
        query_recall={c: evaluation.after.recall.get(c) for c in evaluation.classes},
        forgetting=evaluation.forgetting,
        data=data,
    )


def published_verdict(verdict: Verdict, evaluation: PublishedEvaluation) -> Verdict:
    """A verdict as it may leave the hospital; whether a rule is met stays as it was judged.

    Args:
        verdict: the gate's.
        evaluation: what was judged, as it may leave the hospital.
    """
    rules = []
    for rule in verdict.rules:
        figure = rule.figure
        if figure is not None and rule.rule != "query_images":
            figure = shown_bounds(figure, figure)[rule.bound == "at most"]
        rules.append(rule.model_copy(update={"figure": figure}))
    measured = None if verdict.measured is None else _measured(evaluation, verdict.measured.data)
    return verdict.model_copy(
        update={"rules": tuple(rules), "measured": measured, "champion": _champion(verdict.champion)}
    )


def _champion(champion: Champion | None) -> Champion | None:
    """Of the version in use only what the relative rule needs; the rest was told when it was new."""
    if champion is None or champion.measured is None:
        return champion
    told = champion.measured.model_copy(
        update={
            "balanced_accuracy": _shown(champion.measured.balanced_accuracy),
            "query_recall": dict.fromkeys(champion.measured.query_recall),
            "forgetting": None,
        }
    )
    return champion.model_copy(update={"measured": told})


def published_metrics(metrics: TeacherMetrics, images: Mapping[str, int] | None) -> TeacherMetrics:
    """Figures of a training as they may leave the hospital.

    Args:
        metrics: of the teacher.
        images: class to number of validation images; None where the hospital's data are not in this
            workspace, in which case readers of the figures do not know it either.
    """
    recall = metrics.recall
    hidden = {c for c, value in recall.items() if value is None}
    if images is not None:
        told = {
            c: None if value is None else shown_share(round(value * images.get(c, 0)), images.get(c, 0))
            for c, value in recall.items()
        }
        hidden = {c for c, value in told.items() if value is None}
    few = None in recall.values()
    if not few:
        hidden = hide_a_second(hidden, recall, images or {})
    mean = metrics.balanced_accuracy
    return metrics.model_copy(
        update={
            "recall": {
                c: None if c in hidden or value is None else shown_figure(value)
                for c, value in recall.items()
            },
            "balanced_accuracy": None if mean is None or few or len(hidden) == 1 else shown_figure(mean),
        }
    )
