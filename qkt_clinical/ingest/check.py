"""Judge files one by one, without a site: can each be read as an image?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

from qkt_clinical.common.workers import in_order
from qkt_clinical.config.site import ImageSpec
from qkt_clinical.errors import FileRejected, SourceError
from qkt_clinical.ingest.arrays import Picture, prepare
from qkt_clinical.ingest.codes import quiet, reading, reject
from qkt_clinical.ingest.listing import is_side_file, list_all
from qkt_clinical.ingest.readers import readers, recognised, suffix
from qkt_clinical.ingest.readers.base import Reader
from qkt_clinical.ingest.source import Found, SourceFile, Unit, opened

HEAD = 132
"""Bytes by which a file is recognised."""
LONGEST_SIDE = {2: 1024, 3: 256}
"""Pixels, by number of axes, beyond which an image is shrunk to be judged."""


class FileVerdict(TypedDict):
    """One file: its path relative to the folder, and whether and how it can be read."""

    file: str
    accepted: bool
    code: str | None
    kind: str | None
    """Of source; None where the file is refused."""
    shape: tuple[int, ...] | None
    """Of the stored array; None if rejected, like the two below."""
    dtype: str | None
    spacing_mm: tuple[float, ...] | None
    """Between pixels, per axis; None also where the file does not say."""


def judge(picture: Picture) -> None:
    """Judge a decoded image as ingest does, for a site that wants it as it is: none is resampled by spacing.

    Raises:
        FileRejected: as of :func:`~qkt_clinical.ingest.arrays.prepare`.
    """
    most = LONGEST_SIDE[len(picture.size)]
    size = tuple(min(max(length, 4), most) for length in picture.size)
    prepare(picture, ImageSpec(size=size, channels=3 if picture.colour else 1))


def check_file(
    path: Path, *, max_file_mb: int = 2_000, among: Sequence[Reader] | None = None
) -> tuple[str, Found]:
    """Decode one file completely and return its source kind and what it holds.

    What makes ingest refuse a file by itself, makes this refuse it, with the same code. What depends on
    site.yaml or on other files (labels, the size wanted, the rest of a series) is not asked.

    Args:
        path: of the file.
        max_file_mb: that it may take, decoded too.
        among: readers of whom one reads it; all that are known if left out.

    Raises:
        FileRejected: with a code of :data:`~qkt_clinical.ingest.codes.REASONS`.
    """
    limit = max_file_mb * 1_000_000
    with quiet():
        with reading("unreadable"):
            real = path.resolve()
        if is_side_file(real.name):
            raise reject("side-file")
        with opened(real, limit) as stream, reading("unreadable"):
            head = stream.read(HEAD)
        reader = recognised(head, real.name, readers().values() if among is None else among)
        return reader.kind, reader.check(real, limit, judge)


Barred = tuple[Unit, str | None]
"""Files that are judged together, and the code that bars them from being opened."""


def _units(found: Sequence[tuple[SourceFile, str | None]]) -> list[Barred]:
    """The files as the readers of their endings take them: one by one, or an ``.img`` with its ``.hdr``."""
    units: list[Barred] = [(Unit((file,)), code) for file, code in found if code is not None]
    by_ending: dict[str, list[SourceFile]] = {}
    for file, code in found:
        if code is None:
            by_ending.setdefault(suffix(file.name), []).append(file)
    for reader in readers().values():
        own = sorted(file for ending in reader.suffixes for file in by_ending.get(ending, ()))
        units += [(unit, None) for unit in (reader.units(own) if own else ())]
    return units


def _judge(unit: Barred, *, max_file_mb: int, among: Sequence[Reader]) -> list[FileVerdict]:
    files, barred = unit[0].files, unit[1]
    kind, held = None, None
    if barred is None:
        try:
            kind, held = check_file(files[0].path, max_file_mb=max_file_mb, among=among)
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


def _lost(unit: Barred) -> list[FileVerdict]:
    return _judge((unit[0], "decoder-crashed"), max_file_mb=0, among=())


def check_folder(
    folder: Path,
    *,
    max_file_mb: int = 2_000,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[FileVerdict]:
    """Judge every visible file below ``folder``, in sorted order.

    ``workers`` as of :func:`qkt_clinical.ingest.ingest_site`.

    Raises:
        SourceError: no such folder.
    """
    if not folder.is_dir():
        raise SourceError("no such folder", remedy="Name a folder that exists.", stage="ingest", file=folder)
    found = list_all(folder)
    units = _units(found)
    # Handed over, since a process that starts anew knows our own readers alone.
    work = partial(_judge, max_file_mb=max_file_mb, among=tuple(readers().values()))
    rows: list[FileVerdict] = []
    for judged in in_order(work, units, len(units), workers=workers, lost=_lost):
        rows += judged
        if progress is not None:
            progress(len(rows), len(found))
    return sorted(rows, key=lambda row: row["file"])
