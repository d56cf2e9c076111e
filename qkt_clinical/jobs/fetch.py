"""Teachers from the registry: cards and masks of all to plan with, the bundles of the relevant ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from qkt_clinical.catalog import Method
from qkt_clinical.common.console import tell_set_aside
from qkt_clinical.common.files import TooLarge, copy_plain, digest_file, passing_folder, sweep
from qkt_clinical.config.params import Params
from qkt_clinical.config.query import QueryConfig
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.errors import BundleError, QueryError
from qkt_clinical.models.offers import check_teacher
from qkt_clinical.records.card import (
    CARD,
    MASK,
    MAX_JSON_BYTES,
    MEANS,
    REMEDY,
    WEIGHTS,
    Weights,
    most_bytes,
    read_card_file,
    read_mask_file,
)
from qkt_clinical.records.plan import Offer, moved_files
from qkt_clinical.tracking.client import registry_client, tracking_uri
from qkt_clinical.tracking.teachers import (
    Registered,
    check_card,
    check_teacher_version,
    fetch_file,
    registered_teachers,
)

SQLITE = "sqlite:///"
FETCHED = "fetch"
"""What is being fetched, in a folder of its own inside the cache."""


class RegistryTeachers(NamedTuple):
    """The teachers of a registry, and the cache of their weights."""

    folder: Path
    """Holds ``<site>/bundle.json`` and ``<site>/mask.json``."""
    cache: Path
    """Folder of weights by their digest, which an interrupted job need not fetch again."""
    offers: dict[str, Offer]
    versions: dict[str, Registered]

    def holds(self, site: str) -> bool:
        """Whether a teacher's weights are in the cache."""
        return (self.cache / self.offers[site].card.weights.sha256).is_file()

    def to_fetch(self, site: str, method: Method) -> int:
        """Bytes that an answer by the method has still to move of a teacher."""
        offer = self.offers[site]
        cached = WEIGHTS in moved_files(offer.card, method) and self.holds(site)
        return 0 if cached else offer.bytes_moved(method)

    def provide(self, site: str, folder: Path, method: Method) -> None:
        """Put what an answer by the method takes of a teacher into ``folder``.

        Weights are fetched unless they are here.

        Raises:
            BundleError: a file is missing, or larger or other than the card says, or the version is not what
                was registered.
        """
        from qkt_clinical.models.bundle import load_shared_means, read_bundle

        card, version = self.offers[site].card, self.versions[site]
        names = moved_files(card, method)
        for name in (CARD, MASK):
            copy_plain(self.folder / site / name, folder / name, MAX_JSON_BYTES)
        if MEANS in names:
            fetch_file(version, MEANS, folder / MEANS, most_bytes(card, MEANS))
        if WEIGHTS not in names:
            load_shared_means(folder)
            check_card(version, digest_file(folder / CARD))
            return
        self._fetch_weights(site, folder)
        read_bundle(folder)  # says what is wrong with it; the digest says only that something is
        check_teacher_version(version, {n: digest_file(folder / n) for n in names})

    def _fetch_weights(self, site: str, folder: Path) -> None:
        weights = self.offers[site].card.weights
        stored = self.cache / weights.sha256
        if not self._cached_copy(stored, folder / WEIGHTS, weights):
            with passing_folder(self.cache / FETCHED) as passing:
                fetch_file(self.versions[site], WEIGHTS, passing / WEIGHTS, weights.bytes)
                if copy_plain(passing / WEIGHTS, folder / WEIGHTS, weights.bytes) != weights.sha256:
                    raise BundleError(
                        "the weights' digest differs from the card's",
                        remedy=REMEDY,
                        site=site,
                        code="bundle-digest",
                    )
                (passing / WEIGHTS).replace(stored)

    @staticmethod
    def _cached_copy(stored: Path, target: Path, weights: Weights) -> bool:
        """Whether weights that were fetched before are whole; they are at ``target`` then."""
        try:
            return copy_plain(stored, target, weights.bytes) == weights.sha256
        except (FileNotFoundError, TooLarge):
            return False


def _offer(teacher: Registered, place: Path) -> Offer:
    for name in (CARD, MASK):
        fetch_file(teacher, name, place / name, MAX_JSON_BYTES)
    card, size, digest = read_card_file(place)
    check_teacher(card, teacher.site, place)
    mask = read_mask_file(place, card)
    assert mask is not None, "it was fetched"
    return Offer(card, mask.mask, size + mask.bytes, digest)


def _nobody(what: str, hospital: str) -> QueryError:
    return QueryError(
        what,
        remedy="Set track.uri in params.yaml to the hospitals' server, or run 'qkt track' where the teachers "
        "are.",
        site=hospital,
        stage="plan",
        code="no-teachers",
    )


@contextmanager
def open_teachers(
    root: Path, params: Params, hospital: str, query: QueryConfig
) -> Iterator[RegistryTeachers]:
    """Every other hospital's teacher in the registry, by its card and mask; their weights stay there.

    Raises:
        QueryError: there is no registry, or it holds no teacher of another hospital, code ``no-teachers``.
        BundleError: a card or mask is not valid; of a hospital that the query excludes that does not matter.
        QktError: the registry cannot be reached, code ``mlflow``.
    """
    uri = tracking_uri(root, params)
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        raise _nobody("there is no registry yet", hospital)  # MLflow would make its database
    with registry_client(root, params) as client, tempfile.TemporaryDirectory() as temporary:
        folder, offers, versions = Path(temporary), {}, {}
        for teacher in registered_teachers(client, set_aside=tell_set_aside):
            if teacher.site == hospital:
                continue
            try:
                offers[teacher.site] = _offer(teacher, folder / teacher.site)
            except BundleError as error:
                if teacher.site in query.exclude_teachers:
                    continue
                error.remedy += f" Or leave it out: exclude_teachers: [{teacher.site}] in the query's file."
                raise
            versions[teacher.site] = teacher
        if not offers:
            raise _nobody("the registry holds no other hospital's teacher", hospital)
        cache = Workspace(root).scratch / "bundles"
        sweep(cache / FETCHED)
        yield RegistryTeachers(folder, cache, offers, versions)
