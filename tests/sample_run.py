"""A finished run written by hand: the files that stages leave behind, with figures that are easy to check."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from qkt_clinical.catalog import BLOOD_CELLS, SPLITS
from qkt_clinical.common.files import digest_bytes, digest_file, digest_folder, write_json
from qkt_clinical.config.loading import parse
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import Consent, Manifest, read_manifest
from qkt_clinical.records.card import CARD, MASK, WEIGHTS, Card, Mask
from qkt_clinical.records.evaluation import Evaluation
from qkt_clinical.records.phases import MERGE_KIND, Phases
from qkt_clinical.records.plan import Plan
from qkt_clinical.records.query import AskedQuery
from qkt_clinical.records.reading import write_record
from qkt_clinical.records.training import TeacherMetrics, TrainingCurves
from qkt_clinical.stages.gate import gate_queries

SHAPE = (3, 16, 16)
FEW_AT, FEW = 2, 3
"""The query of whose asked class there are few test images, and how many."""
LAYERS = 10
"""That are made smaller, of every teacher."""


def write_as(kind: type[BaseModel], path: Path, data: Any) -> None:
    """Write a file through its model: a fixture holds what stages write, and nothing that they do not."""
    record = kind.model_validate(data)
    if isinstance(data, dict):
        strange = set(data) - set(kind.model_fields)
        assert not strange, f"{kind.__name__} has no {sorted(strange)}"
    write_record(path, record)


def interval(value: float, half: float = 0.04) -> dict[str, float]:
    return {"value": round(value, 6), "low": round(value - half, 6), "high": round(value + half, 6)}


def fraction(value: float, half: float = 0.04) -> dict[str, float]:
    """An interval of something that lies between 0 and 1."""
    return {name: min(max(bound, 0.0), 1.0) for name, bound in interval(value, half).items()}


def share(*names: object) -> float:
    """A number in [0, 1) that depends on the names alone."""
    return hashlib.sha256("/".join(map(str, names)).encode()).digest()[0] / 256


def sample_params(classes: Sequence[str] = BLOOD_CELLS, sites: int = 3, **sections: Any) -> Params:
    """Site ``h<i>`` has the classes i, i + 1 and i + 2 and asks one query, ``q<i>``."""
    names = [f"h{i}" for i in range(sites)]
    queries = {f"{n}-q{i}": {"hospital": n, "query": f"q{i}"} for i, n in enumerate(names)}
    data = {"classes": list(classes), "sites": names, "queries": queries, **sections}
    return parse(Params, data, file="params.yaml")


def _local(params: Params, index: int) -> list[str]:
    return [params.classes[(index + k) % len(params.classes)] for k in range(3)]


def asked_class(params: Params, index: int) -> str:
    """The next class where some other site has it, else the one before."""
    return params.classes[index + 3 if index + 3 < len(params.sites) + 2 else index - 1]


def _card(params: Params, site: str, **rest: Any) -> dict[str, Any]:
    return {
        "kind": "teacher",
        "site": site,
        "network": {
            "name": "resnet-small",
            "spatial_dims": len(SHAPE) - 1,
            "in_channels": SHAPE[0],
            "classes": len(params.classes),
        },
        "classes": list(params.classes),
        "input": {"shape": list(SHAPE), "normalisation": "unit", "spacing_mm": None},
        "training": {"epochs": 12},
        **rest,
    }


def write_card(folder: Path, card: dict[str, Any], *, weights: bool, seed: int) -> None:
    """A real bundle of random weights, or its card alone with a weights file of a few bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    if weights:
        from qkt_clinical.models.bundle import write_bundle
        from qkt_clinical.models.networks import build
        from qkt_clinical.records.card import NetworkSpec

        network = build(NetworkSpec.model_validate(card["network"]), seed=seed)
        write_bundle(folder, network, {k: v for k, v in card.items() if k != "network"})
        return
    (folder / WEIGHTS).write_bytes(f"weights {seed}".encode())
    size = {"bytes": 1_234_567, "sha256": digest_file(folder / WEIGHTS)}
    write_json(folder / CARD, Card.model_validate({**card, "weights": size}).model_dump(mode="json"))


def _write_site(workspace: Workspace, params: Params, index: int, *, weights: bool) -> None:
    site, local = params.sites[index], _local(params, index)
    folder = workspace.teacher(site)
    write_card(folder, _card(params, site), weights=weights, seed=index)
    scores = [1.0 if c in local else round(0.001 + 0.01 * share(site, c), 6) for c in params.classes]
    write_as(
        Mask,
        folder / MASK,
        {
            "format": "qkt-mask/1",
            "estimator": "combined",
            "probes": 256,
            "seed": 0,
            "classes": list(params.classes),
            "scores": scores,
            "threshold": 0.1,
            "automatic": True,
            "known": [s >= 0.1 for s in scores],
        },
    )
    write_as(
        TeacherMetrics,
        folder / "metrics.json",
        {
            "balanced_accuracy": 0.9375,
            "recall": dict(zip(local, (0.88, 0.909091, 1.0), strict=True)),
            "epochs": 12,
            "best_epoch": 9,
            "stopped_early": True,
        },
    )
    write_as(
        TrainingCurves,
        folder / "curves.json",
        [
            {"epoch": float(e), "loss": round(1.1 / e, 6), "score": round(0.95 - 0.5 / e, 6)}
            for e in range(1, 13)
        ],
    )
    sizes = dict(zip(SPLITS, (270, 70, 50, 150), strict=True))
    counts = {s: dict(zip(local, (n // 2, n // 2 - 3, 3), strict=True)) for s, n in sizes.items()}
    counts["test"] = dict.fromkeys(local, 50)
    prepared = workspace.prepared(site)
    prepared.mkdir(parents=True, exist_ok=True)
    write_as(
        Manifest,
        prepared / "manifest.json",
        {
            "format": "qkt-prepared/1",
            "site": site,
            "source_kind": ("dicom", "nifti", "images", "npz")[index % 4],
            "classes": list(params.classes),
            "count": sum(sizes.values()),
            "shape": list(SHAPE),
            "dtype": "uint8",
            "spacing_mm": None,
            "normalisation": "unit",
            "transforms": ["centre crop", "resize to 16 x 16"],
            "counts": counts,
            "patients": {"train": 40, "calibration": 11, "val": 4, "test": 14},
            "rejected": {"unreadable": 2, "polarity": 1} if index == 0 else {},
            "risks": {},
            "digests": {"images.npy": digest_bytes(site.encode())},
        },
    )


def _scores(
    relevant: list[str], recalls: dict[str, float], query: str, images: dict[str, int]
) -> dict[str, Any]:
    rows = []
    for i, name in enumerate(relevant):
        right = round(images[name] * recalls[name])
        rows.append([right if i == j else 0 for j in range(len(relevant))])
        rows[-1][(i + 1) % len(relevant)] += images[name] - right
    local = [v for k, v in recalls.items() if k != query]
    mean = sum(recalls.values()) / len(recalls)
    bins = [
        {"confidence": 0.55, "accuracy": 0.5, "images": 4},
        {"confidence": 0.75, "accuracy": 0.8, "images": 12},
        {"confidence": 0.95, "accuracy": 0.9, "images": sum(images.values()) - 16},
    ]
    return {
        "query_accuracy": fraction(recalls[query]),
        "retained_accuracy": fraction(sum(local) / len(local), 0.02),
        "balanced_accuracy": fraction(mean, 0.02),
        "auroc": fraction(0.9, 0.03) if recalls[query] else None,
        "ece": fraction(0.05, 0.02),
        "recall": {k: fraction(v) for k, v in recalls.items()},
        "precision": {k: fraction(v) if v else None for k, v in recalls.items()},
        "class_auroc": {k: fraction(0.5 + v / 2) for k, v in recalls.items()},
        "class_auprc": {k: fraction(v) for k, v in recalls.items()},
        "class_ece": {k: round(0.1 - 0.08 * v, 6) for k, v in recalls.items()},
        "class_reliability": dict.fromkeys(recalls, bins),
        "macro_precision": fraction(mean),
        "macro_auroc": fraction(0.5 + mean / 2),
        "macro_auprc": fraction(mean),
        "reliability": bins,
        "confusion": rows,
    }


def _write_query(
    workspace: Workspace,
    params: Params,
    index: int,
    *,
    weights: bool,
    reason: str,
    loss: bool,
    recalls: tuple[float, float],
) -> None:
    site, query = params.sites[index], f"q{index}"
    local, asked = _local(params, index), asked_class(params, index)
    method = ("qkt", "qkt-light", "routed")[index % 3]
    relevant = [c for c in params.classes if c in {*local, asked}]
    others = [s for s in params.sites if s != site]
    known = {s: _local(params, params.sites.index(s)) for s in others}
    teachers = [s for s in others if asked in known[s]]
    student = workspace.student(site, query)
    decision = {
        "method": method,
        "local": sorted(params.classes.index(c) for c in local),
        "query": [params.classes.index(asked)],
        "offsets": [-1.25],
        "budget": 0.05,
        "own_weight": 2.0,
        "experts": teachers if method == "routed" else [],
        "flips": method == "routed",
    }
    write_card(
        student,
        _card(params, site, kind="student", query=query, decision=decision),
        weights=weights,
        seed=100 + index,
    )
    for expert in decision["experts"]:
        copy = student / "experts" / expert
        copy.mkdir(parents=True)
        for name in (CARD, WEIGHTS, MASK):
            (copy / name).write_bytes((workspace.teacher(expert) / name).read_bytes())
    moved = 1_234_567 * len(teachers)
    ask = {
        "hospital": site,
        "query": query,
        "classes": [asked],
        "method": method,
        "budget": 0.05,
        "max_teachers": None,
        "exclude_teachers": [],
    }
    write_as(AskedQuery, student / "query.json", ask)
    plan = {
        "format": "qkt-plan/1",
        **{k: ask[k] for k in ("hospital", "query", "classes", "method", "budget")},
        "local": local,
        "teachers": [
            {
                "site": s,
                "relevant": s in teachers,
                "reason": reason if s in teachers else f"knows none of: {asked}",
                "teaches": [asked] if s in teachers else [],
                "rivals": [c for c in known[s] if c in local and method != "qkt-light"],
                "known": known[s],
                "scores": {asked: 1.0 if s in teachers else 0.004},
                "threshold": 0.1,
                "bytes": 1_234_567,
                "digest": digest_bytes(s.encode()),
            }
            for s in others
        ],
        "uncovered": [],
        "bytes_moved": moved,
    }
    write_as(Plan, student / "plan.json", plan)
    first = {
        "kind": MERGE_KIND,
        "rank": 0.35 if method == "qkt-light" else 0.5,
        "curves": [
            {"layer number": float(i), **{s: round(0.01 * i, 6) for s in teachers}}
            for i in range(1, LAYERS + 1)
        ],
        "views": 1,
        "teacher_passes": len(teachers),
    }
    write_as(
        Phases,
        student / "phases.json",
        {
            "format": "qkt-phases/2",
            "method": method,
            "phase1": first if method != "routed" else None,
            "phase2": {
                "offsets": {asked: -1.25},
                "budget": 0.05,
                "false_query_rate": 0.043478,
                "own_images": 469,
                "local_model_weight": 2.0,
                "rare": {},
                "curves": [],
            },
        },
    )
    images = {c: FEW if c == asked and index == FEW_AT else 50 for c in relevant}
    recalled = round(2 / FEW, 6) if index == FEW_AT else 0.80 + 0.02 * index
    before = {c: 0.0 if c == asked else recalls[0] for c in relevant}
    after = {c: recalled if c == asked else recalls[1] for c in relevant}
    if loss:
        after = {c: 0.04 * (index != FEW_AT) if c == asked else 0.90 for c in relevant}
    first, second = _scores(relevant, before, asked, images), _scores(relevant, after, asked, images)

    def gain(key: str, sign: int = 1) -> dict[str, float]:
        return interval(sign * (second[key]["value"] - first[key]["value"]), 0.03)

    write_as(
        Evaluation,
        workspace.reports / "evaluation" / site / f"{query}.json",
        {
            "student": digest_folder(student),
            **{k: ask[k] for k in ("hospital", "query", "classes", "method", "budget")},
            "teachers": teachers,
            "bytes_moved": moved,
            "relevant": relevant,
            "local": local,
            "test_images": images,
            "test_sites": sorted({site, *teachers}),
            "test_data": digest_bytes(f"test images for {site}".encode()),
            "passes_per_prediction": 4 * (1 + len(teachers)) if method == "routed" else 1,
            "before": first,
            "after": second,
            "gain": gain("balanced_accuracy"),
            "forgetting": gain("retained_accuracy", -1),
            "query_gain": gain("query_accuracy"),
            "gain_p": 0.004,
            "class_forgetting": {c: interval(before[c] - after[c]) for c in relevant},
            "operating_point": {
                "offsets": {asked: -1.25},
                "budget": 0.05,
                "given_away_own": 0.043478,
                "own_images": 469,
                "given_away_test": fraction(0.06, 0.02),
                "test_images": 150,
            },
            "flips": _flips(sorted({site, *teachers}), asked, local, index),
        },
    )


def _flips(sites: list[str], asked: str, local: list[str], query: int) -> list[dict[str, Any]]:
    """Seven cases of every site: five of the class asked for, and two that were lost of an own one.

    Of the class with few test images two, at the first site. No two queries name the same image.
    """
    gained = {"actual": asked, "before": local[0], "after": asked}
    lost = {"actual": local[1], "before": local[1], "after": asked}
    return [
        {"site": site, "index": 100 * query + 10 * number, **(gained if number < 5 else lost)}
        for site in sites
        for number in range(7)
        if number >= 5 or query != FEW_AT or (site == sites[0] and number < 2)
    ]


def write_pictures(root: Path, params: Params, sites: Sequence[str]) -> None:
    """Prepared arrays of every site, no two images alike, and consent of those named.

    Images below 300 are test images, and those that flipped are of the class that the evaluation says.
    """
    space = Workspace(root)
    found = [json.loads(p.read_text()) for p in sorted((space.reports / "evaluation").rglob("*.json"))]
    flips = [flip for evaluation in found for flip in evaluation["flips"]]
    for site in params.sites:
        folder = space.prepared(site)
        count = read_manifest(folder).count
        random = np.random.default_rng(params.sites.index(site))
        np.save(folder / "images.npy", random.integers(0, 256, (count, *SHAPE), np.uint8), allow_pickle=False)
        labels = np.zeros(count, np.int64)
        for flip in flips:
            if flip["site"] == site:
                labels[flip["index"]] = params.classes.index(flip["actual"])
        np.save(folder / "labels.npy", labels, allow_pickle=False)
        np.save(folder / "groups.npy", np.arange(count).astype(np.str_), allow_pickle=False)
        write_json(
            folder / "splits.json",
            {s: [] for s in SPLITS} | {"train": list(range(300, count)), "test": list(range(300))},
        )
        write_as(Consent, space.consent(site), {"pictures": site in sites})


def write_sample_run(
    root: Path,
    params: Params,
    *,
    weights: bool = False,
    reason: str = "knows what is asked; nearest in scores",
    loss_at: int | None = None,
    recalls: tuple[float, float] = (0.96, 0.94),
) -> None:
    """Everything that report and track read. Query ``loss_at`` ends worse than the site's own model.

    ``recalls`` are those of the hospital's own classes, before and after.
    """
    workspace = Workspace(root)
    for index in range(len(params.sites)):
        _write_site(workspace, params, index, weights=weights)
    for index in range(len(params.sites)):
        loss = index == loss_at
        _write_query(workspace, params, index, weights=weights, reason=reason, loss=loss, recalls=recalls)
    gate_queries(root, params)
