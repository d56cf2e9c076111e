"""Hospitals in memory: their images, and the queries to ask; simulated ones from one file.

The npz's train split is divided among the hospitals, and within each into training and calibration
images; its val split is divided likewise and serves early stopping. Its test split is touched by the
final figures alone. Real hospitals with a file each come from :mod:`qkt_clinical.benchmark.sites`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.catalog import EvaluationSplit, Partition, Regime
from qkt_clinical.common.disclosure import SMALLEST_COUNT
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.params import TrainParams
from qkt_clinical.data.prepared import Images, Labels
from qkt_clinical.datasets.medmnist import class_names
from qkt_clinical.datasets.medmnist_file import SplitArrays, read_medmnist
from qkt_clinical.datasets.partition import Indices, dirichlet_shares, divide, pathological_shares
from qkt_clinical.errors import ConfigError
from qkt_clinical.records.card import NetworkSpec
from qkt_clinical.training.classifier import network_spec

CALIBRATION = 0.15
"""Share of a hospital's training images (whole patients) that is held out for the operating point."""
MAX_RARE_IMAGES = 50
"""A class of which a hospital holds at most so many training images counts as rare there."""
WITHOUT = "~"
"""Stands in a hospital's name before the classes hidden from it; no site's name has it."""

Judges = Literal["all", "own", "others"]
"""Whose images judge an answer: everybody's; the asking hospital's own; its own of local classes and other
hospitals' of the query."""


@dataclass(frozen=True)
class LabelledImages:
    """Images (N, C, *spatial), uint8 or float32 in [0, 1], and labels (N,)."""

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def pair(self) -> tuple[Images, Labels]:
        """Images and labels, as the training functions take them."""
        return self.images, self.labels

    def take(self, index: Indices) -> LabelledImages:
        """A part of it."""
        return LabelledImages(self.images[index], self.labels[index])

    def of_classes(self, classes: Sequence[int]) -> LabelledImages:
        """The images of these classes."""
        return self.take(np.flatnonzero(np.isin(self.labels, classes)))


def together(parts: Sequence[LabelledImages]) -> LabelledImages:
    """Several sets of images as one, in their order."""
    return LabelledImages(
        np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts])
    )


@dataclass(frozen=True)
class SimulatedHospital:
    """One hospital, simulated or real, as it is or with classes hidden from it."""

    name: str
    train: LabelledImages
    calibration: LabelledImages
    val: LabelledImages
    """Its part of the npz's val split, for early stopping."""

    @property
    def site(self) -> str:
        """Its name, without what is hidden from it."""
        return self.name.partition(WITHOUT)[0]

    @property
    def held(self) -> tuple[int, ...]:
        """Classes of which it has training images, rare ones included."""
        return tuple(int(c) for c in np.unique(self.train.labels))


@dataclass(frozen=True)
class SimulatedQuery:
    """A query: the asking hospital and the classes that it asks for."""

    student: str
    query: tuple[int, ...]
    asks_as: str = ""
    """Name of the hospital from which the classes are hidden; empty: the student asks as it is."""
    judges: Judges = "all"

    @property
    def asking(self) -> str:
        """Name of the hospital whose images the student learns from."""
        return self.asks_as or self.student


@dataclass(frozen=True)
class Origins:
    """Where images come from."""

    sites: NDArray[np.str_]
    """(N,) names of sites."""
    groups: Indices
    """(N,) number of the patient, or of the image where patients are not known."""


@dataclass(frozen=True)
class SimulatedFederation:
    """All hospitals of one seed, the val and test images of all, and the queries to ask."""

    seed: int
    classes: tuple[str, ...]
    spec: NetworkSpec
    hospitals: tuple[SimulatedHospital, ...]
    questions: tuple[SimulatedQuery, ...]
    val: LabelledImages
    test: LabelledImages
    asking: tuple[SimulatedHospital, ...] = ()
    """Real hospitals from which classes are hidden, as they ask."""
    origins: Mapping[EvaluationSplit, Origins] = field(default_factory=dict)
    """Of the val and test images of real hospitals."""

    def hospital(self, name: str) -> SimulatedHospital:
        """By name."""
        return next(h for h in (*self.hospitals, *self.asking) if h.name == name)

    def members(self, asking: str = "") -> tuple[SimulatedHospital, ...]:
        """All hospitals; the one named has its classes hidden from it."""
        if not asking:
            return self.hospitals
        hospital = self.hospital(asking)
        return tuple(hospital if h.name == hospital.site else h for h in self.hospitals)

    def relevant(self, question: SimulatedQuery) -> tuple[int, ...]:
        """The relevant label space: what the student holds and what it asks for, sorted."""
        return tuple(sorted({*self.hospital(question.asking).held, *question.query}))

    def judging(self, question: SimulatedQuery, split: EvaluationSplit) -> Indices:
        """Indices of the images of a split that judge the answers to a question.

        Of real hospitals, a class of fewer than ``SMALLEST_COUNT`` such images does not count.
        """
        labels = (self.test if split == "test" else self.val).labels
        wanted = np.isin(labels, self.relevant(question))
        if question.judges == "all":
            return np.flatnonzero(wanted)
        own = self.origins[split].sites == question.student
        if question.judges == "others":
            own |= np.isin(labels, question.query)
        wanted &= own
        counts = np.bincount(labels[wanted], minlength=len(self.classes))
        return np.flatnonzero(wanted & (counts[labels] >= SMALLEST_COUNT))

    def choosing(self, question: SimulatedQuery) -> Indices:
        """Indices of val images by which a global model may be chosen: none that is hidden is among them."""
        wanted = np.isin(self.val.labels, self.relevant(question))
        if question.asks_as:
            own = self.origins["val"].sites == question.student
            wanted &= ~(own & np.isin(self.val.labels, question.query))
        return np.flatnonzero(wanted)

    def val_of(self, hospital: SimulatedHospital) -> Indices:
        """Indices of the val images that recall is measured on: a real hospital's own, else everybody's."""
        if not self.origins:
            return np.arange(len(self.val))
        return np.flatnonzero(self.origins["val"].sites == hospital.site)


def channels_first(images: NDArray[Any]) -> Images:
    """(N, H, W), (N, H, W, 3) or (N, D, H, W) as the file has them to (N, C, *spatial).

    uint8 stays; anything else is scaled into [0, 1] by its own range, as float32.
    """
    if images.dtype != np.uint8:
        low, high = float(images.min()), float(images.max())
        images = ((images - low) / ((high - low) or 1.0)).astype(np.float32)
    colour = images.ndim == 4 and images.shape[-1] == 3
    return np.ascontiguousarray(np.moveaxis(images, -1, 1) if colour else images[:, None])


def calibration_part(
    labels: Labels, groups: NDArray[Any] | None, share: float, seed: int
) -> NDArray[np.bool_]:
    """Which images are held out: about ``share`` of every class, whole groups where there are groups."""
    shares = np.tile([[1.0 - share], [share]], (1, int(labels.max()) + 1))
    index = divide(labels, groups, shares, seed=seed)[1]
    out = np.zeros(len(labels), dtype=bool)
    out[index] = True
    return out


def _rare_classes(counts: NDArray[np.int64]) -> list[int]:
    """Classes of a hospital to make rare: those already scarce, else the smallest of three or more."""
    held = np.flatnonzero(counts)
    scarce = [int(c) for c in held if counts[c] <= MAX_RARE_IMAGES]
    if scarce or len(held) < 3:
        return scarce if len(scarce) < len(held) else scarce[1:]
    return [int(held[np.argmin(counts[held])])]


def spread(candidates: Sequence[SimulatedQuery], count: int | None, seed: int) -> tuple[SimulatedQuery, ...]:
    """At most ``count`` queries, spread evenly over students first and classes second."""
    chance = np.random.default_rng(seed).permutation(len(candidates))
    left = [candidates[i] for i in chance]
    students: dict[str, int] = {}
    classes: dict[int, int] = {}
    chosen: list[SimulatedQuery] = []
    while left and (count is None or len(chosen) < count):
        best = min(left, key=lambda q: (students.get(q.student, 0), sum(classes.get(c, 0) for c in q.query)))
        left.remove(best)
        chosen.append(best)
        students[best.student] = students.get(best.student, 0) + 1
        for c in best.query:
            classes[c] = classes.get(c, 0) + 1
    return tuple(sorted(chosen, key=lambda q: (q.student, q.query)))


def simulate(
    parts: dict[str, SplitArrays],
    classes: tuple[str, ...],
    *,
    partition: Partition = "pathological",
    hospitals: int = 6,
    classes_per_hospital: int = 3,
    beta: float = 0.3,
    regime: Regime = "absent",
    samples_per_rare_class: int = 20,
    query_size: int = 1,
    seed: int = 0,
    training: TrainParams | None = None,
    max_queries: int | None = None,
) -> SimulatedFederation:
    """Divide a data set among simulated hospitals and choose the queries.

    ``absent``: sets of ``query_size`` classes of which the student has no image. ``rare``: classes of
    which it has at most ``samples_per_rare_class`` training images: those scarce by the partition
    (``MAX_RARE_IMAGES``), or else its smallest class, cut down to that number before any teacher is trained.

    Raises:
        ConfigError: the data cannot be divided so, or no such question exists.
    """
    images = {split: channels_first(part.images) for split, part in parts.items()}
    train, val = parts["train"], parts["val"]
    count = len(classes)
    draw = derive(seed, "benchmark", "partition")
    totals = np.bincount(train.labels, minlength=count)
    if partition == "pathological":
        shares = pathological_shares(
            count, hospitals=hospitals, classes_per_hospital=classes_per_hospital, seed=draw
        )
    else:
        shares = dirichlet_shares(totals, hospitals=hospitals, beta=beta, seed=draw)
    pieces = divide(train.labels, train.groups, shares, seed=derive(seed, "benchmark", "train"))
    val_pieces = divide(val.labels, val.groups, shares, seed=derive(seed, "benchmark", "val"))
    sites, questions = [], []
    for h, (index, val_index) in enumerate(zip(pieces, val_pieces, strict=True)):
        name = f"h{h + 1}"
        labels = train.labels[index]
        if len(np.unique(labels)) < 2:
            raise ConfigError(
                f"hospital {name} would hold fewer than two classes", remedy="Choose fewer hospitals."
            )
        groups = None if train.groups is None else train.groups[index]
        held_out = calibration_part(
            labels, groups, CALIBRATION, derive(seed, "benchmark", "calibration", name)
        )
        rare: list[int] = []
        if regime == "rare":
            rare = _rare_classes(np.bincount(labels, minlength=count))
        keep = ~held_out
        rng = np.random.default_rng(derive(seed, "benchmark", "rare", name))
        for c in rare:
            # A class of a handful: calibration images are of the other classes anyway, so all may train.
            mine = np.flatnonzero(labels == c)
            keep[mine], held_out[mine] = False, False
            keep[rng.permutation(mine)[:samples_per_rare_class]] = True
        if groups is not None:
            held_out &= ~np.isin(groups, groups[keep])  # a patient whose rare image trains only trains
        own = LabelledImages(images["train"][index], labels)
        hospital = SimulatedHospital(
            name,
            own.take(np.flatnonzero(keep)),
            own.take(np.flatnonzero(held_out)),
            LabelledImages(images["val"][val_index], val.labels[val_index]),
        )
        if len(hospital.calibration) == 0:
            raise ConfigError(f"hospital {name} has no calibration image", remedy="Choose fewer hospitals.")
        sites.append(hospital)
        if regime == "absent":
            absent = [c for c in range(count) if c not in hospital.held]
            questions += [SimulatedQuery(name, asked) for asked in combinations(absent, query_size)]
        else:
            questions += [SimulatedQuery(name, asked) for asked in combinations(rare, query_size)]
    elsewhere = {c: {s.name for s in sites if c in s.held} for c in range(count)}
    questions = [q for q in questions if all(elsewhere[c] - {q.student} for c in q.query)]
    if not questions:
        raise ConfigError(
            f"no {regime} query of {query_size} class(es) exists in this partition",
            remedy="Choose fewer classes per hospital, a smaller beta or another query size.",
        )
    sample = images["train"]
    spec = network_spec(training or TrainParams(), sample.shape[1:], count)
    return SimulatedFederation(
        seed,
        classes,
        spec,
        tuple(sites),
        spread(questions, max_queries, derive(seed, "benchmark", "questions")),
        LabelledImages(images["val"], val.labels),
        LabelledImages(images["test"], parts["test"].labels),
    )


def read(source: Path) -> tuple[dict[str, SplitArrays], tuple[str, ...]]:
    """A MedMNIST-layout npz and its classes' names in label order.

    Raises:
        SourceError: see :func:`qkt_clinical.datasets.medmnist_file.read_medmnist`.
    """
    parts = read_medmnist(source)
    needed = max(int(p.labels.max()) for p in parts.values()) + 1
    names = class_names(source) or tuple(f"class-{c}" for c in range(needed))
    return parts, tuple(names)
