"""What the report's pages share: their templates, bars and single charts.

A page is one file without scripts, fonts or anything else from a network. Charts are SVG written by Jinja
macros, not by matplotlib: a tenth of the bytes, coloured by the page's own variables in light and dark,
legible at any width, and readable by a screen reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from jinja2 import Environment

from qkt_clinical.common import wording
from qkt_clinical.common.disclosure import shown_count
from qkt_clinical.common.html import page_environment
from qkt_clinical.records.evaluation import Interval
from qkt_clinical.records.outputs import Outputs, QueryOutputs
from qkt_clinical.report import charts


@dataclass(frozen=True)
class Bar:
    """Before and after of one thing, as shares with intervals; ``note`` stands at the right."""

    label: str
    before: Interval | None
    after: Interval | None
    note: str
    marked: bool = False
    """Of dumbbells: a loss; of bars: a class asked for."""

    @property
    def lost(self) -> bool:
        """Whether the figure fell."""
        return bool(self.before and self.after and self.after.value < self.before.value)


def _before_after(before: Interval | None, after: Interval | None) -> str:
    if before is None and after is None:
        return "too few images"
    one, two = ("too few images" if v is None else wording.percent(v.value) for v in (before, after))
    return f"{one} → {two}"


def gain_bars(outputs: Outputs) -> list[Bar]:
    """Balanced accuracy before and after, per query."""
    return [
        Bar(
            f"{q.evaluation.hospital}: {wording.words(q.evaluation.classes)}",
            q.evaluation.before.balanced_accuracy,
            q.evaluation.after.balanced_accuracy,
            f"{wording.points(q.evaluation.gain.value)} points",
            q.evaluation.gain.value < 0,
        )
        for q in outputs.queries
    ]


def recall_bars(query: QueryOutputs) -> list[Bar]:
    """Recall before and after, per relevant class; the classes asked for are marked."""
    evaluation = query.evaluation
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


def reliability_curves(query: QueryOutputs) -> list[charts.Curve]:
    """Before and after; bins of too few images are not among them."""
    sides = (("own model", query.evaluation.before), ("after the query", query.evaluation.after))
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
    made.filters["figure"] = wording.figure
    made.filters["count"] = lambda number: number if isinstance(number, str) else shown_count(number)
    return made


def render_chart(kind: str, title: str, bars: list[Bar]) -> str:
    """One chart as an SVG file of its own; ``kind`` is ``dumbbells`` or ``bars``."""
    return environment().get_template("chart.svg").render(kind=kind, title=title, drawn=bars)


def render_reliability(query: QueryOutputs) -> str:
    """Reliability before and after as an SVG file of its own."""
    chart = environment().get_template("chart.svg")
    return chart.render(
        kind="reliability", title=f"Reliability: {query.name}", drawn=reliability_curves(query)
    )
