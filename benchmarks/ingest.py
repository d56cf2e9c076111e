"""Throughput and memory of the gate: ``python -m benchmarks.ingest [--files N] [--small N]``.

Writes DICOM files into a temporary folder and compares the stage ``ingest`` with a bare loop of
``pydicom.dcmread(file).pixel_array`` over the same files, in the same process, alternating. Peak memory is
that of a process of its own that ingests many small files.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from pydicom import dcmread
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from benchmarks.tables import markdown
from qkt_clinical.config import Params
from qkt_clinical.ingest import ingest_site

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


def throughput(files: int) -> dict[str, str | float]:
    """Images of 512 x 512 per second: bare loop and gate, median of three alternating runs."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        paths = write_site(root, files, 512, seed=1)
        bare, gate = [], []
        ingest_site(root, SITE, params())  # libraries are loaded, files are in the system's cache
        for _ in range(3):
            start = time.perf_counter()
            for path in paths:
                _ = dcmread(path).pixel_array
            bare.append(files / (time.perf_counter() - start))
            start = time.perf_counter()
            ingest_site(root, SITE, params())
            gate.append(files / (time.perf_counter() - start))
    one, other = statistics.median(bare), statistics.median(gate)
    return {"files": files, "bare loop, per s": one, "gate, per s": other, "share": other / one}


def _small(root: Path, result: multiprocessing.Queue[float]) -> None:
    ingest_site(root, SITE, params())
    result.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)


def peak_memory(files: int) -> dict[str, str | float]:
    """Peak memory of a process that ingests many files of 32 x 32."""
    with tempfile.TemporaryDirectory() as folder:
        write_site(Path(folder), files, 32, seed=2)
        context = multiprocessing.get_context("spawn")
        result: multiprocessing.Queue[float] = context.Queue()
        start = time.perf_counter()
        process = context.Process(target=_small, args=(Path(folder), result))
        process.start()
        peak = result.get()
        process.join()
        return {"files": files, "seconds": time.perf_counter() - start, "peak MB": peak}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=400, help="of 512 x 512")
    parser.add_argument("--small", type=int, default=20_000, help="of 32 x 32")
    options = parser.parse_args()
    print(markdown([throughput(options.files)]), flush=True)
    print()
    print(markdown([peak_memory(options.small)]), flush=True)


if __name__ == "__main__":
    main()
