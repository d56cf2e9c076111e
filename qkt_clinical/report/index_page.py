"""``reports/index.html``: the federation, its hospitals and queries, with gains and losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qkt_clinical import __version__
from qkt_clinical.catalog import SPLITS
from qkt_clinical.qkt.planning import UNLIKE, image_shift
from qkt_clinical.records.base import Estimate
from qkt_clinical.records.model_card import ModelCard
from qkt_clinical.records.outputs import Outputs, QueryOutputs, SiteOutputs
from qkt_clinical.report import charts
from qkt_clinical.report.page import environment, gain_bars


@dataclass(frozen=True)
class Cell:
    """A teacher's mask for one class. ``truth`` is None if the site's data are not in this workspace."""

    score: str
    known: bool
    truth: bool | None


@dataclass(frozen=True)
class GainCell:
    """One query in the map of gains, in the column of a class that it asked for."""

    query: QueryOutputs
    recall: float | None
    """Of that class, after less before; None where it has too few test images."""
    balanced: Estimate
    """Gain in balanced accuracy of the whole query."""

    @property
    def lost(self) -> bool:
        """Whether either figure fell."""
        return self.balanced.value < 0 or (self.recall is not None and self.recall < 0)

    @property
    def shade(self) -> int:
        """Strength of the cell's colour, 0 to 100: of the larger gain or, where one was lost, of the loss."""
        figures = [self.balanced.value, *([] if self.recall is None else [self.recall])]
        return round(100 * min(1.0, abs(min(figures) if self.lost else max(figures))))


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
        )
        for name, score, known in zip(site.mask.classes, site.mask.scores, site.mask.known, strict=True)
    ]


def gain_map(outputs: Outputs) -> tuple[list[str], list[tuple[str, list[list[GainCell]]]]]:
    """Queried classes, and the answers to each per asking hospital, sorted by name."""
    asked = {name for q in outputs.queries for name in q.evaluation.classes}
    columns = [name for name in outputs.params.classes if name in asked]

    def answered(query: QueryOutputs, name: str) -> GainCell:
        before, after = (s.recall.get(name) for s in (query.evaluation.before, query.evaluation.after))
        change = None if before is None or after is None else after.value - before.value
        return GainCell(query, change, query.evaluation.gain)

    rows = [
        (
            hospital,
            [
                [
                    answered(q, name)
                    for q in outputs.queries
                    if q.evaluation.hospital == hospital and name in q.evaluation.classes
                ]
                for name in columns
            ],
        )
        for hospital in sorted({q.evaluation.hospital for q in outputs.queries})
    ]
    return columns, rows


def image_shifts(outputs: Outputs) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """How far the images of every two hospitals lie apart, by their teachers' cards.

    Returns:
        Hospitals whose cards tell, and for each of them its shift to each, None to itself and where channels
        differ; both empty where fewer than two tell.
    """
    told = {s.name: s.card.image_statistics for s in outputs.sites if s.card and s.card.image_statistics}
    if len(told) < 2:
        return [], []
    rows = [
        (name, [None if other == name else image_shift(here, there) for other, there in told.items()])
        for name, here in told.items()
    ]
    return list(told), rows


def _summary(outputs: Outputs) -> dict[str, Any]:
    evaluations = [q.evaluation for q in outputs.queries]

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "answered": len(evaluations),
        "unmeasured": len(outputs.unmeasured),
        "asked": len(evaluations) + len(outputs.unmeasured) + len(outputs.unanswered),
        "gain": mean([e.gain.value for e in evaluations]),
        "before": mean([e.before.balanced_accuracy.value for e in evaluations]),
        "after": mean([e.after.balanced_accuracy.value for e in evaluations]),
        "query_before": mean([e.before.query_accuracy.value for e in evaluations]),
        "query_after": mean([e.after.query_accuracy.value for e in evaluations]),
        "query_gain": mean([e.query_gain.value for e in evaluations]),
        "forgetting": mean([e.forgetting.value for e in evaluations]),
        "error_before": mean([e.before.ece.value for e in evaluations]),
        "error": mean([e.after.ece.value for e in evaluations]),
        "worse": sum(e.gain.value < 0 for e in evaluations),
        "unsure": sum(e.gain.low <= 0 <= e.gain.high for e in evaluations),
        "passed": sum(q.verdict is not None and q.verdict.passed for q in outputs.queries),
        "bytes": sum(e.bytes_moved for e in evaluations),
    }


def _site_view(site: SiteOutputs, card: ModelCard | None) -> dict[str, Any]:
    curves = (
        charts.line_chart("Training loss", site.curves, ["loss"]),
        charts.line_chart("Score on validation images", site.curves, ["score"]),
    )
    return {
        "site": site,
        "cells": _cells(site),
        "charts": [c for c in curves if c],
        "card": card,
        "rows": []
        if site.manifest is None
        else [(c, [site.manifest.counts[s].get(c, 0) for s in SPLITS]) for c in site.manifest.classes],
    }


def render_index(outputs: Outputs, cards: Mapping[str, ModelCard]) -> str:
    """Render the page. The same outputs give the same text.

    Args:
        outputs: the run.
        cards: site to the model card of its teacher, where there is one.
    """
    columns, rows = gain_map(outputs)
    shift_columns, shift_rows = image_shifts(outputs)
    return (
        environment()
        .get_template("index.html")
        .render(
            version=__version__,
            outputs=outputs,
            params=outputs.params,
            confidence=f"{100 * outputs.params.evaluate.confidence:g}%",
            splits=SPLITS,
            summary=_summary(outputs),
            gains=gain_bars(q.evaluation for q in outputs.queries),
            map_columns=columns,
            map_rows=rows,
            shift_columns=shift_columns,
            shift_rows=shift_rows,
            unlike=UNLIKE,
            sites=[_site_view(site, cards.get(site.name)) for site in outputs.sites],
        )
    )
