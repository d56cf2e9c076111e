"""Source kind ``phantom``: a site whose images are drawn in memory, with no file at all."""

from __future__ import annotations

from collections.abc import Sequence

from qkt_clinical.catalog import BLOOD_CELLS, LESIONS
from qkt_clinical.ingest.arrays import Picture, eight_bit_limits
from qkt_clinical.ingest.readers.base import DecodeResults, Reader
from qkt_clinical.ingest.source import DecodedImage, Request, SourceFile, Unit


class PhantomReader(Reader):
    """Draws the phantom hospital of the site's name with the run's seed."""

    kind = "phantom"
    label_sources = frozenset({"npz"})
    has_files = False
    remembered = False

    def units(self, files: Sequence[SourceFile]) -> list[Unit]:
        """One, without files."""
        return [Unit(())]

    def read(self, unit: Unit, request: Request) -> DecodeResults:
        """All images of the hospital.

        Raises:
            ConfigError: no phantom hospital has that name.
        """
        from qkt_clinical.datasets.phantom import render_images

        images, labels, patients = render_images(request.site, seed=request.seed)
        colour = images.shape[-1] == 3
        words = BLOOD_CELLS if colour else LESIONS
        limits = eight_bit_limits(images.dtype)

        def drawn(i: int) -> DecodedImage:
            picture = Picture(images[i], colour=colour, limits=limits, eight_bit=limits is not None)
            return DecodedImage((), picture, label=words[labels[i]], patient=patients[i], item=str(i))

        return [drawn(i) for i in range(len(images))]
