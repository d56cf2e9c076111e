"""What a run left behind, read and checked once for the report and for MLflow. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from qkt_clinical.common.disclosure import SMALLEST_COUNT, shown_count, too_few, withhold
from qkt_clinical.common.files import digest_bytes, digest_file, digest_folder, to_json
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import Manifest, read_consent, read_manifest
from qkt_clinical.errors import OutputsError
from qkt_clinical.records.card import CARD, MAX_JSON_BYTES, Card, Mask, read_card, read_mask
from qkt_clinical.records.decisions import Decision, read_decisions
from qkt_clinical.records.evaluation import Bin, Evaluation, Fraction, Number, Scores, View
from qkt_clinical.records.phases import Phases
from qkt_clinical.records.plan import Plan
from qkt_clinical.records.verdict import Verdict

LARGEST_FILE = 16 * MAX_JSON_BYTES
"""Bytes; an evaluation names every image that flipped."""


class TeacherMetrics(View):
    """``metrics.json`` of a teacher, on its validation images."""

    balanced_accuracy: Fraction | None
    recall: dict[str, Fraction | None]
    """None of a class with too few validation images to tell."""
    epochs: Number
    best_epoch: Number
    stopped_early: bool
    parameters: Number | None = None


@dataclass(frozen=True)
class SiteOutputs:
    """What is known of a site here; another hospital's data may not be, and its teacher may not be yet."""

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
    def data_digest(self) -> str | None:
        """SHA-256 over the digests of the prepared arrays and splits."""
        return None if self.manifest is None else digest_bytes(to_json(self.manifest.digests).encode())

    @property
    def card_digest(self) -> str | None:
        """SHA-256 of the teacher's card, which holds that of its weights."""
        return None if self.teacher is None else digest_file(self.teacher / CARD)


@dataclass(frozen=True)
class AnswerOutputs:
    """A student, which nobody need have measured yet."""

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
    verdict: Verdict | None
    """None where the answer has not been judged, or another student was."""
    verdict_file: Path


@dataclass(frozen=True)
class Outputs:
    """A run: sites in the order of their names, queries by hospital and name."""

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


def _read(kind: Any, path: Path, *, site: str) -> Any:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise OutputsError(
                f"larger than {LARGEST_FILE:,} bytes",
                remedy="Run 'dvc repro' to make it again.",
                file=path,
                site=site,
            )
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError:
        what = "cannot be read"
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        what = f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"
    raise OutputsError(what, remedy="Run 'dvc repro' to make it again.", file=path, site=site) from None


Curves = tuple[dict[str, FiniteFloat], ...]


def _site(workspace: Workspace, name: str) -> SiteOutputs:
    prepared, teacher = workspace.prepared(name), workspace.teacher(name)
    manifest = read_manifest(prepared) if (prepared / "manifest.json").is_file() else None
    pictures = read_consent(workspace.consent(name), name).pictures
    decisions = read_decisions(workspace.root, name)
    if not (teacher / CARD).is_file():
        return SiteOutputs(name, manifest, None, None, None, None, (), pictures, decisions)

    card = read_card(teacher)

    def optional(kind: Any, file: str, absent: Any) -> Any:
        path = teacher / file
        return _read(kind, path, site=name) if path.is_file() else absent

    metrics: TeacherMetrics | None = optional(TeacherMetrics, "metrics.json", None)
    if metrics is not None and manifest is not None:
        recall = withhold(metrics.recall, manifest.counts.get("val", {}))
        metrics = metrics.model_copy(update={"recall": recall})
    return SiteOutputs(
        name=name,
        manifest=manifest,
        teacher=teacher,
        card=card,
        mask=read_mask(teacher, card),
        metrics=metrics,
        curves=optional(Curves, "curves.json", ()),
        pictures=pictures,
        decisions=decisions,
    )


def _told(scores: Scores, evaluation: Evaluation) -> Scores:
    """Figures without those that rest on too few images."""
    images = evaluation.test_images
    answers: dict[str, int] = {}
    if None not in scores.confusion:  # else told before, and the columns are no longer whole
        columns = zip(*(row or () for row in scores.confusion), strict=True)
        answers = dict(zip(evaluation.relevant, map(sum, columns), strict=True))

    def bins(rows: Sequence[Bin] | None) -> tuple[Bin, ...] | None:
        return None if rows is None else tuple(b for b in rows if b.images >= SMALLEST_COUNT)

    curves = withhold(scores.class_reliability, images)
    return scores.model_copy(
        update={
            "recall": withhold(scores.recall, images),
            "precision": withhold(withhold(scores.precision, answers), images),
            "class_auroc": withhold(scores.class_auroc, images),
            "class_auprc": withhold(scores.class_auprc, images),
            "class_ece": withhold(scores.class_ece, images),
            "class_reliability": {c: bins(rows) for c, rows in curves.items()},
            "reliability": bins(scores.reliability),
            "confusion": tuple(None if too_few(sum(row or ())) else row for row in scores.confusion),
        }
    )


def told(evaluation: Evaluation) -> Evaluation:
    """An evaluation without the figures that rest on fewer than five images: of a class, an answer, a bin.

    Pages, cards and MLflow are made of this alone. Figures over several classes stay.
    """
    return evaluation.model_copy(
        update={
            "before": _told(evaluation.before, evaluation),
            "after": _told(evaluation.after, evaluation),
            "class_forgetting": withhold(evaluation.class_forgetting, evaluation.test_images),
        }
    )


def shares(row: Sequence[int] | None) -> list[int] | None:
    """A row of a confusion matrix in whole percent; None where it holds no image or too few to tell."""
    total = sum(row or ())
    return None if row is None or not total or too_few(total) else [round(100 * n / total) for n in row]


def published(evaluation: Evaluation) -> dict[str, Any]:
    """What of an evaluation may leave the hospital: what is :func:`told`, and counts as they may be shown.

    Confusion comes in whole percent, bins without their numbers of images; which images flipped stays.
    """
    out = told(evaluation).model_dump(mode="json", exclude={"flips"})
    out["test_images"] = {c: shown_count(n) for c, n in evaluation.test_images.items()}
    for side in ("before", "after"):
        scores = out[side]
        scores["confusion"] = [shares(row) for row in scores["confusion"]]
        for rows in (scores["reliability"], *filter(None, scores["class_reliability"].values())):
            for row in rows:
                del row["images"]
    return out


def flat(prefix: str, value: Any) -> dict[str, Any]:
    """Nested settings by their dotted names; lists as text."""
    if isinstance(value, Mapping):
        return {k: v for key in value for k, v in flat(f"{prefix}.{key}", value[key]).items()}
    return {prefix: ", ".join(map(str, value)) if isinstance(value, list) else value}


def _plan(student: Path, hospital: str, query: str) -> Plan:
    path = student / "plan.json"
    plan: Plan = _read(Plan, path, site=hospital)
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
        phases=_read(Phases, student / "phases.json", site=hospital),
        card=read_card(student),
    )


def _query(workspace: Workspace, hospital: str, query: str) -> QueryOutputs | None:
    path = workspace.reports / "evaluation" / hospital / f"{query}.json"
    if not path.is_file():
        return None
    student = workspace.student(hospital, query)
    evaluation: Evaluation = _read(Evaluation, path, site=hospital)
    if (evaluation.hospital, evaluation.query) != (hospital, query):
        raise OutputsError(
            "an evaluation of another query",
            remedy="Run 'dvc repro' to make it again.",
            file=path,
            site=hospital,
        )
    size = len(evaluation.relevant)
    images = [evaluation.test_images.get(c, 0) for c in evaluation.relevant]
    for scores in (evaluation.before, evaluation.after):
        rows = [row or () for row in scores.confusion]
        what = None
        if [len(row) for row in rows] != [size] * size:
            what = f"a confusion matrix that is not {size} x {size}"
        elif [sum(row) for row in rows] != images:
            what = "a confusion matrix of other images than were tested"
        if what:
            raise OutputsError(what, remedy="Run 'dvc repro' to make it again.", file=path, site=hospital)
    digest = digest_folder(student)
    if evaluation.student != digest:
        return None  # of another student: nobody has measured this one
    gate = workspace.reports / "gate" / hospital / f"{query}.json"
    verdict: Verdict | None = _read(Verdict, gate, site=hospital) if gate.is_file() else None
    return QueryOutputs(
        verdict=verdict if verdict is not None and verdict.digest == digest else None,
        verdict_file=gate,
        evaluation_file=path,
        student=student,
        evaluation=told(evaluation),
        plan=_plan(student, hospital, query),
        phases=_read(Phases, student / "phases.json", site=hospital),
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
