"""The files of a site's source folder, and what a reader hands over for each image."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from numpy.typing import NDArray

from qkt_clinical.config.site import ImageSpec
from qkt_clinical.ingest.arrays import Picture
from qkt_clinical.ingest.codes import reading, reject

SIDE_SUFFIXES = frozenset(
    f".{ending}"
    for ending in (
        *(
            "bval",
            "bvec",
            "csv",
            "db",
            "doc",
            "docx",
            "dvc",
            "htm",
            "html",
            "ini",
            "inf",
            "json",
            "log",
            "md",
        ),
        *("md5", "ods", "pdf", "rtf", "sha256", "tsv", "txt", "xls", "xlsx", "xml", "yaml", "yml"),
    )
)
"""Tables, texts and indexes that lie beside images; never read as images."""

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "dicom": (".dcm", ".dicom", ".dic", ".ima"),
    "nifti": (".nii.gz", ".nii", ".hdr", ".img"),
    "images": (".png", ".jpg", ".jpeg", ".tif", ".tiff"),
    "npz": (".npz",),
}
"""Name endings per source kind. DICOM files need none: scanners often write UIDs as names."""

LONGEST_PATH = os.pathconf("/", "PC_PATH_MAX")
"""Bytes of a path from which on the system opens nothing by it."""


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
class Sample:
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
    """As those of :class:`Sample`, every value salted."""
    keys: tuple[str, ...] = ()
    """As those of :class:`Sample`, salted."""
    label: str | None = None
    patient: str | None = None
    split: str | None = None
    item: str | None = None
    face: bool = False
    """See :class:`Header`."""
    subgroups: Mapping[str, str] = field(default_factory=dict)
    """As those of :class:`Sample`."""


@dataclass(frozen=True)
class Refusal:
    """Files (or one image of a file) that cannot be used, with the reason code."""

    files: tuple[SourceFile, ...]
    code: str
    item: str | None = None


Outcome = Sample | Refusal
Decoded = Ready | Refusal


class Found(NamedTuple):
    """What a file holds, as stored."""

    shape: tuple[int, ...]
    dtype: str
    spacing_mm: tuple[float, ...] | None = None


class Reading(NamedTuple):
    """What the reader of a source without files of its own returns: how many images, and each as it comes."""

    total: int
    outcomes: Iterator[Outcome]


class Listing(NamedTuple):
    """Files to read and files refused unread, both sorted by name."""

    files: list[SourceFile]
    refused: list[Refusal]


def suffix(name: str) -> str:
    """The known ending of a name, else nothing: an unknown one may be part of a patient's name."""
    lower = name.lower()
    known = (s for suffixes in SUFFIXES.values() for s in suffixes)
    return next((s for s in known if lower.endswith(s)), "")


def stem(name: str) -> str:
    """The name without its known ending."""
    return name[: len(name) - len(suffix(name))]


def is_side_file(name: str) -> bool:
    """Whether a name is that of a table, text or index, or hidden."""
    last = PurePosixPath(name).name
    return (
        last.startswith((".", "~$"))
        or last.upper() in {"DICOMDIR", "README", "LICENSE", "LICENCE", "CHANGES"}
        or PurePosixPath(last.lower()).suffix in SIDE_SUFFIXES
    )


def _belongs(name: str, kind: str) -> bool:
    if kind == "dicom":
        return suffix(name) in ("", *SUFFIXES["dicom"])
    return suffix(name) in SUFFIXES[kind]


def _walk(root: Path) -> Iterator[tuple[SourceFile, str | None]]:
    """Every entry below ``root`` that is no folder, and the code where it must not be opened.

    Folder after folder without recursion, since backups of backups nest by the thousand. A folder that is
    one of those above it (a mount or junction in a circle) is not entered again.
    """
    above: list[tuple[int, int]] = []
    waiting: list[tuple[str, str, int]] = [(str(root), "", 0)]
    while waiting:
        place, prefix, depth = waiting.pop()
        file = SourceFile(prefix.rstrip("/") or ".", place)
        if len(os.fsencode(place)) >= LONGEST_PATH:
            yield file, "path-too-long"
            continue
        try:
            state = Path(place).stat(follow_symlinks=False)
            with os.scandir(place) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            yield file, "unreadable"
            continue
        del above[depth:]
        if (state.st_dev, state.st_ino) in above:
            continue
        above.append((state.st_dev, state.st_ino))
        for entry in entries:
            if _is_folder(entry):
                waiting.append((entry.path, f"{prefix}{entry.name}/", depth + 1))
            else:
                yield from _judged(entry, prefix, root)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _judged(entry: os.DirEntry[str], prefix: str, root: Path) -> Iterator[tuple[SourceFile, str | None]]:
    """An entry that is no folder and the code that bars it; none for a link to a folder inside.

    Only of links is it asked where they lead: resolving every path would take a tenth of reading it. A link
    to a file inside the source stands for that file, which is opened by its own path.
    """
    file = SourceFile(prefix + entry.name, entry.path)
    if len(os.fsencode(entry.path)) >= LONGEST_PATH:
        yield file, "path-too-long"
        return
    try:
        if entry.is_file(follow_symlinks=False):
            yield file, None
            return
        real = Path(entry.path).resolve()
        if not real.is_relative_to(root):
            yield file, "outside-source"
            return
        mode = real.stat().st_mode
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        yield file, "unreadable"
        return
    if not stat.S_ISDIR(mode):
        yield SourceFile(file.name, str(real)), None if stat.S_ISREG(mode) else "not-a-file"


def list_files(folder: Path, kind: str) -> Listing:
    """Files below ``folder`` that a reader of ``kind`` should open, in sorted order.

    ``folder`` itself may be a symbolic link; a link below it that leads out of it is refused. Tables,
    texts, hidden files and DICOMDIR are left out.
    """
    root = folder.resolve()
    files: list[SourceFile] = []
    refused: list[Refusal] = []
    for file, barred in _walk(root):
        if is_side_file(file.name):
            continue
        code = barred or (None if _belongs(file.name, kind) else "other-kind")
        if code is None:
            files.append(file)
        else:
            refused.append(Refusal((file,), code))
    return Listing(sorted(files, key=lambda f: f.name), sorted(refused, key=lambda r: r.files))


def list_all(folder: Path) -> list[tuple[SourceFile, str | None]]:
    """Every visible file below ``folder`` with the code that bars it from being opened, sorted."""
    root = folder.resolve()
    found = [pair for pair in _walk(root) if not pair[0].name.rpartition("/")[2].startswith(".")]
    return sorted(found, key=lambda pair: pair[0].name)


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
