"""Judge files one by one, without a site: can each be read as an image?"""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from qkt_clinical.errors import FileRejected, SourceError
from qkt_clinical.ingest.codes import quiet, reading, reject
from qkt_clinical.ingest.source import Found, is_side_file, list_all, suffix


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


def sniff(path: Path) -> str | None:
    """Source kind of a file by its first bytes, else by its name; None if neither tells."""
    with reading("unreadable"), path.open("rb") as stream:
        head = stream.read(132)
    if head[128:] == b"DICM":
        return "dicom"
    ending = suffix(path.name)
    if ending in (".nii.gz", ".nii", ".hdr", ".img"):
        return "nifti"
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*")):
        return "images"
    if head.startswith(b"PK\x03\x04") and ending == ".npz":
        return "npz"
    return {".png": "images", ".npz": "npz"}.get(ending) or (
        "images" if ending in (".jpg", ".jpeg", ".tif", ".tiff") else None
    )


def check_file(path: Path, *, max_file_mb: int = 2_000) -> tuple[str, Found]:
    """Decode one file completely and return its source kind and what it holds.

    Raises:
        FileRejected: with a code of :data:`~qkt_clinical.ingest.codes.REASONS`.
    """
    with quiet():
        return _check(path, max_file_mb * 1_000_000)


def _check(path: Path, limit: int) -> tuple[str, Found]:
    with reading("unreadable"):
        if not stat.S_ISREG(path.stat().st_mode):
            raise reject("not-a-file")
        if path.stat().st_size == 0:
            raise reject("empty")
    kind = sniff(path)
    if kind == "nifti":
        from qkt_clinical.ingest import nifti

        return kind, nifti.check(path, limit)
    elif kind == "images":
        from qkt_clinical.ingest import images

        return kind, images.check(path, limit)
    elif kind == "npz":
        from qkt_clinical.ingest import npz

        return kind, npz.check(path, limit)
    elif kind is None and is_side_file(path.name):
        raise reject("side-file")
    else:
        from qkt_clinical.ingest import dicom

        return "dicom", dicom.check(path, limit)


def check_folder(
    folder: Path, *, max_file_mb: int = 2_000, progress: Callable[[int, int], None] | None = None
) -> list[Verdict]:
    """Judge every visible file below ``folder``, in sorted order.

    Raises:
        SourceError: no such folder.
    """
    if not folder.is_dir():
        raise SourceError("no such folder", remedy="Name a folder that exists.", stage="ingest", file=folder)
    rows: list[Verdict] = []
    found = list_all(folder)
    for number, (file, barred) in enumerate(found, start=1):
        row: Verdict = {
            "file": file.name,
            "accepted": False,
            "code": barred,
            "kind": None,
            "shape": None,
            "dtype": None,
            "spacing_mm": None,
        }
        if barred is None:
            try:
                row["kind"], held = check_file(file.path, max_file_mb=max_file_mb)
                row["accepted"] = True
                row["shape"], row["dtype"], row["spacing_mm"] = held
            except FileRejected as rejected:
                row["code"] = rejected.code
        rows.append(row)
        if progress is not None:
            progress(number, len(found))
    return rows
