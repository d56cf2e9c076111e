"""PNG, JPEG and TIFF files, read by Pillow.

EXIF orientation is applied; palettes, CMYK and YCbCr become RGB; transparency is laid over black, which
is the background of most medical images. 16-bit and floating-point greys keep their values.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.errors import FileRejected
from qkt_clinical.ingest.arrays import Picture, eight_bit_limits
from qkt_clinical.ingest.codes import reading, reject
from qkt_clinical.ingest.source import (
    Found,
    Request,
    Sample,
    SourceFile,
    bounded_pixels,
    bounded_size,
)

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "TIFF")
DEEP = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N", "F"})
"""Pillow's modes with more than 8 bits, all grey."""
BANDS = {"1": 1, "L": 1, "P": 3, "LA": 2, "La": 2, "PA": 4, "RGB": 3, "RGBA": 4, "RGBa": 4, "RGBX": 4}
OTHER_COLOURS = {"CMYK": 4, "YCbCr": 3}


def _open(path: Path, max_bytes: int) -> Image:
    """Open a file lazily after checking its declared size.

    Raises:
        FileRejected: any code of one file.
    """
    import PIL.Image

    bounded_size(path, max_bytes)
    try:
        with warnings.catch_warnings():
            # Large sizes are judged below against max_file_mb, not by Pillow's own guess.
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            with reading("not-picture", PIL.UnidentifiedImageError):
                image = PIL.Image.open(path, formats=FORMATS)
    except PIL.Image.DecompressionBombError:
        raise reject("too-large") from None
    bands = BANDS.get(image.mode) or OTHER_COLOURS.get(image.mode) or (4 if image.mode in DEEP else None)
    if bands is None:
        image.close()
        raise reject("colour-unknown")
    try:
        bounded_pixels((frames(image), image.height, image.width, bands), 8, max_bytes)
    except FileRejected:
        image.close()
        raise
    return image


def frames(image: Image) -> int:
    """Number of pages or animation frames.

    Raises:
        FileRejected: ``header-unreadable``.
    """
    with reading("header-unreadable"):
        return int(getattr(image, "n_frames", 1))


def _pixels(image: Image) -> NDArray[Any]:
    """Decoded pixels of the current frame: (H, W) grey or (H, W, 3)."""
    import PIL.Image
    from PIL import ImageOps

    try:
        with reading("pixels-undecodable"):
            try:
                image.load()
            except OSError as error:
                raise reject("truncated" if "truncated" in str(error) else "pixels-undecodable") from None
            upright = ImageOps.exif_transpose(image)
            if upright.mode in DEEP:
                return np.asarray(upright)
            if upright.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in upright.info:
                solid = upright.convert("RGBA")
                black = PIL.Image.new("RGBA", solid.size, (0, 0, 0, 255))
                flat = PIL.Image.alpha_composite(black, solid)
                return np.asarray(flat.convert("L" if upright.mode in ("LA", "La", "L", "1") else "RGB"))
            return np.asarray(upright.convert("L" if upright.mode in ("1", "L") else "RGB"))
    except PIL.Image.DecompressionBombError:
        raise reject("too-large") from None


def _picture(image: Image, *, volumes: bool) -> Picture:
    count = frames(image)
    if not volumes:
        if count > 1:
            raise reject("multi-frame")
        pixels = _pixels(image)
    else:
        if count < 2:
            raise reject("dimensions")
        pages = []
        for number in range(count):
            with reading("pixels-undecodable"):
                image.seek(number)
            pages.append(_pixels(image))
        if len({(page.shape, page.dtype) for page in pages}) > 1:
            raise reject("sizes-mixed")
        pixels = np.stack(pages)
    limits = eight_bit_limits(pixels.dtype)
    colour = pixels.ndim == (4 if volumes else 3)
    return Picture(pixels, colour=colour, limits=limits, eight_bit=limits is not None)


def read(file: SourceFile, request: Request) -> Sample:
    """Read a file's one image; for volumes, the pages of a TIFF file are its slices.

    Raises:
        FileRejected: any code of one file.
    """
    with _open(file.path, request.max_bytes) as image:
        return Sample((file,), _picture(image, volumes=request.volumes))


def check(path: Path, max_bytes: int) -> Found:
    """Decode every frame of a file.

    Raises:
        FileRejected: with the reason.
    """
    with _open(path, max_bytes) as image:
        pixels = _picture(image, volumes=frames(image) > 1).pixels
    return Found(pixels.shape, str(pixels.dtype))
