"""Teachers in the registry, and their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qkt_clinical.config.base import NAME
from qkt_clinical.records.card import CARD
from qkt_clinical.records.decisions import CHAMPION
from qkt_clinical.records.registered import SHA256, unsound
from qkt_clinical.tracking.client import LISTED, pages
from qkt_clinical.tracking.mirror import ALIAS
from qkt_clinical.tracking.runs import CARD_DIGEST, DIGEST
from qkt_clinical.tracking.version_files import VersionFiles

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel


# --- what a query job takes from the registry ------------------------------------------------------


class Registered(NamedTuple):
    """The version of a teacher that a query uses: the champion or, where there is none, the candidate."""

    site: str
    version: str
    digest: str
    """Of its bundle, as it was registered."""
    card: str = ""
    """SHA-256 of its card, likewise."""

    @property
    def model(self) -> str:
        """Its registered name."""
        return f"teacher.{self.site}"


def registered_teachers(
    client: MlflowClient, *, set_aside: Callable[[str, str], None] | None = None
) -> list[Registered]:
    """Every teacher in the registry, by site. Anything else that others left there is set aside.

    Args:
        client: see :func:`qkt_clinical.tracking.client.registry_client`.
        set_aside: told the name of each model that cannot be a teacher of ours, and why.
    """
    found = []
    for model in pages(client.search_registered_models, "name LIKE 'teacher.%'", LISTED):
        teacher = _registered(client, model)
        if isinstance(teacher, Registered):
            found.append(teacher)
        elif set_aside:
            set_aside(str(model.name), teacher)
    return sorted(found)


def _registered(client: MlflowClient, model: RegisteredModel) -> Registered | str:
    """The teacher in a registered model, or the reason why it is none."""
    from mlflow.exceptions import MlflowException

    number = model.aliases.get(CHAMPION, model.aliases.get(ALIAS))
    site = str(model.name).removeprefix("teacher.")
    if not NAME.fullmatch(site):
        return "no site's name"
    if number is None:
        return "neither champion nor candidate"
    try:
        tags = client.get_model_version(model.name, str(number)).tags
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return "its version is gone"
    digest = str(tags.get(DIGEST))
    if not SHA256.fullmatch(digest):
        return "not registered by 'qkt track'"
    return Registered(site, str(number), digest, str(tags.get(CARD_DIGEST)))


def _files(teacher: Registered) -> VersionFiles:
    from mlflow import MlflowClient

    return VersionFiles(MlflowClient(), teacher.model, teacher.version)


def fetch_file(teacher: Registered, name: str, target: Path, max_bytes: int) -> str:
    """Fetch one file of a registered teacher's bundle, within :func:`registry_client`.

    Args:
        teacher: as in :func:`registered_teachers`.
        name: of the file within the bundle.
        target: where to put it, in one step.
        max_bytes: bytes at most; what the registry declares is looked at before anything is moved.

    Returns:
        SHA-256 of the bytes that were written.

    Raises:
        UnsoundVersion: there is no such file, or it is larger, or the version holds what none of ours does.
    """
    files = _files(teacher)
    return files.save(f"{files.data}/{name}", target, max_bytes)


def check_card(teacher: Registered, digest: str) -> None:
    """Check a registered teacher's card alone, which holds the digests of its other files.

    Args:
        teacher: as in :func:`registered_teachers`.
        digest: SHA-256 of the card that was fetched.

    Raises:
        UnsoundVersion: it is another.
    """
    if digest != teacher.card:
        raise unsound(f"{CARD} of {teacher.model} is not the one that was registered")


def check_teacher_version(teacher: Registered, known: Mapping[str, str]) -> None:
    """Check a registered teacher's files against the digest of its registration.

    Args:
        teacher: as in :func:`registered_teachers`.
        known: SHA-256 of the files that were fetched, by name; the others are fetched for this alone.

    Raises:
        UnsoundVersion: they are others, or something beside them is not ours.
    """
    _files(teacher).check(teacher.digest, known)
