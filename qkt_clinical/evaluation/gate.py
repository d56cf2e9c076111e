"""The promotion gate: is an answer good enough for a reviewer to let it into use? Pure functions.

Absolute rules judge bounds of intervals, not values: what might be chance does not pass. Relative rules hold
an answer against the champion, the version of the same model that is in use. Nothing is promoted here; the
verdict says what speaks for and against it.
"""

from __future__ import annotations

from qkt_clinical.common.disclosure import shown_count, suppress, too_few
from qkt_clinical.config.params import GateParams
from qkt_clinical.records.evaluation import Evaluation
from qkt_clinical.records.verdict import Bound, Champion, GateRule, Measured, Verdict

COMPARED_DECIMALS = 2
"""In which balanced accuracies are compared: those of a version in use may be kept as they may be told."""


def measured(evaluation: Evaluation) -> Measured:
    """The figures of an answer with which others are compared."""
    recall = suppress(evaluation.after.recall, evaluation.test_images)
    return Measured(
        balanced_accuracy=evaluation.after.balanced_accuracy,
        query_recall={c: recall.get(c) for c in evaluation.classes},
        forgetting=evaluation.forgetting,
        data=evaluation.test_data,
    )


def _rule(name: str, meaning: str, figure: float | None, bound: Bound, threshold: float) -> GateRule:
    met = figure is not None and (figure >= threshold if bound == "at least" else figure <= threshold)
    return GateRule(rule=name, meaning=meaning, figure=figure, bound=bound, threshold=threshold, passed=met)


def absolute_rules(evaluation: Evaluation, figures: Measured, params: GateParams) -> tuple[GateRule, ...]:
    """Rules for every answer, whichever version is in use.

    Whether a figure that may not be told reaches a threshold is not told either: the rule is met only where
    every figure would meet it.
    """
    recalls = list(figures.query_recall.values())
    lows = [recall.low for recall in recalls if recall is not None]
    images = [evaluation.test_images.get(c, 0) for c in evaluation.classes]
    cases = min(images, default=0)
    fewest = [
        evaluation.shown_images.get(c, "0")
        for c, n in zip(evaluation.classes, images, strict=True)
        if n == cases
    ]
    hidden = next((told for told in fewest if told != shown_count(cases) or too_few(cases)), None)
    recall = _rule(
        "query_recall",
        "recall of every class asked for, lower end of its interval",
        min(lows) if lows and len(lows) == len(recalls) else None,
        "at least",
        params.query_recall,
    )
    if any(map(too_few, images)):
        met = cases > 0 and params.query_recall <= 0
        recall = recall.model_copy(update={"note": "too few test images", "passed": met})
    return (
        recall,
        _rule(
            "forgetting",
            "retained accuracy lost, upper end of its interval",
            evaluation.forgetting.high,
            "at most",
            params.forgetting,
        ),
        _rule(
            "calibration",
            "expected calibration error, upper end of its interval",
            evaluation.after.ece.high,
            "at most",
            params.calibration,
        ),
        GateRule(
            rule="query_images",
            meaning="test images of every class asked for",
            figure=None if hidden is not None else float(cases),
            bound="at least",
            threshold=float(params.query_images),
            passed=cases >= params.query_images,
            note=hidden,
        ),
    )


def relative_rules(
    figures: Measured, digest: str | None, champion: Champion | None, params: GateParams
) -> tuple[GateRule, ...]:
    """Rules that compare an answer with the version in use.

    Figures of other test images say nothing about which of two versions is better: the rule is not met
    then. It is met where nothing is in use, or the answer itself is.
    """
    figure: float | None = None
    met = False
    if champion is None:
        met, note = True, "no champion"
    elif champion.digest == digest:
        figure, met, note = 0.0, True, "it is the champion"
    elif champion.measured is None:
        note = "the champion's figures were not kept"
    elif figures.data is None or figures.data != champion.measured.data:
        note = "measured on other data than the champion"
    elif figures.balanced_accuracy is None or champion.measured.balanced_accuracy is None:
        note = "too few test images to compare with the champion"
    else:
        now = round(figures.balanced_accuracy.value, COMPARED_DECIMALS)
        then = round(champion.measured.balanced_accuracy.value, COMPARED_DECIMALS)
        figure = round(then - now, COMPARED_DECIMALS)
        met = figure <= params.worse_than_champion
        note = f"balanced accuracy {now:.3f}, the champion's is {then:.3f}"
    return (
        GateRule(
            rule="worse_than_champion",
            kind="relative",
            meaning="balanced accuracy below the champion's, on the same data",
            figure=figure,
            bound="at most",
            threshold=params.worse_than_champion,
            passed=met,
            note=note,
        ),
    )


def judge(
    evaluation: Evaluation,
    params: GateParams,
    *,
    digest: str | None = None,
    champion: Champion | None = None,
) -> Verdict:
    """Apply all rules to one answer.

    Args:
        evaluation: the answer's figures.
        params: the thresholds.
        digest: of the answer's bundle.
        champion: the version in use, if there is one.
    """
    figures = measured(evaluation)
    rules = (
        *absolute_rules(evaluation, figures, params),
        *relative_rules(figures, digest, champion, params),
    )
    return Verdict(
        hospital=evaluation.hospital,
        query=evaluation.query,
        digest=digest,
        passed=all(rule.passed for rule in rules),
        rules=rules,
        measured=figures,
        champion=champion,
    )


def against(verdict: Verdict, champion: Champion | None, params: GateParams) -> Verdict:
    """The same verdict against another champion: the version in use may have changed since."""
    if verdict.measured is None:
        return verdict
    rules = (
        *(rule for rule in verdict.rules if rule.kind == "absolute"),
        *relative_rules(verdict.measured, verdict.digest, champion, params),
    )
    passed = all(rule.passed for rule in rules)
    return verdict.model_copy(update={"rules": rules, "passed": passed, "champion": champion})
