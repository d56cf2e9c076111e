"""``reports/index.html``: one file without scripts, fonts or anything else from a network.

Charts are SVG written by Jinja macros, not by matplotlib: a tenth of the bytes, coloured by the page's
own variables in light and dark, legible at any width, and readable by a screen reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment

from qkt_clinical import __version__
from qkt_clinical.catalog import SPLITS
from qkt_clinical.config import Params, Workspace
from qkt_clinical.data import shown_count
from qkt_clinical.files import write_text
from qkt_clinical.html import page_environment
from qkt_clinical.report import charts
from qkt_clinical.report.outputs import (
    Interval,
    Outputs,
    Phase1,
    QueryOutputs,
    Scores,
    SiteOutputs,
    read_outputs,
)

METHOD_WORDS = {
    "qkt": (
        "One network answers. It took up the extractors of the relevant teachers beside its own, made "
        "smaller on the hospital’s own images (phase 1); then its head was set for all relevant classes "
        "(phase 2)."
    ),
    "qkt-light": (
        "One network answers. It took up the extractors of the teachers that know the query beside its own, "
        "made much smaller; then its head was set for all relevant classes."
    ),
    "routed": (
        "Several networks answer together: the hospital’s own model and the relevant teachers’ networks, "
        "each for the classes that it knows."
    ),
}


@dataclass(frozen=True)
class Bar:
    """Before and after of one thing, as shares with intervals; ``note`` stands at the right."""

    label: str
    before: Interval | None
    after: Interval | None
    note: str
    marked: bool = False


@dataclass(frozen=True)
class Cell:
    """A teacher's mask for one class. ``truth`` is None where the site's data is not here."""

    score: str
    known: bool
    truth: bool | None
    shade: int


def _before_after(before: Interval | None, after: Interval | None) -> str:
    one, two = ("no images" if v is None else charts.percent(v.value) for v in (before, after))
    return f"{one} → {two}"


def gain_bars(outputs: Outputs) -> list[Bar]:
    """Balanced accuracy before and after, per query."""
    return [
        Bar(
            f"{q.evaluation.hospital}: {charts.words(q.evaluation.classes)}",
            q.evaluation.before.balanced_accuracy,
            q.evaluation.after.balanced_accuracy,
            f"{charts.points(q.evaluation.gain.value)} points",
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


def _confusion(scores: Scores) -> list[list[int | None]]:
    """Rows in whole percent of their images; None where a class has no image. Counts stay out of the page."""
    return [[round(100 * n / sum(row)) if sum(row) else None for n in row] for row in scores.confusion]


def _cells(site: SiteOutputs) -> list[Cell] | None:
    """One cell per class; None where the site has no mask."""
    if site.mask is None:
        return None
    train = site.manifest.counts["train"] if site.manifest else None
    return [
        Cell(
            score=f"{score:.2f}" if score >= 0.005 else "0.00",
            known=known,
            truth=None if train is None else train.get(name, 0) > 0,
            shade=round(100 * min(score, 1.0)),
        )
        for name, score, known in zip(site.mask.classes, site.mask.scores, site.mask.known, strict=True)
    ]


def _summary(outputs: Outputs) -> dict[str, Any]:
    evaluations = [q.evaluation for q in outputs.queries]

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "answered": len(evaluations),
        "asked": len(evaluations) + len(outputs.unanswered),
        "gain": mean([e.gain.value for e in evaluations]),
        "before": mean([e.before.balanced_accuracy.value for e in evaluations]),
        "after": mean([e.after.balanced_accuracy.value for e in evaluations]),
        "query_before": mean([e.before.query_accuracy.value for e in evaluations]),
        "query_after": mean([e.after.query_accuracy.value for e in evaluations]),
        "forgetting": mean([e.forgetting.value for e in evaluations]),
        "worse": sum(e.gain.value < 0 for e in evaluations),
        "unsure": sum(e.gain.low <= 0 <= e.gain.high for e in evaluations),
        "bytes": sum(e.bytes_moved for e in evaluations),
    }


def _site_view(site: SiteOutputs) -> dict[str, Any]:
    curves = (
        charts.line_chart("Training loss", site.curves, ["loss"]),
        charts.line_chart("Score on validation images", site.curves, ["score"]),
    )
    return {
        "site": site,
        "cells": _cells(site),
        "charts": [c for c in curves if c],
        "rows": []
        if site.manifest is None
        else [(c, [site.manifest.counts[s].get(c, 0) for s in SPLITS]) for c in site.manifest.classes],
    }


def _phase1_chart(phase1: Phase1) -> charts.LineChart | None:
    if phase1.kind == "transplant":
        title = "Phase 1: share of a layer’s output lost, per teacher"
        return charts.line_chart(title, phase1.curves, axis="layer number")
    return charts.line_chart("Phase 1: losses", phase1.curves)


def _query_view(outputs: Outputs, query: QueryOutputs) -> dict[str, Any]:
    phases, evaluation = query.phases, query.evaluation
    site = outputs.site(evaluation.hospital)
    drawn = [
        _phase1_chart(phases.phase1) if phases.phase1 else None,
        charts.line_chart("Phase 2: losses", phases.phase2.curves),
    ]
    return {
        "q": query,
        "e": evaluation,
        "recall": recall_bars(query),
        "confusions": [
            ("Before", _confusion(evaluation.before)),
            ("After", _confusion(evaluation.after)),
        ],
        "charts": [c for c in drawn if c],
        "method_words": METHOD_WORDS.get(evaluation.method, ""),
        "provenance": {
            "Student bundle": query.card_digest,
            "Student weights": query.card.weights.sha256,
            "Hospital's own model": site.card_digest if site else None,
            "Hospital's data": site.data_digest if site else None,
            **{f"Teacher {t.site}": t.digest for t in query.plan.teachers if t.relevant},
            "Parameters": outputs.params_digest,
        },
    }


@cache
def _environment() -> Environment:
    environment = page_environment("qkt_clinical.report")
    for function in (charts.percent, charts.percents, charts.points, charts.size, charts.words):
        environment.filters[function.__name__] = function
    environment.filters["figure"] = charts.figure
    environment.filters["count"] = shown_count
    return environment


def render_report(outputs: Outputs) -> str:
    """The whole page. Same outputs, same text."""
    return (
        _environment()
        .get_template("index.html")
        .render(
            version=__version__,
            outputs=outputs,
            params=outputs.params,
            confidence=f"{100 * outputs.params.evaluate.confidence:g}%",
            splits=SPLITS,
            summary=_summary(outputs),
            gains=gain_bars(outputs),
            sites=[_site_view(site) for site in outputs.sites],
            queries=[_query_view(outputs, query) for query in outputs.queries],
        )
    )


def render_chart(kind: str, title: str, bars: list[Bar]) -> str:
    """One chart as an SVG file of its own; ``kind`` is ``dumbbells`` or ``bars``."""
    return _environment().get_template("chart.svg").render(kind=kind, title=title, bars=bars)


def render_reliability(query: QueryOutputs) -> str:
    """Reliability before and after as an SVG file of its own."""
    sides = (("own model", query.evaluation.before), ("after the query", query.evaluation.after))
    curves = [
        charts.reliability_curve(name, [(b.confidence, b.accuracy) for b in scores.reliability])
        for name, scores in sides
    ]
    return (
        _environment()
        .get_template("reliability.svg")
        .render(title=f"Reliability: {query.name}", curves=curves)
    )


def write_report(root: Path, params: Params) -> Path:
    """Write ``reports/index.html`` of a workspace and return its path.

    Raises:
        OutputsError, BundleError, PreparedError: see :func:`qkt_clinical.report.outputs.read_outputs`.
    """
    path = Workspace(root).reports / "index.html"
    write_text(path, render_report(read_outputs(root, params)))
    return path
