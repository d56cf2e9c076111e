"""Judge files one by one, without a site: can each be read as an image?"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

from qkt_clinical.common.workers import in_order
from qkt_clinical.config.site import ImageSpec
from qkt_clinical.errors import FileRejected, SourceError
from qkt_clinical.ingest.arrays import Picture, prepare
from qkt_clinical.ingest.codes import quiet, reading, reject
from qkt_clinical.ingest.nifti import pairs
from qkt_clinical.ingest.source import Found, SourceFile, is_side_file, list_all, opened, suffix
from qkt_clinical.ingest.tiff import MAGICS

LONGEST_SIDE = {2: 1024, 3: 256}
"""Pixels, by number of axes, beyond which an image is shrunk to be judged."""


class Verdict(TypedDict):
    """One file: its path relative to the folder, and whether and how it can be read."""

    file: str
    accepted: bool
    code: str | None
    kind: str | None
    """dicom, nifti, images or npz; None where nothing was recognised."""
    shape: tuple[int, ...] | None
    """Of the stored array; None if rejected, like the two below."""
    dtype: str | None
    spacing_mm: tuple[float, ...] | None
    """Between pixels, per axis; None also where the file does not say."""


def sniff(head: bytes, name: str) -> str | None:
    """Source kind of a file by its first 132 bytes, else by its name; None if neither tells."""
    if head[128:] == b"DICM":
        return "dicom"
    ending = suffix(name)
    if ending in (".nii.gz", ".nii", ".hdr", ".img"):
        return "nifti"
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", *MAGICS)):
        return "images"
    if head.startswith(b"PK\x03\x04") and ending == ".npz":
        return "npz"
    return {".png": "images", ".npz": "npz"}.get(ending) or (
        "images" if ending in (".jpg", ".jpeg", ".tif", ".tiff") else None
    )


def judge(picture: Picture) -> None:
    """Judge a decoded image as ingest does, for a site that wants it as it is: none is resampled by spacing.

    Raises:
        FileRejected: as of :func:`~qkt_clinical.ingest.arrays.prepare`.
    """
    most = LONGEST_SIDE[len(picture.size)]
    size = tuple(min(max(length, 4), most) for length in picture.size)
    prepare(picture, ImageSpec(size=size, channels=3 if picture.colour else 1))


def check_file(path: Path, *, max_file_mb: int = 2_000) -> tuple[str, Found]:
    """Decode one file completely and return its source kind and what it holds.

    What makes ingest refuse a file by itself, makes this refuse it, with the same code. What depends on
    site.yaml or on other files (labels, the size wanted, the rest of a series) is not asked.

    Raises:
        FileRejected: with a code of :data:`~qkt_clinical.ingest.codes.REASONS`.
    """
    with quiet():
        with reading("unreadable"):
            real = path.resolve()
        return _check(real, max_file_mb * 1_000_000)


def _check(path: Path, limit: int) -> tuple[str, Found]:
    if is_side_file(path.name):
        raise reject("side-file")
    with opened(path, limit) as stream, reading("unreadable"):
        kind = sniff(stream.read(132), path.name)
    if kind == "npz":
        from qkt_clinical.ingest import npz

        return kind, npz.check(path, limit)
    # What is nothing else may be DICOM: scanners name files by UIDs.
    reader = importlib.import_module(f"qkt_clinical.ingest.{kind or 'dicom'}")
    return kind or "dicom", reader.check(path, limit, judge)


Unit = tuple[tuple[SourceFile, ...], str | None]
"""Files that are judged together, and the code that bars them from being opened."""


def _units(found: Sequence[tuple[SourceFile, str | None]]) -> list[Unit]:
    """The files one by one, but for an ``.img``, which belongs to the ``.hdr`` beside it."""
    barred: list[Unit] = [((file,), code) for file, code in found if code is not None]
    return barred + [(unit, None) for unit in pairs([file for file, code in found if code is None])]


def _judge(unit: Unit, *, max_file_mb: int) -> list[Verdict]:
    files, barred = unit
    kind, held = None, None
    if barred is None:
        try:
            kind, held = check_file(files[0].path, max_file_mb=max_file_mb)
        except FileRejected as rejected:
            barred = rejected.code
    return [
        {
            "file": file.name,
            "accepted": barred is None,
            "code": barred,
            "kind": kind,
            "shape": held and held.shape,
            "dtype": held and held.dtype,
            "spacing_mm": held and held.spacing_mm,
        }
        for file in files
    ]


def _lost(unit: Unit) -> list[Verdict]:
    return _judge((unit[0], "decoder-crashed"), max_file_mb=0)


def check_folder(
    folder: Path,
    *,
    max_file_mb: int = 2_000,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Verdict]:
    """Judge every visible file below ``folder``, in sorted order.

    ``workers`` as of :func:`qkt_clinical.ingest.ingest_site`.

    Raises:
        SourceError: no such folder.
    """
    if not folder.is_dir():
        raise SourceError("no such folder", remedy="Name a folder that exists.", stage="ingest", file=folder)
    found = list_all(folder)
    units = _units(found)
    work = partial(_judge, max_file_mb=max_file_mb)
    rows: list[Verdict] = []
    for judged in in_order(work, units, len(units), workers=workers, lost=_lost):
        rows += judged
        if progress is not None:
            progress(len(rows), len(found))
    return sorted(rows, key=lambda row: row["file"])
