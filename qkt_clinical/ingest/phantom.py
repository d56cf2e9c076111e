"""Source kind ``phantom``: a site whose images are drawn in memory, with no file at all."""

from __future__ import annotations

from collections.abc import Iterator

from qkt_clinical.catalog import BLOOD_CELLS, LESIONS
from qkt_clinical.ingest.arrays import Picture, eight_bit_limits
from qkt_clinical.ingest.source import Outcome, Reading, Request, Sample


def read(request: Request) -> Reading:
    """Draw the phantom hospital of the site's name with the run's seed.

    Raises:
        ConfigError: no phantom hospital has that name.
    """
    from qkt_clinical.datasets.phantom import render_images

    images, labels, patients = render_images(request.site, seed=request.seed)
    colour = images.shape[-1] == 3
    words = BLOOD_CELLS if colour else LESIONS

    def outcomes() -> Iterator[Outcome]:
        for i, pixels in enumerate(images):
            limits = eight_bit_limits(pixels.dtype)
            picture = Picture(pixels, colour=colour, limits=limits, eight_bit=limits is not None)
            yield Sample((), picture, label=words[labels[i]], patient=patients[i], item=str(i))

    return Reading(len(images), outcomes())
