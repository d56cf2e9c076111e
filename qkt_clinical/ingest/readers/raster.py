"""What the picture formats have in common: orientation, transparency, and what an image's samples mean."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.ingest.arrays import Picture, eight_bit_limits
from qkt_clinical.ingest.codes import reject

Pixels = NDArray[Any]


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Pixels (H, W) or (H, W, 3) as they are to be looked at; from 5 on height and width change places.

    Args:
        pixels: as stored.
        orientation: 1 to 8 as TIFF and EXIF number them (tag 274); any other is taken as 1.
    """
    turned = np.swapaxes(pixels, 0, 1) if orientation in (5, 6, 7, 8) else pixels
    rows = turned[::-1] if orientation in (3, 4, 7, 8) else turned
    return rows[:, ::-1] if orientation in (2, 3, 6, 7) else rows


def on_black(pixels: Pixels, alpha: Pixels) -> Pixels:
    """Unsigned integers (H, W) or (H, W, 3) laid over black by their opacity (H, W) of the same type."""
    most = np.iinfo(pixels.dtype).max
    share = alpha.astype(np.uint64)
    share = share[..., None] if pixels.ndim == 3 else share
    return ((pixels.astype(np.uint64) * share + most // 2) // most).astype(pixels.dtype)


def rgb_of_inks(pixels: Pixels) -> Pixels:
    """Cyan, magenta, yellow and black (H, W, 4), each full at its type's maximum, as RGB (H, W, 3)."""
    most = np.iinfo(pixels.dtype).max
    paper = most - pixels
    return on_black(paper[..., :3], paper[..., 3])


def picture_of(pages: list[Pixels], *, volumes: bool, inverted: bool = False) -> Picture:
    """Upright pages as one picture: the only one, or the slices of a volume.

    Raises:
        FileRejected: ``multi-frame``, ``dimensions`` or ``sizes-mixed``.
    """
    if len(pages) > 1 and not volumes:
        raise reject("multi-frame")
    if len(pages) < 2 and volumes:
        raise reject("dimensions")
    if len({(page.shape, page.dtype) for page in pages}) > 1:
        raise reject("sizes-mixed")
    pixels = np.stack(pages) if volumes else np.ascontiguousarray(pages[0])
    limits = eight_bit_limits(pixels.dtype)
    colour = pixels.ndim == (4 if volumes else 3)
    return Picture(pixels, colour=colour, limits=limits, eight_bit=limits is not None, inverted=inverted)
