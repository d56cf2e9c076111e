"""Simulated hospitals from one labelled MedMNIST-layout npz: who holds which images, and who asks what.

A partition is a matrix of *shares* (hospitals, classes) whose columns sum to 1: the same matrix
divides train, val and test, so that a hospital meets the same mixture of classes in all three.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field

from qkt_clinical.catalog import Method, Partition
from qkt_clinical.config import NAME, OPEN_POLICY, POLICY, Name, QueryConfig, SiteConfig, Strict, parse
from qkt_clinical.errors import ConfigError, SourceError
from qkt_clinical.fetch import class_names
from qkt_clinical.files import new_folder, write_text
from qkt_clinical.seeding import derive

Indices = NDArray[np.int64]

SPLITS = ("train", "val", "test")
"""Splits of a MedMNIST file; ingest carves calibration images out of train."""
MAX_BYTES = 8 << 30
"""Largest sum of declared array sizes that is read: everything is held in memory once."""
FEWEST = 5
"""Dirichlet: a share of fewer training images than this is none, so that a held class can be learned."""
DRAWS = 1000
MARK = "# Simulated hospital, written by 'qkt federate' and overwritten by it."


# --- partitions (pure) ----------------------------------------------------------------------------


def pathological_shares(
    classes: int, *, hospitals: int, classes_per_hospital: int, seed: int = 0
) -> NDArray[np.float64]:
    """Shares (hospitals, classes): every hospital holds ``classes_per_hospital`` classes.

    The number of hospitals that hold a class differs by at most one between classes; those that hold
    it share it evenly.

    Raises:
        ConfigError: too few places for all classes, or more classes per hospital than there are.
    """
    if classes_per_hospital > classes or hospitals * classes_per_hospital < classes:
        raise ConfigError(
            f"{hospitals} hospitals with {classes_per_hospital} classes each cannot hold all of {classes}",
            remedy="Choose at most as many classes per hospital as there are, and enough hospitals for all.",
        )
    rng = np.random.default_rng(seed)
    held = np.zeros((hospitals, classes), dtype=bool)
    for hospital in held:
        # The least held classes first, chance among equals: holders never differ by more than one.
        order = np.lexsort((rng.random(classes), held.sum(axis=0)))
        hospital[order[:classes_per_hospital]] = True
    shares: NDArray[np.float64] = held / held.sum(axis=0)
    return shares


def dirichlet_shares(
    counts: NDArray[np.int64], *, hospitals: int, beta: float, seed: int = 0
) -> NDArray[np.float64]:
    """Shares (hospitals, classes): every class is divided in proportions drawn from Dirichlet(beta).

    Shares below ``FEWEST`` training images are taken as none. Draws are repeated until every hospital
    holds at least two classes and a quarter of an even share of all images.

    Args:
        counts: (classes,) training images per class, each at least 1.
        hospitals: at least 2.
        beta: concentration; the smaller, the more unlike the hospitals.
        seed: of the draws.

    Raises:
        ConfigError: no draw satisfies the floor.
    """
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS):
        shares: NDArray[np.float64] = rng.dirichlet(np.full(hospitals, beta), size=len(counts)).T.copy()
        largest = shares.argmax(axis=0)
        shares[shares * counts < FEWEST] = 0.0
        empty = shares.sum(axis=0) == 0.0
        shares[largest[empty], empty] = 1.0
        shares /= shares.sum(axis=0)
        enough = shares @ counts >= counts.sum() / (4 * hospitals)
        if enough.all() and (np.count_nonzero(shares, axis=1) >= 2).all():
            return shares
    raise ConfigError(
        f"{DRAWS} draws with beta {beta:g} left a hospital without images or with a single class",
        remedy="Choose a greater beta or fewer hospitals.",
    )


def divide(
    labels: NDArray[np.int64],
    groups: NDArray[Any] | None,
    shares: NDArray[np.float64],
    *,
    seed: int = 0,
) -> list[Indices]:
    """Divide images among hospitals by ``shares``.

    Without groups, class counts differ from the exact share by less than one image, and every image
    goes to one hospital. With groups (patients), a group goes to one hospital as a whole, to the one
    that lacks its images most; images of classes of which that hospital has no share are left out.

    Args:
        labels: (N,) class indices.
        groups: (N,) patient ids, or None.
        shares: (hospitals, classes), columns sum to 1.
        seed: of the order in which images or groups are dealt out.

    Returns:
        Per hospital the sorted indices of its images; no index stands in two.
    """
    rng = np.random.default_rng(seed)
    hospitals, classes = shares.shape
    if groups is None:
        owner = np.empty(len(labels), dtype=np.int64)
        for c in range(classes):
            index = rng.permutation(np.flatnonzero(labels == c))
            owner[index] = np.repeat(np.arange(hospitals), _quotas(len(index), shares[:, c]))
        return [np.flatnonzero(owner == h) for h in range(hospitals)]
    ids, member = np.unique(groups, return_inverse=True)
    content = np.zeros((len(ids), classes), dtype=np.int64)
    np.add.at(content, (member, labels), 1)
    owner = _assign_groups(content, shares, rng)[member]
    owner[shares[owner, labels] == 0.0] = -1
    return [np.flatnonzero(owner == h) for h in range(hospitals)]


def partition_pathological(
    labels: NDArray[np.int64],
    groups: NDArray[Any] | None = None,
    *,
    hospitals: int,
    classes_per_hospital: int,
    seed: int = 0,
) -> list[Indices]:
    """Indices (sorted) per hospital, a few classes each. See :func:`pathological_shares`, :func:`divide`."""
    shares = pathological_shares(
        int(labels.max()) + 1, hospitals=hospitals, classes_per_hospital=classes_per_hospital, seed=seed
    )
    return divide(labels, groups, shares, seed=seed)


def partition_dirichlet(
    labels: NDArray[np.int64],
    groups: NDArray[Any] | None = None,
    *,
    hospitals: int,
    beta: float,
    seed: int = 0,
) -> list[Indices]:
    """Indices (sorted) per hospital, label-skewed. See :func:`dirichlet_shares`, :func:`divide`."""
    shares = dirichlet_shares(np.bincount(labels), hospitals=hospitals, beta=beta, seed=seed)
    return divide(labels, groups, shares, seed=seed)


def choose_queries(held: NDArray[np.bool_], count: int | None, *, seed: int = 0) -> list[tuple[int, int]]:
    """Choose (hospital, class) pairs to ask for: absent at the hospital, held by another.

    Args:
        held: (hospitals, classes), whether a hospital has training images of a class.
        count: how many; None: one per hospital, as far as there are any.
        seed: decides among equals.

    Returns:
        Sorted pairs, spread evenly over hospitals first and classes second.

    Raises:
        ConfigError: fewer such pairs than asked for, or none.
    """
    candidates = np.argwhere(~held & held.any(axis=0))
    wanted = min(len(held), len(candidates)) if count is None else count
    if wanted > len(candidates) or len(candidates) == 0:
        raise ConfigError(
            f"{wanted} absent single-class queries asked for, {len(candidates)} exist",
            remedy="Ask fewer queries, or let the hospitals differ more (fewer classes each, smaller beta).",
        )
    chance = np.random.default_rng(seed).permutation(len(candidates))
    hospital, asked = candidates.T
    by_hospital = np.zeros(held.shape[0], dtype=np.int64)
    by_class = np.zeros(held.shape[1], dtype=np.int64)
    chosen = np.zeros(len(candidates), dtype=bool)
    for _ in range(wanted):
        order = np.lexsort((chance, by_class[asked], by_hospital[hospital], chosen))
        best = order[0]  # ``chosen`` is the first key: those taken already come last
        chosen[best] = True
        by_hospital[hospital[best]] += 1
        by_class[asked[best]] += 1
    while (swap := _evening_swap(hospital, asked, chosen, by_class, chance)) is not None:
        given_up, taken = swap
        chosen[given_up], chosen[taken] = False, True
        by_class[asked[given_up]] -= 1
        by_class[asked[taken]] += 1
    return [(int(h), int(c)) for h, c in candidates[chosen]]


def _evening_swap(
    hospital: Indices, asked: Indices, chosen: NDArray[np.bool_], by_class: Indices, chance: Indices
) -> tuple[int, int] | None:
    """A chosen and a free pair of one hospital whose exchange makes classes more evenly asked; None: none.

    Every such exchange lowers the sum of squares of ``by_class``, so their sequence ends.
    """
    taken, free = np.flatnonzero(chosen), np.flatnonzero(~chosen)
    gain = by_class[asked[taken]][:, None] - by_class[asked[free]][None, :]
    gain[hospital[taken][:, None] != hospital[free][None, :]] = 0
    if gain.size == 0 or gain.max() < 2:
        return None
    give, take = np.nonzero(gain == gain.max())
    first = np.lexsort((chance[free[take]], chance[taken[give]]))[0]
    return int(taken[give[first]]), int(free[take[first]])


def _quotas(count: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers summing to ``count``, each within one of ``count * shares``: largest remainders."""
    exact = count * shares
    # A share that should be whole can lie a rounding error below it (3 * (1/3) of 6, say).
    quotas = np.floor(exact + 1e-9).astype(np.int64)
    left = count - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:left]] += 1
    return quotas


def _assign_groups(
    content: NDArray[np.int64], shares: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Owner of every group: largest groups first, each where it lowers the squared distance to target most.

    Args:
        content: (groups, classes) images of each class.
        shares: (hospitals, classes).
        rng: order among groups of one size.
    """
    totals = content.sum(axis=0)
    target = shares * totals
    weight = 1.0 / np.maximum(totals, 1)  # otherwise the largest class alone would decide
    have = np.zeros_like(target)
    owner = np.empty(len(content), dtype=np.int64)
    order = rng.permutation(len(content))
    order = order[np.argsort(-content[order].sum(axis=1), kind="stable")]
    for group in order:
        usable = np.where(shares > 0.0, content[group], 0)
        change = (weight * usable * (usable + 2.0 * (have - target))).sum(axis=1)
        change[usable.sum(axis=1) == 0] = np.inf
        best = int(change.argmin())
        owner[group] = best
        have[best] += usable[best]
    return owner


# --- reading the npz --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One split of a MedMNIST-layout file."""

    images: NDArray[Any]
    """(N, H, W), (N, H, W, 3) or (N, D, H, W)."""
    labels: NDArray[np.int64]
    """(N,)"""
    groups: NDArray[Any] | None
    """(N,) patient ids as the file has them."""


def read_medmnist(source: Path) -> dict[str, Part]:
    """Read a single-label MedMNIST-layout npz; sizes are checked before anything is allocated.

    Raises:
        SourceError: unreadable, too large, pickled, an array missing, or shapes and types that do not
            belong together; also where a patient stands in two splits.
    """
    try:
        arrays = _read_arrays(source)
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        zlib.error,
        zipfile.BadZipFile,
        NotImplementedError,  # unknown compression
        RuntimeError,  # encrypted
    ) as error:
        raise _unusable(source, f"cannot be read as an npz file ({type(error).__name__})") from None
    parts = {split: _part(source, arrays, split) for split in SPLITS}
    shapes = {p.images.shape[1:] for p in parts.values()}
    kinds = {(p.images.dtype, p.groups is None) for p in parts.values()}
    if len(shapes) > 1 or len(kinds) > 1:
        raise _unusable(source, "its splits differ in image shape or type, or only some have groups")
    if parts["train"].groups is not None:
        owners = [set(p.groups.tolist()) for p in parts.values() if p.groups is not None]
        if sum(map(len, owners)) != len(set().union(*owners)):
            raise _unusable(source, "a patient stands in two of its splits")
    return parts


def _unusable(source: Path, what: str) -> SourceError:
    return SourceError(
        what,
        remedy="A MedMNIST-layout file holds {train,val,test}_images (N, H, W), (N, H, W, 3) or (N, D, H, W) "
        "and {train,val,test}_labels (N,) or (N, 1), one whole number per image.",
        file=source,
    )


def _declared_bytes(archive: zipfile.ZipFile, name: str) -> int:
    """Size of an npz member by its header; ValueError for pickles and headers that disagree with the zip."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with archive.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in readers:
            raise ValueError("array format")
        shape, _, dtype = readers[version](stream)
        if dtype.hasobject:
            raise ValueError("pickled objects")
        size = math.prod(shape) * dtype.itemsize
        if size + stream.tell() != archive.getinfo(name).file_size:
            raise ValueError("size")
    return size


def _read_arrays(source: Path) -> dict[str, NDArray[Any]]:
    wanted = {f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels", "groups")}
    with zipfile.ZipFile(source) as archive:
        present = sorted(n for n in set(archive.namelist()) if n.removesuffix(".npy") in wanted)
        size = sum(_declared_bytes(archive, name) for name in present)
    if size > MAX_BYTES:
        raise SourceError(
            f"declares {size / 2**30:.1f} GiB of arrays, more than {MAX_BYTES / 2**30:g} GiB",
            remedy="Use a smaller image size or fewer images.",
            file=source,
        )
    with np.load(source, allow_pickle=False) as content:
        return {name.removesuffix(".npy"): content[name] for name in present}


def _part(source: Path, arrays: Mapping[str, NDArray[Any]], split: str) -> Part:
    images, labels = arrays.get(f"{split}_images"), arrays.get(f"{split}_labels")
    if images is None or labels is None:
        raise _unusable(source, f"{split}_images or {split}_labels is missing")
    if images.ndim not in (3, 4) or images.dtype.kind not in "uif" or len(images) == 0:
        raise _unusable(source, f"{split}_images is {images.shape} {images.dtype}")
    if labels.shape not in ((len(images),), (len(images), 1)) or labels.dtype.kind not in "ui":
        raise _unusable(source, f"{split}_labels is {labels.shape} {labels.dtype} for {len(images)} images")
    labels = labels.reshape(-1).astype(np.int64)
    if labels.min() < 0 or labels.max() >= 1000:
        raise _unusable(source, f"{split}_labels has values outside 0 to 999")
    groups = arrays.get(f"{split}_groups")
    if groups is not None:
        if groups.shape not in ((len(images),), (len(images), 1)) or groups.dtype.kind not in "uiUS":
            raise _unusable(source, f"{split}_groups is {groups.shape} {groups.dtype}")
        groups = groups.reshape(-1)
    return Part(images, labels, groups)


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
    """A file of ``qkt_clinical/presets``: arguments of :func:`federate` and sections of params.yaml."""

    federate: FederateParams
    params: dict[str, Any]


@dataclass(frozen=True)
class Federation:
    """What params.yaml needs to know of the hospitals."""

    classes: tuple[str, ...]
    sites: tuple[str, ...]
    queries: dict[str, dict[str, str]]
    """Key in params.yaml to hospital and query (the name of the file below ``queries/``)."""

    def as_params(self) -> dict[str, Any]:
        """The three sections of params.yaml as plain lists and dictionaries."""
        return {"classes": list(self.classes), "sites": list(self.sites), "queries": dict(self.queries)}


def list_presets() -> list[str]:
    """Names that :func:`load_preset` knows."""
    folder = files("qkt_clinical").joinpath("presets")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_preset(name: str) -> Preset:
    """Read a preset of the package.

    Raises:
        ConfigError: no such preset.
    """
    if name not in list_presets():
        raise ConfigError(f"no preset {name!r}", remedy=f"Known presets: {', '.join(list_presets())}.")
    text = files("qkt_clinical").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
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
    budget: float = 0.05,
) -> Federation:
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
    return Federation(names, sites, keys)


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


def _class_names(source: Path, classes: tuple[str, ...] | None, parts: Mapping[str, Part]) -> tuple[str, ...]:
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
    source: Path, asked: FederateParams, parts: Mapping[str, Part], classes: int
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


def _site_config(site: str, names: Sequence[str], held: NDArray[np.bool_], train: Part) -> dict[str, Any]:
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
    content: Mapping[str, tuple[Part, Indices]],
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
