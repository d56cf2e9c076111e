"""Recipes: what each artefact depends on, one function per stage. Only they decide what is made again.

Checkpoints, query jobs and the federation ask here whether what is there was made of just this; ``dvc.yaml``
lists the same sections of ``params.yaml``, and a test holds the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

from qkt_clinical import __version__
from qkt_clinical.common.files import digest_bytes, to_json
from qkt_clinical.config.params import Params
from qkt_clinical.config.query import QueryConfig
from qkt_clinical.data.prepared import Manifest

SECTIONS = {
    "train": ("seed", "device", "threads", "shared_encoder", "train"),
    "mask": ("seed", "mask"),
    "plan": ("sites", "shared_encoder", "train.encoder"),
    "transfer": ("seed", "device", "threads", "shared_encoder", "mask", "transfer"),
}
"""Stage to the sections of ``params.yaml`` that it reads, or a part of one."""


@dataclass(frozen=True)
class Recipe:
    """All that a stage's artefact depends on, as plain JSON."""

    stage: str
    params: dict[str, Any]
    """The stage's sections; ``device`` is the kind of processor that does the work, not what is asked for."""
    reads: dict[str, Any]
    """Names, and digests of what else the stage reads."""

    @property
    def digest(self) -> str:
        """SHA-256 over everything, this package's version too."""
        said = {"version": __version__, "stage": self.stage, "params": self.params, "reads": self.reads}
        return digest_bytes(to_json(said).encode())


def _recipe(stage: str, params: Params, reads: dict[str, Any], device: str | None = None) -> Recipe:
    said = params.model_dump(mode="json")
    used = {name: reduce(lambda part, key: part[key], name.split("."), said) for name in SECTIONS[stage]}
    if used.get("threads") == Params.model_fields["threads"].default:
        del used["threads"]  # so that what was made before there was this key is not made again
    return Recipe(stage, used | ({} if device is None else {"device": device}), reads)


def prepared_digest(manifest: Manifest) -> str:
    """SHA-256 of a manifest, which contains the digests of the arrays and the classes in their order."""
    return digest_bytes(to_json(manifest.model_dump(mode="json")).encode())


def train_recipe(params: Params, data: Manifest, device: str) -> Recipe:
    """Recipe of a site's teacher without its mask.

    Args:
        device: kind of processor, ``cpu`` or ``cuda``: the last digits of weights depend on it.
    """
    return _recipe("train", params, {"site": data.site, "data": prepared_digest(data)}, device)


def mask_recipe(params: Params, bundle: str) -> Recipe:
    """Recipe of a teacher's mask.

    Args:
        bundle: digest of the teacher's card, or of the recipe that it was made by.
    """
    return _recipe("mask", params, {"bundle": bundle})


def plan_recipe(params: Params, query: QueryConfig, data: Manifest, teachers: dict[str, str]) -> Recipe:
    """Recipe of a query's plan and the bundles fetched for it.

    Args:
        data: of the asking hospital.
        teachers: site to digest of its bundle's files, the mask among them.
    """
    reads = {
        "query": query.model_dump(mode="json"),
        "hospital": data.site,
        "data": prepared_digest(data),
        "teachers": teachers,
    }
    return _recipe("plan", params, reads)


def transfer_recipe(
    params: Params, name: str, query: QueryConfig, data: Manifest, *, own: str, fetched: str, device: str
) -> Recipe:
    """Recipe of a query's student.

    Args:
        name: of the query.
        data: of the asking hospital.
        own: digest of the card of the hospital's own teacher.
        fetched: digest of the folder that holds the plan and the relevant bundles, their masks among them.
        device: as in :func:`train_recipe`.
    """
    reads = {
        "hospital": data.site,
        "name": name,
        "query": query.model_dump(mode="json"),
        "data": prepared_digest(data),
        "own": own,
        "fetched": fetched,
    }
    return _recipe("transfer", params, reads, device)
