"""The blood-smear phantom: eight classes of cells drawn from soft masks, stained like a hospital's slides.

A cell is a row of numbers (size, outline, nucleus, colours, granules); a class is a range for each
number. So an ambiguous cell is simply a row between two classes. Everything is drawn as optical density
on a grid twice as fine as the image, which makes overlaps and stains behave as in transmitted light.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.catalog import BLOOD_CELLS
from qkt_clinical.datasets.phantom.exact import length, rounded

F32 = NDArray[np.float32]

AMBIGUOUS: dict[str, float] = {
    "basophil": 0.21,
    "eosinophil": 0.24,
    "erythroblast": 0.13,
    "ig": 0.09,
    "lymphocyte": 0.21,
    "monocyte": 0.11,
    "neutrophil": 0.14,
    "platelet": 0.18,
}
"""Share of a class's cells that are drawn between it and a neighbouring one."""
BETWEEN = (0.3, 0.65)
"""How far such a cell lies towards its neighbour: 0 is its own class, 1 the other."""
FURTHEST = {"platelet": 0.75, "eosinophil": 0.75}
"""The same at the most for classes that are told by size or granules when they are halfway elsewhere."""
NUISANCE = 1.0
"""Strength of all variation that says nothing about the class.

Calibrated together with the shares above (``tests/datasets/test_phantom_difficulty.py``) so that a residual
network of 0.3 M parameters recalls 0.85 to 0.97 of each class of unseen patients, whether it is trained on
all classes under all six stains or on the six hospitals' own images pooled (who holds which class shows in
the stain).
"""

CHUNK_SIZE = 125
"""Images drawn at once: small enough for the processor's cache."""
LOBES = 5
RED_CELLS = 10

PAPER = np.array([250.0, 240.0, 228.0])
"""Colour of empty glass to which the colours below refer."""

NEIGHBOURS: dict[str, tuple[str, ...]] = {
    "basophil": ("eosinophil", "ig", "platelet"),
    "eosinophil": ("neutrophil", "basophil"),
    "erythroblast": ("lymphocyte", "platelet"),
    "ig": ("monocyte", "neutrophil"),
    "lymphocyte": ("erythroblast", "monocyte"),
    "monocyte": ("ig", "lymphocyte"),
    "neutrophil": ("ig", "eosinophil"),
    "platelet": ("erythroblast", "basophil"),
}
"""With whom each class is confused in practice."""

# Lengths are in half image widths for `size`, and in cell radii below it; angles in radians.
RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "basophil": {
        "size": (0.56, 0.72), "bumps": (0.02, 0.07), "stretch": (0.0, 0.14),
        "arc": (0.18, 0.34), "span": (2.2, 3.6), "lobes": (2, 3.99),
        "lobe": (0.36, 0.48), "bridge": (0.18, 0.32),
        "chromatin": (0.15, 0.3), "granules": (0.55, 0.85), "grain": (1.3, 1.9), "over": (0.75, 1.0),
        "vacuoles": (0.0, 0.5),
    },
    "eosinophil": {
        "size": (0.60, 0.78), "bumps": (0.01, 0.06), "stretch": (0.0, 0.18),
        "arc": (0.34, 0.48), "span": (1.9, 3.4), "lobes": (2, 3.15),
        "lobe": (0.30, 0.39), "bridge": (0.06, 0.14),
        "chromatin": (0.12, 0.28), "granules": (0.55, 0.9), "grain": (1.4, 2.1), "over": (0.05, 0.2),
        "vacuoles": (0.0, 0.25),
    },
    "erythroblast": {
        "size": (0.33, 0.50), "bumps": (0.01, 0.07), "stretch": (0.0, 0.16),
        "arc": (0.0, 0.05), "span": (0.0, 1.0), "lobes": (1, 1.99),
        "lobe": (0.48, 0.70), "bridge": (0.3, 0.4),
        "chromatin": (0.08, 0.25), "granules": (0.0, 0.12), "grain": (1.0, 1.8), "over": (0.0, 0.1),
        "vacuoles": (0.0, 0.1),
    },
    "ig": {
        "size": (0.66, 0.90), "bumps": (0.01, 0.05), "stretch": (0.0, 0.20),
        "arc": (0.10, 0.30), "span": (0.9, 2.3), "lobes": (3, 4.99),
        "lobe": (0.40, 0.60), "bridge": (0.38, 0.55),
        "chromatin": (0.10, 0.25), "granules": (0.15, 0.5), "grain": (0.9, 1.4), "over": (0.2, 0.5),
        "vacuoles": (0.0, 0.3),
    },
    "lymphocyte": {
        "size": (0.42, 0.60), "bumps": (0.02, 0.09), "stretch": (0.0, 0.20),
        "arc": (0.0, 0.10), "span": (0.0, 1.2), "lobes": (1, 2.99),
        "lobe": (0.76, 0.92), "bridge": (0.6, 0.8),
        "chromatin": (0.15, 0.35), "granules": (0.0, 0.15), "grain": (1.0, 1.6), "over": (0.0, 0.2),
        "vacuoles": (0.0, 0.1),
    },
    "monocyte": {
        "size": (0.66, 0.88), "bumps": (0.05, 0.13), "stretch": (0.05, 0.32),
        "arc": (0.38, 0.50), "span": (2.3, 3.3), "lobes": (5, 5.99),
        "lobe": (0.25, 0.36), "bridge": (0.24, 0.34),
        "chromatin": (0.15, 0.3), "granules": (0.05, 0.2), "grain": (0.8, 1.2), "over": (0.0, 0.2),
        "vacuoles": (0.4, 1.0),
    },
    "neutrophil": {
        "size": (0.56, 0.74), "bumps": (0.01, 0.06), "stretch": (0.0, 0.15),
        "arc": (0.36, 0.50), "span": (2.8, 4.9), "lobes": (3, 5.99),
        "lobe": (0.22, 0.30), "bridge": (0.06, 0.17),
        "chromatin": (0.12, 0.28), "granules": (0.2, 0.5), "grain": (0.8, 1.1), "over": (0.0, 0.1),
        "vacuoles": (0.0, 0.2),
    },
    "platelet": {
        "size": (0.15, 0.35), "bumps": (0.04, 0.16), "stretch": (0.0, 0.35),
        "arc": (0.0, 0.15), "span": (0.0, 2.0), "lobes": (1, 2.99),
        "lobe": (0.35, 0.60), "bridge": (0.2, 0.4),
        "chromatin": (0.3, 0.6), "granules": (0.35, 0.8), "grain": (0.8, 1.3), "over": (0.4, 0.9),
        "vacuoles": (0.0, 0.1),
    },
}  # fmt: skip
NUMBERS = tuple(RANGES["basophil"])

COLOURS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]] = {
    "basophil": ((150, 105, 170), (88, 48, 128), (58, 26, 92)),
    "eosinophil": ((226, 152, 150), (88, 52, 132), (196, 88, 92)),
    "erythroblast": ((184, 166, 190), (54, 34, 82), (140, 120, 170)),
    "ig": ((172, 164, 222), (108, 66, 164), (122, 70, 160)),
    "lymphocyte": ((150, 156, 220), (78, 46, 122), (128, 90, 170)),
    "monocyte": ((174, 164, 202), (98, 64, 146), (146, 110, 170)),
    "neutrophil": ((232, 196, 208), (80, 46, 124), (202, 146, 178)),
    "platelet": ((186, 156, 204), (140, 96, 172), (100, 58, 140)),
}
"""Cytoplasm, nucleus, granules: as seen on a Pappenheim-stained slide."""


@dataclass(frozen=True)
class Stain:
    """How one hospital's slides look: the dyes, the glass and the scanner."""

    glass: tuple[float, float, float]
    """Colour of the empty background, 0..255."""
    dyes: tuple[float, float, float]
    """Factor on the optical density in red, green and blue: shifts hue."""
    strength: float
    """Factor on the optical density as a whole."""
    blur: float
    """Standard deviation of the scanner's point spread, in pixels of a 32-pixel image."""
    noise: float
    """Standard deviation of the sensor's noise, in grey levels."""
    gamma: float = 1.0


def _density(rgb: tuple[int, int, int]) -> NDArray[np.float64]:
    return np.asarray(-np.log(np.asarray(rgb, dtype=float) / PAPER))


LOW = np.array([[RANGES[c][n][0] for n in NUMBERS] for c in BLOOD_CELLS])
HIGH = np.array([[RANGES[c][n][1] for n in NUMBERS] for c in BLOOD_CELLS])
DYED = np.array([[_density(rgb) for rgb in COLOURS[c]] for c in BLOOD_CELLS])
RED = _density((212, 174, 168)).astype(np.float32)


@dataclass(frozen=True)
class Cells:
    """Numbers that describe N cells: each of shape (N,), colours (N, 3, 3)."""

    numbers: dict[str, F32]
    colours: F32

    def __getitem__(self, name: str) -> F32:
        return self.numbers[name]


def sample_cells(labels: NDArray[np.int64], rng: np.random.Generator) -> Cells:
    """Draw cells of the given classes; the share ``AMBIGUOUS`` of them lies between two classes."""
    count = len(labels)

    def rows(classes: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        numbers = LOW[classes] + (HIGH - LOW)[classes] * rng.random((count, len(NUMBERS)))
        tint = 1.0 + 0.10 * NUISANCE * rng.standard_normal((count, 3, 1))
        hue = 1.0 + 0.06 * NUISANCE * rng.standard_normal((count, 1, 3))
        return numbers, DYED[classes] * np.clip(tint * hue, 0.6, 1.5)

    pick = rng.random(count)
    other = np.array(
        [
            BLOOD_CELLS.index(near[int(p * len(near))])
            for near, p in zip((NEIGHBOURS[BLOOD_CELLS[i]] for i in labels), pick, strict=True)
        ],
        dtype=np.int64,
    ).reshape(count)
    ambiguous = np.array([AMBIGUOUS[c] for c in BLOOD_CELLS])[labels]
    most = np.array([FURTHEST.get(c, BETWEEN[1]) for c in BLOOD_CELLS])[labels]
    share = np.where(rng.random(count) < ambiguous, rng.uniform(BETWEEN[0], most), 0.0)
    own, own_colours = rows(labels)
    strange, strange_colours = rows(other)
    numbers = own + share[:, None] * (strange - own)
    colours = own_colours + share[:, None, None] * (strange_colours - own_colours)
    return Cells(
        {n: numbers[:, i].astype(np.float32) for i, n in enumerate(NUMBERS)}, colours.astype(np.float32)
    )


def _field(count: int, side: int, scale: F32, rng: np.random.Generator) -> F32:
    """Smooth periodic noise (count, side, side) of unit variance; ``scale`` (count,) in grid points."""
    white = rng.standard_normal((count, side, side), dtype=np.float32)
    fy = np.fft.fftfreq(side).astype(np.float32)[:, None]
    fx = np.fft.rfftfreq(side).astype(np.float32)[None, :]
    keep = rounded(np.exp, -2.0 * (np.pi * scale[:, None, None]) ** 2 * (fy**2 + fx**2))
    smooth = np.fft.irfft2(np.fft.rfft2(white) * keep, s=(side, side))
    smooth /= smooth.std(axis=(1, 2), keepdims=True)
    return np.asarray(smooth, dtype=np.float32)


def _soft(distance: F32, width: float) -> F32:
    """1 well inside (negative distance), 0 outside, linear across ``width``."""
    return _clip(0.5 - distance / np.float32(width))


def _clip(values: F32) -> F32:
    return np.asarray(np.clip(values, 0.0, 1.0), dtype=np.float32)


def _per_image(values: NDArray[Any]) -> F32:
    return np.asarray(values, dtype=np.float32)[:, None, None]


def _paint(density: F32, mask: F32, colour: F32) -> None:
    """Cover ``density`` (N, 3, S, S) with ``colour`` (N, 3) where ``mask`` (N, S, S) is 1, in place."""
    density += mask[:, None] * (colour[:, :, None, None] - density)


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> F32:
    return rng.uniform(low, high, shape).astype(np.float32)


def _red_cells(density: F32, x: F32, y: F32, reach: F32, edge: float, rng: np.random.Generator) -> None:
    """Add red cells with central pallor around (not under the middle of) the cell of radius ``reach``."""
    count = len(density)
    crowd = rng.integers(2, RED_CELLS + 1, count)
    radius = _uniform(rng, 0.30, 0.38, count)
    layer: F32 = np.zeros(density.shape[:1] + density.shape[2:], dtype=np.float32)
    for slot in range(RED_CELLS):
        angle = _uniform(rng, 0, 2 * np.pi, count)
        gap = rng.exponential(0.45, count).astype(np.float32)
        far = reach + radius * _uniform(rng, 0.55, 1.1, count) + gap
        turn, squeeze = _uniform(rng, 0, np.pi, count), _uniform(rng, 0.85, 1.1, count)
        pallor, deep = _uniform(rng, 0.45, 0.95, count), _uniform(rng, 0.75, 1.15, count)
        wide = radius * _uniform(rng, 0.88, 1.12, count)
        dx = x - _per_image(far * rounded(np.cos, angle))
        dy = y - _per_image(far * rounded(np.sin, angle))
        cosine, sine = _per_image(rounded(np.cos, turn)), _per_image(rounded(np.sin, turn))
        along = (dx * cosine + dy * sine) * _per_image(squeeze)
        across = dy * cosine - dx * sine
        distance = np.sqrt(along**2 + across**2)
        disc = _soft(distance - _per_image(wide), edge * 1.5)
        disc *= 1.0 - _per_image(pallor) * _soft(distance - _per_image(wide * 0.42), 0.26)
        disc *= _per_image(deep * (slot < crowd))
        # Two cells on top of each other absorb more than one, but they also press each other flat.
        layer = np.maximum(layer, disc) + np.float32(0.35) * np.minimum(layer, disc)
    density += layer[:, None] * RED[None, :, None, None]


def _nucleus(
    cells: Cells, x: F32, y: F32, rough: F32, centre: tuple[F32, F32], turn: F32, rng: np.random.Generator
) -> F32:
    """Signed distance (N, S, S) to a chain of lobes along an arc, joined by bridges."""
    count = len(turn)
    radius = cells["size"]
    lobes = np.clip(np.floor(cells["lobes"]), 1, LOBES).astype(np.int64)
    slot = np.minimum(np.arange(LOBES)[None, :], lobes[:, None] - 1)
    along = slot / np.maximum(lobes - 1, 1)[:, None] - 0.5
    angle = turn[:, None] + cells["span"][:, None] * along
    wobble = 0.05 * rng.standard_normal((2, count, LOBES))
    wobble = np.take_along_axis(wobble, slot[None].repeat(2, axis=0), axis=2)
    px = cells["arc"][:, None] * np.cos(angle) + wobble[0]
    py = cells["arc"][:, None] * np.sin(angle) + wobble[1]
    each = cells["lobe"][:, None] * np.take_along_axis(_uniform(rng, 0.88, 1.14, count, LOBES), slot, axis=1)
    # Many lobes share the same amount of nucleus.
    each = each * np.where(cells["bridge"] < 0.2, (3.0 / np.maximum(lobes, 2)) ** 0.35, 1.0)[:, None]
    shift = 0.10 * rng.standard_normal((2, count))
    room = np.maximum(1.0 - cells["lobe"] - cells["arc"], 0.0)
    px = (px - px.mean(axis=1, keepdims=True) + np.clip(shift[0], -room, room)[:, None]) * radius[:, None]
    py = (py - py.mean(axis=1, keepdims=True) + np.clip(shift[1], -room, room)[:, None]) * radius[:, None]
    px, py = px + centre[0][:, None], py + centre[1][:, None]
    each, bridge = each * radius[:, None], cells["bridge"] * radius
    nearest = np.full_like(rough, np.inf)
    for k in range(LOBES):
        ax, ay = x - _per_image(px[:, k]), y - _per_image(py[:, k])
        nearest = np.minimum(nearest, np.sqrt(ax**2 + ay**2) - _per_image(each[:, k]))
        if k:
            bx, by = px[:, k - 1] - px[:, k], py[:, k - 1] - py[:, k]
            length = np.maximum(bx**2 + by**2, 1e-6)
            at = np.clip(ax * _per_image(bx / length) + ay * _per_image(by / length), 0.0, 1.0)
            gap = np.sqrt((ax - at * _per_image(bx)) ** 2 + (ay - at * _per_image(by)) ** 2)
            nearest = np.minimum(nearest, gap - _per_image(bridge))
    return nearest + 0.035 * rough * _per_image(radius)


def _draw(labels: NDArray[np.int64], size: int, rng: np.random.Generator) -> F32:
    """Optical density (N, 3, 2 * size, 2 * size) of one cell each amid red cells."""
    count, side = len(labels), 2 * size
    cells = sample_cells(labels, rng)
    line = ((np.arange(side, dtype=np.float32) + 0.5) / size - 1.0).astype(np.float32)
    zoom = _uniform(rng, 1.0 - 0.08 * NUISANCE, 1.0 + 0.08 * NUISANCE, count)
    x = line[None, None, :] / _per_image(zoom)
    y = line[None, :, None] / _per_image(zoom)
    edge = 2.0 / size
    radius = cells["size"]
    density = np.zeros((count, 3, side, side), dtype=np.float32)
    _red_cells(density, x, y, radius, edge, rng)

    coarse = _field(count, side, np.full(count, side / 14, dtype=np.float32), rng)
    medium = _field(count, side, np.full(count, side / 40, dtype=np.float32), rng)
    grain = _field(count, side, cells["grain"] * (side / 64), rng)

    place = 0.09 * NUISANCE * rng.standard_normal((2, count))
    centre = (place[0].astype(np.float32), place[1].astype(np.float32))
    turn = _uniform(rng, 0, 2 * np.pi, count)
    dx, dy = x - _per_image(centre[0]), y - _per_image(centre[1])
    cosine, sine = _per_image(rounded(np.cos, turn)), _per_image(rounded(np.sin, turn))
    u = dx * cosine + dy * sine
    v = dy * cosine - dx * sine
    stretch = 1.0 + cells["stretch"]
    u, v = u / _per_image(np.sqrt(stretch)), v * _per_image(np.sqrt(stretch))
    far = np.sqrt(u**2 + v**2) + 1e-6
    # Powers of (u + iv) / far, part by part: some processors multiply and add at once, and round otherwise.
    east, north = u / far, v / far
    wave, real, imaginary = np.zeros_like(far), east, north
    for k in range(2, 6):
        real, imaginary = real * east - imaginary * north, real * north + imaginary * east
        phase = rng.uniform(0, 2 * np.pi, count)
        turned = real * _per_image(np.cos(phase)) - imaginary * _per_image(np.sin(phase))
        wave += turned * np.float32(1.2 / k)
    outline = far - _per_image(radius) * (1.0 + _per_image(cells["bumps"]) * wave)
    body = _soft(outline, edge * 1.5)

    cytoplasm, nuclear, granular = (cells.colours[:, i] for i in range(3))
    _paint(density, body * 0.97, cytoplasm)
    inside = body[:, None]
    rim = np.clip(1.0 + outline / _per_image(0.25 * radius), 0.0, 1.0) * body
    texture = 1.0 + 0.10 * medium + 0.10 * coarse + 0.12 * rim
    density *= 1.0 + inside * (texture[:, None] - 1.0)

    cut = 1.6 - 2.4 * cells["granules"]
    spots = np.clip((grain - _per_image(cut)) * 1.6, 0.0, 1.0) * body * _per_image(cells["granules"] > 0.02)
    _paint(density, spots * 0.75, granular)

    holes = (
        np.clip((coarse * 0.6 + grain * 0.5 - 1.35) * 2.5, 0.0, 1.0) * body * _per_image(cells["vacuoles"])
    )
    density *= 1.0 - 0.75 * holes[:, None]

    distance = _nucleus(cells, x, y, coarse, centre, turn + _uniform(rng, -0.5, 0.5, count), rng)
    nucleus = _soft(distance, edge * 1.3) * np.clip(body * 1.5 - 0.25, 0.0, 1.0)
    # A platelet has no nucleus: its granular middle is drawn faintly in the nucleus's place.
    solid = np.interp(cells["size"], (0.26, 0.38), (0.55, 0.96))
    nucleus *= _per_image(solid)
    chromatin = 1.0 + _per_image(cells["chromatin"]) * medium
    density += nucleus[:, None] * (
        nuclear[:, :, None, None] * np.clip(chromatin, 0.5, 1.5)[:, None] - density
    )
    _paint(density, spots * 0.85 * _per_image(cells["over"]) * nucleus, granular)

    _debris(density, x, y, edge, rng)
    return density


def _debris(density: F32, x: F32, y: F32, edge: float, rng: np.random.Generator) -> None:
    """Specks of dye and stray platelets near the margin of a share of the images."""
    count = len(density)
    for low, high, share in ((0.04, 0.08, 0.25), (0.10, 0.15, 0.18)):
        angle, far = _uniform(rng, 0, 2 * np.pi, count), _uniform(rng, 0.75, 1.25, count)
        wide = _uniform(rng, low, high, count)
        away = length(
            x - _per_image(far * rounded(np.cos, angle)), y - _per_image(far * rounded(np.sin, angle))
        )
        mask = _soft(away - _per_image(wide), edge * 2)
        mask *= _per_image((rng.random(count) < share * NUISANCE) * rng.uniform(0.4, 0.9, count))
        colour = np.broadcast_to(DYED[BLOOD_CELLS.index("platelet"), 2].astype(np.float32), (count, 3))
        _paint(density, mask, colour)


def _blurred(images: F32, sigma: F32) -> F32:
    """Gaussian blur of (N, 3, S, S) with one standard deviation (N,) per image, edges repeated."""
    taps = np.arange(-2, 3, dtype=np.float32)
    kernel = rounded(np.exp, -(taps[None, :] ** 2) / (2 * np.maximum(sigma, 0.15)[:, None] ** 2))
    kernel = (kernel / kernel.sum(axis=1, keepdims=True)).astype(np.float32)
    for axis in (2, 3):
        pad = [(0, 0)] * 4
        pad[axis] = (2, 2)
        wide = np.pad(images, pad, mode="edge")
        length = images.shape[axis]
        images = np.zeros_like(images)
        for k in range(len(taps)):
            piece = [slice(None)] * 4
            piece[axis] = slice(k, k + length)
            images += kernel[:, k, None, None, None] * wide[tuple(piece)]
    return images


def render_cells(
    labels: NDArray[np.int64],
    patients: NDArray[np.int64],
    stain: Stain,
    *,
    size: int,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Draw one image per label.

    Args:
        labels: (N,) indices into ``BLOOD_CELLS``.
        patients: (N,) which slide each image comes from; slides differ a little in their staining.
        stain: the hospital's.
        size: height and width in pixels.
        rng: the only source of chance.

    Returns:
        (N, size, size, 3) uint8.
    """
    slides = int(patients.max()) + 1 if len(patients) else 0
    slide_dyes = np.exp(0.05 * NUISANCE * rng.standard_normal((slides, 3)))
    slide_strength = np.exp(0.09 * NUISANCE * rng.standard_normal(slides))
    slide_glass = 1.0 + 0.015 * NUISANCE * rng.standard_normal((slides, 3))
    out = np.empty((len(labels), size, size, 3), dtype=np.uint8)
    for start in range(0, len(labels), CHUNK_SIZE):
        part = slice(start, start + CHUNK_SIZE)
        slide, count = patients[part], len(labels[part])
        density = _draw(labels[part], size, rng)
        strength = (
            stain.strength * slide_strength[slide] * np.exp(0.06 * NUISANCE * rng.standard_normal(count))
        )
        dyes = np.asarray(stain.dyes)[None, :] * slide_dyes[slide] * strength[:, None]
        density *= dyes.astype(np.float32)[:, :, None, None]
        light = rounded(np.exp, -density)
        light = light.reshape(count, 3, size, 2, size, 2).mean(axis=(3, 5), dtype=np.float32)
        sigma = stain.blur * size / 32 * np.exp(0.25 * NUISANCE * rng.standard_normal(count))
        light = _blurred(light, np.minimum(sigma, 1.4).astype(np.float32))
        line = np.linspace(-1, 1, size, dtype=np.float32)
        slope = 0.035 * NUISANCE * rng.standard_normal((2, count)).astype(np.float32)
        lamp = (
            1.0
            + slope[0][:, None, None] * line[None, None, :]
            + slope[1][:, None, None] * line[None, :, None]
        )
        lamp *= _per_image(np.exp(0.02 * NUISANCE * rng.standard_normal(count)))
        glass = np.asarray(stain.glass)[None, :] / 255.0 * slide_glass[slide]
        light = light * lamp[:, None] * glass.astype(np.float32)[:, :, None, None]
        light = rounded(np.power, np.clip(light, 0.0, 1.0), stain.gamma) * np.float32(255.0)
        light += stain.noise * rng.standard_normal(light.shape, dtype=np.float32)
        out[part] = np.clip(np.rint(light), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return out
