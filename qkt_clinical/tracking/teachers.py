"""Teachers in the registry: which there are, and their files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qkt_clinical.config.base import NAME
from qkt_clinical.errors import BundleError
from qkt_clinical.records.decisions import CHAMPION
from qkt_clinical.tracking.mirror import ALIAS

if TYPE_CHECKING:
    from mlflow import MlflowClient


# --- what a query job takes from the registry ------------------------------------------------------


class Registered(NamedTuple):
    """The version of a teacher that a query hears: the champion or, where there is none, the candidate."""

    site: str
    version: str

    @property
    def model(self) -> str:
        """Its registered name."""
        return f"teacher.{self.site}"


def registered_teachers(client: MlflowClient) -> list[Registered]:
    """Every teacher in the registry, by site."""
    found = []
    for model in client.search_registered_models("name LIKE 'teacher.%'", max_results=1000):
        number = model.aliases.get(CHAMPION, model.aliases.get(ALIAS))
        site = model.name.removeprefix("teacher.")
        if number is not None and NAME.fullmatch(site):  # a shared registry holds other people's models, too
            found.append(Registered(site, str(number)))
    return sorted(found)


def fetch_file(teacher: Registered, name: str, target: Path, most: int) -> None:
    """Fetch one file of a registered teacher's bundle, within :func:`registry_client`.

    Args:
        name: of the file within the bundle.
        target: where to put it, in one step.
        most: bytes at most; what the registry declares is looked at before anything is moved.

    Raises:
        BundleError: there is no such file, or it is larger.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    def refuse(what: str, code: str) -> BundleError:
        return BundleError(
            f"{name} in version {teacher.version} of {teacher.model} {what}",
            remedy="Ask the site to register its teacher again; nothing of it was used.",
            site=teacher.site,
            code=code,
        )

    store = get_artifact_repository(f"models:/{teacher.model}/{teacher.version}")
    place = f"data/{teacher.site}/{name}"
    listed = {f.path: f.file_size for f in store.list_artifacts(f"data/{teacher.site}")}
    if place not in listed:
        raise refuse("is missing", "bundle-missing")
    if int(listed[place] or 0) > most:
        raise refuse(f"has {listed[place]} bytes, more than {most}", "bundle-size")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        got = Path(store.download_artifacts(place, folder))  # type: ignore[no-untyped-call]
        if got.stat().st_size > most:
            raise refuse("is larger than the registry says", "bundle-size")
        got.replace(target)
