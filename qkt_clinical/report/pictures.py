"""Pictures of test images on which two models differ, for hospitals with consent. Reads prepared arrays."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.catalog import HELD_BACK
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import PreparedSite, load_held_back, load_prepared
from qkt_clinical.records.evaluation import Flip
from qkt_clinical.records.outputs import Outputs, QueryOutputs

MAX_PICTURES = 12
"""Maximum number of pictures per direction."""
SIDE = 96
"""Maximum length of a picture's longer side in pixels."""


@dataclass(frozen=True)
class EmbeddedImage:
    """A test image as PNG in base64, its class, and the answers of both models."""

    png: str
    site: str
    actual: str
    before: str
    after: str


@dataclass(frozen=True)
class Flipped:
    """Number of cases of one direction, and the pictures of some."""

    cases: int
    pictures: tuple[EmbeddedImage, ...]
    strange: int = 0
    """Cases of hospitals that consent whose image is no test image here, or of another class."""


def choose(flips: Sequence[Flip], limit: int = MAX_PICTURES) -> list[Flip]:
    """Choose at most ``limit`` flips, from every class and site in turn, keeping their order within these."""
    kinds = sorted({(flip.actual, flip.site) for flip in flips})
    rows = [[flip for flip in flips if (flip.actual, flip.site) == kind] for kind in kinds]
    turns = chain.from_iterable(zip_longest(*rows))
    return [flip for flip in turns if flip is not None][:limit]


def png(image: NDArray[Any]) -> str:
    """A prepared image (C, H, W) as PNG in base64, the middle slice of a volume (C, D, H, W).

    Bytes are shown as they are, other values from the image's least to its greatest. The longer side is
    brought to ``SIDE`` at most.
    """
    from PIL import Image

    plane = image if image.ndim == 3 else image[:, image.shape[1] // 2]
    if plane.dtype != np.uint8:
        low, high = float(plane.min()), float(plane.max())
        plane = np.round(255 * (plane.astype(np.float64) - low) / ((high - low) or 1.0)).astype(np.uint8)
    pixels = np.ascontiguousarray(np.moveaxis(plane, 0, -1) if len(plane) == 3 else plane[0])
    drawn = Image.fromarray(pixels)
    if max(drawn.size) > SIDE:
        drawn.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    stream = io.BytesIO()
    drawn.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _is_test_image(site: PreparedSite, flip: Flip) -> bool:
    """Whether the evaluation's image is a test image here, and of the class that it says."""
    if flip.index not in site.splits[flip.split]:
        return False
    classes = site.manifest.classes
    return flip.actual in classes and bool(site.labels[flip.index] == classes.index(flip.actual))


def _arrays(root: Path, site: str, split: str) -> PreparedSite | None:
    space = Workspace(root)
    return (
        load_held_back(space.held_back(site)) if split == HELD_BACK else load_prepared(space.prepared(site))
    )


def flipped_cases(root: Path, outputs: Outputs, query: QueryOutputs) -> dict[bool, Flipped]:
    """Cases that the answer gained (True) and lost (False), with pictures of hospitals that consent.

    What an evaluation of other data calls a test image may be one that a model was trained on: no picture of
    an image that is not in the test split, or of another class than it says.

    Raises:
        PreparedError: a prepared site cannot be read.
    """
    consent = {site.name for site in outputs.sites if site.pictures and site.manifest is not None}
    willing = [flip for flip in query.evaluation.flips if flip.site in consent]
    sites = {place: _arrays(root, *place) for place in sorted({(flip.site, flip.split) for flip in willing})}

    def arrays(flip: Flip) -> PreparedSite | None:
        return sites[flip.site, flip.split]

    held = [f for f in willing if (site := arrays(f)) is not None and _is_test_image(site, f)]
    found = {}
    for gained in (True, False):
        cases = [flip for flip in query.evaluation.flips if flip.gained == gained]
        pictures = tuple(
            EmbeddedImage(png(site.images[f.index]), f.site, f.actual, f.before, f.after)
            for f in choose([flip for flip in held if flip.gained == gained])
            if (site := arrays(f)) is not None
        )
        strange = sum(flip.gained == gained for flip in willing) - sum(flip.gained == gained for flip in held)
        found[gained] = Flipped(len(cases), pictures, strange)
    return found
