"""Judge files one by one, without a site: can each be read as an image?"""

from __future__ import annotations

import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypedDict

from qkt_clinical.common.workers import in_order
from qkt_clinical.errors import FileRejected, SourceError
from qkt_clinical.ingest.codes import quiet, reading, reject
from qkt_clinical.ingest.source import Found, SourceFile, is_side_file, list_all, suffix


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


def _judge(found: tuple[SourceFile, str | None], *, max_file_mb: int) -> Verdict:
    file, barred = found
    kind, held = None, None
    if barred is None:
        try:
            kind, held = check_file(file.path, max_file_mb=max_file_mb)
        except FileRejected as rejected:
            barred = rejected.code
    return {
        "file": file.name,
        "accepted": barred is None,
        "code": barred,
        "kind": kind,
        "shape": held and held.shape,
        "dtype": held and held.dtype,
        "spacing_mm": held and held.spacing_mm,
    }


def _lost(found: tuple[SourceFile, str | None]) -> Verdict:
    return _judge((found[0], "decoder-crashed"), max_file_mb=0)


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
    work = partial(_judge, max_file_mb=max_file_mb)
    rows: list[Verdict] = []
    for row in in_order(work, found, len(found), workers=workers, lost=_lost):
        rows.append(row)
        if progress is not None:
            progress(len(rows), len(found))
    return rows
