"""Throughput and memory of the gate: ``python -m benchmarks.ingest [--files N] [--small N]``.

Writes uncompressed 16-bit DICOM files of 512 x 512 into a temporary folder and takes turns, in the same run,
between a bare loop of ``pydicom.dcmread(file).pixel_array`` in one process, the gate alone (``qkt ingest
check``) and the whole stage (``qkt ingest``), each with one and with two processes. The median of the turns
counts. Then the stage again: with everything decoded before, and with one new file. Peak memory is that of
processes of their own that ingest many small files.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from pydicom import dcmread
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from benchmarks.tables import markdown
from qkt_clinical.common.workers import in_order
from qkt_clinical.config.params import Params
from qkt_clinical.ingest import check_folder, ingest_site

SITE, CLASSES = "alder", ("solid", "cavity")
CT = "1.2.840.10008.5.1.4.1.1.2"


def write_site(root: Path, files: int, size: int, *, seed: int) -> list[Path]:
    """A site of uncompressed 16-bit CT images, one patient each; their paths."""
    rng = np.random.default_rng(seed)
    data = root / "hospitals" / SITE / "data"
    for name in CLASSES:
        (data / name).mkdir(parents=True)
    config = {
        "name": SITE,
        "source": {"kind": "dicom"},
        "label": {"from": "folder"},
        "patient": {"from": "tag", "tag": "PatientID"},
        "image": {"size": [64, 64], "channels": 1, "window": {"center": 40, "width": 400}},
    }
    (data.parent / "site.yaml").write_text(yaml.safe_dump(config))
    paths = []
    for number in range(files):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, UID(CT)
        meta.MediaStorageSOPInstanceUID = UID(f"2.25.{seed}{number}")
        image = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        image.SOPClassUID, image.SOPInstanceUID = CT, meta.MediaStorageSOPInstanceUID
        image.PatientID, image.Modality, image.PhotometricInterpretation = f"P{number}", "CT", "MONOCHROME2"
        image.Rows = image.Columns = size
        image.SamplesPerPixel, image.BitsAllocated, image.BitsStored, image.HighBit = 1, 16, 16, 15
        image.PixelRepresentation, image.RescaleSlope, image.RescaleIntercept = 1, 1, -1024
        image.PixelSpacing = [0.7, 0.7]
        image.PixelData = rng.integers(0, 2048, (size, size), dtype=np.int16).tobytes()
        path = data / CLASSES[number % 2] / f"{number:06d}.dcm"
        image.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def params() -> Params:
    """Of a federation with this one site."""
    return Params.model_validate({"classes": CLASSES, "sites": [SITE], "queries": {}})


def _rate(files: int, act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return files / (time.perf_counter() - start)


def _pixels(path: Path) -> None:
    _ = dcmread(path).pixel_array


def _bare(paths: list[Path], workers: int) -> None:
    if workers == 1:
        for path in paths:
            _pixels(path)
    else:
        for _ in in_order(_pixels, paths, len(paths), workers=workers, lost=_pixels):
            pass


def _ingest(root: Path, workers: int) -> None:
    """The whole stage, nothing known from before."""
    shutil.rmtree(root / ".qkt", ignore_errors=True)
    ingest_site(root, SITE, params(), workers=workers)


def throughput(files: int, turns: int) -> list[dict[str, str | float]]:
    """Files per second, and the share of the bare loop per core."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        paths = write_site(root, files, 512, seed=1)
        data = paths[0].parent.parent
        acts: dict[tuple[str, int], Callable[[], object]] = {}
        for n in (1, 2):
            acts["bare loop", n] = partial(_bare, paths, n)
            acts["check", n] = partial(check_folder, data, workers=n)
            acts["ingest", n] = partial(_ingest, root, n)
        rates: dict[tuple[str, int], list[float]] = {name: [] for name in acts}
        for _ in range(turns + 1):  # the first turn loads libraries and fills the system's cache
            for name, act in acts.items():
                rates[name].append(_rate(files, act))
        median = {name: statistics.median(r[1:]) for name, r in rates.items()}
        again = partial(ingest_site, root, SITE, params(), workers=1)
        median["ingest, nothing new", 1] = _rate(files, again)
        shutil.copy(paths[0], paths[0].with_name("new.dcm"))
        median["ingest, one new file", 1] = _rate(files, again)
        return [
            {
                "what": what,
                "processes": n,
                "files per s": f"{rate:.0f}",
                "of the bare loop, per process": rate / n / median["bare loop", 1],
                "times one process": rate / median[what, 1],
            }
            for (what, n), rate in median.items()
        ]


def _small(root: Path, workers: int, result: multiprocessing.Queue[tuple[float, float]]) -> None:
    ingest_site(root, SITE, params(), workers=workers)
    result.put(
        (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000,
        )
    )


def peak_memory(files: int) -> list[dict[str, str | float]]:
    """Peak memory of a process that ingests many files of 32 x 32, and of its largest worker."""
    rows: list[dict[str, str | float]] = []
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            write_site(Path(folder), files, 32, seed=2)
            context = multiprocessing.get_context("spawn")
            result: multiprocessing.Queue[tuple[float, float]] = context.Queue()
            start = time.perf_counter()
            process = context.Process(target=_small, args=(Path(folder), workers, result))
            process.start()
            own, child = result.get()
            process.join()
            rows.append(
                {
                    "files": files,
                    "processes": workers,
                    "seconds": time.perf_counter() - start,
                    "peak MB": own,
                    "peak MB of the largest worker": child if workers > 1 else 0.0,
                }
            )
    return rows


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=8_000, help="of 512 x 512")
    parser.add_argument("--small", type=int, default=20_000, help="of 32 x 32")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    print(markdown(throughput(options.files, options.turns)), flush=True)
    print()
    print(markdown(peak_memory(options.small)), flush=True)


if __name__ == "__main__":
    main()
