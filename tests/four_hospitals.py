"""Four hospitals with hand-written cards and masks; aster, which asks, has images of a and b."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qkt_clinical.common.files import digest_file, write_json
from qkt_clinical.config.loading import parse
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import write_prepared
from qkt_clinical.records.card import CARD, MASK, WEIGHTS

CLASSES = ("a", "b", "c", "d")
SITES = ("aster", "birch", "cedar", "dahlia")
SHAPE = (3, 16, 16)
PARAMS = parse(Params, {"classes": CLASSES, "sites": SITES, "queries": {}}, file="params.yaml")

KNOWN = {"aster": (0, 1), "birch": (1, 2), "cedar": (2, 3), "dahlia": (0, 3)}
SCORES = {
    "aster": (1.0, 0.9, 0.01, 0.02),
    "birch": (0.02, 1.0, 0.7, 0.03),
    "cedar": (0.01, 0.01, 0.8, 1.0),
    "dahlia": (1.0, 0.01, 0.02, 0.6),
}


def write_teacher(root: Path, site: str, known: Sequence[int], **changes: Any) -> Path:
    """A teacher's folder as the stages train and mask leave it; its weights are a few bytes."""
    folder = Workspace(root).teacher(site)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(f"weights of {site}".encode())
    card = {
        "format": "qkt-bundle/1",
        "kind": "teacher",
        "site": site,
        "query": None,
        "network": {"name": "resnet-small", "spatial_dims": 2, "in_channels": 3, "classes": 4},
        "classes": CLASSES,
        "input": {"shape": SHAPE, "normalisation": "unit", "spacing_mm": None},
        "training": {},
        "weights": {"bytes": (folder / WEIGHTS).stat().st_size, "sha256": digest_file(folder / WEIGHTS)},
        "decision": None,
        **changes,
    }
    mask = {
        "estimator": "combined",
        "probes": 8,
        "seed": 0,
        "classes": card["classes"],
        "scores": SCORES[site],
        "threshold": 0.3,
        "automatic": True,
        "known": [i in known for i in range(4)],
    }
    write_json(folder / CARD, card)
    write_json(folder / MASK, mask)
    for private in ("metrics.json", "curves.json"):
        write_json(folder / private, {"secret": site})
    return folder


def ask(root: Path, hospital: str = "aster", name: str = "q", **query: Any) -> None:
    write_json(root / "hospitals" / hospital / "queries" / f"{name}.yaml", query)


def write_hospitals(root: Path) -> None:
    """Prepared images of aster, four teachers, and aster's query ``q`` for class c."""
    space = Workspace(root)
    labels = np.array([0, 0, 1, 1], dtype=np.int64)
    write_prepared(
        space.prepared("aster"),
        site="aster",
        source_kind="images",
        classes=CLASSES,
        images=np.zeros((4, *SHAPE), dtype=np.uint8),
        labels=labels,
        groups=np.array(["p0", "p1", "p2", "p3"]),
        splits={s: np.array([i]) for i, s in enumerate(("calibration", "val"))}
        | {"train": np.array([2, 3]), "test": np.array([], dtype=np.int64)},
        spacing_mm=None,
        normalisation="unit",
        transforms=(),
        outcomes=[],
    )
    for site, known in KNOWN.items():
        write_teacher(root, site, known)
    ask(root, classes=["c"])
