"""A prepared site: memory-mapped arrays and a manifest, written by ``ingest`` and read by all others.

``data/prepared/<site>/`` holds

- ``images.npy``: (N, C, H, W) or (N, C, D, H, W); uint8 in 0..255, or float32;
- ``labels.npy``: (N,) int64, indices into the federation's classes;
- ``groups.npy``: (N,) unicode, salted patient ids;
- ``splits.json``: split name to sorted image indices;
- ``manifest.json``: see :class:`Manifest`;
- ``integrity.json``: every input file, accepted or rejected with its reason code;
- ``integrity.html``: the same and more for people, with pictures. It stays at the site;
- ``hashes.npy``: (N, 2) uint64, of pixels and of looks, to find copies;
- ``subgroups.json``, where site.yaml names columns: per column its groups, and each image's place among them;
- ``headers.json``, of DICOM files: per image what is kept of the header, de-identified, in the DICOM JSON
  model. It stays at the site.

``data/held_back/<site>/`` holds the same of the images that a site keeps for evaluation alone, in one
split of their own. It lies apart, so that no stage that trains, calibrates or plans can take them: see
:func:`load_held_back`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from qkt_clinical.catalog import HELD_BACK, SPLITS
from qkt_clinical.common.files import digest_file, new_folder, write_json, write_json_list, write_text
from qkt_clinical.config.base import Strict
from qkt_clinical.data.integrity import FileOutcome, rejected_by_code, write_integrity
from qkt_clinical.errors import PreparedError

Images = NDArray[np.uint8] | NDArray[np.float32]
Labels = NDArray[np.int64]

FORMAT = "qkt-prepared/1"
ARRAYS = ("images.npy", "labels.npy", "groups.npy")
SUBGROUPS = "subgroups.json"
BYTES_PER_INDEX, BYTES_OF_NAMES = 32, 65_536
"""Of JSON, at most: an image's index or place on a line of its own; what else a list or column holds."""
MAX_COLUMNS, MAX_GROUP_NAME = 8, 64
"""Columns of ``subgroups.json``, and characters of a group's name, at most."""


class ImageStack(Protocol):
    """Images of one shape and type: an array, or an object that yields them one by one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, ...)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8 or float32."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> NDArray[Any]: ...


class Manifest(Strict):
    """What a prepared site holds. Its counts never leave the site."""

    format: Literal["qkt-prepared/1"]
    site: str
    source_kind: str
    classes: tuple[str, ...]
    """The federation's label space."""
    count: int
    shape: tuple[int, ...]
    """Of one image: (C, H, W) or (C, D, H, W)."""
    dtype: Literal["uint8", "float32"]
    spacing_mm: tuple[float, ...] | None
    normalisation: Literal["unit", "zscore"]
    transforms: tuple[str, ...]
    """In words, in the order applied."""
    counts: dict[str, dict[str, int]]
    """Split to class to number of images."""
    patients: dict[str, int]
    """Split to number of patients."""
    rejected: dict[str, int]
    """Reason code to number of files."""
    risks: dict[str, int]
    """Known risk that de-identification cannot take away to number of images."""
    digests: dict[str, str]
    """File name to SHA-256 of the arrays and splits."""


class Consent(Strict):
    """``data/consent/<site>.json``: which of its data others may see, written by ``ingest``.

    It lies beside the prepared site, not in it: to give or to withdraw consent must not train a teacher anew.
    """

    pictures: bool = False
    """Whether reports may show test images of the hospital."""


def read_consent(path: Path, site: str) -> Consent:
    """A hospital's consent; none where the file is absent.

    Raises:
        PreparedError: not a consent.
    """
    try:
        return Consent.model_validate_json(path.read_bytes()) if path.is_file() else Consent()
    except (OSError, ValidationError):
        raise PreparedError(
            "no readable consent", remedy="Run 'qkt ingest' for this site.", file=path, site=site
        ) from None


@dataclass(frozen=True)
class PreparedSite:
    """A prepared site with its images left on disk (memory map)."""

    folder: Path
    manifest: Manifest
    images: Images
    labels: Labels
    groups: NDArray[np.str_]
    splits: Mapping[str, NDArray[np.int64]]
    subgroups: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)
    """Column (sex, age, scanner) to each image's group."""

    @property
    def name(self) -> str:
        """The site's name."""
        return self.manifest.site

    def part(self, *splits: str) -> tuple[Images, Labels]:
        """Images and labels of the splits together, copied into memory, in index order."""
        index = np.sort(np.concatenate([self.splits[s] for s in splits]))
        return np.ascontiguousarray(self.images[index]), self.labels[index]

    def local_classes(self) -> tuple[int, ...]:
        """Indices of the classes that the training split holds at all."""
        return tuple(int(c) for c in np.unique(self.labels[self.splits["train"]]))


def write_prepared(
    folder: Path,
    *,
    site: str,
    source_kind: str,
    classes: tuple[str, ...],
    images: ImageStack,
    labels: Labels,
    groups: NDArray[np.str_],
    splits: Mapping[str, NDArray[np.int64]],
    spacing_mm: tuple[float, ...] | None,
    normalisation: Literal["unit", "zscore"],
    transforms: tuple[str, ...],
    outcomes: Sequence[FileOutcome],
    headers: Iterable[Mapping[str, Any] | None] | None = None,
    risks: Mapping[str, int] = MappingProxyType({}),
    hashes: NDArray[np.uint64] | None = None,
    subgroups: Mapping[str, NDArray[np.str_]] = MappingProxyType({}),
    page: Callable[[Manifest], str] | None = None,
    parts: Sequence[str] = SPLITS,
) -> Manifest:
    """Write a prepared site in one step; ``outcomes`` are those of its input files.

    Images are taken and written one by one. ``headers`` (one per image), ``hashes``, ``subgroups`` (column to
    one group per image) and what ``page`` says of the manifest are written if given.
    ``parts`` are the splits that there are.

    Raises:
        PreparedError: lengths differ, an index stands in two splits, or a patient does.
    """
    count = len(labels)
    if not (len(images) == len(groups) == count):
        raise PreparedError(
            f"{len(images)} images, {count} labels and {len(groups)} patient ids",
            remedy="Report this as a defect.",
            site=site,
        )
    seen = np.concatenate([splits[s] for s in parts])
    owners = [set(groups[splits[s]].tolist()) for s in parts]
    if len(np.unique(seen)) != len(seen) or sum(map(len, owners)) != len(set().union(*owners)):
        raise PreparedError(
            "an image or a patient stands in two splits", remedy="Report this as a defect.", site=site
        )
    with new_folder(folder) as temporary:
        _save(temporary / "images.npy", images)
        np.save(temporary / "labels.npy", labels.astype(np.int64), allow_pickle=False)
        np.save(temporary / "groups.npy", groups.astype(np.str_), allow_pickle=False)
        write_json(temporary / "splits.json", {s: np.sort(splits[s]).tolist() for s in parts})
        named = (*ARRAYS, "splits.json", *((SUBGROUPS,) if subgroups else ()))
        if subgroups:
            write_json(temporary / SUBGROUPS, {c: _as_places(values) for c, values in subgroups.items()})
        manifest = Manifest(
            format="qkt-prepared/1",
            site=site,
            source_kind=source_kind,
            classes=classes,
            count=count,
            shape=tuple(images.shape[1:]),
            dtype="uint8" if images.dtype == np.uint8 else "float32",
            spacing_mm=spacing_mm,
            normalisation=normalisation,
            transforms=transforms,
            counts={
                s: {
                    classes[c]: int(n)
                    for c, n in zip(*np.unique(labels[splits[s]], return_counts=True), strict=True)
                }
                for s in parts
            },
            patients={s: len(owners[i]) for i, s in enumerate(parts)},
            rejected=rejected_by_code(outcomes),
            risks=dict(risks),
            digests={name: digest_file(temporary / name) for name in named},
        )
        write_json(temporary / "manifest.json", manifest.model_dump(mode="json"))
        write_integrity(temporary, outcomes)
        if headers is not None:
            write_json_list(temporary / "headers.json", headers)
        if hashes is not None:
            np.save(temporary / "hashes.npy", hashes, allow_pickle=False)
        if page is not None:
            write_text(temporary / "integrity.html", page(manifest))
    return manifest


def _as_places(groups: NDArray[np.str_]) -> dict[str, Any]:
    names, places = np.unique(groups, return_inverse=True)
    return {"groups": names.tolist(), "images": places.tolist()}


def _read_bounded(path: Path, limit: int) -> Any:
    """A JSON file of so many bytes at most.

    Raises:
        OSError, ValueError, RecursionError: absent, larger, or not JSON.
    """
    if path.stat().st_size > limit:
        raise ValueError(f"larger than {limit} bytes")
    return json.loads(path.read_text(encoding="utf-8"))


def _read_subgroups(folder: Path, manifest: Manifest) -> dict[str, NDArray[np.str_]]:
    """Column to groups (N,).

    Raises:
        OSError, RecursionError, ValueError, TypeError, KeyError, IndexError, AttributeError: not what
            :func:`write_prepared` writes.
    """
    if SUBGROUPS not in manifest.digests:
        return {}
    found = {}
    limit = MAX_COLUMNS * (BYTES_PER_INDEX * manifest.count + BYTES_OF_NAMES)
    for column, held in _read_bounded(folder / SUBGROUPS, limit).items():
        places = np.asarray(held["images"], dtype=np.int64)
        if places.shape != (manifest.count,) or places.min(initial=0) < 0:
            raise ValueError(column)
        # One long name would make every image's group as long.
        if max((len(name) for name in held["groups"]), default=0) > MAX_GROUP_NAME:
            raise ValueError(column)
        found[str(column)] = np.array(held["groups"], dtype=np.str_)[places]
    return found


def _save(path: Path, images: ImageStack) -> None:
    """As ``numpy.save`` would, holding one image at a time."""
    header = {
        "descr": np.lib.format.dtype_to_descr(images.dtype),
        "fortran_order": False,
        "shape": tuple(images.shape),
    }
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for i in range(len(images)):
            stream.write(np.ascontiguousarray(images[i]).data)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest alone.

    Raises:
        PreparedError: absent or not a manifest.
    """
    path = folder / "manifest.json"
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise PreparedError(
            "no readable manifest", remedy="Run 'qkt ingest' for this site.", file=path, site=folder.name
        ) from None


UNREADABLE = (
    *(OSError, EOFError, ValueError, TypeError, AttributeError, OverflowError, LookupError),
    RecursionError,
)
"""What a damaged file of a prepared site may end in."""


def _unreadable(error: BaseException, manifest: Manifest, folder: Path) -> PreparedError:
    return PreparedError(
        f"cannot be read: {type(error).__name__}",
        remedy="Run 'qkt ingest' for this site again.",
        site=manifest.site,
        file=folder,
    )


def load_prepared(folder: Path) -> PreparedSite:
    """Open a prepared site; images stay on disk.

    Raises:
        PreparedError: a file is missing, or shapes, dtypes or splits do not match the manifest.
    """
    return _load(folder, SPLITS)


def load_held_back(folder: Path) -> PreparedSite | None:
    """Open the images that a site keeps for evaluation alone; None where it keeps none.

    Raises:
        PreparedError: as of :func:`load_prepared`.
    """
    return _load(folder, (HELD_BACK,)) if (folder / "manifest.json").is_file() else None


def _load(folder: Path, parts: Sequence[str]) -> PreparedSite:
    manifest = read_manifest(folder)
    try:
        images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
        groups = np.load(folder / "groups.npy", allow_pickle=False)
    except UNREADABLE as error:
        raise _unreadable(error, manifest, folder) from None
    wanted = (manifest.count, *manifest.shape)
    lengths = {labels.shape, groups.shape}
    if images.shape != wanted or str(images.dtype) != manifest.dtype or lengths != {wanted[:1]}:
        raise PreparedError(
            f"images {images.shape} {images.dtype}, labels {labels.shape} and patient ids {groups.shape} "
            f"against {wanted} {manifest.dtype} in the manifest",
            remedy="Run 'qkt ingest' for this site again.",
            site=manifest.site,
            file=folder,
        )
    try:  # now that the number of images is known to be true
        limit = BYTES_PER_INDEX * manifest.count + BYTES_OF_NAMES
        splits = {
            s: np.asarray(v, dtype=np.int64) for s, v in _read_bounded(folder / "splits.json", limit).items()
        }
        subgroups = _read_subgroups(folder, manifest)
    except UNREADABLE as error:
        raise _unreadable(error, manifest, folder) from None
    if set(splits) != set(parts):
        raise PreparedError(
            "splits.json lacks a split", remedy="Run 'qkt ingest' for this site again.", site=manifest.site
        )
    if any(((v < 0) | (v >= manifest.count)).any() for v in splits.values()):
        raise PreparedError(
            "splits.json names images that are not there",
            remedy="Run 'qkt ingest' for this site again.",
            site=manifest.site,
        )
    return PreparedSite(folder, manifest, images, labels, groups, splits, subgroups)
