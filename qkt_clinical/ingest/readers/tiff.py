"""TIFF files, read by tifffile: samples of any depth come as they are stored.

Pillow cuts colour of 16 bits to 8 and leaves 16-bit greys of which 0 is white as they are. What the standard
asks beyond the samples is done here: polarity, palettes, opacity, inks and orientation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from qkt_clinical.ingest.codes import reading, reject
from qkt_clinical.ingest.readers.pixels import read_stream
from qkt_clinical.ingest.readers.raster import Pixels, on_black, rgb_of_inks, upright
from qkt_clinical.ingest.source import bounded_pixels

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How files begin: little and big endian, classic and BigTIFF."""
PLAIN = frozenset({1, 2, 3, 4, 5, 8, 32773, 32946, 34925, 50000})
"""Compressions (tag 259) that decode into as many bytes as are asked for: none, fax, LZW, Deflate, PackBits,
LZMA and Zstandard."""
CODED = frozenset({6, 7, 33003, 33005, 34712, 34892})
"""JPEG and JPEG 2000, whose streams say their size once more."""
MOST_PAGES = 65_536
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, INKS, YCBCR = 0, 1, 2, 3, 5, 6
"""Photometric interpretations (tag 262) that can be read."""
COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, INKS: 4, YCBCR: 3}
"""Samples of a pixel beside opacity and the like."""
OPACITY = 2
"""Extra sample (tag 338) by which colours are still to be multiplied; by number 1 they are already."""


class Page(NamedTuple):
    """One page as it is to be looked at."""

    pixels: Pixels
    """(H, W) or (H, W, 3)."""
    inverted: bool
    """Whether low values are bright."""


def count_pages(stream: BinaryIO) -> int:
    """How many pages a file declares, :data:`MOST_PAGES` and one at most.

    Raises:
        FileRejected: ``not-picture``, ``header-unreadable`` or ``truncated``.
    """
    with _file(stream) as file, reading("header-unreadable"):
        return sum(1 for _ in _pages(file))


def read_pages(stream: BinaryIO, max_bytes: int) -> Iterator[Page]:
    """The pages one by one, all bounded together before the first is decoded.

    Raises:
        FileRejected: any code of one file.
    """
    with _file(stream) as file, reading("header-unreadable"):
        pages = list(_pages(file))
        if len(pages) > MOST_PAGES:
            raise reject("too-large")
        left = 8 * max_bytes
        for page in pages:
            left -= _bits(page, max_bytes)
            if left < 0:
                raise reject("too-large")
        for page in pages:
            yield _page(page)


def _file(stream: BinaryIO) -> TiffFile:
    from tifffile import TiffFile

    stream.seek(0)
    with reading("not-picture"):
        # Without the ways of single makers: pages are what the standard says.
        return TiffFile(
            stream, name="image.tif", is_lsm=False, is_scanimage=False, is_ndpi=False, is_ome=False
        )


def _pages(file: TiffFile) -> Iterator[TiffPage]:
    """The pages of the main chain, until it ends or there are too many.

    Raises:
        FileRejected: ``header-unreadable`` for a chain in a circle or without pages, ``truncated`` for one
            that leads out of the file.
    """
    seen: set[int] = set()
    while len(seen) <= MOST_PAGES:
        try:
            page: Any = file.pages[len(seen)]
        except IndexError:
            break
        if page.offset in seen:
            raise reject("header-unreadable")
        seen.add(page.offset)
        yield page
    if not seen:
        raise reject("header-unreadable")
    if len(seen) <= MOST_PAGES:
        _check_end(file)


def _check_end(file: TiffFile) -> None:
    """Refuse a chain of pages that ends elsewhere than at its last page; tifffile takes what it found."""
    file.filehandle.seek(file.pages.next_page_offset or 0)
    held = file.filehandle.read(file.tiff.offsetsize)
    if any(held) or len(held) < file.tiff.offsetsize:
        raise reject("truncated")


def _bits(page: TiffPage, max_bytes: int) -> int:
    """Bits that a page takes when it is decoded, and a bound on each of its tiles.

    Raises:
        FileRejected: ``colour-unknown``, ``multi-frame``, ``pixels-undecodable`` or ``too-large``.
    """
    if page.photometric not in COLOURS or page.samplesperpixel < COLOURS[page.photometric]:
        raise reject("colour-unknown")
    if page.imagedepth != 1:
        raise reject("multi-frame")
    if page.compression not in PLAIN | CODED or page.dtype is None:
        raise reject("pixels-undecodable")
    bits = 8 * page.dtype.itemsize
    shape = (page.imagelength, page.imagewidth, page.samplesperpixel)
    bounded_pixels(shape, bits, max_bytes)
    if page.is_tiled:
        bounded_pixels((page.tilelength, page.tilewidth, page.samplesperpixel), bits, max_bytes)
    return bits * int(np.prod([int(length) for length in shape], dtype=object))


def _page(page: TiffPage) -> Page:
    _check_segments(page)
    with reading("pixels-undecodable"):
        held = page.asarray(squeeze=False, maxworkers=1)[:, 0]
        # Planes of their own come first, samples beside one another last.
        samples = np.moveaxis(held[..., 0], 0, -1) if len(held) > 1 else held[0]
        pixels = _coloured(page, samples)
    if pixels.dtype.kind not in "iuf":
        raise reject("pixels-undecodable")
    tag = page.tags.get(274)
    orientation = tag.value if tag is not None and isinstance(tag.value, int) else 1
    return Page(upright(pixels, orientation), page.photometric == WHITE_IS_ZERO)


def _check_segments(page: TiffPage) -> None:
    """Refuse strips and tiles that are not there, or whose own header declares more than the page does.

    tifffile takes an absent one as black, and decoders of JPEG allocate by what the stream says.

    Raises:
        FileRejected: ``truncated`` or ``pixels-undecodable``.
    """
    places = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    wanted = int(np.prod(page.chunked, dtype=np.int64))
    if len(places) < wanted and not page.is_contiguous:
        raise reject("truncated")
    size = page.parent.filehandle.size
    if not places or any(at <= 0 or length <= 0 for at, length in places[:wanted]):
        raise reject("pixels-undecodable")
    if any(at + length > size for at, length in places[:wanted]):
        raise reject("truncated")
    if page.compression in CODED:
        chunk = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        limit = [max(c, n) for c, n in zip(chunk, (1, 1), strict=True)]
        for at, length in places[:wanted]:
            page.parent.filehandle.seek(at)
            declared = read_stream(page.parent.filehandle.read(length))
            if declared is None or declared.rows > limit[0] or declared.columns > limit[1]:
                raise reject("pixels-undecodable")


def _coloured(page: TiffPage, samples: Pixels) -> Pixels:
    """Samples (H, W, S) as grey (H, W) or RGB (H, W, 3), opacity laid over black."""
    bits = page.bitspersample if isinstance(page.bitspersample, int) else 0
    if not bits:
        raise reject("pixels-undecodable")
    number = COLOURS[page.photometric]
    own, extra = samples[..., :number], list(page.extrasamples)
    if page.photometric == PALETTE:
        return _painted(page, own[..., 0])
    if samples.dtype.kind in "bu" and bits < 8:
        # Fewer than 8 bits fill the range of 8, as they do on every screen.
        own = (own.astype(np.uint16) * 255 // (2**bits - 1)).astype(np.uint8)
    if page.photometric == INKS:
        if page.tags.valueof(332, 1) != 1 or own.dtype.kind != "u":  # other inks than the four
            raise reject("colour-unknown")
        own = rgb_of_inks(own)
    elif page.photometric == YCBCR and page.compression not in CODED:
        raise reject("colour-unknown")
    plain = own[..., 0] if number == 1 else own
    if OPACITY in extra and samples.dtype.kind == "u" and bits in (8, 16, 32):
        opacity = samples[..., samples.shape[-1] - len(extra) + extra.index(OPACITY)]
        plain = _faded(plain, opacity, white_is_zero=page.photometric == WHITE_IS_ZERO)
    return plain


def _faded(pixels: Pixels, opacity: Pixels, *, white_is_zero: bool) -> Pixels:
    if not white_is_zero:
        return on_black(pixels, opacity)
    most = np.iinfo(pixels.dtype).max
    return np.asarray(most - on_black(most - pixels, opacity))


def _painted(page: TiffPage, index: Pixels) -> Pixels:
    """Palette colours of 8 bits; the map holds 16, though some writers leave 8 in the low byte."""
    colours = page.colormap
    if colours is None or index.dtype.kind not in "bu" or int(index.max()) >= colours.shape[1]:
        raise reject("pixels-undecodable")
    eight = (colours >> 8 if int(colours.max()) > 255 else colours).astype(np.uint8)
    return np.moveaxis(eight[:, index.astype(np.intp)], 0, -1)
