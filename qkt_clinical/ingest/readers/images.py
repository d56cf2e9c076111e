"""PNG, JPEG and TIFF files.

EXIF orientation is applied; palettes, CMYK and YCbCr become RGB; transparency is laid over black, which
is the background of most medical images. More than 8 bits and floating point keep their values. JPEG is
decoded by Pillow, PNG by libpng (Pillow cuts its colour of 16 bits to 8), TIFF by tifffile.
"""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qkt_clinical.errors import FileRejected
from qkt_clinical.ingest.arrays import Picture
from qkt_clinical.ingest.codes import reading, reject
from qkt_clinical.ingest.readers import tiff
from qkt_clinical.ingest.readers.base import DecodeResults, Judge, Reader
from qkt_clinical.ingest.readers.raster import Pixels, on_black, picture_of, upright
from qkt_clinical.ingest.source import (
    DecodedImage,
    Found,
    Request,
    Unit,
    bounded_pixels,
    opened,
    whole_file,
)

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG")
BANDS = {"1": 1, "L": 1, "P": 3, "LA": 2, "I;16": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "YCbCr": 3}
"""Pillow's modes of these formats, with bytes that a pixel takes."""
PNG_DEPTH = 24
"""Place of the bits per sample in a PNG file."""
MOST_SCANS = 200
"""Of a progressive JPEG, of which ten are usual: each is a pass over all pixels, however short it is."""
SCAN = re.compile(rb"\xff\xda")
ORIENTATION = 0x0112


def _open(data: bytes, max_bytes: int) -> Image:
    """Open a PNG or JPEG file lazily after checking its declared size.

    Raises:
        FileRejected: any code of one file.
    """
    import PIL.Image

    try:
        with warnings.catch_warnings():
            # Large sizes are judged below against max_file_mb, not by Pillow's own guess.
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            with reading("not-picture", PIL.UnidentifiedImageError):
                image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except PIL.Image.DecompressionBombError:
        raise reject("too-large") from None
    if image.mode not in BANDS:
        raise reject("colour-unknown")
    deep = image.format == "PNG" and data[PNG_DEPTH] == 16
    with reading("header-unreadable"):
        # A camera's preview behind its picture (MPO) is none of its own; frames of an APNG are.
        frames = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
    bounded_pixels((frames, image.height, image.width, BANDS[image.mode]), 16 if deep else 8, max_bytes)
    if frames > 1:
        raise reject("multi-frame")
    return image


def _orientation(image: Image) -> int:
    with reading("header-unreadable"):
        found = image.getexif().get(ORIENTATION, 1)
        return found if isinstance(found, int) else 1


def _png(data: bytes) -> Pixels:
    """Samples as stored, palettes painted, fewer than 8 bits brought to 8, opacity laid over black."""
    import imagecodecs

    try:
        with reading("pixels-undecodable"):
            held: Pixels = imagecodecs.png_decode(data)
    except FileRejected:
        raise reject("pixels-undecodable" if b"IEND" in data[-1024:] else "truncated") from None
    if held.ndim == 2:
        return held
    colour, opacity = held[..., : held.shape[-1] // 2 * 2 - 1], held[..., -1]
    if held.shape[-1] % 2 == 0:
        held = on_black(colour, opacity)
    return held[..., 0] if held.shape[-1] == 1 else held


def _jpeg(image: Image, data: bytes) -> Pixels:
    """Decoded pixels: (H, W) grey or (H, W, 3)."""
    if sum(1 for _ in SCAN.finditer(data)) > MOST_SCANS:
        raise reject("pixels-undecodable")
    with reading("pixels-undecodable"):
        try:
            image.load()
        except OSError as error:
            raise reject("truncated" if "truncated" in str(error) else "pixels-undecodable") from None
        return np.asarray(image if image.mode == "L" else image.convert("RGB"))


def _pages(path: Path, max_bytes: int, *, volumes: bool | None) -> tuple[list[Pixels], bool]:
    """Upright pages of a file, and whether low values are bright.

    Args:
        path: of the file.
        max_bytes: that it may take, decoded too.
        volumes: whether the pages are slices of one; where they are not, only one is read. None: whatever
            the file holds.
    """
    with opened(path, max_bytes) as stream:
        if stream.read(4) in tiff.MAGICS:
            if volumes is False and tiff.count_pages(stream) > 1:
                raise reject("multi-frame")
            pages = list(tiff.read_pages(stream, max_bytes))
            if len({page.inverted for page in pages}) > 1:
                raise reject("sizes-mixed")
            return [page.pixels for page in pages], pages[0].inverted
    data = whole_file(path, max_bytes)
    with _open(data, max_bytes) as image:
        orientation = _orientation(image) if image.format != "PNG" or _has_words(data) else 1
        pixels = _png(data) if image.format == "PNG" else _jpeg(image, data)
    return [upright(pixels, orientation)], False


def _has_words(data: bytes) -> bool:
    """Whether a PNG file may say an orientation: to be sure that it does not, Pillow decodes all pixels."""
    return any(kind in data for kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"))


def _picture(path: Path, max_bytes: int, *, volumes: bool | None) -> Picture:
    pages, inverted = _pages(path, max_bytes, volumes=volumes)
    return picture_of(pages, volumes=len(pages) > 1 if volumes is None else volumes, inverted=inverted)


class ImageReader(Reader):
    """PNG, JPEG and TIFF files. For volumes, the pages of a TIFF file are its slices."""

    kind = "images"
    suffixes = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
    libraries = ("imagecodecs", "pillow", "tifffile")

    def sniff(self, head: bytes, ending: str) -> bool:
        """By how the file begins, whatever its name."""
        return head.startswith((b"\x89PNG", b"\xff\xd8\xff", *tiff.MAGICS))

    def read(self, unit: Unit, request: Request) -> DecodeResults:
        """Read a file's one image."""
        (file,) = unit.files
        return [DecodedImage((file,), _picture(file.path, request.max_bytes, volumes=request.volumes))]

    def check(self, path: Path, max_bytes: int, judge: Judge) -> Found:
        """Decode a file by itself, whatever its number of pages."""
        picture = _picture(path, max_bytes, volumes=None)
        judge(picture)
        return Found(picture.pixels.shape, str(picture.pixels.dtype))
