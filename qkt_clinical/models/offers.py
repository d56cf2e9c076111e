"""Offers of teachers: card and mask, read before any weights are fetched."""

from __future__ import annotations

from pathlib import Path

from qkt_clinical.errors import BundleError
from qkt_clinical.records.card import (
    CARD,
    WEIGHTS,
    Card,
    ImageStatistics,
    read_card,
    read_card_file,
    read_mask_file,
)
from qkt_clinical.records.plan import Offer


def check_teacher(card: Card, site: str, folder: Path) -> None:
    """Raise BundleError unless the card, found in ``folder``, is that of the site's teacher."""
    if card.kind != "teacher" or card.site != site:
        raise BundleError(
            f"a {card.kind} of site {card.site!r} where the teacher of {site!r} should be",
            remedy=f"Put the bundle of {site!r} there.",
            file=folder,
            site=site,
            code="bundle-card",
        )


def read_offer(folder: Path, site: str) -> Offer:
    """Read the offer in a site's bundle folder; no weights are read.

    Raises:
        BundleError: card or mask is not valid, or not that of the site's teacher, or a file is missing.
    """
    card, card_bytes, digest = read_card_file(folder)
    check_teacher(card, site, folder)
    mask = read_mask_file(folder, card)
    if mask is None:
        raise BundleError(
            "no mask", remedy=f"Run 'qkt mask {site}'.", file=folder, site=site, code="bundle-mask"
        )
    weights = folder / WEIGHTS
    if weights.is_symlink() or not weights.is_file():
        raise BundleError(
            "no weights",
            remedy=f"Run 'qkt train {site}', or put the site's bundle there.",
            file=weights,
            site=site,
            code="bundle-missing",
        )
    return Offer(card, mask.mask, card_bytes + mask.bytes, digest)


def read_image_statistics(folder: Path) -> ImageStatistics | None:
    """What the training images of a bundle look like; None where it does not say, or is not there.

    Raises:
        BundleError: the card is not valid.
    """
    return read_card(folder).image_statistics if (folder / CARD).is_file() else None
