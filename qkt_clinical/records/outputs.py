"""Outputs of a run, read and checked once for the report and for MLflow. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkt_clinical.common.disclosure import SMALLEST_COUNT, suppress, too_few
from qkt_clinical.common.files import digest_bytes, digest_file, digest_folder, to_json
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import Manifest, read_consent, read_manifest
from qkt_clinical.errors import OutputsError
from qkt_clinical.records.card import CARD, Card, Mask, read_card, read_mask
from qkt_clinical.records.decisions import Decision, read_decisions
from qkt_clinical.records.evaluation import Bin, Evaluation, Scores
from qkt_clinical.records.phases import Phases
from qkt_clinical.records.plan import Plan
from qkt_clinical.records.published import (
    PublishedEvaluation,
    published,
    published_metrics,
    published_verdict,
)
from qkt_clinical.records.reading import read_record
from qkt_clinical.records.training import TeacherMetrics, TrainingCurves
from qkt_clinical.records.verdict import Verdict


@dataclass(frozen=True)
class SiteOutputs:
    """Outputs of a site in this workspace; another hospital's data, or its teacher, may be missing."""

    name: str
    manifest: Manifest | None
    teacher: Path | None
    card: Card | None
    mask: Mask | None
    metrics: TeacherMetrics | None
    curves: tuple[dict[str, float], ...]
    pictures: bool
    """Whether the hospital consents to reports showing its test images."""
    decisions: tuple[Decision, ...]
    """About all of the hospital's models, the oldest first."""

    @property
    def published_metrics(self) -> TeacherMetrics | None:
        """The teacher's figures as they may leave the hospital."""
        images = None if self.manifest is None else self.manifest.counts.get("val", {})
        return None if self.metrics is None else published_metrics(self.metrics, images)

    @property
    def data_digest(self) -> str | None:
        """SHA-256 over the digests of the prepared arrays and splits."""
        return None if self.manifest is None else digest_bytes(to_json(self.manifest.digests).encode())

    @property
    def card_digest(self) -> str | None:
        """SHA-256 of the teacher's card, which holds that of its weights."""
        return None if self.teacher is None else digest_file(self.teacher / CARD)


@dataclass(frozen=True)
class AnswerOutputs:
    """A student, evaluated or not."""

    student: Path
    plan: Plan
    phases: Phases
    card: Card

    @property
    def name(self) -> str:
        """``<hospital>-<query>``."""
        return f"{self.plan.hospital}-{self.plan.query}"

    @property
    def card_digest(self) -> str:
        """SHA-256 of the student's card, which holds that of its weights."""
        return digest_file(self.student / CARD)

    @property
    def folder_digest(self) -> str:
        """SHA-256 over the student's folder, by which decisions know it."""
        return digest_folder(self.student)

    @property
    def model(self) -> str:
        """Name in the registry."""
        return f"student.{self.plan.hospital}.{self.plan.query}"


@dataclass(frozen=True)
class QueryOutputs(AnswerOutputs):
    """An answered query with its figures."""

    evaluation_file: Path
    evaluation: Evaluation
    """As the hospital's own pages may show it."""
    published: PublishedEvaluation
    """As it may leave the hospital."""
    verdict: Verdict | None
    """None where the answer has not been judged, or another student was."""

    @property
    def published_verdict(self) -> Verdict | None:
        """The verdict as it may leave the hospital."""
        return None if self.verdict is None else published_verdict(self.verdict, self.published)


@dataclass(frozen=True)
class Outputs:
    """All outputs of a run: sites sorted by name, queries by hospital and name."""

    params: Params
    sites: tuple[SiteOutputs, ...]
    queries: tuple[QueryOutputs, ...]
    unanswered: tuple[str, ...]
    """``<hospital>-<query>`` of the queries in ``params.yaml`` that have no student."""
    unmeasured: tuple[AnswerOutputs, ...] = ()
    """Students without figures: who asked has no test images of the class, and nobody else has measured."""

    @property
    def params_digest(self) -> str:
        """SHA-256 of the parameters that bear on results, defaults included."""
        used = self.params.model_dump(mode="json", exclude={"device", "track"})
        return digest_bytes(to_json(used).encode())

    def site(self, name: str) -> SiteOutputs | None:
        """The site of that name."""
        return next((s for s in self.sites if s.name == name), None)


def _metrics(path: Path, site: str, manifest: Manifest | None) -> TeacherMetrics | None:
    """A teacher's metrics without those of too few images; None where they were not kept."""
    if not path.is_file():
        return None
    metrics = read_record(TeacherMetrics, path, site=site)
    if manifest is None:
        return metrics
    recall = suppress(metrics.recall, manifest.counts.get("val", {}))
    return metrics.model_copy(update={"recall": recall})


def _site(workspace: Workspace, name: str) -> SiteOutputs:
    prepared, teacher = workspace.prepared(name), workspace.teacher(name)
    manifest = read_manifest(prepared) if (prepared / "manifest.json").is_file() else None
    pictures = read_consent(workspace.consent(name), name).pictures
    decisions = read_decisions(workspace.root, name)
    if not (teacher / CARD).is_file():
        return SiteOutputs(name, manifest, None, None, None, None, (), pictures, decisions)

    card = read_card(teacher)

    metrics = _metrics(teacher / "metrics.json", name, manifest)
    curves = teacher / "curves.json"
    return SiteOutputs(
        name=name,
        manifest=manifest,
        teacher=teacher,
        card=card,
        mask=read_mask(teacher, card),
        metrics=metrics,
        curves=read_record(TrainingCurves, curves, site=name).root if curves.is_file() else (),
        pictures=pictures,
        decisions=decisions,
    )


def _told(scores: Scores, images: Mapping[str, int], relevant: Sequence[str]) -> Scores:
    """Figures without those that rest on too few images."""
    answers: dict[str, int] = {}
    if None not in scores.confusion:  # else told before, and the columns are no longer whole
        columns = zip(*(row or () for row in scores.confusion), strict=True)
        answers = dict(zip(relevant, map(sum, columns), strict=True))

    def bins(rows: Sequence[Bin] | None) -> tuple[Bin, ...] | None:
        return None if rows is None else tuple(b for b in rows if b.images >= SMALLEST_COUNT)

    curves = suppress(scores.class_reliability, images)
    return scores.model_copy(
        update={
            "recall": suppress(scores.recall, images),
            "precision": suppress(suppress(scores.precision, answers), images),
            "class_auroc": suppress(scores.class_auroc, images),
            "class_auprc": suppress(scores.class_auprc, images),
            "class_ece": suppress(scores.class_ece, images),
            "class_reliability": {c: bins(rows) for c, rows in curves.items()},
            "reliability": bins(scores.reliability),
            "confusion": tuple(None if too_few(sum(row or ())) else row for row in scores.confusion),
        }
    )


def told(evaluation: Evaluation) -> Evaluation:
    """An evaluation without the figures that rest on fewer than five images: of a class, an answer, a bin.

    The pages, which are the hospital's own, are made of this. Figures over several classes stay.
    """
    parts = {side: getattr(evaluation, side) for side in ("before", "after")}
    others = evaluation.others
    if others is not None:
        others = others.model_copy(
            update={
                side: _told(getattr(others, side), others.test_images, evaluation.relevant) for side in parts
            }
        )
    return evaluation.model_copy(
        update={
            **{s: _told(scores, evaluation.test_images, evaluation.relevant) for s, scores in parts.items()},
            "others": others,
            "class_forgetting": suppress(evaluation.class_forgetting, evaluation.test_images),
        }
    )


def shares(row: Sequence[int] | None) -> list[int] | None:
    """A row of a confusion matrix in whole percent; None where it has no image or too few."""
    total = sum(row or ())
    return None if row is None or not total or too_few(total) else [round(100 * n / total) for n in row]


def flat(prefix: str, value: Any) -> dict[str, Any]:
    """Nested settings by their dotted names; lists as text."""
    if isinstance(value, Mapping):
        return {k: v for key in value for k, v in flat(f"{prefix}.{key}", value[key]).items()}
    return {prefix: ", ".join(map(str, value)) if isinstance(value, list) else value}


def _plan(student: Path, hospital: str, query: str) -> Plan:
    path = student / "plan.json"
    plan = read_record(Plan, path, site=hospital)
    if (plan.hospital, plan.query) != (hospital, query):
        raise OutputsError(
            "a plan of another query", remedy="Run 'dvc repro' to make it again.", file=path, site=hospital
        )
    return plan


def _answer(workspace: Workspace, hospital: str, query: str) -> AnswerOutputs | None:
    student = workspace.student(hospital, query)
    if not (student / CARD).is_file():
        return None
    return AnswerOutputs(
        student=student,
        plan=_plan(student, hospital, query),
        phases=read_record(Phases, student / "phases.json", site=hospital),
        card=read_card(student),
    )


def _query(workspace: Workspace, hospital: str, query: str) -> QueryOutputs | None:
    path = workspace.reports / "evaluation" / hospital / f"{query}.json"
    if not path.is_file():
        return None
    student = workspace.student(hospital, query)
    evaluation = read_record(Evaluation, path, site=hospital)
    if (evaluation.hospital, evaluation.query) != (hospital, query):
        raise OutputsError(
            "an evaluation of another query",
            remedy="Run 'dvc repro' to make it again.",
            file=path,
            site=hospital,
        )
    digest = digest_folder(student)
    if evaluation.student != digest:
        return None  # of another student: nobody has measured this one
    gate = workspace.reports / "gate" / hospital / f"{query}.json"
    verdict = read_record(Verdict, gate, site=hospital) if gate.is_file() else None
    return QueryOutputs(
        verdict=verdict if verdict is not None and verdict.digest == digest else None,
        evaluation_file=path,
        student=student,
        evaluation=told(evaluation),
        published=published(evaluation),
        plan=_plan(student, hospital, query),
        phases=read_record(Phases, student / "phases.json", site=hospital),
        card=read_card(student),
    )


def read_outputs(root: Path, params: Params) -> Outputs:
    """Read what the stages up to ``evaluate`` left in a workspace.

    Raises:
        BundleError: a card or mask is malformed.
        OutputsError: another file is malformed, an answered query lacks a part, or there is nothing at all.
        PreparedError: a manifest or consent is malformed.
    """
    workspace = Workspace(root)
    sites = tuple(_site(workspace, name) for name in sorted(params.sites))
    pairs = sorted({(ref.hospital, ref.query) for ref in params.queries.values()})
    found: Mapping[tuple[str, str], QueryOutputs | None] = {p: _query(workspace, *p) for p in pairs}
    queries = tuple(q for q in found.values() if q is not None)
    unmeasured = tuple(a for p, q in found.items() if q is None and (a := _answer(workspace, *p)) is not None)
    if not queries and not unmeasured and all(site.teacher is None for site in sites):
        raise OutputsError(
            "neither a teacher nor an answered query", remedy="Run 'dvc repro' first.", file=workspace.reports
        )
    answered = {a.name for a in (*queries, *unmeasured)}
    unanswered = tuple(name for h, q in found if (name := f"{h}-{q}") not in answered)
    return Outputs(params, sites, queries, unanswered, unmeasured)
