"""Stage ``evaluate``: every answer on held-out patients, before and after.

The federation's own view, not a query job: it opens the test split of every hospital, since a hospital
that lacks a class has no test images of it. Where a hospital's prepared data are absent, its test images
are missing from the figures and its name from ``test_sites``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qkt_clinical.catalog import DEFAULT_TASK
from qkt_clinical.common.disclosure import shown_parts, shown_total, too_few
from qkt_clinical.common.files import digest_bytes, digest_folder, write_text
from qkt_clinical.common.locks import hold_query
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.params import Params
from qkt_clinical.config.query import QueryRef
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import PreparedSite, load_prepared
from qkt_clinical.errors import OutputsError, QktError, QueryError
from qkt_clinical.evaluation.metrics import (
    Draws,
    ModelFigures,
    SubgroupFigures,
    TestSet,
    assess,
    by_subgroup,
    false_query_rate,
)
from qkt_clinical.models.bundle import load_bundle
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import pick_device
from qkt_clinical.qkt.prediction import predict_scores
from qkt_clinical.records.base import Estimate
from qkt_clinical.records.card import DecisionRule
from qkt_clinical.records.evaluation import Evaluation, Flip, OperatingPointResult, Scores, SubgroupResult
from qkt_clinical.records.phases import Phases
from qkt_clinical.records.plan import read_plan
from qkt_clinical.records.reading import read_record, write_record
from qkt_clinical.records.summary import Headline, QueryMetrics, QuerySummaries, QuerySummary, RunMetrics
from qkt_clinical.task import task_of

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
    sites: tuple[str, ...]
    places: list[tuple[str, int]]
    """Of each image, its site and its index in the prepared arrays."""
    subgroups: Mapping[str, NDArray[np.str_]]
    """Column to group (N,), empty for images of hospitals without the column."""
    digest: str
    """Of images, labels and patients: figures of one test set can be compared."""


def _test_images(
    sites: dict[str, PreparedSite], hospital: str, local: tuple[int, ...], query: tuple[int, ...]
) -> _Held:
    """The hospital's own test images of R, and every other hospital's of the query.

    Raises:
        NoTestImages: there is none.
    """
    images, labels, patients, own, used, places, digests = [], [], [], [], [], [], []
    columns = sorted(set().union(*(site.subgroups for site in sites.values())))
    groups: dict[str, list[NDArray[np.str_]]] = {column: [] for column in columns}
    for name, site in sorted(sites.items()):
        wanted = (*local, *query) if name == hospital else query
        index = site.splits["test"][np.isin(site.labels[site.splits["test"]], wanted)]
        if len(index):
            used.append(name)
            places += [(name, int(i)) for i in index]
            pixels = site.images[index]
            images.append(to_input(pixels, site.manifest.normalisation))
            labels.append(site.labels[index])
            patients.append(np.char.add(f"{name}/", site.groups[index]))
            own.append(np.full(len(index), name == hospital))
            for column, parts_of in groups.items():
                held = site.subgroups.get(column)
                parts_of.append(np.full(len(index), "") if held is None else held[index])
            parts = (pixels.tobytes(), labels[-1].tobytes(), "\n".join(patients[-1].tolist()).encode())
            digests += [digest_bytes(part) for part in parts]
    if not images:
        raise NoTestImages(
            "no hospital here has a test image of these classes",
            remedy="Evaluate where test images of the class are prepared.",
            site=hospital,
            stage="evaluate",
        )
    return _Held(
        inputs=torch.cat(images),
        labels=np.concatenate(labels),
        patients=np.concatenate(patients),
        own=np.concatenate(own),
        sites=tuple(used),
        places=places,
        subgroups={column: np.concatenate(parts_of) for column, parts_of in groups.items()},
        digest=digest_bytes("".join(digests).encode()),
    )


def _flips(
    places: list[tuple[str, int]], actual: list[str], before: list[str], after: list[str]
) -> tuple[Flip, ...]:
    """Images that exactly one of the two models classifies correctly, by site and index."""
    return tuple(
        Flip(site=site, index=index, actual=truth, before=first, after=second)
        for (site, index), truth, first, second in sorted(zip(places, actual, before, after, strict=True))
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
    """The query's offsets, and their false-query rates on the calibration and the test images.

    Args:
        classes: the label space.
        rate: of the hospital's own test images of its own classes.
    """
    own = [int((held.own & (held.labels == c)).sum()) for c in decision.local]
    calibration = phases.phase2.calibration_images
    return OperatingPointResult(
        offsets={classes[c]: o for c, o in zip(decision.query, decision.offsets, strict=True)},
        budget=decision.budget,
        given_away_calibration=phases.phase2.false_query_rate,
        calibration_images=calibration if isinstance(calibration, str) else shown_total(calibration, ()),
        given_away_test=None if too_few(sum(own)) else rate,
        test_images=shown_total(sum(own), own),
    )


def _scores(figures: ModelFigures, names: Sequence[str]) -> Scores:
    """Figures of one model, those of each class by its name."""
    found = {name: getattr(figures, name) for name in Scores.model_fields}
    return Scores.model_validate(
        found | {name: dict(zip(names, found[name], strict=True)) for name in PER_CLASS}
    )


def _subgroups(groups: Mapping[str, SubgroupFigures]) -> dict[str, SubgroupResult]:
    """Groups of one column with counts as they may be told: their total is that of the test images."""
    images, patients = (
        shown_parts({g: getattr(figures, of) for g, figures in groups.items()})
        for of in ("images", "patients")
    )
    return {
        g: SubgroupResult(images=images[g], patients=patients[g], before=figures.before, after=figures.after)
        for g, figures in groups.items()
    }


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
    own = load_bundle(space.teacher(ref.hospital))
    plan, phases = read_plan(folder), _phases(folder)
    decision = student.card.decision
    if decision is None:
        raise QueryError("not a student", remedy="Run 'qkt transfer' again.", site=ref.hospital)
    classes = student.card.classes
    if not sites:
        raise NoTestImages(
            "no hospital's prepared data are here",
            remedy="Evaluate where test images of the class are prepared.",
            site=ref.hospital,
            stage="evaluate",
        )
    held = _test_images(sites, ref.hospital, decision.local, decision.query)
    labels = held.labels
    relevant = list(decision.relevant)
    missing = [classes[c] for c in relevant if not (labels == c).any()]
    if missing:
        raise NoTestImages(
            f"no hospital here has a test image of {', '.join(missing)}",
            remedy="Evaluate where test images of the class are prepared.",
            site=ref.hospital,
            stage="evaluate",
        )
    before = predict(own.network, held.inputs, device)[:, relevant].double().numpy()
    after = predict_scores(student, held.inputs, device)[:, relevant].double().numpy()
    test = TestSet(
        labels=np.searchsorted(relevant, labels),
        patients=held.patients,
        classes=len(relevant),
        query=tuple(relevant.index(q) for q in decision.query),
        task=task,
    )
    scores = before, after
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
            "test_images": {classes[c]: int((labels == c).sum()) for c in relevant},
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
                column: _subgroups(groups)
                for column, groups in by_subgroup(test, *scores, held.subgroups, **drawn).items()
            },
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
    where = pick_device(device or params.device)
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
    where = pick_device(device or params.device)
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
