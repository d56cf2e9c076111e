"""Volumes of DICOM files: slices in the order of their place, copies, concatenations, acquisitions.

Geometry is our own projection of ImagePositionPatient on the slice normal: MONAI's reader sorts by
InstanceNumber, drops slices without one, averages the spacing and ignores MONOCHROME1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.common.files import digest_file
from qkt_clinical.errors import FileRejected
from qkt_clinical.ingest.arrays import Picture, to_head_back_left
from qkt_clinical.ingest.codes import reading, reject
from qkt_clinical.ingest.deidentify import salted
from qkt_clinical.ingest.readers.dicom_file import (
    COLOURS,
    GREYS,
    PALETTE,
    Limits,
    as_sets,
    frame_picture,
    frames_of,
    functional_group,
    kept_header,
    matrix_of,
    open_file,
    photometric_of,
    pixel_spacing,
    reading_dicom,
    refuse_mosaic,
    refuse_text,
    samples_of,
    stored_pixels,
    tags_of,
    types_of,
    uid_of,
)
from qkt_clinical.ingest.readers.elements import values, whole, word
from qkt_clinical.ingest.source import (
    DecodedImage,
    DecodeResult,
    Refusal,
    Request,
    SourceFile,
    bounded_pixels,
)
from qkt_clinical.ingest.subgroups import header_groups

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

F64 = NDArray[np.float64]

PLANNED = frozenset({"CT", "MR", "PT"})
"""Modalities whose scans are planned on a scout."""
SCOUT = re.compile(r"LOCALI[SZ]ER|SCOUT|TOPOGRAM|SURVEYVIEW|CT_SOM\d+ TOP")

ORIENTATION_TOLERANCE = 1e-3
POSITION_ROUNDING_MM = 0.101
"""Positions are often rounded to a tenth of a millimetre: two of them may be off by that together."""


@dataclass(frozen=True)
class Slice:
    """One slice's header: what decides its place and whether it fits the others."""

    file: SourceFile
    frame: int
    position: F64
    """(3,) centre of the first voxel, millimetres towards left, back and head (LPS)."""
    orientation: F64
    """(6,) direction along a row, then down a column."""
    spacing: tuple[float, float]
    kind: tuple[int, int, int, str]
    """Rows, columns, samples per pixel and photometric interpretation."""


class ConcatenationPart(NamedTuple):
    """One file of a concatenation: an object of many frames that was divided among files."""

    whole: str
    """Salted UID of the concatenation."""
    number: int
    """From 1."""
    total: int
    """Files in all; 0 if not said."""


@dataclass(frozen=True)
class Scan:
    """A file's header, with nothing in it that names a patient: UIDs and tags are salted."""

    file: SourceFile
    series: str
    acquisition: str
    frames: int
    slices: tuple[Slice, ...]
    code: str | None
    """Why it has no place in space."""
    tags: dict[str, str]
    part: ConcatenationPart | None = None
    """Its place in a concatenation."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the file."""
        slices = [
            (s.frame, s.position.tolist(), s.orientation.tolist(), s.spacing, s.kind) for s in self.slices
        ]
        return {
            "series": self.series,
            "acquisition": self.acquisition,
            "frames": self.frames,
            "slices": slices,
            "code": self.code,
            "tags": self.tags,
            "part": self.part,
        }

    @staticmethod
    def from_dict(held: Mapping[str, Any], file: SourceFile) -> Scan:
        """What :meth:`as_dict` gave."""
        slices = tuple(
            Slice(file, frame, np.array(place), np.array(turn), (spacing[0], spacing[1]), tuple(kind))
            for frame, place, turn, spacing, kind in held["slices"]
        )
        part = held["part"] and ConcatenationPart(*held["part"])
        return Scan(file=file, **(dict(held) | {"slices": slices, "part": part}))


def scan(file: SourceFile, request: Request) -> Scan:
    """Read the header of a file that may be part of a volume.

    Raises:
        FileRejected: any code of one file.
    """
    with reading_dicom("header-unreadable"):
        data = open_file(file.path, request.max_bytes, pixels=False)
        frames = frames_of(data)
        try:
            slices = tuple(_slice(data, file, frame) for frame in range(frames))
            code = None
        except FileRejected as rejected:
            slices, code = (), rejected.code
        if frames > 1 and code == "geometry-missing":
            code = "multi-frame"
        series = uid_of(data, "SeriesInstanceUID")
        refuse_mosaic(data)
        refuse_text(data, request)
        if word(data, "Modality") in PLANNED and SCOUT.search(types_of(data)):
            raise reject("localiser")
        if not series:
            raise reject("geometry-missing")
        acquisition = str(whole(data, "AcquisitionNumber", 0))
        tags = {n: salted(request.salt, "value", v) for n, v in tags_of(data, request.tags).items()}
        words = (salted(request.salt, "value", w) for w in (series, acquisition))
        part = _part(data, series, request.salt)
        return Scan(file, next(words), next(words), frames, slices, code, tags, part)


def _part(data: Dataset, series: str, salt: bytes) -> ConcatenationPart | None:
    number = whole(data, "InConcatenationNumber", 0)
    named = uid_of(data, "ConcatenationUID") or uid_of(data, "SOPInstanceUIDOfConcatenationSource")
    total = whole(data, "InConcatenationTotalNumber", 0)
    if (not number and frames_of(data) == 1) or (not named and max(number, total) < 2):
        return None
    return ConcatenationPart(salted(salt, "value", named or series), number, total)


def _slice(data: Dataset, file: SourceFile, frame: int) -> Slice:
    plane = functional_group(data, frame, "PlanePositionSequence") or data
    turned = functional_group(data, frame, "PlaneOrientationSequence") or data
    place, turn = values(plane, "ImagePositionPatient"), values(turned, "ImageOrientationPatient")
    spacing = pixel_spacing(data, frame)
    shared = frames_of(data) > 1 and "PerFrameFunctionalGroupsSequence" not in data
    if spacing is None or len(place) != 3 or len(turn) != 6 or shared:
        raise reject("geometry-missing")
    position, orientation = np.array([float(v) for v in place]), np.array([float(v) for v in turn])
    row, column = orientation[:3], orientation[3:]
    sound = np.isfinite(position).all() and np.isfinite(orientation).all()
    if not sound or abs(row @ row - 1) > 0.02 or abs(column @ column - 1) > 0.02 or abs(row @ column) > 0.02:
        raise reject("geometry-invalid")
    colours = photometric_of(data) if photometric_of(data) in COLOURS | GREYS | {PALETTE} else ""
    kind = (*matrix_of(data), samples_of(data), colours)
    return Slice(file, frame, position, orientation, spacing, kind)


def sort_slices(slices: Sequence[Slice]) -> tuple[list[Slice], F64]:
    """Slices in the order of their projection on the common normal, and the volume's affine.

    Returns:
        The sorted slices, and (4, 4): (slice, row, column) index to millimetres in LPS.

    Raises:
        FileRejected: ``too-few-slices``, ``sizes-mixed``, ``orientation-mixed``, ``slice-duplicate``,
            ``slice-missing``, ``spacing-uneven``, ``slices-shifted``.
    """
    first = slices[0]
    if len(slices) < 2:
        raise reject("too-few-slices")
    if any(s.kind != first.kind or not np.allclose(s.spacing, first.spacing, rtol=1e-3) for s in slices):
        raise reject("sizes-mixed")
    if any(np.abs(s.orientation - first.orientation).max() > ORIENTATION_TOLERANCE for s in slices):
        raise reject("orientation-mixed")
    row, column = first.orientation[:3], first.orientation[3:]
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    heights = np.array([s.position @ normal for s in slices])
    order = np.argsort(heights, kind="stable")
    heights = heights[order]
    gaps = np.diff(heights)
    step = float(heights[-1] - heights[0]) / len(gaps)
    if gaps.min() < max(0.01 * step, 1e-4):
        raise reject("slice-duplicate")
    grid = heights[0] + step * np.arange(len(heights))
    tolerance = max(0.02 * step, min(POSITION_ROUNDING_MM, 0.2 * step))
    if np.abs(heights - grid).max() > tolerance:
        steps = gaps / gaps.min()
        raise reject("slice-missing" if np.abs(steps - np.rint(steps)).max() < 0.1 else "spacing-uneven")
    placed = [slices[i] for i in order]
    origin = placed[0].position
    sideways = [s.position - origin - ((s.position - origin) @ normal) * normal for s in placed]
    if max(float(np.linalg.norm(v)) for v in sideways) > max(0.5 * min(first.spacing), POSITION_ROUNDING_MM):
        raise reject("slices-shifted")
    affine = np.eye(4)
    affine[:3, :3] = np.stack([normal * step, column * first.spacing[0], row * first.spacing[1]], axis=1)
    affine[:3, 3] = origin
    return placed, affine


def _volume(slices: Sequence[Slice], affine: F64, request: Request) -> Picture:
    """Decode sorted slices into one volume, file by file.

    Raises:
        FileRejected: of the first file that fails, with ``file`` naming it.
    """
    rows, columns, samples, photometric = slices[0].kind
    bounded_pixels((len(slices), rows, columns, samples), 32, request.max_bytes)
    colour = samples == 3 or photometric == PALETTE
    shape = (len(slices), rows, columns, 3) if colour else (len(slices), rows, columns)
    by_file: dict[SourceFile, list[int]] = {}
    for place, part in enumerate(slices):
        by_file.setdefault(part.file, []).append(place)
    volume: NDArray[Any] | None = None
    scale = (1.0, 0.0)
    limits: set[Limits | None] = set()
    eight = True
    for file, places in by_file.items():
        try:
            with reading_dicom("header-unreadable"):
                data = open_file(file.path, request.max_bytes, pixels=True)
                stored = stored_pixels(data)
                frames = stored.reshape(-1, *shape[1 : 3 + (samples == 3)])
                pictures = [
                    frame_picture(data, frames[slices[n].frame], slices[n].frame, lookup=False)
                    for n in places
                ]
        except FileRejected as rejected:
            raise FileRejected(
                rejected.message, remedy=rejected.remedy, code=rejected.code, file=file.name
            ) from None
        for place, picture in zip(places, pictures, strict=True):
            if volume is None:
                volume = np.empty(shape, dtype=picture.pixels.dtype)
                scale = (picture.slope, picture.intercept)
            same = picture.pixels.dtype == volume.dtype and (picture.slope, picture.intercept) == scale
            if not same and (volume.dtype != np.float32 or scale != (1.0, 0.0)):
                # Slices scaled one by one, as those of PET are: from here on in the modality's units.
                volume, scale = (volume * scale[0] + scale[1]).astype(np.float32), (1.0, 0.0)
            volume[place] = picture.pixels if same else picture.intensities
            limits.add(picture.limits)
            eight &= picture.eight_bit
    assert volume is not None  # slices are never empty
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    pixels, spacing = to_head_back_left(volume, to_ras @ affine)
    alike = len(limits) == 1
    return Picture(
        pixels,
        colour=colour,
        spacing_mm=spacing,
        limits=next(iter(limits)) if alike else None,
        eight_bit=eight and alike,
        inverted=photometric == "MONOCHROME1",
        slope=scale[0],
        intercept=scale[1],
    )


def _copies(slices: Sequence[Slice]) -> tuple[list[Slice], list[SourceFile]]:
    """Set aside files that are byte for byte copies of another at the same position."""
    kept: list[Slice] = []
    dropped: list[SourceFile] = []
    at: dict[tuple[float, ...], list[Slice]] = {}
    for part in slices:
        twins = at.setdefault(tuple(part.position.round(3).tolist()), [])
        if any(digest_file(t.file.path) == digest_file(part.file.path) for t in twins if t.file != part.file):
            dropped.append(part.file)
        else:
            twins.append(part)
            kept.append(part)
    return kept, dropped


def read_series(scans: Sequence[Scan], request: Request) -> Iterator[DecodeResult]:
    """One volume's files (a group of :func:`series`) to one sample or its refusals."""
    files = tuple(s.file for s in scans)
    lost = next((s.code for s in scans if s.code is not None), None) or _gap(scans)
    if lost is not None:
        yield Refusal(files, lost)
        return
    try:
        with reading("unreadable"):
            slices, dropped = _copies([part for s in scans for part in s.slices])
        if dropped:
            yield Refusal(tuple(dropped), "duplicate")
        files = tuple(f for f in files if f not in dropped)
        placed, affine = sort_slices(slices)
        picture = _volume(placed, affine, request)
        with reading_dicom("header-unreadable"):
            first = open_file(placed[0].file.path, request.max_bytes, pixels=False)
            kept, groups = kept_header(first, request), header_groups(first, request)
    except FileRejected as rejected:
        culprit = tuple(f for f in files if f.name == rejected.where.file)
        if culprit:
            yield Refusal(culprit, rejected.code)
            yield Refusal(tuple(f for f in files if f not in culprit), "series-incomplete")
        else:
            yield Refusal(files, rejected.code)
        return
    tags = as_sets([s.tags for s in scans])
    yield DecodedImage(files, picture, tags=tags, keys=(scans[0].series,), header=kept, subgroups=groups)


def _gap(scans: Sequence[Scan]) -> str | None:
    """``slice-missing`` where a file of a concatenation is not there, as far as the others can tell."""
    parts = [s.part for s in scans if s.part is not None]
    if not parts:
        return None
    said = max(part.total for part in parts)
    total = max(said or 2, *(part.number for part in parts))
    return None if {part.number for part in parts} == {*range(1, total + 1)} else "slice-missing"


def series(scans: Sequence[Scan]) -> list[tuple[Scan, ...]]:
    """The files of each volume, sorted.

    A file of several frames is a volume by itself, or with the others of its concatenation. The rest belong
    together by their series; one that holds several acquisitions of the same place (phases of a contrast
    agent, repetitions) is one volume per acquisition.
    """
    groups: dict[tuple[str, ...], list[Scan]] = {}
    for found in scans:
        if found.part is not None:
            alone: tuple[str, ...] = ("part", found.part.whole)
        else:
            alone = ("file", found.file.name) if found.frames > 1 else ()
        groups.setdefault((found.series, *alone), []).append(found)
    volumes = []
    for group in groups.values():
        apart = _overlap(group)
        by_acquisition: dict[str, list[Scan]] = {}
        for found in group:
            by_acquisition.setdefault(found.acquisition if apart else "", []).append(found)
        volumes += [tuple(sorted(part, key=lambda s: s.file)) for part in by_acquisition.values()]
    return sorted(volumes, key=lambda volume: volume[0].file)


def _overlap(scans: Sequence[Scan]) -> bool:
    """Whether two acquisitions hold a slice at one place."""
    at: dict[tuple[float, ...], str] = {}
    places = ((tuple(p.position.round(3).tolist()), s.acquisition) for s in scans for p in s.slices)
    return any(at.setdefault(place, acquisition) != acquisition for place, acquisition in places)
