"""``reports/queries/<hospital>/<query>.html``: one answer, for the reviewer who decides about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from qkt_clinical import __version__
from qkt_clinical.catalog import BY_MEANS
from qkt_clinical.common import wording
from qkt_clinical.qkt.planning import UNLIKE, at_risk
from qkt_clinical.records.base import Estimate
from qkt_clinical.records.decisions import Decision, champions
from qkt_clinical.records.model_card import ModelCard
from qkt_clinical.records.outputs import AnswerOutputs, Outputs, QueryOutputs, flat, shares
from qkt_clinical.records.phases import FAR, MERGE_KIND, Phase1
from qkt_clinical.records.verdict import GateRule
from qkt_clinical.report import charts
from qkt_clinical.report.page import environment, recall_bars, reliability_curves
from qkt_clinical.report.pictures import MAX_PICTURES, Flipped

LIBRARIES = ("torch", "monai", "numpy", "scipy", "safetensors")
"""Whose versions bear on figures."""


@dataclass(frozen=True)
class Voice:
    """Shares of one network in the consensus, in the order of the relevant classes; None: unknown to it."""

    network: str
    shares: tuple[float | None, ...]


def relevant(answer: AnswerOutputs) -> tuple[str, ...]:
    """The classes that an answer tells apart, in the federation's order."""
    asked = {*answer.plan.local, *answer.plan.classes}
    return tuple(name for name in answer.card.classes if name in asked)


def voices(answer: AnswerOutputs) -> list[Voice]:
    """Shares of the hospital's own network and the fetched teachers in the consensus, per relevant class.

    Empty where no other network took part.
    """
    if answer.plan.method == BY_MEANS:
        return []
    plan, second = answer.plan, answer.phases.phase2
    excluded = {t.site for t in answer.phases.screening if not t.included}
    struck_out = {t.site: {*t.unverified, *t.misnamed} for t in answer.phases.screening}
    networks = [(plan.hospital, second.local_model_weight, {*plan.local, *second.rare})]
    networks += [
        (t.site, 1.0, set(t.known) - struck_out.get(t.site, set()))
        for t in plan.teachers
        if t.relevant and t.site not in excluded
    ]
    totals = {
        name: sum(weight for _, weight, known in networks if name in known) for name in relevant(answer)
    }
    return [
        Voice(site, tuple(weight / total if name in known else None for name, total in totals.items()))
        for site, weight, known in networks
    ]


def why_own_weight(method: str) -> str:
    """Reason for the local model weight, in words."""
    if method == "qkt-light":
        return "qkt-light asks no image about that: it is always the same"
    return "its own held-out images spoke for that"


@dataclass(frozen=True)
class Overall:
    """One figure over all relevant classes; ``rises`` if more of it is better."""

    name: str
    before: Estimate | None
    after: Estimate | None
    rises: bool = True

    @property
    def lost(self) -> bool:
        """Whether it became worse."""
        if self.before is None or self.after is None:
            return False
        change = self.after.value - self.before.value
        return change < 0 if self.rises else change > 0


def overall_figures(query: QueryOutputs) -> list[Overall]:
    """Means over the classes, the query against the rest, and calibration, before and after."""
    before, after = query.evaluation.before, query.evaluation.after
    return [
        Overall("Precision, mean over classes", before.macro_precision, after.macro_precision),
        Overall("AUROC, mean over classes", before.macro_auroc, after.macro_auroc),
        Overall("AUPRC, mean over classes", before.macro_auprc, after.macro_auprc),
        Overall("AUROC, query against own classes", before.auroc, after.auroc),
        Overall("Calibration error", before.ece, after.ece, rises=False),
    ]


def confusion_shares(confusion: Sequence[Sequence[int] | None], size: int) -> list[list[int | None]]:
    """Rows in whole percent of their images; None where a class has none or too few to show a figure."""
    nothing: list[int | None] = [None] * size
    return [[*found] if (found := shares(row)) else nothing for row in confusion]


def rule_figure(rule: GateRule) -> str:
    """A rule's figure as its page shows it."""
    if rule.figure is None:
        return rule.note or "unknown"
    return f"{rule.figure:,.0f}" if rule.rule.endswith("_images") else wording.percent(rule.figure)


def rule_threshold(rule: GateRule) -> str:
    """A rule's threshold in the same unit."""
    return f"{rule.threshold:,.0f}" if rule.rule.endswith("_images") else wording.percent(rule.threshold)


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
    if phase1.kind == MERGE_KIND:
        title = "Phase 1: share of a layer’s output lost, per teacher"
        return charts.line_chart(title, phase1.curves, axis="layer number")
    return charts.line_chart("Phase 1: losses", phase1.curves)


def _used(outputs: Outputs) -> dict[str, Any]:
    """The parameters that bear on the figures of an answer."""
    params = outputs.params
    sections = ("ingest", "train", "mask", "transfer", "evaluate", "gate")
    found: dict[str, Any] = {"seed": params.seed}
    for name in sections:
        found |= flat(name, getattr(params, name).model_dump(mode="json"))
    return found


def _provenance(outputs: Outputs, answer: AnswerOutputs) -> dict[str, str | None]:
    site = outputs.site(answer.plan.hospital)
    return {
        "Student (folder, as in the registry)": answer.folder_digest,
        "Student bundle": answer.card_digest,
        "Student weights": answer.card.weights.sha256,
        "Hospital’s own model": site.card_digest if site else None,
        "Hospital’s data": site.data_digest if site else None,
        **{f"Teacher {t.site}": t.digest for t in answer.plan.teachers if t.relevant},
        "Parameters": outputs.params_digest,
    }


def _common(outputs: Outputs, answer: AnswerOutputs) -> dict[str, Any]:
    """Content common to the pages of evaluated and unevaluated answers."""
    phases = answer.phases
    site = outputs.site(answer.plan.hospital)
    drawn = (
        _phase1_chart(phases.phase1) if phases.phase1 else None,
        charts.line_chart("Phase 2: losses", phases.phase2.curves),
    )
    decisions = tuple(d for d in (site.decisions if site else ()) if d.model == answer.model)
    return {
        "version": __version__,
        "outputs": outputs,
        "params": outputs.params,
        "q": answer,
        "relevant": relevant(answer),
        "p2": phases.phase2,
        "voices": voices(answer),
        "why_own_weight": why_own_weight(answer.plan.method),
        "at_risk": at_risk(answer.plan),
        "far": FAR,
        "unlike": UNLIKE,
        "decisions": decisions,
        "standing": standing(decisions, answer.model, answer.folder_digest),
        "digest": answer.folder_digest,
        "charts_drawn": [c for c in drawn if c],
        "provenance": _provenance(outputs, answer),
        "used": _used(outputs),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
    }


def render_unmeasured(outputs: Outputs, answer: AnswerOutputs, card: ModelCard) -> str:
    """Render the page of a student without an evaluation. The same outputs give the same text."""
    return environment().get_template("unmeasured.html").render(**_common(outputs, answer), e=None, card=card)


def render_query(
    outputs: Outputs, query: QueryOutputs, card: ModelCard, flipped: Mapping[bool, Flipped]
) -> str:
    """Render the page. The same outputs give the same text.

    Args:
        outputs: the run.
        query: one of its answered queries.
        card: the model card of its student.
        flipped: see :func:`qkt_clinical.report.pictures.flipped_cases`.
    """
    evaluation = query.evaluation
    size = len(evaluation.relevant)
    silent = [s for s in evaluation.test_sites if (o := outputs.site(s)) is None or not o.pictures]
    return (
        environment()
        .get_template("query.html")
        .render(
            **_common(outputs, query),
            confidence=f"{100 * outputs.params.evaluate.confidence:g}%",
            e=evaluation,
            absent=[c for c in evaluation.classes if c not in query.phases.phase2.rare],
            recall=recall_bars(evaluation),
            overall=overall_figures(query),
            confusions=[
                ("Before", confusion_shares(evaluation.before.confusion, size)),
                ("After", confusion_shares(evaluation.after.confusion, size)),
            ],
            curves=reliability_curves(evaluation),
            rules=[]
            if query.verdict is None
            else [(r, rule_figure(r), rule_threshold(r)) for r in query.verdict.rules],
            flipped=flipped,
            silent=silent,
            most=MAX_PICTURES,
            card=card,
        )
    )
