"""One ``.npz`` file in MedMNIST's layout: ``{train,val,test}_{images,labels}`` and, if known, ``_groups``.

Images are (N, H, W), (N, H, W, 1) or (N, H, W, 3) for flat sites, (N, D, H, W), with a last axis of 1 or 3
if need be, for volumes; labels (N,) or (N, 1) integers; groups (N,) or (N, 1) patient ids. Images are
taken from the archive one at a time, so that a file larger than memory can be read.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.errors import FileRejected
from qkt_clinical.ingest.arrays import Picture, eight_bit_limits
from qkt_clinical.ingest.codes import reading, reject
from qkt_clinical.ingest.readers.base import DecodeResults, Judge, Reader
from qkt_clinical.ingest.source import (
    DecodedImage,
    DecodeResult,
    Found,
    Refusal,
    Request,
    SourceFile,
    Unit,
    bounded_pixels,
    opened,
)

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class _Member:
    """One array's header: what it declares, checked against what the archive says it holds."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool


@contextmanager
def _opened(path: Path, max_bytes: int) -> Iterator[zipfile.ZipFile]:
    """The archive of a plain, bounded file.

    Raises:
        FileRejected: any code of one file.
    """
    with (
        opened(path, max_bytes) as stream,
        reading("not-npz", zipfile.BadZipFile),
        zipfile.ZipFile(stream) as archive,
    ):
        yield archive


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise reject("npz-layout")


def _member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> _Member:
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as stream:
        shape, fortran, dtype = _npy_header(stream)
        start = stream.tell()
    if dtype.hasobject:
        raise reject("object-array")
    if 0 not in shape:
        bounded_pixels(shape, 8 * dtype.itemsize, max_bytes)
    if start + math.prod(shape) * dtype.itemsize > info.file_size:
        raise reject("truncated")
    return _Member(name, shape, dtype, fortran)


def _members(archive: zipfile.ZipFile, max_bytes: int) -> dict[str, _Member]:
    """Headers of the arrays that the layout knows; others are left unread."""
    known = {f"{part}_{what}" for part in PARTS for what in ("images", "labels", "groups")}
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    present = set(names)
    if any(names.count(name) > 1 for name in known & present):
        raise reject("npz-layout")  # two arrays of one name: which is meant?
    # Any object array is refused, even one that would not be read: such a file is not what it should be.
    members = {name: _member(archive, name, max_bytes) for name in sorted(known & present)}
    if "train_images" not in members:
        raise reject("npz-layout")
    for part in PARTS:
        images, labels = members.get(f"{part}_images"), members.get(f"{part}_labels")
        groups = members.get(f"{part}_groups")
        if (images is None) != (labels is None):
            raise reject("npz-layout")
        if images is None or labels is None:
            continue
        count = images.shape[:1]
        sound = images.dtype.kind in "iufb" and labels.dtype.kind in "iu" and len(images.shape) >= 3
        for column in (labels, *(() if groups is None else (groups,))):
            sound &= column.shape in (count, (*count, 1))
        sound &= groups is None or groups.dtype.kind in "iuUS"
        if not sound:
            raise reject("npz-layout")
    return members


def _column(archive: zipfile.ZipFile, member: _Member) -> NDArray[Any]:
    with archive.open(f"{member.name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False).reshape(-1)


def _rows(archive: zipfile.ZipFile, member: _Member) -> Iterator[NDArray[Any]]:
    """The images one by one."""
    with archive.open(f"{member.name}.npy") as stream:
        if member.fortran:
            yield from np.lib.format.read_array(stream, allow_pickle=False)
            return
        _npy_header(stream)
        size = math.prod(member.shape[1:]) * member.dtype.itemsize
        for _ in range(member.shape[0]):
            data = stream.read(size)
            if len(data) < size:
                raise reject("truncated")
            yield np.frombuffer(data, dtype=member.dtype).reshape(member.shape[1:])


def _picture(pixels: NDArray[Any], dimensions: int) -> Picture:
    """One image; its last axis is colour if it has one axis too many and that has length 3.

    Raises:
        FileRejected: ``dimensions``.
    """
    colour = pixels.ndim == dimensions + 1 and pixels.shape[-1] == 3
    if pixels.ndim == dimensions + 1 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim != dimensions + colour:
        raise reject("dimensions")
    limits = eight_bit_limits(pixels.dtype)
    return Picture(pixels, colour=colour, limits=limits, eight_bit=limits is not None)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _samples(
    file: SourceFile, archive: zipfile.ZipFile, members: dict[str, _Member], request: Request
) -> Iterator[DecodeResult]:
    for part in PARTS:
        if f"{part}_images" not in members:
            continue
        labels = _column(archive, members[f"{part}_labels"])
        groups = members.get(f"{part}_groups")
        patients = None if groups is None else _column(archive, groups)
        for i, pixels in enumerate(_rows(archive, members[f"{part}_images"])):
            item = f"{part}/{i}"
            try:
                picture = _picture(pixels, len(request.spec.size))
            except FileRejected as rejected:
                yield Refusal((file,), rejected.code, item=item)
                continue
            patient = None if patients is None else _text(patients[i]).strip()
            label = str(int(labels[i]))
            yield DecodedImage((file,), picture, label=label, patient=patient, split=part, item=item)


def _all(file: SourceFile, request: Request) -> Iterator[DecodeResult]:
    try:
        with _opened(file.path, request.max_bytes) as archive:
            members = _members(archive, request.max_bytes)
            yield from _guarded(_samples(file, archive, members, request))
    except FileRejected as rejected:
        yield Refusal((file,), rejected.code)


def _guarded(outcomes: Iterator[DecodeResult]) -> Iterator[DecodeResult]:
    """The outcomes, with what a damaged archive raises between them turned into a rejection."""
    while True:
        with reading("pixels-undecodable", zipfile.BadZipFile):
            outcome = next(outcomes, None)
        if outcome is None:
            return
        yield outcome


def count(path: Path, max_bytes: int) -> int:
    """How many images a file declares.

    Raises:
        FileRejected: the file's own code.
    """
    with _opened(path, max_bytes) as archive:
        members = _members(archive, max_bytes)
        return sum(member.shape[0] for name, member in members.items() if name.endswith("_images"))


@dataclass(frozen=True)
class _Images:
    """The images of a file, taken from it as they are asked for."""

    file: SourceFile
    request: Request
    total: int

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[DecodeResult]:
        return _all(self.file, self.request)


class NpzReader(Reader):
    """One npz file with the images, labels and patients of a site."""

    kind = "npz"
    suffixes = (".npz",)
    libraries = ("numpy",)
    label_sources = frozenset({"npz"})
    one_file = True
    remembered = False
    gives_splits = True
    numbers_classes = True

    def sniff(self, head: bytes, ending: str) -> bool:
        """A zip archive of that name."""
        return head.startswith(b"PK\x03\x04") and ending in self.suffixes

    def read(self, unit: Unit, request: Request) -> DecodeResults:
        """Read every image of the file."""
        (file,) = unit.files
        return _Images(file, request, count(file.path, request.max_bytes))

    def check(self, path: Path, max_bytes: int, judge: Judge) -> Found:
        """Read every array of a file. What is found is said of its training images."""
        with _opened(path, max_bytes) as archive:
            members = _members(archive, max_bytes)
            for name, member in members.items():
                with reading("pixels-undecodable", zipfile.BadZipFile):
                    if name.endswith("_images"):
                        for _ in _rows(archive, member):
                            pass
                    else:
                        _column(archive, member)
            images = members["train_images"]
            return Found(images.shape, str(images.dtype))
