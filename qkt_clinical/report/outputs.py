"""What a run left behind, read and checked once for the report and for MLflow. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from qkt_clinical.card import CARD, Card, Mask, read_card, read_mask
from qkt_clinical.config import Params, Workspace
from qkt_clinical.data import Manifest, read_manifest
from qkt_clinical.errors import OutputsError
from qkt_clinical.files import digest_bytes, digest_file, to_json
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
    confusion: tuple[tuple[int, ...], ...]
    reliability: tuple[Bin, ...] = ()


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
    rare: dict[str, int] = {}
    curves: tuple[dict[str, float], ...] = ()


class Phases(View):
    """``phases.json``."""

    method: str
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

    @property
    def data_digest(self) -> str | None:
        """SHA-256 over the digests of the prepared arrays and splits."""
        return None if self.manifest is None else digest_bytes(to_json(self.manifest.digests).encode())

    @property
    def card_digest(self) -> str | None:
        """SHA-256 of the teacher's card, which holds that of its weights."""
        return None if self.teacher is None else digest_file(self.teacher / CARD)


@dataclass(frozen=True)
class QueryOutputs:
    """An answered query."""

    evaluation_file: Path
    student: Path
    evaluation: Evaluation
    plan: Plan
    phases: Phases
    card: Card
    verdict: Verdict | None
    """None where the answer has not been judged."""
    verdict_file: Path

    @property
    def name(self) -> str:
        """``<hospital>-<query>``."""
        return f"{self.evaluation.hospital}-{self.evaluation.query}"

    @property
    def card_digest(self) -> str:
        """SHA-256 of the student's card, which holds that of its weights."""
        return digest_file(self.student / CARD)


@dataclass(frozen=True)
class Outputs:
    """A run: sites in the order of their names, queries by hospital and name."""

    params: Params
    sites: tuple[SiteOutputs, ...]
    queries: tuple[QueryOutputs, ...]
    unanswered: tuple[str, ...]
    """``<hospital>-<query>`` of the queries in ``params.yaml`` that have no evaluation."""

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
    if not (teacher / CARD).is_file():
        return SiteOutputs(name, manifest, None, None, None, None, ())

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
    )


def _query(workspace: Workspace, hospital: str, query: str) -> QueryOutputs | None:
    path = workspace.reports / "evaluation" / hospital / f"{query}.json"
    if not path.is_file():
        return None
    student = workspace.student(hospital, query)
    evaluation: Evaluation = _read(Evaluation, path, site=hospital)
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
        PreparedError: a manifest is malformed.
    """
    workspace = Workspace(root)
    sites = tuple(_site(workspace, name) for name in sorted(params.sites))
    pairs = sorted({(ref.hospital, ref.query) for ref in params.queries.values()})
    found: Mapping[tuple[str, str], QueryOutputs | None] = {p: _query(workspace, *p) for p in pairs}
    queries = tuple(q for q in found.values() if q is not None)
    if not queries and all(site.teacher is None for site in sites):
        raise OutputsError(
            "neither a teacher nor an answered query", remedy="Run 'dvc repro' first.", file=workspace.reports
        )
    unanswered = tuple(f"{h}-{q}" for (h, q), value in found.items() if value is None)
    return Outputs(params, sites, queries, unanswered)
