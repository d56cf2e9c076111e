"""Read a data set in MedMNIST's layout, bounded before anything is allocated."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.errors import SourceError

SPLITS = ("train", "val", "test")
"""Splits of a MedMNIST file; ingest carves calibration images out of train."""

MAX_BYTES = 8 << 30
"""Largest sum of declared array sizes that is read: everything is held in memory once."""


# --- reading the npz --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitArrays:
    """One split of a MedMNIST-layout file."""

    images: NDArray[Any]
    """(N, H, W), (N, H, W, 3) or (N, D, H, W)."""
    labels: NDArray[np.int64]
    """(N,)"""
    groups: NDArray[Any] | None
    """(N,) patient ids as the file has them."""


def read_medmnist(source: Path) -> dict[str, SplitArrays]:
    """Read a single-label MedMNIST-layout npz; sizes are checked before anything is allocated.

    Raises:
        SourceError: unreadable, too large, pickled, an array missing, or shapes and types that do not
            belong together; also where a patient stands in two splits.
    """
    arrays = _arrays(
        source, {f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels", "groups")}
    )
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


def read_class_names(source: Path) -> tuple[str, ...] | None:
    """The names of the classes, in label order, that a MedMNIST-layout npz states; None where it has none.

    Raises:
        SourceError: as :func:`read_medmnist`, or the names are no list of different texts.
    """
    names = _arrays(source, {"class_names"}).get("class_names")
    if names is None:
        return None
    found = tuple(map(str, names.reshape(-1).tolist()))
    if names.ndim != 1 or names.dtype.kind != "U" or len(set(found)) != len(found) or "" in found:
        raise _unusable(source, f"class_names is {names.shape} {names.dtype}, not a list of different names")
    return found


def _arrays(source: Path, wanted: Set[str]) -> dict[str, NDArray[Any]]:
    """The arrays of these names that the file has, or a typed error."""
    try:
        return _read_arrays(source, wanted)
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


def _read_arrays(source: Path, wanted: Set[str]) -> dict[str, NDArray[Any]]:
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


def _part(source: Path, arrays: Mapping[str, NDArray[Any]], split: str) -> SplitArrays:
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
    return SplitArrays(images, labels, groups)
