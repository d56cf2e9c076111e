"""Hospitals with fewer images or wrong labels, for the ablations of quality and quantity. Pure functions."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from qkt_clinical.benchmark.settings import Variant
from qkt_clinical.benchmark.simulate import LabelledImages, SimulatedHospital
from qkt_clinical.common.seeding import derive
from qkt_clinical.data.prepared import Labels
from qkt_clinical.datasets.partition import Indices

WEAK = 0.1
"""Share of its training images on which a weak teacher is trained."""


def wrong_labels(labels: Labels, held: tuple[int, ...], share: float, seed: int) -> Labels:
    """Labels (N,) with a random ``share`` of them changed to another held class."""
    random = np.random.default_rng(seed)
    out = labels.copy()
    for image in random.permutation(len(labels))[: round(share * len(labels))]:
        out[image] = random.choice([c for c in held if c != labels[image]])
    return out


def _some_of_each(labels: Labels, counts: dict[int, int], seed: int) -> Indices:
    """Sorted indices of at most ``counts[c]`` images of every class c, drawn at random."""
    random = np.random.default_rng(seed)
    drawn = [random.permutation(np.flatnonzero(labels == c))[:n] for c, n in sorted(counts.items())]
    return np.sort(np.concatenate(drawn))


def vary(hospital: SimulatedHospital, variant: Variant, *, budget: float, seed: int) -> SimulatedHospital:
    """Apply a variant to a hospital. Wrong labels affect all its images, including calibration and val."""
    name = hospital.name
    match variant:
        case "full" | "sent":
            return hospital
        case "weak":
            present = {c: int((hospital.train.labels == c).sum()) for c in hospital.held}
            counts = {c: max(1, round(WEAK * n)) for c, n in present.items()}
            index = _some_of_each(hospital.train.labels, counts, derive(seed, "benchmark", variant, name))
            return dataclasses.replace(hospital, train=hospital.train.take(index))
        case "images-100" | "images-30" | "images-10":
            return with_fewer_images(hospital, int(variant.removeprefix("images-")), budget, seed)
        case "label-noise-10" | "label-noise-30":
            share = int(variant.rsplit("-", 1)[1]) / 100

            def noisy(part: str, split: LabelledImages) -> LabelledImages:
                draw = derive(seed, "benchmark", variant, name, part)
                return LabelledImages(split.images, wrong_labels(split.labels, hospital.held, share, draw))

            return dataclasses.replace(
                hospital,
                train=noisy("train", hospital.train),
                calibration=noisy("calibration", hospital.calibration),
                val=noisy("val", hospital.val),
            )


def with_fewer_images(
    hospital: SimulatedHospital, images: int, budget: float, seed: int
) -> SimulatedHospital:
    """At most ``images`` training and val images of every class, calibration images in the same proportion.

    Calibration keeps at least 1 / budget images where there are so many: with fewer, no offset can
    promise the budget, and the ablation would measure that alone.
    """
    train, calibration = hospital.train, hospital.calibration
    draw = derive(seed, "benchmark", "images", hospital.name)
    kept = train.take(_some_of_each(train.labels, dict.fromkeys(hospital.held, images), draw))
    share = len(kept) / len(train)
    count = max(math.ceil(share * len(calibration)), math.ceil(1 / budget))
    order = np.random.default_rng(derive(draw, "calibration")).permutation(len(calibration))
    val = hospital.val.take(_some_of_each(hospital.val.labels, dict.fromkeys(hospital.held, images), draw))
    held_out = calibration.take(np.sort(order[:count]))
    return dataclasses.replace(hospital, train=kept, calibration=held_out, val=val)
