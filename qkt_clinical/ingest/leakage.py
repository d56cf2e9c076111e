"""Images that stand in two places: the same pixels, or nearly the same. Pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.ingest.arrays import as_float, averaging

Hashes = NDArray[np.uint64]
"""(N, 2): of the pixels, and of what a small picture of them looks like."""
NEAR = 3
"""Bits of 64 in which two pictures that look alike differ at most."""
BANDS = 4
"""Two hashes that differ in at most ``BANDS - 1`` bits are equal in one of so many parts."""
COARSE = (8, 9)


class Pair(NamedTuple):
    """Two images, by position."""

    first: int
    second: int


def flat(image: NDArray[np.generic]) -> NDArray[np.float32]:
    """Grey (H, W) of one prepared image (C, H, W), or of the middle slice of (C, D, H, W)."""
    grey: NDArray[np.float32] = np.asarray(image, dtype=np.float32).mean(axis=0)
    return grey if grey.ndim == 2 else grey[len(grey) // 2]


def pixel_hash(image: NDArray[np.generic]) -> int:
    """First 64 bits of SHA-256 of an image's values and shape; 0 for an even image, which is nobody's."""
    if image.min() == image.max():
        return 0
    digest = hashlib.sha256(f"{image.shape}".encode())
    digest.update(np.ascontiguousarray(as_float(image)).data)
    return int.from_bytes(digest.digest()[:8], "little")


def difference_hash(image: NDArray[np.generic]) -> int:
    """Whether each of 8 x 8 fields is darker than the one at its right, 64 bits; 0 for an even image.

    Copies that were scaled, compressed or brightened differ in a few bits (dHash, N. Krawetz 2013).
    """
    grey = flat(as_float(image))
    rows, columns = (averaging(old, new) for old, new in zip(grey.shape, COARSE, strict=True))
    coarse = (columns @ (rows @ grey).T.copy()).T
    bits = (coarse[:, 1:] > coarse[:, :-1] + 1e-6).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def hashes_of(image: NDArray[np.generic]) -> tuple[int, int]:
    """Both hashes of one prepared image (C, ...); the same for its 8 bits and for these as 0..1."""
    return pixel_hash(image), difference_hash(image)


def same_pixels(hashes: Hashes, parts: Sequence[NDArray[np.int64]]) -> Iterator[Pair]:
    """Pairs of the same pixels in two different parts, sorted; even images are left out."""
    where = _part_of(parts)
    first_with: dict[int, int] = {}
    for position in (p for p in sorted(where) if hashes[p, 0]):
        earlier = first_with.setdefault(int(hashes[position, 0]), position)
        if where[earlier] != where[position]:
            yield Pair(earlier, position)


def look_alike(hashes: Hashes, parts: Sequence[NDArray[np.int64]]) -> list[Pair]:
    """Pairs in two different parts that look nearly the same, sorted; even images are left out."""
    where = _part_of(parts)
    found: set[Pair] = set()
    looks = {p: int(hashes[p, 1]) for p in sorted(where) if int(hashes[p, 1])}
    for band in range(BANDS):
        buckets: dict[int, list[int]] = {}
        for position, look in looks.items():
            key = (look >> (64 // BANDS * band)) & (2 ** (64 // BANDS) - 1)
            for other in buckets.setdefault(key, []):
                if where[other] != where[position] and (looks[other] ^ look).bit_count() <= NEAR:
                    found.add(Pair(other, position))
            buckets[key].append(position)
    return sorted(found)


def _part_of(parts: Sequence[NDArray[np.int64]]) -> dict[int, int]:
    return {int(i): number for number, part in enumerate(parts) for i in part}


class Crossing(NamedTuple):
    """One hospital trains on so many of another's test images."""

    trains: str
    tests: str
    images: int


def across_sites(
    sites: Mapping[str, tuple[Hashes, NDArray[np.int64], NDArray[np.int64]]],
) -> Iterator[Crossing]:
    """Where one hospital trains on pixels that another is tested on.

    Args:
        sites: name to hashes, and positions of training and of test images.
    """
    for trains, (theirs, train, _) in sorted(sites.items()):
        learned = set(theirs[train, 0].tolist())
        for tests, (others, _, test) in sorted(sites.items()):
            count = len((learned & set(others[test, 0].tolist())) - {0})
            if trains != tests and count:
                yield Crossing(trains, tests, count)
