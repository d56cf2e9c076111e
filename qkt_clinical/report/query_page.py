"""``reports/queries/<hospital>/<query>.html``: one answer, for the reviewer who decides about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from qkt_clinical import __version__
from qkt_clinical.decisions import Decision, champions
from qkt_clinical.gate import Rule
from qkt_clinical.model_card import student_model_card
from qkt_clinical.query import at_risk
from qkt_clinical.report import charts
from qkt_clinical.report.outputs import Outputs, Phase1, QueryOutputs, Scores
from qkt_clinical.report.page import environment, recall_bars, reliability_curves
from qkt_clinical.report.pictures import MOST, Flipped

LIBRARIES = ("torch", "monai", "numpy", "scipy", "safetensors")
"""Whose versions bear on figures."""


@dataclass(frozen=True)
class Voice:
    """What one network counts for, as shares, in the order of the relevant classes; None: it is not heard."""

    network: str
    shares: tuple[float | None, ...]


def voices(query: QueryOutputs) -> list[Voice]:
    """What the hospital's own network and the fetched teachers count for, per relevant class."""
    plan, second = query.plan, query.phases.phase2
    silent = {t.site for t in query.phases.trust if not t.heard}
    dismissed = {t.site: set(t.dismissed) for t in query.phases.trust}
    networks = [(plan.hospital, second.own_weight, {*plan.local, *second.rare})]
    networks += [
        (t.site, 1.0, set(t.known) - dismissed.get(t.site, set()))
        for t in plan.teachers
        if t.relevant and t.site not in silent
    ]
    totals = {
        name: sum(weight for _, weight, known in networks if name in known)
        for name in query.evaluation.relevant
    }
    return [
        Voice(site, tuple(weight / total if name in known else None for name, total in totals.items()))
        for site, weight, known in networks
    ]


def confusion_shares(scores: Scores) -> list[list[int | None]]:
    """Rows in whole percent of their images; None where a class has no image. Counts stay out of the page."""
    return [[round(100 * n / sum(row)) if sum(row) else None for n in row] for row in scores.confusion]


def rule_figure(rule: Rule) -> str:
    """A rule's figure as its page shows it."""
    if rule.figure is None:
        return rule.note or "unknown"
    return f"{rule.figure:,.0f}" if rule.rule.endswith("_images") else charts.percent(rule.figure)


def rule_threshold(rule: Rule) -> str:
    """A rule's threshold in the same unit."""
    return f"{rule.threshold:,.0f}" if rule.rule.endswith("_images") else charts.percent(rule.threshold)


def standing(decisions: tuple[Decision, ...], model: str, digest: str) -> str:
    """Which version of a model is in use, in words."""
    stack = champions(decisions, model)
    if not stack:
        return "No version of this model is in use."
    if stack[-1] == digest:
        return "This answer is in use."
    if digest in stack:
        return "Another version is in use; this answer was replaced by it."
    return "Another version is in use, not this answer."


def _phase1_chart(phase1: Phase1) -> charts.LineChart | None:
    if phase1.kind == "transplant":
        title = "Phase 1: share of a layer’s output lost, per teacher"
        return charts.line_chart(title, phase1.curves, axis="layer number")
    return charts.line_chart("Phase 1: losses", phase1.curves)


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    """Nested settings by their dotted names."""
    if isinstance(value, Mapping):
        return {k: v for key in value for k, v in _flat(f"{prefix}.{key}", value[key]).items()}
    return {prefix: ", ".join(map(str, value)) if isinstance(value, list) else value}


def _used(outputs: Outputs) -> dict[str, Any]:
    """The parameters that bear on the figures of an answer."""
    params = outputs.params
    sections = ("ingest", "train", "mask", "transfer", "evaluate", "gate")
    found: dict[str, Any] = {"seed": params.seed}
    for name in sections:
        found |= _flat(name, getattr(params, name).model_dump(mode="json"))
    return found


def _provenance(outputs: Outputs, query: QueryOutputs) -> dict[str, str | None]:
    site = outputs.site(query.evaluation.hospital)
    return {
        "Student (folder, as in the registry)": query.folder_digest,
        "Student bundle": query.card_digest,
        "Student weights": query.card.weights.sha256,
        "Hospital’s own model": site.card_digest if site else None,
        "Hospital’s data": site.data_digest if site else None,
        **{f"Teacher {t.site}": t.digest for t in query.plan.teachers if t.relevant},
        "Parameters": outputs.params_digest,
    }


def render_query(outputs: Outputs, query: QueryOutputs, flipped: Mapping[bool, Flipped]) -> str:
    """The whole page. Same outputs, same text.

    Args:
        outputs: the run.
        query: one of its answered queries.
        flipped: see :func:`qkt_clinical.report.pictures.flipped_cases`.
    """
    phases, evaluation = query.phases, query.evaluation
    site = outputs.site(evaluation.hospital)
    decisions = tuple(d for d in (site.decisions if site else ()) if d.model == query.model)
    drawn = (
        _phase1_chart(phases.phase1) if phases.phase1 else None,
        charts.line_chart("Phase 2: losses", phases.phase2.curves),
    )
    silent = [s for s in evaluation.test_sites if (o := outputs.site(s)) is None or not o.pictures]
    return (
        environment()
        .get_template("query.html")
        .render(
            version=__version__,
            outputs=outputs,
            params=outputs.params,
            confidence=f"{100 * outputs.params.evaluate.confidence:g}%",
            q=query,
            e=evaluation,
            p2=phases.phase2,
            recall=recall_bars(query),
            voices=voices(query),
            at_risk=at_risk(query.plan),
            confusions=[
                ("Before", confusion_shares(evaluation.before)),
                ("After", confusion_shares(evaluation.after)),
            ],
            curves=reliability_curves(query),
            rules=[]
            if query.verdict is None
            else [(r, rule_figure(r), rule_threshold(r)) for r in query.verdict.rules],
            decisions=decisions,
            standing=standing(decisions, query.model, query.folder_digest),
            digest=query.folder_digest,
            charts_drawn=[c for c in drawn if c],
            flipped=flipped,
            silent=silent,
            most=MOST,
            card=student_model_card(query, outputs),
            provenance=_provenance(outputs, query),
            used=_used(outputs),
            libraries={name: metadata.version(name) for name in LIBRARIES},
        )
    )
