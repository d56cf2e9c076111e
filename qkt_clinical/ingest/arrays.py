"""From one decoded image to the array that ``ImageSpec`` asks for.

Axes of a prepared array: flat images are (C, H, W), rows from top to bottom as displayed. Volumes are
(C, D, H, W) with D from foot to head, H from front to back and W from the patient's right to left:
axial slices in the usual display, stacked upwards. DICOM series and NIfTI files of one anatomy come out
alike, since both are brought there by their own geometry (see :func:`to_head_back_left`).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.config.site import ImageSpec
from qkt_clinical.ingest.codes import reading, reject

if TYPE_CHECKING:
    from scipy.sparse import csr_array

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Weights of red, green and blue (ITU-R BT.601), as Pillow uses them."""
PERCENTILES = (0.5, 99.5)
MOST_RESAMPLED = 2**27
"""Pixels after resampling that are always allowed: 512 MB, and several times as much while it is done."""
GROWTH = 4
"""Beyond that, so many times the pixels of the file at most."""
ROUNDING = 1e-6
"""What differs by no more, between 0 and 1, is the same."""
COLUMNS = 2**16
"""So many lines at once are resampled in double precision: memory is what a volume has most of."""
SAME_SPACING = 1e-3
"""Relative difference up to which two spacings count as equal: header figures are rounded."""


@dataclass(frozen=True)
class Picture:
    """One decoded image.

    Attributes:
        pixels: (H, W) or (D, H, W), with a last axis of 3 where ``colour``; any real dtype.
        colour: whether the last axis holds red, green and blue.
        spacing_mm: per spatial axis of ``pixels``; None if unknown.
        limits: the two intensities shown as black and white, from the stored 8-bit type or the file's
            own display window; None if the image does not say.
        eight_bit: whether ``limits`` are those of an 8-bit type, so that 8 bits can hold the result.
        inverted: whether low values are bright (MONOCHROME1).
        slope, intercept: intensities in the modality's units are ``pixels * slope + intercept``; left to be
            applied together with the window, in one pass over the pixels.
    """

    pixels: NDArray[Any]
    colour: bool = False
    spacing_mm: tuple[float, ...] | None = None
    limits: tuple[float, float] | None = None
    eight_bit: bool = False
    inverted: bool = False
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def size(self) -> tuple[int, ...]:
        """Spatial shape."""
        return self.pixels.shape[:-1] if self.colour else self.pixels.shape

    @property
    def intensities(self) -> NDArray[Any]:
        """In the modality's units."""
        plain = (self.slope, self.intercept) == (1.0, 0.0)
        return self.pixels if plain else self.pixels * self.slope + self.intercept


def eight_bit_limits(dtype: np.dtype[Any], bits: int = 8) -> tuple[float, float] | None:
    """Range of an 8-bit integer type of which ``bits`` are used; None for any other type."""
    if dtype.kind not in "iub" or dtype.itemsize != 1:
        return None
    if dtype.kind == "b":
        return 0.0, 1.0
    return (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if dtype.kind == "i" else (0.0, 2.0**bits - 1)


def to_head_back_left(pixels: NDArray[Any], affine: F64) -> tuple[NDArray[Any], tuple[float, float, float]]:
    """Flip and swap axes so that they run to head, back and left.

    Args:
        pixels: (A, B, C) or (A, B, C, 3).
        affine: (4, 4), voxel index to millimetres towards right, front and head (RAS+).

    Returns:
        The same voxels as (D, H, W) or (D, H, W, 3), and their spacing in millimetres. Oblique axes
        go to the nearest anatomical one; nothing is interpolated.

    Raises:
        FileRejected: ``geometry-invalid``.
    """
    from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

    matrix = affine[:3, :3]
    steps = np.linalg.norm(matrix, axis=0)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or (steps < 1e-6).any():
        raise reject("geometry-invalid")
    if abs(float(np.linalg.det(matrix / steps))) < 1e-3:
        raise reject("geometry-invalid")
    here = io_orientation(affine)  # type: ignore[no-untyped-call]
    wanted = axcodes2ornt(("S", "P", "L"))  # type: ignore[no-untyped-call]
    there = ornt_transform(here, wanted)  # type: ignore[no-untyped-call]
    turned = np.asarray(apply_orientation(pixels, there))  # type: ignore[no-untyped-call]
    spacing = np.empty(3)
    spacing[there[:, 0].astype(int)] = steps
    return turned, (float(spacing[0]), float(spacing[1]), float(spacing[2]))


def flat_view(
    pixels: NDArray[Any], spacing: tuple[float, float, float]
) -> tuple[NDArray[Any], tuple[float, float]]:
    """The one slice of a (D, H, W[, 3]) array as it is displayed, and its spacing.

    Axial: front at the top, the patient's right at the left. Coronal: head at the top, right at the
    left. Sagittal: head at the top, front at the left.

    Raises:
        FileRejected: ``dimensions`` if no axis has length 1.
    """
    axis = next((a for a in range(3) if pixels.shape[a] == 1), None)
    if axis is None:
        raise reject("dimensions")
    flat = np.take(pixels, 0, axis=axis)
    rest = [s for a, s in enumerate(spacing) if a != axis]
    return (flat if axis == 0 else np.flip(flat, 0)), (rest[0], rest[1])


def _limits(picture: Picture, spec: ImageSpec) -> tuple[float, float]:
    if spec.window is not None:
        half = spec.window.width / 2
        return spec.window.center - half, spec.window.center + half
    if picture.limits is not None and np.isfinite(picture.limits).all():
        return picture.limits
    low, high = sorted(x * picture.slope + picture.intercept for x in _extent(picture.pixels))
    return low, high


def _extent(pixels: NDArray[Any]) -> tuple[float, float]:
    """The two intensities between which the pixels lie, but for the outermost at either end.

    :data:`PERCENTILES`, unless an end falls on the median: then the outermost few are all that stands out
    from a background, such as the lesions of a mask, and that end is the percentile of what lies beyond it.
    """
    low, middle, high = _percentiles(pixels, (PERCENTILES[0], 50.0, PERCENTILES[1]))
    if low == middle and (beyond := pixels[pixels < middle]).size:
        low = _percentiles(beyond, PERCENTILES[:1])[0]
    if high == middle and (beyond := pixels[pixels > middle]).size:
        high = _percentiles(beyond, PERCENTILES[1:])[0]
    return low, high


def _percentiles(pixels: NDArray[Any], percentiles: Sequence[float] = PERCENTILES) -> tuple[float, ...]:
    """As numpy interpolates them; of 16-bit integers by counting, ten times as fast."""
    if pixels.dtype.kind not in "iu" or pixels.dtype.itemsize > 2:
        return tuple(map(float, np.percentile(pixels, percentiles)))
    lowest = int(pixels.min())
    ranked = np.cumsum(np.bincount(pixels.ravel().astype(np.intp) - lowest))
    found = []
    for percentile in percentiles:
        rank = percentile / 100 * (pixels.size - 1)
        below, above = np.searchsorted(ranked, [int(rank), min(int(rank) + 1, pixels.size - 1)], side="right")
        found.append(lowest + float(below) + (rank - int(rank)) * float(above - below))
    return tuple(found)


def _finite(pixels: NDArray[Any]) -> NDArray[Any]:
    """Non-finite values become the lowest finite one: they mark what lies outside the field of view."""
    if pixels.dtype.kind != "f":
        return pixels
    good = np.isfinite(pixels)
    if good.all():
        return pixels
    if not good.any():
        raise reject("no-finite-values")
    return np.where(good, pixels, pixels[good].min())


def _unit(picture: Picture, limits: tuple[float, float]) -> F32:
    """Intensities to [0, 1], bright high; a constant image (no range at all) becomes 0, or 1 if inverted.

    So does one whose range cannot be told in floating point. Differences are taken before anything is scaled:
    those of integers are exact, so that an image and its inverted twin come out alike to the last bit.
    """
    pixels = picture.pixels
    # Integers of 16 bits are exact in single precision.
    exact = pixels.dtype.kind in "iub" and pixels.dtype.itemsize <= 2
    kind = np.float32 if exact else np.float64
    black, white = ((x - picture.intercept) / picture.slope for x in limits)
    with np.errstate(all="ignore"):
        scale = kind(1 / np.float64(abs(white - black)))
        known = bool(np.isfinite([kind(black), kind(white), scale]).all())
    if not limits[1] > limits[0] or not known or scale == 0:
        return np.full(pixels.shape, picture.inverted, dtype=np.float32)
    if picture.inverted:
        black, white = white, black
    unit = np.subtract(*((black, pixels) if white < black else (pixels, black)), dtype=kind)
    unit *= scale
    np.clip(unit, 0.0, 1.0, out=unit)
    return np.asarray(unit, dtype=np.float32)


def _monai(module: str = "monai.transforms") -> Any:
    """Loaded only where it is needed: it takes seconds."""
    return importlib.import_module(module)


def _same(first: Sequence[float], second: Sequence[float]) -> bool:
    return bool(np.allclose(first, second, rtol=SAME_SPACING, atol=0.0))


def resample(image: F32, spacing_mm: tuple[float, ...] | None, spec: ImageSpec) -> F32:
    """Bring (C, ...) float32 to the spacing and size wanted.

    With ``spec.spacing_mm``: linear interpolation (smoothed first where it shrinks, so that nothing aliases),
    then pad with 0 or crop about the centre. Without: see :func:`_resized`. MONAI is imported only if it has
    something to do. The same bits come out on every processor, see :func:`_weighted`.

    Raises:
        FileRejected: ``spacing-missing``, ``resampled-too-large``.
    """
    if spec.spacing_mm is None:
        return image if image.shape[1:] == spec.size else _resized(image, spec.size)
    if spacing_mm is None:
        raise reject("spacing-missing")
    if not _same(spacing_mm, spec.spacing_mm):
        _bounded(image.shape[1:], spacing_mm, spec.spacing_mm)
        with reading("resampled-too-large"):  # torch wants memory as RuntimeError
            image = _respaced(image, spacing_mm, spec.spacing_mm)
    if image.shape[1:] == spec.size:
        return image
    pad_or_crop = _monai().ResizeWithPadOrCrop
    return np.asarray(pad_or_crop(spec.size, mode="constant", value=0.0)(image), dtype=np.float32)


def _resized(image: F32, size: tuple[int, ...]) -> F32:
    """Axis by axis: means over blocks where it shrinks, linear interpolation where it grows.

    What MONAI's Resize gives with the modes ``area`` and ``bilinear``, without the seconds and the 400 MB
    that its import takes: this is the path of nearly every file.
    """
    return np.stack([_each_axis(channel, size) for channel in image])


def _each_axis(pixels: F32, size: tuple[int, ...]) -> F32:
    for axis, new in enumerate(size):
        old = pixels.shape[axis]
        if old != new:
            pixels = _weighted(averaging(old, new) if new < old else interpolating(old, new), pixels, axis)
    return pixels


def _weighted(weights: csr_array, pixels: F32, axis: int) -> F32:
    """(new, old) weights times the values along one axis.

    Weights and values have 24 binary digits, so that a product is exact in double precision, whether a
    processor adds it in the same step or the next; and sums run in the order of the row's samples, whatever
    the width of registers. MONAI and torch leave both to the processor.
    """
    exact = weights.astype(np.float64)
    first = np.ascontiguousarray(np.moveaxis(pixels, axis, 0))
    flat = first.reshape(len(first), -1)
    changed = np.empty((weights.shape[0], flat.shape[1]), dtype=np.float32)
    for start in range(0, flat.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        changed[:, part] = exact @ flat[:, part].astype(np.float64)
    return np.moveaxis(changed.reshape(len(changed), *first.shape[1:]), 0, axis)


@lru_cache(maxsize=256)
def averaging(old: int, new: int) -> csr_array:
    """(new, old): row i averages the samples from floor(i * old / new) to ceil((i + 1) * old / new)."""
    from scipy.sparse import csr_array

    ends = [(i * old // new, -(-(i + 1) * old // new)) for i in range(new)]
    columns = np.concatenate([np.arange(a, b) for a, b in ends])
    lengths = np.array([b - a for a, b in ends])
    weights = np.repeat(1 / lengths, lengths).astype(np.float32)
    return csr_array((weights, columns, np.concatenate([[0], np.cumsum(lengths)])), shape=(new, old))


@lru_cache(maxsize=256)
def interpolating(old: int, new: int) -> csr_array:
    """(new, old): row i lies between the two samples nearest to (i + 1/2) * old / new - 1/2; ends repeat."""
    return _between((np.arange(new) + 0.5) * old / new - 0.5, old)


def _between(place: F64, old: int) -> csr_array:
    """(new, old): row i lies between the two samples nearest to ``place[i]``; ends repeat."""
    from scipy.sparse import csr_array

    place = np.clip(place, 0, old - 1)
    below = np.minimum(place.astype(np.intp), max(old - 2, 0))
    above = np.minimum(below + 1, old - 1)
    share = (place - below).astype(np.float32)
    rows = np.repeat(np.arange(len(place)), 2)
    values = np.stack([1 - share, share], axis=1).ravel()
    return csr_array((values, (rows, np.stack([below, above], axis=1).ravel())), shape=(len(place), old))


def _smoothing(length: int, sigma: float) -> csr_array:
    """(length, length): each sample becomes a mean of its neighbours up to four ``sigma``; ends repeat.

    Weights are the normal distribution's over each sample's width.
    """
    from scipy.sparse import csr_array

    tail = math.ceil(4 * sigma)
    steps = np.arange(-tail, tail + 1)
    ends = [math.erf((k - 0.5) / (sigma * math.sqrt(2))) for k in range(-tail, tail + 2)]
    weights = (np.diff(ends) / (ends[-1] - ends[0])).astype(np.float32)
    columns = np.clip(np.arange(length)[:, None] + steps, 0, length - 1)
    starts = np.arange(length + 1) * len(steps)
    return csr_array((np.tile(weights, length), columns.ravel(), starts), shape=(length, length))


def _bounded(shape: Sequence[int], old: Sequence[float], new: Sequence[float]) -> None:
    """Refuse a change of spacing that would fill the memory or leave nothing, before anything is allocated.

    A spacing in the wrong unit makes a picture of a few pixels millions wide, or its smoothing margin.

    Raises:
        FileRejected: ``resampled-too-large``.
    """
    factors = [b / a for a, b in zip(old, new, strict=True)]
    after = [n / f for n, f in zip(shape, factors, strict=True)]
    smoothed = [n + 2 * math.ceil(2 * max(0.0, f - 1)) for n, f in zip(shape, factors, strict=True)]
    most = max(math.prod(after), math.prod(smoothed))
    if not most <= max(MOST_RESAMPLED, GROWTH * math.prod(shape)) or min(after) < 0.5:
        raise reject("resampled-too-large")


def _respaced(image: F32, old: tuple[float, ...], new: tuple[float, ...]) -> F32:
    """Linear interpolation of (C, ...) at another spacing, about the same centre; edges repeat outwards.

    Along axes that shrink it is smoothed first. MONAI's Spacing moves what shrinks by up to a pixel.
    """
    for axis, (o, n) in enumerate(zip(old, new, strict=True), start=1):
        length = image.shape[axis]
        if n > o:
            image = _weighted(_smoothing(length, (n / o - 1) / 2), image, axis)
        many = max(1, round(length * o / n))
        place = (length - 1) / 2 + (np.arange(many) - (many - 1) / 2) * (n / o)
        image = _weighted(_between(place, length), image, axis)
    return image


def prepare(picture: Picture, spec: ImageSpec) -> NDArray[np.uint8] | F32:
    """Bring one image to ``spec``.

    In this order: window to [0, 1], polarity, colour, resampling, normalisation.

    Returns:
        (C, H, W) or (C, D, H, W): uint8 for 8-bit images with ``unit`` normalisation and no window,
        else float32.

    Raises:
        FileRejected: ``dimensions``, ``no-finite-values``, ``spacing-missing``, ``resampled-too-large``, or
            ``contrast-lost`` where an image that is not constant would become so.
    """
    if len(picture.size) != len(spec.size):
        raise reject("dimensions")
    image = _prepared(picture, spec)
    if _even(image) and _varies(picture):
        raise reject("contrast-lost")
    return np.ascontiguousarray(_spread(image, spec.channels))


def _even(image: NDArray[Any]) -> bool:
    """Whether each channel of (C, ...) is one value, but for rounding."""
    channels = image.reshape(len(image), -1)
    return bool((channels.max(axis=1) - channels.min(axis=1) <= ROUNDING).all())


def _varies(picture: Picture) -> bool:
    """Whether the finite pixels differ from each other, whatever the colour of the whole."""
    pixels = _finite(picture.pixels).reshape(-1, 3 if picture.colour else 1)
    return bool((pixels != pixels[0]).any())


def _prepared(picture: Picture, spec: ImageSpec) -> NDArray[Any]:
    """The image as :func:`prepare` gives it, but for grey that is to be repeated."""
    pixels = _finite(picture.pixels)
    if pixels is not picture.pixels:
        picture = replace(picture, pixels=pixels, eight_bit=False)
    eight = picture.eight_bit and spec.window is None and spec.normalisation == "unit"
    limits = _limits(picture, spec)
    grey = picture.colour and spec.channels == 1
    untouched = picture.size == spec.size and (
        spec.spacing_mm is None
        or (picture.spacing_mm is not None and _same(picture.spacing_mm, spec.spacing_mm))
    )
    if eight and untouched and not grey and pixels.dtype == np.uint8 and limits == (0.0, 255.0):
        return _channels_first(255 - pixels if picture.inverted else pixels, picture.colour)
    unit = _unit(picture, limits)
    image: F32 = _luminance(unit)[None] if grey else _channels_first(unit, picture.colour)
    image = np.clip(resample(image, picture.spacing_mm, spec), 0.0, 1.0)
    if eight:
        return np.rint(image * 255).astype(np.uint8)
    if spec.normalisation == "zscore":
        spread = float(image.std(dtype=np.float64))
        mean = float(image.mean(dtype=np.float64))
        image = ((image - mean) / spread).astype(np.float32) if spread > ROUNDING else np.zeros_like(image)
    return image


def _luminance(colours: F32) -> F32:
    """(..., 3) to (...), one product after the other: a matrix product adds up as the processor likes."""
    red, green, blue = (colours[..., i] * LUMINANCE[i] for i in range(3))
    return np.asarray(red + green + blue, dtype=np.float32)


def _channels_first(pixels: NDArray[Any], colour: bool) -> NDArray[Any]:
    return np.moveaxis(pixels, -1, 0) if colour else pixels[None]


def _spread(image: NDArray[Any], channels: int) -> NDArray[Any]:
    """Repeat the one channel of a grey image where three are wanted."""
    return image if image.shape[0] == channels else np.broadcast_to(image, (channels, *image.shape[1:]))


def as_float(image: NDArray[Any]) -> F32:
    """An 8-bit image as 0..1; a float32 one as it is."""
    return image if image.dtype == np.float32 else image.astype(np.float32) / np.float32(255)


def in_words(spec: ImageSpec) -> tuple[str, ...]:
    """The steps of :func:`prepare` for the manifest."""
    if spec.window is None:
        window = (
            "intensities to [0, 1]: 8-bit range or the file's display window, else 0.5 to 99.5 percentiles"
        )
    else:
        window = f"intensities to [0, 1]: window centre {spec.window.center:g}, width {spec.window.width:g}"
    size = " x ".join(map(str, spec.size))
    if spec.spacing_mm is None:
        place = f"resize to {size}"
    else:
        spacing = " x ".join(f"{s:g}" for s in spec.spacing_mm)
        place = f"resample to {spacing} mm, then pad or crop to {size}"
    colour = "grey to RGB by repetition" if spec.channels == 3 else "RGB to grey by luminance"
    steps = ("bright is high (MONOCHROME1 inverted)", colour, place)
    return (
        window,
        *steps,
        *(("zero mean, unit spread per image",) if spec.normalisation == "zscore" else ()),
    )
