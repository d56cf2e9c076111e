"""Simulated hospitals from one labelled MedMNIST-layout npz: their images and queries.

A partition is a matrix of *shares* (hospitals, classes) whose columns sum to 1: the same matrix
divides train, val and test, so that a hospital meets the same mixture of classes in all three.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field

from qkt_clinical.catalog import DEFAULT_BUDGET, Method, Partition
from qkt_clinical.common.files import new_folder, write_text
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.base import NAME, Name, Strict
from qkt_clinical.config.loading import parse
from qkt_clinical.config.policy import OPEN_POLICY, POLICY
from qkt_clinical.config.query import QueryConfig
from qkt_clinical.config.site import SiteConfig
from qkt_clinical.datasets.medmnist import class_names
from qkt_clinical.datasets.medmnist_file import SPLITS, SplitArrays, read_medmnist
from qkt_clinical.datasets.partition import (
    Indices,
    choose_queries,
    dirichlet_shares,
    divide,
    pathological_shares,
)
from qkt_clinical.errors import ConfigError, SourceError

MARK = "# Simulated hospital, written by 'qkt federate' and overwritten by it."


# --- simulated hospitals --------------------------------------------------------------------------


class FederateParams(Strict):
    """Arguments of :func:`federate`, as a preset states them."""

    partition: Partition
    hospitals: Annotated[int, Field(ge=2, le=1000)]
    classes_per_hospital: Annotated[int, Field(ge=2)]
    beta: Annotated[float, Field(gt=0.0, le=1e6)]
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)]
    classes: tuple[str, ...] | None
    prefix: Name
    queries: Annotated[int, Field(ge=1)] | None
    method: Method
    budget: Annotated[float, Field(gt=0.0, le=0.5)]


class Preset(Strict):
    """A file of ``presets/``: arguments of :func:`federate` and sections of params.yaml."""

    federate: FederateParams
    params: dict[str, Any]


@dataclass(frozen=True)
class DividedDataSet:
    """Classes, sites and queries of the simulated hospitals, for params.yaml."""

    classes: tuple[str, ...]
    sites: tuple[str, ...]
    queries: dict[str, dict[str, str]]
    """Key in params.yaml to hospital and query (the name of the file below ``queries/``)."""

    def as_params(self) -> dict[str, Any]:
        """The three sections of params.yaml as plain lists and dictionaries."""
        return {"classes": list(self.classes), "sites": list(self.sites), "queries": dict(self.queries)}


def list_presets() -> list[str]:
    """Names that :func:`load_preset` knows."""
    folder = files("qkt_clinical.datasets").joinpath("presets")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_preset(name: str) -> Preset:
    """Read a preset of the package.

    Raises:
        ConfigError: no such preset.
    """
    if name not in list_presets():
        raise ConfigError(f"no preset {name!r}", remedy=f"Known presets: {', '.join(list_presets())}.")
    text = files("qkt_clinical.datasets").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    return parse(Preset, yaml.safe_load(text), file=f"presets/{name}.yaml")


def federate(
    source: Path,
    out: Path,
    *,
    partition: Partition,
    hospitals: int = 6,
    classes_per_hospital: int = 3,
    beta: float = 0.3,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    prefix: str = "h",
    queries: int | None = None,
    method: str = "qkt",
    budget: float = DEFAULT_BUDGET,
) -> DividedDataSet:
    """Turn one labelled npz into simulated hospitals below ``out/hospitals``.

    Writes ``<site>/data/images.npz``, ``<site>/queries/*.yaml`` and ``<site>/site.yaml`` per hospital;
    the same arguments give the same bytes. Hospitals written by an earlier call are overwritten, others
    of the same name are not.

    Args:
        source: MedMNIST-layout npz, 2D or 3D, grey or colour, with or without ``*_groups``.
        out: the workspace.
        partition: ``pathological`` (a few classes each) or ``dirichlet`` (skewed proportions).
        hospitals: how many; they are called ``<prefix>1``, ``<prefix>2``, ...
        classes_per_hospital: for ``pathological``.
        beta: concentration for ``dirichlet``.
        seed: of everything drawn by chance.
        classes: names in label order; default: MedMNIST's, where the file's name is one of theirs,
            else ``class-0``, ``class-1``, ...
        prefix: of the hospitals' names.
        queries: how many absent single-class queries; None: one per hospital.
        method: with which they are answered.
        budget: of every query.

    Raises:
        SourceError: the file cannot be used (see :func:`read_medmnist`) or is too small to be divided.
        ConfigError: the arguments do not fit together or to the file, or a real hospital is in the way.
    """
    asked = _checked(
        {
            "partition": partition,
            "hospitals": hospitals,
            "classes_per_hospital": classes_per_hospital,
            "beta": beta,
            "seed": seed,
            "classes": classes,
            "prefix": prefix,
            "queries": queries,
            "method": method,
            "budget": budget,
        }
    )
    sites = tuple(f"{asked.prefix}{h + 1}" for h in range(asked.hospitals))
    for site in sites:
        _check_free(out / "hospitals" / site, site)
    parts = read_medmnist(source)
    names = _class_names(source, asked.classes, parts)
    pieces, held = _divide_parts(source, asked, parts, len(names))
    questions = choose_queries(held, asked.queries, seed=derive(asked.seed, "federate", "queries"))

    slugs = _slugs(names)
    keys: dict[str, dict[str, str]] = {}
    for h, site in enumerate(sites):
        mine = [c for asking, c in questions if asking == h]
        keys |= {f"{site}-{slugs[c]}": {"hospital": site, "query": slugs[c]} for c in mine}
        _write_hospital(
            out / "hospitals" / site,
            _site_config(site, names, held[h], parts["train"]),
            {slugs[c]: {"classes": [names[c]], "method": asked.method, "budget": asked.budget} for c in mine},
            {split: (parts[split], pieces[split][h]) for split in SPLITS},
        )
    return DividedDataSet(names, sites, keys)


def _checked(arguments: dict[str, Any]) -> FederateParams:
    try:
        asked = parse(FederateParams, arguments, file="federate")
    except ConfigError as error:
        raise ConfigError(error.message, remedy="Correct the arguments of federate.") from None
    if not NAME.fullmatch(f"{asked.prefix}{asked.hospitals}"):
        raise ConfigError("prefix: too long", remedy="Hospital names have at most 63 characters.")
    return asked


def _check_free(folder: Path, site: str) -> None:
    """Refuse to write into a hospital that this module did not write."""
    config = folder / "site.yaml"
    if folder.exists() and not (
        config.is_file() and config.read_text(encoding="utf-8", errors="replace").startswith(MARK)
    ):
        raise ConfigError(
            "there is already a hospital of this name, not written by 'qkt federate'",
            remedy="Choose another prefix or another output folder.",
            site=site,
            file=folder,
        )


def _class_names(
    source: Path, classes: tuple[str, ...] | None, parts: Mapping[str, SplitArrays]
) -> tuple[str, ...]:
    """The classes' names in label order; every one of them must have a training image."""
    needed = max(int(p.labels.max()) for p in parts.values()) + 1
    names = classes or class_names(source) or tuple(f"class-{c}" for c in range(needed))
    if len(names) < needed or len(set(names)) < len(names):
        raise ConfigError(
            f"{len(set(names))} different class names for labels 0 to {needed - 1}",
            remedy="Name every class once, in label order.",
            file=source,
        )
    counts = np.bincount(parts["train"].labels, minlength=len(names))
    if not counts.all():
        raise ConfigError(
            f"class {names[int(counts.argmin())]!r} has no training image",
            remedy="Name the classes that the file has, or add images.",
            file=source,
        )
    return names


def _divide_parts(
    source: Path, asked: FederateParams, parts: Mapping[str, SplitArrays], classes: int
) -> tuple[dict[str, list[Indices]], NDArray[np.bool_]]:
    """Indices per split and hospital, and (hospitals, classes) which classes each hospital trains on."""
    train = parts["train"]
    assign = derive(asked.seed, "federate", "assign")
    if asked.partition == "pathological":
        shares = pathological_shares(
            classes,
            hospitals=asked.hospitals,
            classes_per_hospital=asked.classes_per_hospital,
            seed=assign,
        )
    else:
        counts = np.bincount(train.labels, minlength=classes)
        shares = dirichlet_shares(counts, hospitals=asked.hospitals, beta=asked.beta, seed=assign)
    pieces: dict[str, list[Indices]] = {}
    held = np.zeros(shares.shape, dtype=bool)
    for split in SPLITS:
        part = parts[split]
        pieces[split] = divide(part.labels, part.groups, shares, seed=derive(asked.seed, "federate", split))
        if split == "train":
            for h, index in enumerate(pieces[split]):
                held[h, part.labels[index]] = True
            # Whole patients cannot always follow small shares: what a hospital cannot train on, it
            # does not meet in val and test either.
            shares = np.where(held, shares, 0.0)
            shares /= np.maximum(shares.sum(axis=0), np.finfo(np.float64).tiny)
    short = [h for h in range(asked.hospitals) if not all(len(pieces[s][h]) for s in SPLITS)]
    missing = asked.partition == "pathological" and (held.sum(axis=1) < asked.classes_per_hospital).any()
    if short or missing or (held.sum(axis=1) < 2).any() or not held.any(axis=0).all():
        raise SourceError(
            f"too few images or patients for {asked.hospitals} hospitals: one would lack a split or a class",
            remedy="Choose fewer hospitals.",
            file=source,
        )
    return pieces, held


def _slugs(names: Sequence[str]) -> list[str]:
    """Class names as query names: lower case, hyphens, at most 40 characters, each once."""
    slugs = [re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].rstrip("-") for name in names]
    return [slug if slug and slugs.count(slug) == 1 else f"class-{index}" for index, slug in enumerate(slugs)]


def _site_config(
    site: str, names: Sequence[str], held: NDArray[np.bool_], train: SplitArrays
) -> dict[str, Any]:
    shape = train.images.shape[1:]
    colour = len(shape) == 3 and shape[-1] == 3  # no volume is 3 voxels wide: sizes start at 4
    return {
        "name": site,
        "source": {"kind": "npz", "path": "data"},
        "label": {"from": "npz"},
        "patient": {"from": "none" if train.groups is None else "npz"},
        "label_map": {str(c): names[c] for c in np.flatnonzero(held).tolist()},
        "image": {"size": list(shape[:-1] if colour else shape), "channels": 3 if colour else 1},
        "splits": "given",
    }


def _yaml(value: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=110)
    return text


def _write_hospital(
    folder: Path,
    config: Mapping[str, Any],
    queries: Mapping[str, Mapping[str, Any]],
    content: Mapping[str, tuple[SplitArrays, Indices]],
) -> None:
    """Write what belongs to a simulated hospital; anything else in its folder (such as a salt) stays."""
    site = str(config["name"])
    parse(SiteConfig, dict(config), file=folder / "site.yaml", site=site)
    # The mark comes first, so that a call that was cut short can be repeated.
    write_text(folder / "site.yaml", f"{MARK}\n{_yaml(config)}")
    if not (folder / POLICY).exists():  # somebody may have changed it
        write_text(folder / POLICY, OPEN_POLICY)
    with new_folder(folder / "data") as temporary:
        arrays: dict[str, Any] = {}
        for split, (part, index) in content.items():
            arrays[f"{split}_images"] = part.images[index]
            arrays[f"{split}_labels"] = part.labels[index, None]
            if part.groups is not None:
                arrays[f"{split}_groups"] = part.groups[index]
        np.savez(temporary / "images.npz", **arrays)
    with new_folder(folder / "queries") as temporary:
        for name, query in queries.items():
            parse(QueryConfig, dict(query), file=folder / "queries" / f"{name}.yaml", site=site)
            write_text(temporary / f"{name}.yaml", _yaml(query))
