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
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from qkt_clinical.common.disclosure import shown_parts, shown_total, too_few
from qkt_clinical.common.files import digest_bytes, digest_folder, write_json, write_text
from qkt_clinical.common.locks import hold_query
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.params import Params
from qkt_clinical.config.query import QueryRef
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import PreparedSite, load_prepared
from qkt_clinical.errors import QktError, QueryError
from qkt_clinical.evaluation.metrics import TestSet, assess, by_subgroup, share_given_away
from qkt_clinical.models.bundle import load_bundle
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import pick_device
from qkt_clinical.qkt.prediction import predict_scores
from qkt_clinical.records.phases import Phases
from qkt_clinical.records.plan import read_plan

PER_CLASS = ("recall", "precision", "class_auroc", "class_auprc", "class_ece", "class_reliability")
HEADLINE = ("query_accuracy", "retained_accuracy", "balanced_accuracy")


class NoTestImages(QueryError):
    """A query cannot be measured here."""

    code = "no-test-images"


class _Drawn(TypedDict):
    """How intervals are drawn."""

    draws: int
    confidence: float
    seed: int


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
) -> list[dict[str, Any]]:
    """The images that one of two models has right and the other wrong, by site and index."""
    return [
        {"site": site, "index": index, "actual": truth, "before": first, "after": second}
        for (site, index), truth, first, second in sorted(zip(places, actual, before, after, strict=True))
        if (first == truth) != (second == truth)
    ]


def _calibrated(student: Path) -> dict[str, Any]:
    """The false-query rate on the calibration images by which the offsets were set, of ``phases.json``."""
    path = student / "phases.json"
    try:
        second = Phases.model_validate_json(path.read_bytes()).phase2
        images = second.calibration_images
        return {
            "given_away_calibration": second.false_query_rate,
            "calibration_images": images if isinstance(images, str) else shown_total(images, ()),
        }
    except (OSError, ValueError):
        raise QueryError(
            "no readable record of the phases",
            remedy="Run 'qkt transfer' for this query again.",
            file=path,
            code="no-phases",
            stage="evaluate",
        ) from None


def _shown_groups(rows: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Groups of one column with counts as they may be told: their total is that of the test images."""
    images, patients = (shown_parts({g: row[of] for g, row in rows.items()}) for of in ("images", "patients"))
    return {g: row | {"images": images[g], "patients": patients[g]} for g, row in rows.items()}


def evaluate_query(
    space: Workspace, ref: QueryRef, sites: dict[str, PreparedSite], params: Params, device: torch.device
) -> dict[str, Any]:
    """Figures of one answer, as in ``reports/evaluation/<hospital>/<query>.json``.

    Raises:
        NoTestImages: no hospital has a test image of a class that counts.
        QueryError: there is no student, or it has no record of its phases.
    """
    student = load_bundle(space.student(ref.hospital, ref.query))
    own = load_bundle(space.teacher(ref.hospital))
    plan = read_plan(space.student(ref.hospital, ref.query))
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
    )
    scores = before, after
    drawn = _Drawn(
        draws=params.evaluate.bootstrap,
        confidence=params.evaluate.confidence,
        seed=derive(params.seed, "evaluate", ref.hospital, ref.query),
    )
    figures = assess(test, *scores, **drawn)
    groups = by_subgroup(test, *scores, held.subgroups, **drawn)
    names = [classes[c] for c in relevant]
    test_images = {classes[c]: int((labels == c).sum()) for c in relevant}
    own_images = int((held.own & np.isin(labels, decision.local)).sum())
    for side in ("before", "after"):
        for figure in PER_CLASS:
            figures[side][figure] = dict(zip(names, figures[side][figure], strict=True))
    figures["class_forgetting"] = dict(zip(names, figures["class_forgetting"], strict=True))
    said = [[names[i] for i in one.argmax(axis=1)] for one in scores]
    return {
        "format": "qkt-evaluation/1",
        "hospital": ref.hospital,
        "query": ref.query,
        "student": digest_folder(space.student(ref.hospital, ref.query)),
        "classes": [classes[c] for c in decision.query],
        "method": decision.method,
        "teachers": list(plan.relevant),
        "bytes_moved": plan.bytes_moved,
        "budget": decision.budget,
        "relevant": names,
        "local": [classes[c] for c in decision.local],
        "test_images": test_images,
        "test_sites": list(held.sites),
        "test_data": held.digest,
        "operating_point": {
            "offsets": {classes[c]: o for c, o in zip(decision.query, decision.offsets, strict=True)},
            "budget": decision.budget,
            **_calibrated(space.student(ref.hospital, ref.query)),
            "given_away_test": None
            if too_few(own_images)
            else share_given_away(test, held.own, scores[1], **drawn),
            "test_images": shown_total(own_images, [test_images[classes[c]] for c in decision.local]),
        },
        "subgroups": {column: _shown_groups(rows) for column, rows in groups.items()},
        "passes_per_prediction": decision.passes,
        "flips": _flips(held.places, [classes[c] for c in labels], *said),
        **figures,
    }


def _confusion_rows(result: dict[str, Any]) -> list[list[str]]:
    """One row per test image: query, actual, predicted (after)."""
    rows = []
    for actual, counts in zip(result["relevant"], result["after"]["confusion"], strict=True):
        for predicted, count in zip(result["relevant"], counts, strict=True):
            rows += [[f"{result['hospital']}-{result['query']}", actual, predicted]] * count
    return rows


def _write_csv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def prepared_sites(space: Workspace, sites: Sequence[str]) -> dict[str, PreparedSite]:
    """Those of the sites whose prepared data are here."""
    return {s: load_prepared(space.prepared(s)) for s in sites if space.prepared(s).is_dir()}


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """What ``reports/queries.json`` says of an evaluation."""
    keys = ("hospital", "query", "classes", "method", "teachers", "bytes_moved")
    sides = {s: {h: result[s][h]["value"] for h in HEADLINE} for s in ("before", "after")}
    return {k: result[k] for k in keys} | sides


def evaluate_one(
    root: Path, ref: QueryRef, params: Params, *, sites: Sequence[str], device: str | None = None
) -> dict[str, Any]:
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
    write_json(space.reports / "evaluation" / ref.hospital / f"{ref.query}.json", result)
    return headline(result)


def evaluate_queries(
    root: Path,
    params: Params,
    *,
    device: str | None = None,
    skipped: Callable[[QueryRef, QktError], None] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate every query of ``params.yaml`` that can be measured here.

    Writes ``reports/evaluation/<hospital>/<query>.json``, ``reports/queries.json``,
    ``reports/metrics.json`` and ``reports/plots/``.

    Args:
        skipped: told of each that cannot; its answer stays unmeasured, and an older evaluation is removed.

    Returns:
        The list in ``reports/queries.json``.

    Raises:
        Busy: another process works on one of them.
        QueryError: as :func:`evaluate_query`.
    """
    space = Workspace(root)
    where = pick_device(device or params.device)
    sites = prepared_sites(space, params.sites)
    folder = space.reports / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    metrics: dict[str, dict[str, float]] = {}
    accuracy: list[list[str]] = []
    confusion: list[list[str]] = []
    for key, ref in sorted(params.queries.items()):
        path = folder / ref.hospital / f"{ref.query}.json"
        with hold_query(root, ref.hospital, ref.query):
            try:
                result = evaluate_query(space, ref, sites, params, where)
            except NoTestImages as error:
                path.unlink(missing_ok=True)
                if skipped:
                    skipped(ref, error)
                continue
            write_json(path, result)
        rows.append(headline(result))
        metrics[key] = {h: result["after"][h]["value"] for h in HEADLINE} | {
            "gain": result["gain"]["value"],
            "forgetting": result["forgetting"]["value"],
        }
        accuracy += [[key, h, f"{result[s][h]['value']}", s] for h in HEADLINE for s in ("before", "after")]
        confusion += _confusion_rows(result)
    if metrics:
        names = next(iter(metrics.values()))
        metrics["mean"] = {n: round(sum(m[n] for m in metrics.values()) / len(metrics), 6) for n in names}
    write_json(space.reports / "queries.json", rows)
    write_json(space.reports / "metrics.json", metrics)
    _write_csv(space.reports / "plots" / "accuracy.csv", ["query", "measure", "value", "when"], accuracy)
    _write_csv(space.reports / "plots" / "confusion.csv", ["query", "actual", "predicted"], confusion)
    return rows
