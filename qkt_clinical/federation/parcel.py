"""Bundles in transit: names to bytes. Received bundles are bounded and checked before they are stored."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qkt_clinical.common.files import read_plain
from qkt_clinical.config.base import NAME
from qkt_clinical.errors import BundleError
from qkt_clinical.models.bundle import Bundle, load_bundle
from qkt_clinical.models.offers import check_teacher
from qkt_clinical.records.card import (
    CARD,
    MASK,
    MAX_JSON_BYTES,
    REMEDY,
    WEIGHTS,
    Card,
    Mask,
    cannot_be_read,
    read_card,
    read_mask,
)
from qkt_clinical.records.plan import SHARED

FileContents = Mapping[str, bytes]
"""Name to content: of a teacher those in :data:`qkt_clinical.records.plan.SHARED`."""


def pack(folder: Path, names: tuple[str, ...] = SHARED) -> dict[str, bytes]:
    """The named files of a bundle's folder, if they are plain ones and no larger than its card says.

    Raises:
        BundleError: a file is none, or is not there.
    """
    weights = read_card(folder).weights.bytes if WEIGHTS in names else 0
    files = {}
    for name in names:
        try:
            files[name] = read_plain(folder / name, weights if name == WEIGHTS else MAX_JSON_BYTES)
        except OSError as error:
            raise cannot_be_read(error, folder / name, None) from None
    return files


def _refuse(what: str, site: str, code: str) -> BundleError:
    return BundleError(what, remedy=REMEDY, site=site, code=code)


def check_files(files: Any, site: str, names: tuple[str, ...] = SHARED) -> dict[str, bytes]:
    """Check that a peer sent exactly the expected files, of possible sizes.

    Raises:
        BundleError: codes ``bundle-missing``, ``bundle-size``, ``bundle-format``.
    """
    if not isinstance(files, Mapping) or not all(
        isinstance(k, str) and isinstance(v, bytes) for k, v in files.items()
    ):
        raise _refuse("not files", site, "bundle-format")
    if set(files) != set(names):
        raise _refuse(f"files are not {', '.join(names[:8])}", site, "bundle-missing")
    for name, content in files.items():
        if not name.endswith(WEIGHTS) and len(content) > MAX_JSON_BYTES:
            raise _refuse(f"{name} is larger than {MAX_JSON_BYTES} bytes", site, "bundle-size")
    return dict(files)


@contextmanager
def _laid_out(files: FileContents, site: str) -> Iterator[Path]:
    """Write the files to a temporary folder named after the site."""
    with tempfile.TemporaryDirectory(prefix="qkt-") as temporary:
        folder = Path(temporary) / site
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        yield folder


def read_offer_files(files: Any, site: str) -> tuple[Card, Mask]:
    """Read card and mask of an offered teacher, whose weights are elsewhere.

    Raises:
        BundleError: not a card and a mask of the site's teacher.
    """
    with _laid_out(check_files(files, site, (CARD, MASK)), site) as folder:
        card = read_card(folder)
        check_teacher(card, site, Path(site))
        mask = read_mask(folder, card)
        assert mask is not None, "it was laid out"
        return card, mask


def unpack_teacher(files: Any, site: str, folder: Path) -> Bundle:
    """Write a teacher's files into an empty folder after every check that a bundle gets.

    Raises:
        BundleError: see :func:`qkt_clinical.models.bundle.load_bundle`; also if it is not the site's teacher.
    """
    found = check_files(files, site)
    with _laid_out({n: found[n] for n in (CARD, MASK)}, site) as light:
        card = read_card(light)
        check_teacher(card, site, Path(site))
        read_mask(light, card)
    if len(found[WEIGHTS]) != card.weights.bytes:
        raise _refuse(
            f"weights of {len(found[WEIGHTS])} bytes, the card says {card.weights.bytes}", site, "bundle-size"
        )
    for name, content in found.items():
        (folder / name).write_bytes(content)
    return load_bundle(folder)


STUDENT = (CARD, WEIGHTS, "query.json", "plan.json")
"""The files of a student that leave its site, beside the bundles of its experts: no counts, no reference."""


def pack_student(folder: Path) -> dict[str, bytes]:
    """Files of a student that may be sent; for a routed one also its experts'."""
    files = pack(folder, STUDENT)
    for place in sorted((folder / "experts").glob("*")):
        files |= {f"experts/{place.name}/{n}": content for n, content in pack(place).items()}
    return files


def unpack_student(files: Any, site: str, folder: Path) -> Bundle:
    """Write a student's files into an empty folder after every check that a bundle gets.

    Raises:
        BundleError: see :func:`qkt_clinical.models.bundle.load_bundle`.
    """
    names = [str(n) for n in files] if isinstance(files, Mapping) else []
    experts = sorted({n.split("/")[1] for n in names if n.startswith("experts/") and n.count("/") == 2})
    if len(experts) > 64 or not all(NAME.fullmatch(e) for e in experts):
        raise _refuse("files of experts that cannot be", site, "bundle-missing")
    found = check_files(files, site, (*STUDENT, *(f"experts/{e}/{n}" for e in experts for n in SHARED)))
    (folder / CARD).write_bytes(found[CARD])
    card = read_card(folder)
    if card.kind != "student" or card.site != site:
        raise _refuse(f"a {card.kind} of {card.site!r} where a student should be", site, "bundle-card")
    if set(card.decision.experts if card.decision else ()) != set(experts):
        raise _refuse("the experts are not those of the card", site, "bundle-missing")
    if len(found[WEIGHTS]) != card.weights.bytes:
        raise _refuse("weights of another size than the card says", site, "bundle-size")
    for expert in experts:
        place = folder / "experts" / expert
        place.mkdir(parents=True)
        unpack_teacher({n: found[f"experts/{expert}/{n}"] for n in SHARED}, expert, place)
    for name in STUDENT:
        (folder / name).write_bytes(found[name])
    return load_bundle(folder)
