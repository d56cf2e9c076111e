"""What a teacher offers: its card and mask, read before any weight is fetched."""

from __future__ import annotations

from pathlib import Path

from qkt_clinical.common.files import digest_file
from qkt_clinical.errors import BundleError
from qkt_clinical.records.card import CARD, WEIGHTS, Card, read_card, read_mask
from qkt_clinical.records.plan import SHARED, Offer


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
    """What a site's bundle folder offers; no weight is read.

    Raises:
        BundleError: card or mask is not valid, or not that of the site's teacher, or a file is missing.
    """
    card = read_card(folder)
    check_teacher(card, site, folder)
    mask = read_mask(folder, card)
    if mask is None:
        raise BundleError(
            "no mask", remedy=f"Run 'qkt mask {site}'.", file=folder, site=site, code="bundle-mask"
        )
    if not (folder / WEIGHTS).is_file():
        raise BundleError(
            "no weights",
            remedy=f"Run 'qkt train {site}', or put the site's bundle there.",
            file=folder / WEIGHTS,
            site=site,
            code="bundle-missing",
        )
    size = sum((folder / f).stat().st_size for f in SHARED)
    return Offer(card, mask, size, digest_file(folder / CARD))
