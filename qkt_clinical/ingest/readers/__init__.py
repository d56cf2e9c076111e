"""Readers of hospitals' files by kind of source.

A new kind is one file in this folder, with a subclass of
:class:`~qkt_clinical.ingest.readers.base.Reader`, and its entry in :func:`readers`; one that lives
elsewhere is given to :func:`register`. Reading libraries are loaded when the first file needs them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from qkt_clinical.config.base import NAME
from qkt_clinical.errors import ConfigError

if TYPE_CHECKING:
    from qkt_clinical.ingest.readers.base import Reader


@cache
def readers() -> dict[str, Reader]:
    """Kind of source to its reader, in the order in which they are asked whether a file is theirs."""
    # Here, since readers use what uses this package (elements of DICOM are looked up elsewhere too).
    from qkt_clinical.ingest.readers.dicom import DicomReader
    from qkt_clinical.ingest.readers.images import ImageReader
    from qkt_clinical.ingest.readers.nifti import NiftiReader
    from qkt_clinical.ingest.readers.npz import NpzReader
    from qkt_clinical.ingest.readers.phantom import PhantomReader

    every = (DicomReader(), NiftiReader(), ImageReader(), NpzReader(), PhantomReader())
    return {reader.kind: reader for reader in every}


def register(reader: Reader) -> None:
    """Add a kind of source to those that can be read, for as long as this process lives.

    Raises:
        ValueError: the kind is no name or taken, or another kind's files have one of its endings.
    """
    known = readers()
    if not re.fullmatch(NAME, reader.kind) or reader.kind in known:
        raise ValueError(f"{reader.kind!r} is no name for a new kind of source")
    for other in known.values():
        if shared := set(reader.suffixes) & set(other.suffixes):
            raise ValueError(f"files ending in {', '.join(sorted(shared))} are read as {other.kind}")
    known[reader.kind] = reader


def reader_of(kind: str, *, site: str | None = None, file: Path | None = None) -> Reader:
    """The reader of a kind of source.

    Args:
        kind: as site.yaml names it.
        site: for the error.
        file: site.yaml, for the error.

    Raises:
        ConfigError: there is none.
    """
    found = readers().get(kind)
    if found is None:
        raise ConfigError(
            f"source.kind: {kind!r} is none of {', '.join(readers())}",
            remedy="Correct site.yaml.",
            stage="ingest",
            site=site,
            file=file,
        )
    return found


def suffix(name: str, among: Iterable[Reader] | None = None) -> str:
    """The known ending of a name, else nothing: an unknown one may be part of a patient's name."""
    lower = name.lower()
    known = (s for reader in among or readers().values() for s in reader.suffixes)
    return next((s for s in known if s and lower.endswith(s)), "")


def recognised(head: bytes, name: str, among: Iterable[Reader]) -> Reader:
    """The reader of a file by its first 132 bytes, else by the ending of its name.

    Args:
        head: the bytes.
        name: of the file.
        among: of whom one reads files of unknown ending, since what nobody knows may be DICOM still.
    """
    among = tuple(among)
    ending = suffix(name, among)
    sure = next((reader for reader in among if reader.sniff(head, ending)), None)
    return sure or next(reader for reader in among if ending in reader.suffixes)
