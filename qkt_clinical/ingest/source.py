"""One file of a source and how it is opened; what a reader is asked for, and what it hands over."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from numpy.typing import NDArray

from qkt_clinical.config.site import ImageSpec
from qkt_clinical.ingest.arrays import Picture
from qkt_clinical.ingest.codes import reading, reject


@dataclass(frozen=True, order=True)
class SourceFile:
    """A file by its path relative to the source folder (POSIX) and where it lies."""

    name: str
    place: str = field(compare=False)
    """Its path as text: a site has many files, and a Path takes long to build and to send to a process."""

    @property
    def path(self) -> Path:
        """Where it lies."""
        return Path(self.place)


@dataclass(frozen=True)
class Request:
    """What a reader needs to know: the image wanted, the tags wanted, and the largest file."""

    spec: ImageSpec
    tags: tuple[str, ...]
    max_bytes: int
    site: str
    seed: int
    salt: bytes = field(repr=False)
    """The site's secret: of a header only what it has made unrecognisable is handed over."""
    burned_in: bool
    """Whether images that may show writing are taken."""
    subgroups: tuple[tuple[str, str, tuple[int, ...] | None], ...] = ()
    """Columns of groups that stand in the header: name, DICOM keyword, edges of bands."""

    @property
    def volumes(self) -> bool:
        """Whether images are volumes (D, H, W)."""
        return len(self.spec.size) == 3


@dataclass(frozen=True)
class Header:
    """What is kept of a DICOM header."""

    kept: Mapping[str, Any]
    """De-identified, in the DICOM JSON model."""
    face: bool
    """Whether a face could be rendered from the image."""


@dataclass(frozen=True)
class DecodedImage:
    """One decoded image and everything that may name its class and patient."""

    files: tuple[SourceFile, ...]
    picture: Picture
    tags: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """DICOM keyword to the values that its files hold."""
    keys: tuple[str, ...] = ()
    """Further names under which a CSV file may list it (the series UID)."""
    label: str | None = None
    patient: str | None = None
    split: str | None = None
    item: str | None = None
    """Which image of its file, for files that hold many."""
    header: Header | None = None
    subgroups: Mapping[str, str] = field(default_factory=dict)
    """Column to group, of those that stand in the header."""


@dataclass(frozen=True)
class Ready:
    """An image as it will be stored, and everything that may name its class and patient."""

    files: tuple[SourceFile, ...]
    image: NDArray[Any]
    fingerprint: str
    """Digest of the pixels as they were in the file."""
    hashes: tuple[int, int]
    """See :mod:`qkt_clinical.ingest.leakage`."""
    spacing_mm: tuple[float, ...] | None
    tags: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """As those of :class:`DecodedImage`, every value salted."""
    keys: tuple[str, ...] = ()
    """As those of :class:`DecodedImage`, salted."""
    label: str | None = None
    patient: str | None = None
    split: str | None = None
    item: str | None = None
    face: bool = False
    """See :class:`Header`."""
    subgroups: Mapping[str, str] = field(default_factory=dict)
    """As those of :class:`DecodedImage`."""


@dataclass(frozen=True)
class Refusal:
    """Files (or one image of a file) that cannot be used, with the reason code."""

    files: tuple[SourceFile, ...]
    code: str
    item: str | None = None


DecodeResult = DecodedImage | Refusal
"""What a reader makes of an image."""
Decoded = Ready | Refusal
"""What comes of it when it has been brought to what the site wants."""


class Found(NamedTuple):
    """What a file holds, as stored."""

    shape: tuple[int, ...]
    dtype: str
    spacing_mm: tuple[float, ...] | None = None


@dataclass(frozen=True)
class HeaderFacts:
    """What the header of a file says that is one of several which make an image together."""

    file: SourceFile
    facts: Mapping[str, Any]
    """As JSON may hold them, with nothing in them that names a patient."""


@dataclass(frozen=True)
class Unit:
    """Files that make one image, or hold many, and are read together."""

    files: tuple[SourceFile, ...]
    """The one that is named first stands for the image; none for a source that is no folder of files."""
    facts: tuple[Mapping[str, Any], ...] = ()
    """Of each file, where headers are read before units are known."""


def bounded_size(path: Path, max_bytes: int) -> int:
    """Size of a plain file in bytes.

    Raises:
        FileRejected: ``unreadable``, ``not-a-file``, ``empty`` or ``too-large``.
    """
    try:
        state = path.stat()
    except OSError:
        raise reject("unreadable") from None
    return _bounded(state, max_bytes)


def _bounded(state: os.stat_result, max_bytes: int) -> int:
    if not stat.S_ISREG(state.st_mode):
        raise reject("not-a-file")
    if state.st_size == 0:
        raise reject("empty")
    if state.st_size > max_bytes:
        raise reject("too-large")
    return state.st_size


@contextmanager
def opened(path: Path, max_bytes: int) -> Iterator[BinaryIO]:
    """A plain file, open for reading, after a look at its kind and size.

    What is looked at is what is read: a link is not followed, and a pipe or device, which could hang or
    never end, is not waited for.

    Raises:
        FileRejected: as of :func:`bounded_size`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise reject("not-a-file" if error.errno == errno.ENXIO else "unreadable") from None
    try:
        _bounded(os.fstat(descriptor), max_bytes)
        stream = os.fdopen(descriptor, "rb", closefd=False)
        yield stream
    finally:
        os.close(descriptor)


def whole_file(path: Path, max_bytes: int) -> bytes:
    """All bytes of a plain file; of one that grows meanwhile as many as it had.

    Raises:
        FileRejected: as of :func:`bounded_size`.
    """
    with opened(path, max_bytes) as stream, reading("unreadable"):
        return stream.read(os.fstat(stream.fileno()).st_size)


def bounded_pixels(shape: Sequence[int], bits: int, max_bytes: int) -> None:
    """Refuse declared pixels before anything is allocated for them.

    Raises:
        FileRejected: ``header-unreadable`` for a size below 1, ``too-large``.
    """
    total = max(bits, 1)
    for length in shape:
        if length < 1:
            raise reject("header-unreadable")
        total *= int(length)
    if total > 8 * max_bytes:
        raise reject("too-large")
