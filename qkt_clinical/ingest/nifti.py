"""NIfTI-1 and NIfTI-2 files, single or as a pair of ``.hdr`` and ``.img``, read by nibabel.

The affine decides: axes are flipped and swapped to the prepared convention (see ``arrays``). A flat
image is one slice, stored as (X, Y), (X, Y, 1) or with its single-voxel axis elsewhere; its rows and columns
come out as radiologists display that plane. Colour is NIfTI's RGB24 type, or a fifth axis of 3 that holds
vectors of colours: three slices are no colours, nor are three volumes in time.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.ingest.arrays import Picture, eight_bit_limits, flat_view, to_head_back_left
from qkt_clinical.ingest.codes import reading, reject
from qkt_clinical.ingest.source import (
    Found,
    Request,
    Sample,
    SourceFile,
    bounded_pixels,
    bounded_size,
)

MAX_HEADER_BYTES = 16_000_000
"""Header extensions beyond this are refused: nibabel reads them whole."""
CIFTI_INTENTS = range(3000, 3100)
RGB_VECTOR = 2003
"""Intent of vectors that are colours."""
SAME_SPACING = 0.05
"""Relative difference up to which the spacings of qform and sform may be roundings of one another."""
MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}


def _header(path: Path) -> Any:
    """The header object (its methods carry no types).

    Raises:
        FileRejected: ``not-nifti``.
    """
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    with reading("not-nifti"), (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as stream:
        try:
            block = stream.read(540)
        except EOFError:  # gzip
            raise reject("truncated") from None
    for length, start, magics, kind in (
        (348, 344, (b"n+1\0", b"ni1\0"), Nifti1Header),
        (540, 4, (b"n+2\0", b"ni2\0"), Nifti2Header),
    ):
        if block[start : start + 4] in magics and int.from_bytes(block[:4], "little") in (
            length,
            int.from_bytes(length.to_bytes(4, "little"), "big"),
        ):
            if len(block) < length:
                break
            return kind(block[:length], check=False)  # type: ignore[no-untyped-call]
    raise reject("not-nifti")


def _open(path: Path, max_bytes: int) -> Any:
    """Open an image lazily after checking that header and declared voxels are bounded.

    Raises:
        FileRejected: any code of one file.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    bounded_size(path, max_bytes)
    header = _header(path)
    with reading("header-unreadable", HeaderDataError, ImageFileError):
        if float(header["vox_offset"]) > MAX_HEADER_BYTES:
            raise reject("too-large")
        if int(header["intent_code"]) in CIFTI_INTENTS:
            raise reject("non-image-object")
        bounded_pixels(header.get_data_shape() or (0,), 8 * header.get_data_dtype().itemsize, max_bytes)
        if bytes(header["magic"]).startswith(b"ni"):
            _check_pair(path, max_bytes)
        return nibabel.load(path)


def _check_pair(path: Path, max_bytes: int) -> None:
    partner = path.with_name(path.name[: -len(".hdr")] + (".IMG" if path.name.endswith(".HDR") else ".img"))
    if not path.name.lower().endswith(".hdr") or not partner.is_file():
        raise reject("pair-missing")
    bounded_size(partner, max_bytes)


def _voxels(image: Any, volume: int | None = None) -> tuple[NDArray[Any], bool]:
    """Scaled voxels, and whether the last axis is colour; of several volumes the one wanted, read alone.

    Raises:
        FileRejected: ``volume-missing`` among others.
    """
    from nibabel.filebasedimages import ImageFileError

    with reading("pixels-undecodable", ImageFileError):
        try:
            several = len(image.shape) == 4 and image.shape[3] > 1 and volume is not None
            if several and volume is not None and volume >= image.shape[3]:
                raise reject("volume-missing")
            data = np.asanyarray(image.dataobj[..., volume] if several else image.dataobj)
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


def _affine(image: Any, *, volumes: bool) -> NDArray[np.float64]:
    """Voxel index to millimetres (RAS+), as nibabel chooses it, unless the header contradicts itself.

    The sform counts, then the qform. A zero sform is none. Where both are there, their rotations may differ
    (one is often that of a template), but not which way an axis runs, nor the spacing by more than
    :data:`SAME_SPACING`. Without both, nobody knows left from right: a volume is refused, a flat image is
    taken as NIfTI's first method has it.

    Raises:
        FileRejected: ``affine-conflict``, ``geometry-missing`` or ``geometry-invalid``.
    """
    from nibabel.affines import voxel_sizes
    from nibabel.orientations import aff2axcodes

    header = image.header
    found = [
        form
        for form, code in (header.get_sform(coded=True), header.get_qform(coded=True))
        if form is not None and code and np.abs(form[:3, :3]).max() > 0
    ]
    if not found:
        if header["sform_code"] or header["qform_code"]:
            raise reject("geometry-invalid")
        if volumes:
            raise reject("geometry-missing")
        return np.asarray(header.get_base_affine(), dtype=np.float64)
    if len(found) == 2:
        first, second = (voxel_sizes(form) for form in found)  # type: ignore[no-untyped-call]
        sides = {aff2axcodes(form) for form in found}  # type: ignore[no-untyped-call]
        if len(sides) > 1 or not np.allclose(first, second, rtol=SAME_SPACING):
            raise reject("affine-conflict")
    return np.asarray(found[0], dtype=np.float64)


def read(file: SourceFile, request: Request) -> Sample:
    """Read a file's one image.

    Raises:
        FileRejected: any code of one file.
    """
    from nibabel.spatialimages import HeaderDataError

    image = _open(file.path, request.max_bytes)
    data, colour = _voxels(image, request.spec.volume)
    data, colour = _spatial(data, colour, int(image.header["intent_code"]))
    with reading("header-unreadable", HeaderDataError):
        scale = MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0)
        affine = np.diag([scale, scale, scale, 1.0]) @ _affine(image, volumes=request.volumes)
        stored = image.header.get_data_dtype()
        base = stored[stored.names[0]] if stored.names else stored
        limits = eight_bit_limits(base)
        slope, intercept = image.dataobj.slope, image.dataobj.inter
        if limits is not None and not colour:
            ends = sorted(x * float(slope) + float(intercept) for x in limits)
            limits = ends[0], ends[1]
    turned, spacing = to_head_back_left(data, affine)
    if request.volumes:
        if min(turned.shape[:3]) < 2:
            raise reject("dimensions")
        return Sample((file,), Picture(turned, colour, spacing, limits, limits is not None))
    flat, pixel = flat_view(turned, spacing)
    return Sample((file,), Picture(flat, colour, pixel, limits, limits is not None))


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


def check(path: Path, max_bytes: int) -> Found:
    """Decode a file by itself, whatever its number of dimensions.

    Raises:
        FileRejected: with the reason.
    """
    image = _open(path, max_bytes)
    data, _ = _voxels(image)
    with reading("header-unreadable"):
        scale = MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0)
        spacing = tuple(float(z) * scale for z in image.header.get_zooms()[:3])
    return Found(data.shape, str(data.dtype), spacing if np.isfinite(spacing).all() else None)
