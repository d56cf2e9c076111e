"""Parts shared by the report's pages: templates, bars and single charts.

A page is one file without scripts, fonts or anything else from a network. Charts are SVG written by Jinja
macros, not by matplotlib: a tenth of the bytes, coloured by the page's own variables in light and dark,
legible at any width, and readable by a screen reader.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment

from qkt_clinical.common import wording
from qkt_clinical.common.disclosure import shown_count
from qkt_clinical.common.html import page_environment
from qkt_clinical.records.base import Estimate
from qkt_clinical.records.evaluation import Evaluation
from qkt_clinical.records.published import PublishedEvaluation
from qkt_clinical.report import charts


@dataclass(frozen=True)
class Bar:
    """Before and after of one thing, as shares with intervals; ``note`` stands at the right."""

    label: str
    before: Estimate | None
    after: Estimate | None
    note: str
    marked: bool = False
    """Of dumbbells: a loss; of bars: a class asked for."""

    @property
    def lost(self) -> bool:
        """Whether the figure fell."""
        return bool(self.before and self.after and self.after.value < self.before.value)


def _before_after(before: Estimate | None, after: Estimate | None) -> str:
    if before is None and after is None:
        return "too few images"
    one, two = ("too few images" if v is None else wording.percent(v.value) for v in (before, after))
    return f"{one} → {two}"


def gain_bars(evaluations: Iterable[Evaluation | PublishedEvaluation]) -> list[Bar]:
    """Balanced accuracy before and after, per query."""
    return [
        Bar(
            f"{e.hospital}: {wording.words(e.classes)}",
            e.before.balanced_accuracy,
            e.after.balanced_accuracy,
            "too few images" if e.gain is None else f"{wording.points(e.gain.value)} points",
            e.gain is not None and e.gain.value < 0,
        )
        for e in evaluations
    ]


def recall_bars(evaluation: Evaluation | PublishedEvaluation) -> list[Bar]:
    """Recall before and after, per relevant class; the classes asked for are marked."""
    return [
        Bar(
            f"{name} (asked)" if name in evaluation.classes else name,
            evaluation.before.recall.get(name),
            evaluation.after.recall.get(name),
            _before_after(evaluation.before.recall.get(name), evaluation.after.recall.get(name)),
            name in evaluation.classes,
        )
        for name in evaluation.relevant
    ]


def reliability_curves(evaluation: Evaluation | PublishedEvaluation) -> list[charts.Curve]:
    """Before and after; bins of too few images are not among them."""
    sides = (("own model", evaluation.before), ("after the query", evaluation.after))
    return [
        charts.reliability_curve(name, [(b.confidence, b.accuracy) for b in scores.reliability])
        for name, scores in sides
    ]


@cache
def environment() -> Environment:
    """The pages' templates and filters."""
    made = page_environment("qkt_clinical.report")
    for function in (wording.percent, wording.percents, wording.points, wording.size, wording.words):
        made.filters[function.__name__] = function
    made.filters["images_from"] = wording.IMAGES_FROM.__getitem__
    made.filters["figure"] = wording.figure
    made.filters["count"] = lambda number: number if isinstance(number, str) else shown_count(number)
    return made


def render_chart(kind: str, title: str, bars: list[Bar]) -> str:
    """One chart as an SVG file of its own; ``kind`` is ``dumbbells`` or ``bars``."""
    return environment().get_template("chart.svg").render(kind=kind, title=title, drawn=bars)


def render_reliability(evaluation: Evaluation | PublishedEvaluation) -> str:
    """Reliability before and after as an SVG file of its own."""
    return (
        environment()
        .get_template("chart.svg")
        .render(
            kind="reliability",
            title=f"Reliability: {evaluation.hospital}-{evaluation.query}",
            drawn=reliability_curves(evaluation),
        )
    )
