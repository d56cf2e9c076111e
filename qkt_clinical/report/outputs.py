"""What a run left behind, read and checked once for the report and for MLflow. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from qkt_clinical.card import CARD, Card, Mask, read_card, read_mask
from qkt_clinical.config import Params, Workspace
from qkt_clinical.data import SMALLEST_COUNT, Manifest, read_consent, read_manifest, shown_count
from qkt_clinical.decisions import Decision, read_decisions
from qkt_clinical.errors import OutputsError
from qkt_clinical.files import digest_bytes, digest_file, digest_folder, to_json
from qkt_clinical.gate import Verdict
from qkt_clinical.query import Plan


class View(BaseModel):
    """The part of a JSON file that is shown; other keys may be there."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Interval(View):
    """A figure with its bootstrap interval, as fractions."""

    value: float
    low: float
    high: float


class Bin(View):
    """Images of like confidence: how sure the model was of them, and how often it was right."""

    confidence: float
    accuracy: float
    images: int


class Scores(View):
    """Figures of one model on held-out images; ``confusion`` has truth in rows, ordered as ``relevant``."""

    query_accuracy: Interval
    retained_accuracy: Interval
    balanced_accuracy: Interval
    auroc: Interval | None = None
    ece: float
    recall: dict[str, Interval | None]
    precision: dict[str, Interval | None]
    class_auroc: dict[str, Interval | None]
    class_auprc: dict[str, Interval | None]
    class_ece: dict[str, float] = {}
    macro_precision: Interval | None = None
    macro_auroc: Interval | None = None
    macro_auprc: Interval | None = None
    confusion: tuple[tuple[int, ...], ...]
    reliability: tuple[Bin, ...] = ()


class Flip(View):
    """A test image that one model has right and the other wrong; ``index`` into the prepared arrays."""

    site: str
    index: int
    actual: str
    before: str
    after: str

    @property
    def gained(self) -> bool:
        """Wrong before, right after."""
        return self.after == self.actual


class GroupScores(View):
    """Figures of a group of patients; None where too few stand behind one."""

    query_accuracy: Interval | None
    retained_accuracy: Interval | None
    balanced_accuracy: Interval | None


class Group(View):
    """One group of a column such as sex or scanner; counts as they may be shown."""

    images: int | str
    patients: int | str
    before: GroupScores
    after: GroupScores


class OperatingPoint(View):
    """The query's offsets, and what they give away of the hospital's own images of its own classes."""

    offsets: dict[str, float]
    budget: float
    given_away_calibration: float
    calibration_images: int | str
    given_away_test: Interval | None
    test_images: int | str


class Evaluation(View):
    """``reports/evaluation/<site>/<query>.json``."""

    hospital: str
    query: str
    classes: tuple[str, ...]
    method: str
    teachers: tuple[str, ...]
    bytes_moved: int
    budget: float
    relevant: tuple[str, ...]
    local: tuple[str, ...]
    test_images: dict[str, int]
    test_sites: tuple[str, ...] = ()
    passes_per_prediction: int
    before: Scores
    after: Scores
    gain: Interval
    forgetting: Interval
    query_gain: Interval
    gain_p: float | None = None
    class_forgetting: dict[str, Interval | None]
    flips: tuple[Flip, ...] = ()
    operating_point: OperatingPoint | None = None
    subgroups: dict[str, dict[str, Group]] = {}
    """Column to group, of hospitals whose site.yaml names the column."""


class Trusted(View):
    """What the hospital's own images said of a fetched teacher."""

    site: str
    heard: bool
    reason: str
    dismissed: tuple[str, ...] = ()
    """Classes that it claims and is not believed to know."""


class Phase1(View):
    """What the student took up from the relevant teachers."""

    kind: str = "distill"
    curves: tuple[dict[str, float], ...] = ()
    views: int
    teacher_passes: int


class Phase2(View):
    """Refinement of the head; the operating point."""

    offsets: dict[str, float]
    budget: float
    given_away: float
    calibration_images: int
    own_weight: float
    rare: dict[str, str] = {}
    """Rare class to number of training images, as it may be shown."""
    curves: tuple[dict[str, float], ...] = ()


class Phases(View):
    """``phases.json``."""

    method: str
    trust: tuple[Trusted, ...] = ()
    phase1: Phase1 | None = None
    phase2: Phase2


class TeacherMetrics(View):
    """``metrics.json`` of a teacher, on its validation images."""

    balanced_accuracy: float | None
    recall: dict[str, float]
    epochs: int
    best_epoch: int
    stopped_early: bool
    parameters: int | None = None


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
    """None where the answer has not been judged."""
    verdict_file: Path


@dataclass(frozen=True)
class Outputs:
    """A run: sites in the order of their names, queries by hospital and name."""

    params: Params
    sites: tuple[SiteOutputs, ...]
    queries: tuple[QueryOutputs, ...]
    unanswered: tuple[str, ...]
    """``<hospital>-<query>`` of the queries in ``params.yaml`` that have no evaluation."""
    unmeasured: tuple[AnswerOutputs, ...] = ()
    """Students among them: who asked has no test images of the class, and nobody else has measured yet."""

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
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError:
        what = "cannot be read"
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        what = f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"
    raise OutputsError(what, remedy="Run 'dvc repro' to make it again.", file=path, site=site) from None


Curves = tuple[dict[str, float], ...]


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

    return SiteOutputs(
        name=name,
        manifest=manifest,
        teacher=teacher,
        card=card,
        mask=read_mask(teacher, card),
        metrics=optional(TeacherMetrics, "metrics.json", None),
        curves=optional(Curves, "curves.json", ()),
        pictures=pictures,
        decisions=decisions,
    )


def published(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What of an evaluation's JSON may leave the hospital: figures, and counts only as they may be shown.

    Confusion comes in whole percent (null for a class with too few images); which images flipped stays.
    """
    out = {k: v for k, v in evaluation.items() if k != "flips"}
    out["test_images"] = {c: shown_count(n) for c, n in evaluation["test_images"].items()}

    def bins(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [dict(row) for row in rows if row["images"] >= SMALLEST_COUNT]

    for side in ("before", "after"):
        scores = dict(evaluation[side])
        scores["confusion"] = [
            [round(100 * n / sum(row)) for n in row] if sum(row) >= SMALLEST_COUNT else None
            for row in scores["confusion"]
        ]
        scores["reliability"] = bins(scores.get("reliability", []))
        scores["class_reliability"] = {
            c: bins(rows) for c, rows in scores.get("class_reliability", {}).items()
        }
        out[side] = scores
    return out


def _answer(workspace: Workspace, hospital: str, query: str) -> AnswerOutputs | None:
    student = workspace.student(hospital, query)
    if not (student / CARD).is_file():
        return None
    return AnswerOutputs(
        student=student,
        plan=_read(Plan, student / "plan.json", site=hospital),
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
    for scores in (evaluation.before, evaluation.after):
        if [len(row) for row in scores.confusion] != [size] * size:
            raise OutputsError(
                f"a confusion matrix that is not {size} x {size}",
                remedy="Run 'dvc repro' to make it again.",
                file=path,
                site=hospital,
            )
    gate = workspace.reports / "gate" / hospital / f"{query}.json"
    return QueryOutputs(
        verdict=_read(Verdict, gate, site=hospital) if gate.is_file() else None,
        verdict_file=gate,
        evaluation_file=path,
        student=student,
        evaluation=evaluation,
        plan=_read(Plan, student / "plan.json", site=hospital),
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
    unanswered = tuple(f"{h}-{q}" for (h, q), value in found.items() if value is None)
    return Outputs(params, sites, queries, unanswered, unmeasured)
