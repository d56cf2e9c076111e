"""Stage ``evaluate``: every answer on held-out patients, before and after.

Where the asking hospital has images of the query itself, in its test split or held back for this, these
judge the answer, and figures on other hospitals' images of the query stand beside. Else these judge it.

The federation's own view, not a query job: it opens the test split of every hospital. Where a hospital's
prepared data are absent, its test images are missing from the figures and its name from ``test_sites``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from qkt_clinical.catalog import DEFAULT_TASK, HELD_BACK
from qkt_clinical.common.disclosure import SMALLEST_COUNT, shown_total, too_few
from qkt_clinical.common.files import digest_bytes, digest_folder, write_text
from qkt_clinical.common.locks import hold_query
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.params import Params
from qkt_clinical.config.query import QueryRef
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import PreparedSite, load_held_back, load_prepared
from qkt_clinical.errors import OutputsError, PreparedError, QktError, QueryError
from qkt_clinical.evaluation.metrics import (
    Draws,
    Floats,
    ModelFigures,
    SubgroupFigures,
    TestSet,
    assess,
    by_subgroup,
    false_query_rate,
)
from qkt_clinical.models.bundle import load_bundle
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import begin_computing
from qkt_clinical.qkt.prediction import predict_scores
from qkt_clinical.records.base import Estimate
from qkt_clinical.records.card import DecisionRule
from qkt_clinical.records.evaluation import (
    Evaluation,
    Flip,
    OperatingPointResult,
    OthersFigures,
    Scores,
    SubgroupResult,
)
from qkt_clinical.records.phases import Phases
from qkt_clinical.records.plan import read_plan
from qkt_clinical.records.reading import read_record, write_record
from qkt_clinical.records.summary import Headline, QueryMetrics, QuerySummaries, QuerySummary, RunMetrics
from qkt_clinical.task import Task, task_of

PER_CLASS = ("recall", "precision", "class_auroc", "class_auprc", "class_ece", "class_reliability")


class NoTestImages(QueryError):
    """A query that cannot be evaluated here."""

    code = "no-test-images"


@dataclass(frozen=True)
class _Held:
    """Held-out images (N, C, ...), labels (N,), patients (N,) and which are the hospital's own (N,)."""

    inputs: torch.Tensor
    labels: NDArray[np.int64]
    patients: NDArray[np.str_]
    own: NDArray[np.bool_]
    apart: NDArray[np.bool_]
    """(N,) which are held back by the hospital for evaluation."""
    sites: tuple[str, ...]
    places: list[tuple[str, str, int]]
    """Of each image, its site, its split and its index in the prepared arrays."""
    subgroups: Mapping[str, NDArray[np.str_]]
    """Column to group (N,), empty for images of hospitals without the column."""
    digest: str
    """Of images, labels and patients: figures of one test set can be compared."""


class _Part(NamedTuple):
    """Some images of one split of a prepared site."""

    name: str
    site: PreparedSite
    split: str
    chosen: NDArray[np.int64]
    own: bool


def _part(name: str, site: PreparedSite, split: str, wanted: Sequence[int], *, own: bool) -> _Part:
    held = site.splits[split]
    return _Part(name, site, split, held[np.isin(site.labels[held], wanted)], own)


def _own_parts(
    site: PreparedSite | None, apart: PreparedSite | None, hospital: str, wanted: Sequence[int]
) -> list[_Part]:
    """The hospital's own images of some classes: of its test split, and those that it holds back."""
    parts = [] if site is None else [_part(hospital, site, "test", wanted, own=True)]
    return parts if apart is None else [*parts, _part(hospital, apart, HELD_BACK, wanted, own=True)]


def _judging_parts(
    sites: Mapping[str, PreparedSite], hospital: str, local: Sequence[int], query: Sequence[int]
) -> list[_Part]:
    """The hospital's own test images of R, and every other hospital's of the query."""
    return [
        _part(name, site, "test", (*local, *query) if name == hospital else query, own=name == hospital)
        for name, site in sorted(sites.items())
    ]


def _all_there(parts: Sequence[_Part], query: Sequence[int], least: int) -> bool:
    """Whether there are at least so many images of every query class."""
    counts = [sum(int((p.site.labels[p.chosen] == c).sum()) for p in parts) for c in query]
    return min(counts, default=0) >= least


def _stacked(parts: Sequence[_Part], columns: Sequence[str], hospital: str) -> _Held:
    """The images of all parts in a row.

    Raises:
        NoTestImages: there is none.
    """
    parts = [part for part in parts if len(part.chosen)]
    if not parts:
        raise NoTestImages(
            "no hospital here has a test image of these classes",
            remedy="Evaluate where test images of the class are prepared.",
            site=hospital,
            stage="evaluate",
        )
    labels = [p.site.labels[p.chosen] for p in parts]
    patients = [np.char.add(f"{p.name}/", p.site.groups[p.chosen]) for p in parts]
    pixels = [p.site.images[p.chosen] for p in parts]
    digests = [
        digest_bytes(data)
        for images, kinds, owners in zip(pixels, labels, patients, strict=True)
        for data in (images.tobytes(), kinds.tobytes(), "\n".join(owners.tolist()).encode())
    ]

    def group(part: _Part, column: str) -> NDArray[np.str_]:
        held = part.site.subgroups.get(column)
        return np.full(len(part.chosen), "") if held is None else held[part.chosen]

    return _Held(
        inputs=torch.cat(
            [to_input(i, p.site.manifest.normalisation) for i, p in zip(pixels, parts, strict=True)]
        ),
        labels=np.concatenate(labels),
        patients=np.concatenate(patients),
        own=np.concatenate([np.full(len(p.chosen), p.own) for p in parts]),
        apart=np.concatenate([np.full(len(p.chosen), p.split == HELD_BACK) for p in parts]),
        sites=tuple(sorted({p.name for p in parts})),
        places=[(p.name, p.split, int(i)) for p in parts for i in p.chosen],
        subgroups={c: np.concatenate([group(p, c) for p in parts]) for c in columns},
        digest=digest_bytes("".join(digests).encode()),
    )


def _held_back(space: Workspace, site: PreparedSite | None) -> PreparedSite | None:
    """The images that a hospital holds back for evaluation.

    Raises:
        PreparedError: they are of another ingest than its other images, or of patients who are among these.
    """
    apart = None if site is None else load_held_back(space.held_back(site.name))
    if site is None or apart is None:
        return None
    ours, theirs = site.manifest, apart.manifest
    alike = all(getattr(ours, k) == getattr(theirs, k) for k in ("site", "classes", "shape", "normalisation"))
    if not alike or set(site.groups.tolist()) & set(apart.groups.tolist()):
        raise PreparedError(
            "held-back images do not fit the site's other images, or are of the same patients",
            remedy="Run 'qkt ingest' for this site again.",
            site=site.name,
            file=apart.folder,
        )
    return apart


def _flips(
    places: list[tuple[str, str, int]], actual: list[str], before: list[str], after: list[str]
) -> tuple[Flip, ...]:
    """Images that exactly one of the two models classifies correctly, by site, split and index."""
    return tuple(
        Flip.model_validate(
            {"site": site, "split": split, "index": index, "actual": truth, "before": first, "after": second}
        )
        for (site, split, index), truth, first, second in sorted(
            zip(places, actual, before, after, strict=True)
        )
        if (first == truth) != (second == truth)
    )


def _phases(student: Path) -> Phases:
    """The record of a student's phases.

    Raises:
        QueryError: there is none that can be read.
    """
    try:
        return read_record(Phases, student / "phases.json")
    except OutputsError as error:
        raise QueryError(
            f"no readable record of the phases: {error.message}",
            remedy="Run 'qkt transfer' for this query again.",
            file=student / "phases.json",
            code="no-phases",
            stage="evaluate",
        ) from None


def _operating_point(
    decision: DecisionRule, classes: Sequence[str], phases: Phases, held: _Held, rate: Estimate | None
) -> OperatingPointResult:
    """The query's offsets, and their false-query rates on the images it was set on and on the test images.

    Args:
        classes: the label space.
        rate: of the hospital's own test images of its own classes.
    """
    own = [
        int((held.own & (held.apart == apart) & (held.labels == c)).sum())
        for c in decision.local
        for apart in (False, True)
    ]
    images = phases.phase2.own_images
    return OperatingPointResult(
        offsets={classes[c]: o for c, o in zip(decision.query, decision.offsets, strict=True)},
        budget=decision.budget,
        given_away_own=phases.phase2.false_query_rate,
        own_images=images if isinstance(images, str) else shown_total(images, ()),
        given_away_test=None if too_few(sum(own)) else rate,
        test_images=shown_total(sum(own), own),
    )


def _scores(figures: ModelFigures, names: Sequence[str]) -> Scores:
    """Figures of one model, those of each class by its name."""
    found = {name: getattr(figures, name) for name in Scores.model_fields}
    return Scores.model_validate(
        found | {name: dict(zip(names, found[name], strict=True)) for name in PER_CLASS}
    )


def _subgroups(groups: Mapping[str, SubgroupFigures], held: _Held) -> dict[str, SubgroupResult]:
    """Groups of one column with counts as they may be told: their total is that of the test images.

    Where there are few held-back images of a class, or few of the test split, the total would tell them.
    """
    hidden = [
        int((np.unique(held.labels[mask], return_counts=True)[1]).min(initial=SMALLEST_COUNT))
        for mask in (held.apart, held.own & ~held.apart)
        if held.apart.any()
    ]
    people = [len(set(held.patients[mask].tolist())) for mask in (held.apart, ~held.apart) if mask.any()]
    hidden += people if held.apart.any() else []
    images, patients = (
        {
            g: shown_total(getattr(figures, of), (*(getattr(f, of) for f in groups.values()), *hidden))
            for g, figures in groups.items()
        }
        for of in ("images", "patients")
    )
    return {
        g: SubgroupResult(images=images[g], patients=patients[g], before=figures.before, after=figures.after)
        for g, figures in groups.items()
    }


def _set_of(
    labels: NDArray[np.int64],
    patients: NDArray[np.str_],
    relevant: list[int],
    query: Sequence[int],
    task: Task,
) -> TestSet:
    return TestSet(
        labels=np.searchsorted(relevant, labels),
        patients=patients,
        classes=len(relevant),
        query=tuple(relevant.index(q) for q in query),
        task=task,
    )


def evaluate_query(
    space: Workspace, ref: QueryRef, sites: dict[str, PreparedSite], params: Params, device: torch.device
) -> Evaluation:
    """Figures of one answer, as in ``reports/evaluation/<hospital>/<query>.json``.

    Raises:
        NoTestImages: no hospital has a test image of a class that counts.
        QueryError: there is no student, or it has no record of its phases.
    """
    task, folder = task_of(DEFAULT_TASK), space.student(ref.hospital, ref.query)
    student = load_bundle(folder)
    own = load_bundle(space.own(ref.hospital))
    plan, phases = read_plan(folder), _phases(folder)
    decision = student.card.decision
    if decision is None:
        raise QueryError("not a student", remedy="Run 'qkt transfer' again.", site=ref.hospital)
    classes = student.card.classes
    relevant = list(decision.relevant)
    images = _images(space, sites, ref.hospital, decision, classes)

    def scored(held: _Held) -> tuple[Floats, Floats]:
        before = predict(own.network, held.inputs, device)[:, relevant].double().numpy()
        return before, predict_scores(student, held.inputs, device)[:, relevant].double().numpy()

    held = images.judging
    labels = held.labels
    test = _set_of(labels, held.patients, relevant, decision.query, task)
    scores = scored(held)
    drawn = Draws(
        draws=params.evaluate.bootstrap,
        confidence=params.evaluate.confidence,
        seed=derive(params.seed, "evaluate", ref.hospital, ref.query),
    )
    figures = assess(test, *scores, **drawn)
    rate = false_query_rate(test, held.own, scores[1], **drawn)
    names = [classes[c] for c in relevant]
    said = [[names[i] for i in task.answer(one)] for one in scores]
    return Evaluation.model_validate(
        {
            "hospital": ref.hospital,
            "query": ref.query,
            "student": digest_folder(folder),
            "classes": [classes[c] for c in decision.query],
            "method": decision.method,
            "teachers": plan.relevant,
            "bytes_moved": plan.bytes_moved,
            "budget": decision.budget,
            "relevant": names,
            "local": [classes[c] for c in decision.local],
            "test_images": _counted(labels, relevant, classes),
            "test_images_from": "own" if images.own else "others",
            "held_back": {c: n for c, n in _counted(labels[held.apart], relevant, classes).items() if n},
            "test_sites": held.sites,
            "test_data": held.digest,
            "passes_per_prediction": decision.passes,
            "before": _scores(figures.before, names),
            "after": _scores(figures.after, names),
            "gain": figures.gain,
            "forgetting": figures.forgetting,
            "query_gain": figures.query_gain,
            "gain_p": figures.gain_p,
            "class_forgetting": dict(zip(names, figures.class_forgetting, strict=True)),
            "flips": _flips(held.places, [classes[c] for c in labels], *said),
            "operating_point": _operating_point(decision, classes, phases, held, rate),
            "subgroups": {
                column: _subgroups(groups, held)
                for column, groups in by_subgroup(test, *scores, held.subgroups, **drawn).items()
            },
            "others": None
            if images.others is None
            else _others(images.others, scored(images.others), held, scores, decision, classes, drawn),
        }
    )


class _Images(NamedTuple):
    """What judges an answer."""

    judging: _Held
    own: bool
    """Whether all of these are the asking hospital's own."""
    others: _Held | None
    """Where they are: other hospitals' images of the query, if they have some of every class."""


def _images(
    space: Workspace,
    sites: dict[str, PreparedSite],
    hospital: str,
    decision: DecisionRule,
    classes: Sequence[str],
) -> _Images:
    """The hospital's own images of R if it has enough of every class asked for, else others' of these.

    Raises:
        NoTestImages: there is none of a class.
        PreparedError: see :func:`_held_back`.
    """
    if not sites:
        raise NoTestImages(
            "no hospital's prepared data are here",
            remedy="Evaluate where test images of the class are prepared.",
            site=hospital,
            stage="evaluate",
        )
    own = _own_parts(sites.get(hospital), _held_back(space, sites.get(hospital)), hospital, decision.relevant)
    judged_by_own = _all_there(own, decision.query, SMALLEST_COUNT)
    judging = own if judged_by_own else _judging_parts(sites, hospital, decision.local, decision.query)
    shown = [p.site for p in own] if judged_by_own else list(sites.values())
    columns = sorted(set().union(*(site.subgroups for site in shown)))
    held = _stacked(judging, columns, hospital)
    missing = [classes[c] for c in decision.relevant if not (held.labels == c).any()]
    if missing:
        raise NoTestImages(
            f"no hospital here has a test image of {', '.join(missing)}",
            remedy="Evaluate where test images of the class are prepared.",
            site=hospital,
            stage="evaluate",
        )
    rest = {name: site for name, site in sites.items() if name != hospital}
    theirs = _judging_parts(rest, hospital, (), decision.query)
    beside = judged_by_own and _all_there(theirs, decision.query, 1)
    return _Images(held, judged_by_own, _stacked(theirs, columns, hospital) if beside else None)


def _counted(labels: NDArray[np.int64], relevant: Sequence[int], classes: Sequence[str]) -> dict[str, int]:
    """Class to number of images."""
    return {classes[c]: int((labels == c).sum()) for c in relevant}


def _others(
    theirs: _Held,
    their_scores: tuple[Floats, Floats],
    held: _Held,
    scores: tuple[Floats, Floats],
    decision: DecisionRule,
    classes: Sequence[str],
    drawn: Draws,
) -> OthersFigures:
    """Figures on the hospital's own images of its own classes and other hospitals' of the query.

    Args:
        theirs, their_scores: other hospitals' images of the query, and both models' scores.
        held, scores: the hospital's own images, and the scores.
        decision: of the student.
        classes: the label space.
        drawn: settings of intervals.
    """
    relevant = list(decision.relevant)
    local = np.isin(held.labels, decision.local)
    labels = np.concatenate([held.labels[local], theirs.labels])
    patients = np.concatenate([held.patients[local], theirs.patients])
    test = _set_of(labels, patients, relevant, decision.query, task_of(DEFAULT_TASK))
    before, after = (
        np.concatenate([first[local], second]) for first, second in zip(scores, their_scores, strict=True)
    )
    figures = assess(test, before, after, **drawn)
    names = [classes[c] for c in relevant]
    return OthersFigures.model_validate(
        {
            "test_images": _counted(labels, relevant, classes),
            "test_sites": theirs.sites,
            "before": _scores(figures.before, names),
            "after": _scores(figures.after, names),
            "gain": figures.gain,
            "forgetting": figures.forgetting,
            "query_gain": figures.query_gain,
        }
    )


def _confusion_rows(evaluation: Evaluation) -> list[list[str]]:
    """One row per test image: query, actual, predicted (after)."""
    name = f"{evaluation.hospital}-{evaluation.query}"
    return [
        [name, actual, predicted]
        for actual, counts in zip(evaluation.relevant, evaluation.after.confusion, strict=True)
        for predicted, count in zip(evaluation.relevant, counts or (), strict=True)
        for _ in range(count)
    ]


def _accuracy_rows(key: str, summary: QuerySummary) -> list[list[str]]:
    """One row per accuracy, before and after: query, measure, value, when."""
    return [
        [key, name, f"{getattr(side, name)}", when]
        for name in Headline.model_fields
        for when, side in (("before", summary.before), ("after", summary.after))
    ]


def _write_csv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def prepared_sites(space: Workspace, sites: Sequence[str]) -> dict[str, PreparedSite]:
    """The sites whose prepared data are in this workspace."""
    return {s: load_prepared(space.prepared(s)) for s in sites if space.prepared(s).is_dir()}


def evaluate_one(
    root: Path, ref: QueryRef, params: Params, *, sites: Sequence[str], device: str | None = None
) -> QuerySummary:
    """Evaluate one answer on the test images of ``sites`` alone and write its JSON.

    The caller holds the query's lock.

    Returns:
        Its entry as in ``reports/queries.json``, which is left to :func:`evaluate_queries`.

    Raises:
        NoTestImages, QueryError: as :func:`evaluate_query`.
    """
    space = Workspace(root)
    where = begin_computing(device or params.device, params.threads)
    result = evaluate_query(space, ref, prepared_sites(space, sites), params, where)
    write_record(space.reports / "evaluation" / ref.hospital / f"{ref.query}.json", result)
    return QuerySummary.of(result)


def evaluate_queries(
    root: Path,
    params: Params,
    *,
    device: str | None = None,
    skipped: Callable[[QueryRef, QktError], None] | None = None,
) -> tuple[QuerySummary, ...]:
    """Evaluate every query of ``params.yaml`` that can be measured here.

    Writes ``reports/evaluation/<hospital>/<query>.json``, ``reports/queries.json``,
    ``reports/metrics.json`` and ``reports/plots/``.

    Args:
        skipped: told of each that cannot; its answer stays unmeasured, and an older evaluation is removed.

    Returns:
        What stands in ``reports/queries.json``.

    Raises:
        Busy: another process works on one of them.
        QueryError: as :func:`evaluate_query`.
    """
    space = Workspace(root)
    where = begin_computing(device or params.device, params.threads)
    sites = prepared_sites(space, params.sites)
    folder = space.reports / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Evaluation] = {}
    for key, ref in sorted(params.queries.items()):
        path = folder / ref.hospital / f"{ref.query}.json"
        with hold_query(root, ref.hospital, ref.query):
            try:
                found[key] = evaluate_query(space, ref, sites, params, where)
            except NoTestImages as error:
                path.unlink(missing_ok=True)
                if skipped:
                    skipped(ref, error)
                continue
            write_record(path, found[key])
    rows = {key: QuerySummary.of(evaluation) for key, evaluation in found.items()}
    metrics = RunMetrics.of({key: QueryMetrics.of_query(evaluation) for key, evaluation in found.items()})
    accuracy = [line for key, row in rows.items() for line in _accuracy_rows(key, row)]
    confusion = [line for evaluation in found.values() for line in _confusion_rows(evaluation)]
    write_record(space.reports / "queries.json", QuerySummaries(tuple(rows.values())))
    write_record(space.reports / "metrics.json", metrics)
    _write_csv(space.reports / "plots" / "accuracy.csv", ["query", "measure", "value", "when"], accuracy)
    _write_csv(space.reports / "plots" / "confusion.csv", ["query", "actual", "predicted"], confusion)
    return tuple(rows.values())
