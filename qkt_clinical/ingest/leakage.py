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


class Held(NamedTuple):
    """What of a prepared site is compared with others."""

    hashes: Hashes
    patients: NDArray[np.str_]
    """Salted id per image."""
    train: NDArray[np.int64]
    test: NDArray[np.int64]


class Crossing(NamedTuple):
    """What one hospital trains on that another is tested on."""

    trains: str
    tests: str
    images: int
    """Test images whose very pixels are among the training images."""
    patients: tuple[str, ...]
    """Salted ids at the testing hospital: of the owners of these images, and of patients known to both.
    The latter can be told only where hospitals share one salt."""
    alike: int
    """Further test images that look nearly like a training image. They may be copies: look at them."""


def across_sites(sites: Mapping[str, Held]) -> Iterator[Crossing]:
    """Where hospitals train on what others are tested on, by hashes and salted ids alone."""
    for trains, theirs in sorted(sites.items()):
        for tests, others in sorted(sites.items()):
            if trains != tests:
                crossing = _crossing(trains, tests, theirs, others)
                if crossing.images or crossing.patients or crossing.alike:
                    yield crossing


def _crossing(trains: str, tests: str, theirs: Held, others: Held) -> Crossing:
    learned = theirs.hashes[theirs.train]
    known = set(learned[:, 0].tolist()) - {0}
    same = np.array([i for i in others.test.tolist() if int(others.hashes[i, 0]) in known], dtype=np.int64)
    owners = set(others.patients[same].tolist())
    owners |= set(theirs.patients[theirs.train].tolist()) & set(others.patients[others.test].tolist())
    both = np.concatenate([learned, others.hashes[others.test]])
    parts = np.split(np.arange(len(both)), [len(learned)])
    alike = {int(others.test[p.second - len(learned)]) for p in look_alike(both, parts)}
    return Crossing(trains, tests, len(same), tuple(sorted(owners)), len(alike - set(same.tolist())))
