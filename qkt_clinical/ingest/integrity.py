"""``integrity.html``: what a site's files became, for the site's own eyes. It shows images."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.catalog import HELD_BACK, SPLITS
from qkt_clinical.common.disclosure import shown_count
from qkt_clinical.data.integrity import FileOutcome, rejected_by_code
from qkt_clinical.data.prepared import ImageStack, Labels, Manifest
from qkt_clinical.ingest.codes import REASONS
from qkt_clinical.ingest.leakage import Hashes, flat, look_alike

SAMPLED = 500
"""Images at most that the histogram is made of, evenly over the site."""
BARS = 64
PER_CLASS = 8
PAIRS = 12
TILE = 64
"""Pixels that a picture takes at least, so that small images can be seen."""


def _png(tiles: Sequence[NDArray[Any]], low: float, high: float) -> str:
    """Prepared images side by side as PNG in base64; the middle slice of volumes."""
    from PIL import Image

    shown = []
    for tile in tiles:
        colour = tile.ndim == 3 and tile.shape[0] == 3
        pixels = np.moveaxis(np.asarray(tile, np.float32), 0, -1) if colour else flat(tile)
        scaled = np.clip((pixels - low) / ((high - low) or 1.0), 0, 1)
        image = (scaled * 255).astype(np.uint8)
        image = image if colour else np.repeat(image[..., None], 3, axis=-1)
        times = max(1, -(-TILE // max(image.shape[:2])))
        shown.append(image.repeat(times, axis=0).repeat(times, axis=1))
    stream = io.BytesIO()
    Image.fromarray(np.concatenate(shown, axis=1)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _spacing_words(spacing: tuple[float, ...] | None) -> str:
    return "not said" if spacing is None else " x ".join(f"{s:.3g}" for s in spacing)


def _histogram(images: ImageStack) -> tuple[int, float, float, list[float]]:
    """Number of images used, the ends, and the height of every bar, the tallest 1."""
    chosen = np.unique(np.linspace(0, len(images) - 1, SAMPLED).round().astype(int))
    low, high = (0.0, 255.0) if images.dtype == np.uint8 else (np.inf, -np.inf)
    if images.dtype != np.uint8:
        for i in chosen:
            low, high = min(low, float(images[i].min())), max(high, float(images[i].max()))
    counts = np.zeros(BARS)
    for i in chosen:
        counts += np.histogram(images[i], bins=BARS, range=(low, high if high > low else low + 1))[0]
    return len(chosen), low, high, (counts / counts.max()).tolist()


def render_integrity(
    manifest: Manifest,
    images: ImageStack,
    labels: Labels,
    groups: NDArray[np.str_],
    splits: Mapping[str, NDArray[np.int64]],
    hashes: Hashes,
    outcomes: Sequence[FileOutcome],
    spacings: Sequence[tuple[float, ...] | None],
) -> str:
    """The whole page. Same prepared site, same text.

    Args:
        manifest, images, labels, groups, splits: of the prepared site.
        hashes: (N, 2) of the images, see :func:`qkt_clinical.ingest.leakage.hashes_of`.
        outcomes: rows of ``integrity.json``.
        spacings: of the images as stored.
    """
    from qkt_clinical.common.html import page_environment

    environment = page_environment("qkt_clinical.ingest")
    environment.filters["count"] = shown_count
    sampled, low, high, bars = _histogram(images)
    sheets = [
        (name, _png([images[i] for i in np.flatnonzero(labels == c)[:PER_CLASS]], low, high))
        for c, name in enumerate(manifest.classes)
        if (labels == c).any()
    ]
    parts = [s for s in (*SPLITS, HELD_BACK) if s in splits]
    where = {int(i): s for s in parts for i in splits[s]}
    pairs = look_alike(hashes, [splits[s] for s in parts])
    shown = [
        {
            "first": _png([images[p.first]], low, high),
            "second": _png([images[p.second]], low, high),
            "words": " / ".join(f"{where[i]}, patient {groups[i]}" for i in p),
        }
        for p in pairs[:PAIRS]
    ]
    rejected = [o for o in outcomes if not o.accepted]
    codes = rejected_by_code(rejected)
    return environment.get_template("integrity.html").render(
        m=manifest,
        splits=parts,
        codes=[(code, number, REASONS[code]) for code, number in sorted(codes.items())],
        rejected=rejected,
        reasons=REASONS,
        sampled=sampled,
        low=f"{low:g}",
        high=f"{high:g}",
        bars=bars,
        spacings=sorted(Counter(map(_spacing_words, spacings)).items(), key=lambda p: (-p[1], p[0])),
        sheets=sheets,
        alike=pairs,
        shown=shown,
    )
