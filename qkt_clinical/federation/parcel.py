"""Bundles in transit: names to bytes. Received bundles are bounded and checked before they are stored."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qkt_clinical.catalog import Method
from qkt_clinical.common.files import read_plain
from qkt_clinical.config.base import NAME
from qkt_clinical.errors import BundleError
from qkt_clinical.models.bundle import Bundle, load_bundle, load_shared_means, read_bundle
from qkt_clinical.models.offers import check_teacher
from qkt_clinical.records.card import (
    CARD,
    MASK,
    MAX_JSON_BYTES,
    MAX_MEANS_BYTES,
    MEANS,
    REMEDY,
    WEIGHTS,
    Card,
    Mask,
    cannot_be_read,
    most_bytes,
    read_card,
    read_mask,
)
from qkt_clinical.records.plan import SHARED, moved_files, shared_files

FileContents = Mapping[str, bytes]
"""Name to content: of a teacher those of :func:`qkt_clinical.records.plan.shared_files`."""


def pack(folder: Path, names: tuple[str, ...] | None = None) -> dict[str, bytes]:
    """The named files of a bundle's folder, if they are plain ones and no larger than its card says.

    Args:
        names: by default all that leave a teacher's site.

    Raises:
        BundleError: a file is none, or is not there.
    """
    card = read_card(folder)
    files = {}
    for name in shared_files(card) if names is None else names:
        try:
            files[name] = read_plain(folder / name, most_bytes(card, name))
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
        most = MAX_MEANS_BYTES if name == MEANS else MAX_JSON_BYTES
        if not name.endswith(WEIGHTS) and len(content) > most:
            raise _refuse(f"{name} is larger than {most} bytes", site, "bundle-size")
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


def _written(files: Any, site: str, folder: Path, named: Callable[[Card], tuple[str, ...]]) -> None:
    """Write a teacher's files into an empty folder, those and no others that its card names.

    Raises:
        BundleError: they are not such files, or not of the site's teacher.
    """
    described = {n: files[n] for n in (CARD, MASK) if n in files} if isinstance(files, Mapping) else files
    with _laid_out(check_files(described, site, (CARD, MASK)), site) as light:
        card = read_card(light)
        check_teacher(card, site, Path(site))
        read_mask(light, card)
    found = check_files(files, site, named(card))
    for name, file in ((WEIGHTS, card.weights), (MEANS, card.encoder_means)):
        if name in found and file is not None and len(found[name]) != file.bytes:
            raise _refuse(
                f"{name} of {len(found[name])} bytes, the card says {file.bytes}", site, "bundle-size"
            )
    for name, content in found.items():
        (folder / name).write_bytes(content)


def unpack_teacher(
    files: Any, site: str, folder: Path, named: Callable[[Card], tuple[str, ...]] = shared_files
) -> Card:
    """Write a teacher's files into an empty folder after every check that a bundle gets.

    Args:
        named: the files that there must be, by its card.

    Raises:
        BundleError: see :func:`qkt_clinical.models.bundle.read_bundle`, or where there is no network among
            the files :func:`~qkt_clinical.models.bundle.load_shared_means`; also if it is not the site's
            teacher.
    """
    _written(files, site, folder, named)
    return (read_bundle if (folder / WEIGHTS).exists() else load_shared_means)(folder).card


def unpack_moved(files: Any, site: str, folder: Path, method: Method) -> None:
    """The same for the files that a query of the method moves, of which the network may be none.

    Raises:
        BundleError: as :func:`unpack_teacher`.
    """
    unpack_teacher(files, site, folder, lambda card: moved_files(card, method))


STUDENT = (CARD, WEIGHTS, "query.json", "plan.json")
"""The files of a student that leave its site, beside the bundles of its experts: no counts, no reference."""


def pack_student(folder: Path) -> dict[str, bytes]:
    """Files of a student that may be sent; for a routed one also its experts'."""
    files = pack(folder, STUDENT)
    for place in sorted((folder / "experts").glob("*")):
        files |= {f"experts/{place.name}/{n}": content for n, content in pack(place, SHARED).items()}
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
        sent = {n: found[f"experts/{expert}/{n}"] for n in SHARED}
        unpack_teacher(sent, expert, place, lambda _: SHARED)
    for name in STUDENT:
        (folder / name).write_bytes(found[name])
    return load_bundle(folder)
