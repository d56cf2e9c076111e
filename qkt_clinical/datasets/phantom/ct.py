"""The CT phantom: small chest-like volumes in Hounsfield units with one lesion of four kinds.

Everything is described in millimetres and sampled on whatever grid a scanner has, so that two scanners
see the same anatomy at different resolutions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.catalog import LESIONS
from qkt_clinical.datasets.phantom.exact import length, rounded

F32 = NDArray[np.float32]

AMBIGUOUS = 0.15
"""Share of lesions drawn between their class and a neighbouring one."""
NUISANCE = 1.0
"""Strength of all variation that says nothing about the class."""
CHUNK_SIZE = 24
VESSELS = 6

AIR, LUNG, FAT, MUSCLE, BONE = -1000.0, -840.0, -90.0, 45.0, 420.0

NEIGHBOURS = {"solid": "calcified", "ground-glass": "solid", "cavity": "solid", "calcified": "solid"}

# Rim and core in HU; `core` as a share of the lesion's radius.
RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "solid": {"radius": (6.0, 10.0), "rim": (10, 70), "core": (0.3, 0.6), "middle": (10, 70)},
    "ground-glass": {"radius": (7.0, 11.0), "rim": (-640, -420), "core": (0.3, 0.6), "middle": (-600, -380)},
    "cavity": {"radius": (7.0, 11.0), "rim": (0, 70), "core": (0.5, 0.7), "middle": (-980, -880)},
    "calcified": {"radius": (6.0, 10.0), "rim": (20, 90), "core": (0.45, 0.7), "middle": (350, 800)},
}
NUMBERS = tuple(RANGES["solid"])


@dataclass(frozen=True)
class Scanner:
    """How one hospital's CT sees a chest."""

    shape: tuple[int, int, int]
    """Slices, rows, columns."""
    spacing: tuple[float, float, float]
    """Millimetres between slices, rows and columns."""
    noise: float
    """Standard deviation in Hounsfield units."""
    sharpness: float
    """Width of the transition at an edge, in millimetres."""
    offset: float = 0.0
    """Calibration error in Hounsfield units."""


def _per_image(values: NDArray[Any]) -> F32:
    return np.asarray(values, dtype=np.float32)[:, None, None, None]


def _lesions(labels: NDArray[np.int64], rng: np.random.Generator) -> dict[str, F32]:
    low = np.array([[RANGES[c][n][0] for n in NUMBERS] for c in LESIONS])
    high = np.array([[RANGES[c][n][1] for n in NUMBERS] for c in LESIONS])
    other = np.array([LESIONS.index(NEIGHBOURS[c]) for c in LESIONS])[labels]
    count = len(labels)
    own = low[labels] + (high - low)[labels] * rng.random((count, len(NUMBERS)))
    strange = low[other] + (high - low)[other] * rng.random((count, len(NUMBERS)))
    share = np.where(rng.random(count) < AMBIGUOUS, rng.uniform(0.2, 0.5, count), 0.0)
    numbers = own + share[:, None] * (strange - own)
    return {n: numbers[:, i].astype(np.float32) for i, n in enumerate(NUMBERS)}


def render_chests(
    labels: NDArray[np.int64], scanner: Scanner, *, rng: np.random.Generator
) -> tuple[NDArray[np.int16], F32]:
    """Draw one volume per label.

    Args:
        labels: (N,) indices into ``LESIONS``.
        scanner: the hospital's.
        rng: the only source of chance.

    Returns:
        (N, D, H, W) int16 in Hounsfield units, -1024..3071, axes running towards the patient's head,
        back and left; and the lesions' centres (N, 3) in millimetres from the volume's centre.
    """
    volumes = np.empty((len(labels), *scanner.shape), dtype=np.int16)
    centres = np.empty((len(labels), 3), dtype=np.float32)
    for start in range(0, len(labels), CHUNK_SIZE):
        part = slice(start, start + CHUNK_SIZE)
        volumes[part], centres[part] = _draw(labels[part], scanner, rng)
    return volumes, centres


def _draw(
    labels: NDArray[np.int64], scanner: Scanner, rng: np.random.Generator
) -> tuple[NDArray[np.int16], F32]:
    count, width = len(labels), np.float32(scanner.sharpness)

    def uniform(low: float, high: float, *shape: int) -> F32:
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    def soft(distance: F32) -> F32:
        return np.asarray(np.clip(0.5 - distance / width, 0.0, 1.0), dtype=np.float32)

    axes = [
        ((np.arange(n, dtype=np.float32) - (n - 1) / 2) * s).astype(np.float32)
        for n, s in zip(scanner.shape, scanner.spacing, strict=True)
    ]
    z, y, x = axes[0][None, :, None, None], axes[1][None, None, :, None], axes[2][None, None, None, :]
    volume = np.full((count, *scanner.shape), AIR, dtype=np.float32)

    def put(mask: F32, value: F32 | float) -> None:
        volume[...] += mask * (value - volume)

    girth = uniform(0.92, 1.06)
    ring = np.sqrt((x / _per_image(30.0 * girth)) ** 2 + (y / _per_image(25.0 * girth)) ** 2) + 0.0 * z
    put(soft((ring - 1.0) * 27.0), FAT)
    put(soft((ring - 0.92) * 27.0), MUSCLE)

    # Ribs slope through the wall; the spine stands behind, between the lungs.
    heading = rounded(np.arctan2, y, x)
    slope, phase = _per_image(uniform(0.12, 0.25)), _per_image(uniform(0, 2 * np.pi))
    ribs = rounded(np.cos, 7.0 * heading + slope * z * 3.0 + phase)
    put(soft((np.abs(ring - 0.86) - 0.05) * 27.0) * np.clip((ribs - 0.45) * 3.0, 0.0, 1.0), BONE)
    spine = length(x, y - _per_image(17.0 * girth)) - _per_image(uniform(3.6, 4.6)) + 0.0 * z
    put(soft(spine), BONE * 0.8)

    air = np.zeros_like(volume)
    for side in (-1.0, 1.0):
        across = (x - side * _per_image(13.5 * girth)) / _per_image(uniform(9.5, 11.0) * girth)
        deep = (y + 1.0) / _per_image(uniform(16.0, 18.0) * girth)
        high = (z - 2.0) / _per_image(uniform(38.0, 48.0))
        air = np.maximum(air, soft((np.sqrt(across**2 + deep**2 + high**2) - 1.0) * 10.0))
    put(air, LUNG + _per_image(25.0 * NUISANCE * rng.standard_normal(count).astype(np.float32)))

    for _ in range(VESSELS):
        sides = np.where(rng.random(count) < 0.5, -1.0, 1.0)
        start = np.stack([uniform(-20, 20), uniform(-12, 12), sides * uniform(6, 19)], axis=1)
        way = rng.standard_normal((count, 3)).astype(np.float32)
        way /= np.linalg.norm(way, axis=1, keepdims=True)
        rel = [axis - _per_image(start[:, i]) for i, axis in enumerate((z, y, x))]
        along = sum((r * _per_image(way[:, i]) for i, r in enumerate(rel)), np.zeros_like(volume))
        away = np.sqrt(np.maximum(rel[0] ** 2 + rel[1] ** 2 + rel[2] ** 2 - along**2, 0.0))
        put(soft(away - _per_image(uniform(0.7, 1.5))) * air, 20.0)

    shape = _lesions(labels, rng)
    sides = np.where(rng.random(count) < 0.5, -1.0, 1.0)
    centre = np.stack([uniform(-12, 12), uniform(-8, 7), sides * uniform(11, 16) * girth], axis=1)
    squash = uniform(0.85, 1.18, 3)
    rel = [(axis - _per_image(centre[:, i])) * _per_image(squash[:, i]) for i, axis in enumerate((z, y, x))]
    away = np.sqrt(rel[0] ** 2 + rel[1] ** 2 + rel[2] ** 2)
    waves = [rounded(np.sin, r * 0.6 + _per_image(uniform(0, 6.3))) for r in rel]
    bumps = waves[0] * waves[1] + waves[2]
    away = away + 0.5 * NUISANCE * bumps
    put(soft(away - _per_image(shape["radius"])), _per_image(shape["rim"]))
    put(soft(away - _per_image(shape["radius"] * shape["core"])), _per_image(shape["middle"]))

    volume += scanner.offset
    volume += scanner.noise * NUISANCE * rng.standard_normal(volume.shape, dtype=np.float32)
    return np.clip(np.rint(volume), -1024, 3071).astype(np.int16), centre.astype(np.float32)
