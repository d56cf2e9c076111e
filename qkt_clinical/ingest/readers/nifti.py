"""NIfTI-1 and NIfTI-2 files, single or as a pair of ``.hdr`` and ``.img``, read by nibabel.

The affine decides: axes are flipped and swapped to the prepared convention (see ``arrays``). A flat
image is one slice, stored as (X, Y), (X, Y, 1) or with its single-voxel axis elsewhere; its rows and columns
come out as radiologists display that plane. Colour is NIfTI's RGB24 type, or a fifth axis of 3 that holds
vectors of colours: three slices are no colours, nor are three volumes in time.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.ingest.arrays import Picture, eight_bit_limits, flat_view, to_head_back_left
from qkt_clinical.ingest.codes import reading, reject
from qkt_clinical.ingest.readers.base import DecodeResults, Judge, Reader
from qkt_clinical.ingest.source import (
    DecodedImage,
    Found,
    Request,
    SourceFile,
    Unit,
    bounded_pixels,
    opened,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_HEADER_BYTES = 16_000_000
"""Voxels that begin later are refused: what comes before them is a header's extensions."""
CHUNK = 1 << 17
GZIP = b"\x1f\x8b"
"""How gzip files and their members begin."""
CIFTI_INTENTS = range(3000, 3100)
RGB_VECTOR = 2003
"""Intent of vectors that are colours."""
SAME_SPACING = 0.05
"""Relative difference up to which the spacings of qform and sform may be roundings of one another."""
ROUNDED = 1e-3
"""So much may the squares of a quaternion's parts sum to beyond 1: their fourth part is 0 then."""
MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}


class Gunzipped(io.RawIOBase):
    """What a gzip file holds; what follows its members is left out, as gzip itself does.

    Python's own reader refuses a sound file for what stands behind it. Length and checksum of a member are
    checked when its end is read.

    Args:
        stream: of the file.
        limit: bytes that it may hold.

    Raises:
        FileRejected: ``not-nifti``, where it is no gzip file.
    """

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream, self._limit = stream, limit
        if stream.read(len(GZIP)) != GZIP:
            raise reject("not-nifti")
        self._restart()

    def _restart(self) -> None:
        self._stream.seek(0)
        self._machine = zlib.decompressobj(wbits=31)
        self._place, self._ended = 0, False

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """Forwards; backwards it begins anew."""
        return True

    def tell(self) -> int:
        """Bytes read so far."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Read on to a place, counted from the beginning or from here."""
        wanted = offset + (self._place if whence == io.SEEK_CUR else 0)
        if wanted < self._place:
            self._restart()
        while self._place < wanted and self._next(min(CHUNK, wanted - self._place)):
            pass
        return self._place

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read some bytes; none at the end.

        Raises:
            EOFError: the file ends within a member.
            FileRejected: ``too-large``.
        """
        room = memoryview(buffer).cast("B")
        data = self._next(len(room))
        room[: len(data)] = data
        return len(data)

    def _next(self, size: int) -> bytes:
        while size and not self._ended:
            feed = self._machine.unconsumed_tail or self._machine.unused_data or self._stream.read(CHUNK)
            if self._machine.eof:
                self._ended = not feed.startswith(GZIP)
                self._machine = zlib.decompressobj(wbits=31)
                if self._ended:
                    break
            data = self._machine.decompress(feed, size)
            if data:
                self._place += len(data)
                if self._place > self._limit:
                    raise reject("too-large")
                return data
            if not feed:
                raise EOFError
        return b""


@dataclass(frozen=True)
class _Image:
    """A file whose header has been read and found bounded; its methods carry no types."""

    header: Any
    voxels: Any
    """nibabel's ArrayProxy."""
    stream: BinaryIO
    """That holds the voxels."""


@contextmanager
def _content(path: Path, max_bytes: int) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked where its name ends in ``.gz``."""
    with opened(path, max_bytes) as stream:
        if path.suffix.lower() != ".gz":
            yield stream
        else:
            yield io.BufferedReader(Gunzipped(stream, max_bytes + MAX_HEADER_BYTES), CHUNK)


def _header(stream: BinaryIO) -> Any:
    """The header object (its methods carry no types).

    Raises:
        FileRejected: ``not-nifti``.
    """
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    with reading("not-nifti"):
        try:
            block = stream.read(348)
            sizes = [int.from_bytes(block[:4], order) for order in ("little", "big")]
            if 540 in sizes:
                block += stream.read(540 - 348)
        except EOFError:  # gzip
            raise reject("truncated") from None
        except zlib.error:  # read ahead
            raise reject("pixels-undecodable") from None
    for length, start, magics, kind in (
        (348, 344, (b"n+1\0", b"ni1\0"), Nifti1Header),
        (540, 4, (b"n+2\0", b"ni2\0"), Nifti2Header),
    ):
        if block[start : start + 4] in magics and length in sizes:
            if len(block) < length:
                break
            return kind(block, check=False)  # type: ignore[no-untyped-call]
    raise reject("not-nifti")


@contextmanager
def _opened(path: Path, max_bytes: int) -> Iterator[_Image]:
    """Open an image after checking that header and declared voxels are bounded.

    Raises:
        FileRejected: any code of one file.
    """
    with _content(path, max_bytes) as stream:
        header = _header(stream)
        _check_header(header, max_bytes)
        if not bytes(header["magic"]).startswith(b"ni"):
            yield _image(header, stream)
            return
        with _content(_partner(path), max_bytes) as voxels:
            yield _image(header, voxels)


def _check_header(header: Any, max_bytes: int) -> None:
    from nibabel.spatialimages import HeaderDataError

    with reading("header-unreadable", HeaderDataError):
        if float(header["vox_offset"]) > MAX_HEADER_BYTES:
            raise reject("too-large")
        if int(header["intent_code"]) in CIFTI_INTENTS:
            raise reject("non-image-object")
        bounded_pixels(header.get_data_shape() or (0,), 8 * header.get_data_dtype().itemsize, max_bytes)
        header.check_fix()


def _partner(path: Path) -> Path:
    partner = path.with_name(path.name[: -len(".hdr")] + (".IMG" if path.name.endswith(".HDR") else ".img"))
    if not path.name.lower().endswith(".hdr") or not partner.is_file():
        raise reject("pair-missing")
    return partner


def _image(header: Any, stream: BinaryIO) -> _Image:
    from nibabel.arrayproxy import ArrayProxy
    from nibabel.spatialimages import HeaderDataError

    with reading("header-unreadable", HeaderDataError):
        slope, intercept = header.get_slope_inter()
        scale = (1.0 if slope is None else slope, 0.0 if intercept is None else intercept)
        spec = (header.get_data_shape(), header.get_data_dtype(), header.get_data_offset(), *scale)
        if not _is_packed(stream) and os.fstat(stream.fileno()).st_size < _end(header):
            raise reject("truncated")
        voxels = ArrayProxy(stream, spec, mmap=False)  # type: ignore[no-untyped-call]
        return _Image(header, voxels, stream)


def _is_packed(stream: BinaryIO) -> bool:
    return isinstance(stream, io.BufferedReader) and isinstance(stream.raw, Gunzipped)


def _end(header: Any) -> int:
    """Bytes from a file's begin to the end of its voxels."""
    count = math.prod(int(length) for length in header.get_data_shape())
    return int(header.get_data_offset()) + count * int(header.get_data_dtype().itemsize)


def _voxels(image: _Image, volume: int | None = None) -> tuple[NDArray[Any], bool]:
    """Scaled voxels, and whether the last axis is colour; of several volumes the one wanted, read alone.

    Raises:
        FileRejected: ``volume-missing`` among others.
    """
    shape = image.voxels.shape
    with reading("pixels-undecodable"):
        try:
            several = len(shape) == 4 and shape[3] > 1 and volume is not None
            if several and volume is not None and volume >= shape[3]:
                raise reject("volume-missing")
            data = np.asanyarray(image.voxels[..., volume] if several else image.voxels)
            if _is_packed(image.stream):
                while image.stream.read(CHUNK):  # to the checksum
                    pass
                if image.stream.tell() < _end(image.header):
                    raise reject("truncated")
        except EOFError:
            raise reject("truncated") from None
        except OSError as error:
            # nibabel: "Expected N bytes, got M bytes from file": said without errno, unlike a disk's fault.
            raise reject("truncated" if error.errno is None else "unreadable") from None
    colour = data.dtype.names is not None
    if data.dtype.names is not None:
        if set("RGB") - set(data.dtype.names):
            raise reject("colour-unknown")
        data = np.stack([data[name] for name in "RGB"], axis=-1)
    if data.dtype.kind not in "iuf":
        raise reject("pixels-undecodable")
    return data, colour


def _spatial(data: NDArray[Any], colour: bool, intent: int) -> tuple[NDArray[Any], bool]:
    """Voxels as (X, Y, Z) or (X, Y, Z, 3).

    Args:
        data: voxels; the fourth axis is time, the fifth holds vectors.
        colour: whether the last axis holds colours by the type of the voxels.
        intent: NIfTI's code of what the values mean, 0 if it is not said.

    Raises:
        FileRejected: ``dimensions``, ``time-series`` or ``colour-unknown``.
    """
    if colour:
        data, hue = data[..., :], True
        space = data.shape[:-1]
    else:
        hue = data.ndim == 5 and data.shape[3:] == (1, 3)
        if hue and intent != RGB_VECTOR and (intent or data.dtype != np.uint8):
            raise reject("colour-unknown")  # displacements, directions
        space = data.shape[:-1] if hue else data.shape
    if len(space) < 2:
        raise reject("dimensions")
    if any(n > 1 for n in space[3:]):
        raise reject("time-series")
    space = (*space, 1)[:3]
    return data.reshape((*space, 3) if hue else space), hue


def _affine(header: Any, *, volumes: bool) -> NDArray[np.float64]:
    """Voxel index to millimetres (RAS+), unless the header contradicts itself.

    The sform counts, then the qform. A zero sform is none, and beside a sound one a qform that is no rotation
    is not asked. Where both are there, their rotations may differ (one is often that of a template), but not
    which way an axis runs, nor the spacing by more than :data:`SAME_SPACING`. Without both, nobody knows left
    from right: a volume is refused, a flat image is taken as NIfTI's first method has it.

    Raises:
        FileRejected: ``affine-conflict``, ``geometry-missing`` or ``geometry-invalid``.
    """
    from nibabel.affines import voxel_sizes
    from nibabel.orientations import aff2axcodes

    sform = header.get_sform(coded=True)[0]
    found = [
        form
        for form in (sform, _qform(header))
        if form is not None and (form is sform or np.isfinite(form).all()) and np.any(form[:3, :3] != 0)
    ]
    if not found:
        if header["sform_code"] or header["qform_code"]:
            raise reject("geometry-invalid")
        if volumes:
            raise reject("geometry-missing")
        return np.asarray(header.get_base_affine(), dtype=np.float64)
    if not np.isfinite(found[0]).all():
        raise reject("geometry-invalid")
    if len(found) == 2:
        first, second = (voxel_sizes(form) for form in found)  # type: ignore[no-untyped-call]
        sides = {aff2axcodes(form) for form in found}  # type: ignore[no-untyped-call]
        if len(sides) > 1 or not np.allclose(first, second, rtol=SAME_SPACING):
            raise reject("affine-conflict")
    return np.asarray(found[0], dtype=np.float64)


def _qform(header: Any) -> NDArray[np.float64] | None:
    """The affine of the header's quaternion, None without one or where it is none.

    nibabel refuses one whose parts are too long by rounding; the format's own library shortens it.
    """
    from nibabel.quaternions import quat2mat

    if not header["qform_code"]:
        return None
    parts = np.array([header[f"quatern_{part}"] for part in "bcd"], dtype=np.float64)
    rest = 1.0 - float(parts @ parts)
    if not rest >= -ROUNDED:  # nor where it is no number
        return None
    if rest < 0:
        parts, rest = parts / np.sqrt(1.0 - rest), 0.0
    zooms = np.array(header["pixdim"][1:4], dtype=np.float64)
    zooms[2] *= -1.0 if header["pixdim"][0] < 0 else 1.0
    form = np.eye(4)
    form[:3, :3] = quat2mat([np.sqrt(rest), *parts]) * zooms  # type: ignore[no-untyped-call]
    form[:3, 3] = [header[f"qoffset_{axis}"] for axis in "xyz"]
    return form


def _decoded(image: _Image, *, volume: int | None, volumes: bool | None) -> tuple[Picture, Found]:
    """A file's one image, and what is stored.

    Args:
        image: open.
        volume: which one of several; None to refuse several.
        volumes: whether a volume is wanted; None for whatever the file holds.
    """
    from nibabel.spatialimages import HeaderDataError

    stored = image.header.get_data_dtype()
    data, colour = _voxels(image, volume)
    shape = data.shape if colour or volume is None else image.voxels.shape
    space, colour = _spatial(data, colour, int(image.header["intent_code"]))
    if volumes is None:
        volumes = 1 not in space.shape[:3]
    with reading("header-unreadable", HeaderDataError):
        scale = MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0)
        affine = np.diag([scale, scale, scale, 1.0]) @ _affine(image.header, volumes=volumes)
        base = stored[stored.names[0]] if stored.names else stored
        limits = eight_bit_limits(base)
        if limits is not None and not colour:
            slope, intercept = float(image.voxels.slope), float(image.voxels.inter)
            ends = sorted(x * slope + intercept for x in limits)
            limits = ends[0], ends[1]
    turned, spacing = to_head_back_left(space, affine)
    steps = np.linalg.norm(affine[:3, :3], axis=0)[: min(data.ndim, 3)]
    found = Found(shape, str(data.dtype), tuple(float(step) for step in steps))
    if volumes:
        if min(turned.shape[:3]) < 2:
            raise reject("dimensions")
        return Picture(turned, colour, spacing, limits, limits is not None), found
    flat, pixel = flat_view(turned, spacing)
    return Picture(flat, colour, pixel, limits, limits is not None), found


def pairs(files: Sequence[SourceFile]) -> list[tuple[SourceFile, ...]]:
    """The files of each image: an ``.img`` belongs to the ``.hdr`` beside it, which comes first."""
    images = {f.name.lower(): f for f in files if f.name.lower().endswith(".img")}
    found: list[tuple[SourceFile, ...]] = []
    for file in files:
        image = images.pop(f"{file.name.lower()[:-4]}.img", None) if _is_head(file) else None
        found.append((file,) if image is None else (file, image))
    taken = {unit[1] for unit in found if len(unit) > 1}
    return [unit for unit in found if unit[0] not in taken]


def _is_head(file: SourceFile) -> bool:
    return file.name.lower().endswith(".hdr")


class NiftiReader(Reader):
    """NIfTI files, single or in pairs."""

    kind = "nifti"
    suffixes = (".nii.gz", ".nii", ".hdr", ".img")
    libraries = ("nibabel",)

    def sniff(self, head: bytes, ending: str) -> bool:
        """By its name: packed, it begins as any other does."""
        return ending in self.suffixes

    def units(self, files: Sequence[SourceFile]) -> list[Unit]:
        """See :func:`pairs`."""
        return [Unit(pair) for pair in pairs(files)]

    def read(self, unit: Unit, request: Request) -> DecodeResults:
        """Read a file's one image."""
        file = unit.files[0]
        with _opened(file.path, request.max_bytes) as image:
            picture, _ = _decoded(image, volume=request.spec.volume, volumes=request.volumes)
        return [DecodedImage((file,), picture)]

    def check(self, path: Path, max_bytes: int, judge: Judge) -> Found:
        """Decode a file by itself, whatever its number of axes; of several volumes the first is judged."""
        with _opened(path, max_bytes) as image:
            several = len(image.voxels.shape) == 4 and image.voxels.shape[3] > 1
            picture, found = _decoded(image, volume=0 if several else None, volumes=None)
        judge(picture)
        return found
