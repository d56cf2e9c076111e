"""Pipeline at clinical resolution: ``python -m benchmarks.resolution [--sides 64 128 224] [--volume 64]``.

Draws phantom cells (or, with ``--volume``, chests) of the size wanted, divides them among simulated hospitals
and runs every stage from ingest to report in a process of its own: seconds and peak memory of each, and what
the answer reaches. With ``--encoder-weights`` networks are heads over that frozen encoder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import Row, markdown
from qkt_clinical.catalog import BLOOD_CELLS, LESIONS
from qkt_clinical.datasets.phantom import ct, smear
from qkt_clinical.datasets.phantom.federation import SMEARS
from qkt_clinical.datasets.simulated import federate
from qkt_clinical.datasets.workspace import write_workspace
from qkt_clinical.models.encoders import digest_weights

STAGES = ("ingest", "train", "mask", "plan", "transfer", "evaluate", "gate", "report")
DRAWN = 100
"""Cells at once."""
MM = 64.0
"""Edge of a drawn chest, in millimetres."""
WINDOW = (-1000.0, 500.0)
"""Hounsfield units that become 0 and 255."""
SPLITS = {"train": 0.7, "val": 0.1, "test": 0.2}


def drawn_cells(count: int, side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, side, side, 3) uint8 in one stain, and labels (N,)."""
    look = SMEARS["aster"].look
    assert isinstance(look, smear.Stain)
    labels = np.arange(count) % len(BLOOD_CELLS)
    parts = (labels[i : i + DRAWN] for i in range(0, count, DRAWN))
    return np.concatenate(
        [smear.render_cells(p, np.arange(len(p)), look, size=side, rng=rng) for p in parts]
    ), labels


def drawn_chests(count: int, side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Volumes (N, side, side, side) uint8 of one scanner, and labels (N,)."""
    scanner = ct.Scanner(shape=(side,) * 3, spacing=(MM / side,) * 3, noise=30.0, sharpness=1.5)
    labels = np.arange(count) % len(LESIONS)
    volumes, low, high = ct.render_chests(labels, scanner, rng=rng)[0], *WINDOW
    return np.clip((volumes - low) / (high - low) * 255.0, 0.0, 255.0).astype(np.uint8), labels


def write_hospitals(
    root: Path, images: np.ndarray, labels: np.ndarray, names: tuple[str, ...]
) -> dict[str, Any]:
    """Three simulated hospitals and one query below ``root``; their sections of params.yaml."""
    order, start = np.random.default_rng(0).permutation(len(labels)), 0
    arrays: dict[str, Any] = {}
    for split, share in SPLITS.items():
        index = order[start : start + round(share * len(labels))]
        start += len(index)
        arrays |= {f"{split}_images": images[index], f"{split}_labels": labels[index, None]}
    source = root / "drawn.npz"
    np.savez(source, **arrays)
    made = federate(
        source,
        root,
        partition="pathological",
        hospitals=3,
        classes_per_hospital=max(2, len(names) // 2),
        classes=names,
        queries=1,
    )
    source.unlink()
    return made.as_params()


def write_root(root: Path, dims: int, side: int, count: int, train: dict[str, Any]) -> None:
    """A workspace of drawn images."""
    draw, names = (drawn_cells, BLOOD_CELLS) if dims == 2 else (drawn_chests, LESIONS)
    images, labels = draw(count, side, np.random.default_rng(0))
    write_workspace(root, {"train": train, **write_hospitals(root, images, labels, names)})


def run_stage(root: Path, stage: str) -> tuple[float, float]:
    """Seconds and peak megabytes of a stage's largest process.

    Raises:
        SystemExit: it failed.
    """
    start = time.perf_counter()
    program = subprocess.Popen(
        [sys.executable, "-m", "qkt_clinical.cli", stage, "-C", str(root), "--json"],
        stdout=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(program.pid, 0)
    if status and stage != "gate":  # where an answer does not pass, that is said so
        raise SystemExit(f"{stage} failed in {root}")
    return time.perf_counter() - start, used.ru_maxrss / 1024


def run_pipeline(root: Path) -> Row:
    """All stages: seconds, the largest of their processes, and what the answer reaches."""
    seconds, peaks = {}, {}
    for stage in STAGES:
        seconds[stage], peaks[stage] = run_stage(root, stage)
        print(
            f"{root.name}: {stage} {seconds[stage]:.0f} s, {peaks[stage]:.0f} MB", file=sys.stderr, flush=True
        )
    found = json.loads((root / "reports" / "metrics.json").read_text(encoding="utf-8"))["mean"]
    largest = max(peaks, key=lambda stage: peaks[stage])
    slow = {f"{stage} s": round(seconds[stage]) for stage in ("ingest", "train", "transfer")}
    return {
        **slow,
        "other stages s": round(sum(seconds.values()) - sum(slow.values())),
        "peak MB": f"{peaks[largest]:.0f} ({largest})",
        **{name: float(found[name]) for name in ("query_accuracy", "retained_accuracy", "balanced_accuracy")},
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="*", default=[64, 128, 224], help="of cells, in pixels")
    parser.add_argument("--volume", type=int, nargs="*", default=[], help="edge of volumes, in voxels")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--encoder-weights", type=Path, help="of EfficientNet-Lite0: heads over it, frozen")
    parser.add_argument("--keep", type=Path, help="where workspaces are made and stay")
    options = parser.parse_args()
    rows = []
    for dims, side in [*((2, s) for s in options.sides), *((3, s) for s in options.volume)]:
        with tempfile.TemporaryDirectory() as folder:
            root = (options.keep or Path(folder)) / f"{dims}d-{side}"
            root.mkdir(parents=True)
            train: dict[str, Any] = {"appearance": 0.0, "epochs": options.epochs}
            if options.encoder_weights and dims == 2:
                train["encoder"] = {
                    "name": "efficientnet-lite0",
                    "weights": str(options.encoder_weights.resolve()),
                    "digest": digest_weights(options.encoder_weights),
                    "side": side,
                    "mode": "frozen",
                }
            # A process of its own: a stage's peak memory counts that of the process which starts it.
            work = get_context("spawn").Process(
                target=write_root, args=(root, dims, side, options.images, train)
            )
            work.start()
            work.join()
            if work.exitcode:
                raise SystemExit(1)
            rows.append(
                {"images": f"{options.images} of {'x'.join([str(side)] * dims)}", **run_pipeline(root)}
            )
    print(markdown(rows))


if __name__ == "__main__":
    main()
