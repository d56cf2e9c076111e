"""Real hospitals, one MedMNIST-layout npz each: what each of them sees, and the questions to ask them.

A class that a hospital holds is hidden from its training, calibration and val images, and asked for; the
hospital's own images of the class then judge the answer.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.benchmark.settings import BenchmarkSettings
from qkt_clinical.benchmark.simulate import (
    CALIBRATION,
    WITHOUT,
    LabelledImages,
    Origins,
    SimulatedFederation,
    SimulatedHospital,
    SimulatedQuery,
    calibration_part,
    channels_first,
    spread,
    together,
)
from qkt_clinical.catalog import EvaluationSplit
from qkt_clinical.common.disclosure import SMALLEST_COUNT
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.base import NAME
from qkt_clinical.datasets.medmnist_file import SplitArrays, read_class_names, read_medmnist
from qkt_clinical.errors import ConfigError, SourceError
from qkt_clinical.training.classifier import network_spec

MIN_TRAINING_IMAGES = 10
"""A class of fewer training images is neither hidden from a hospital nor expected from its teacher."""


@dataclass(frozen=True)
class RealSite:
    """One real hospital as its file has it."""

    name: str
    parts: dict[str, SplitArrays]

    @cached_property
    def images(self) -> dict[str, LabelledImages]:
        """By split."""
        return {s: LabelledImages(channels_first(p.images), p.labels) for s, p in self.parts.items()}

    def counts(self, split: str, classes: int) -> NDArray[np.int64]:
        """How many images of each class a split has."""
        return np.bincount(self.parts[split].labels, minlength=classes)


def site_files(paths: Sequence[Path]) -> tuple[Path, ...]:
    """The npz files named, or those in a folder, sorted by the names of their sites.

    Raises:
        ConfigError: fewer than two, a name that is none for a site, or two of one name.
    """
    files = [f for path in paths for f in (sorted(path.glob("*.npz")) if path.is_dir() else [path])]
    for file in files:
        if not NAME.fullmatch(file.stem):
            raise ConfigError(
                f"{file.stem!r} is no name of a site",
                remedy="Name the file with small letters, digits, '-' and '_'.",
                file=file,
            )
    if len(files) < 2 or len({f.stem for f in files}) < len(files):
        raise ConfigError(
            f"--sites names {len(files)} npz file(s)" + (", two of one name" if len(files) > 1 else ""),
            remedy="Give a folder with one npz a site, or --sites once for each of several files.",
        )
    return tuple(sorted(files, key=lambda f: f.stem))


def read_sites(files: Sequence[Path]) -> tuple[tuple[RealSite, ...], tuple[str, ...]]:
    """All sites and the names of the classes, in label order.

    Raises:
        SourceError: a file cannot be read, or its classes or the form of its images are others than those
            of the first.
    """
    sites: list[RealSite] = []
    expected: tuple[object, ...] = ()
    for file in files:
        parts = read_medmnist(file)
        images, names = parts["train"].images, read_class_names(file)
        form = names, images.shape[1:], images.dtype
        if names is not None and max(int(p.labels.max()) for p in parts.values()) >= len(names):
            raise _differs(file, f"has labels beyond its {len(names)} class_names")
        if sites and form != expected:
            raise _differs(file, f"{_first_difference(form, expected)} than {files[0].name}")
        expected = form
        sites.append(RealSite(file.stem, parts))
    if names is None:
        count = max(int(p.labels.max()) for s in sites for p in s.parts.values()) + 1
        names = tuple(f"class-{c}" for c in range(count))
    return tuple(sites), names


def _first_difference(form: Sequence[object], expected: Sequence[object]) -> str:
    said = ("other class_names", "images of another shape", "images of another type")
    return "has " + next(s for s, a, b in zip(said, form, expected, strict=True) if a != b)


def _differs(file: Path, what: str) -> SourceError:
    return SourceError(
        what,
        remedy="All sites share one list of classes, in one order, and one form of images.",
        file=file,
        code="sites-differ",
    )


def federation_of_sites(
    sites: Sequence[RealSite], classes: tuple[str, ...], settings: BenchmarkSettings, seed: int
) -> SimulatedFederation:
    """The hospitals as they are, those from which classes are hidden, and the queries to ask.

    Raises:
        ConfigError: no such question exists, a name asked for is none, or a hospital is too small.
    """
    whole = [_hospital(site, seed) for site in sites]
    questions = _questions(sites, classes, settings, seed)
    asking = {
        q.asks_as: _hide(next(h for h in whole if h.name == q.student), q, settings, seed)
        for q in questions
        if q.asks_as
    }
    needed = [*whole, *asking.values()]
    for hospital in needed:
        if not len(hospital.calibration) or not len(hospital.val):
            raise ConfigError(
                "no calibration or val image of a class that it trains on is left",
                remedy="Leave the site out, or choose other classes with --query-classes.",
                site=hospital.name,
            )
    shape = sites[0].images["train"].images.shape[1:]
    spec = network_spec(settings.train, shape, len(classes))
    return SimulatedFederation(
        seed,
        classes,
        spec,
        tuple(whole),
        questions,
        together([site.images["val"] for site in sites]),
        together([site.images["test"] for site in sites]),
        tuple(asking.values()),
        {"val": origins_of(sites, "val"), "test": origins_of(sites, "test")},
    )


def origins_of(sites: Sequence[RealSite], split: EvaluationSplit) -> Origins:
    """Of all sites' images of a split, in the order of the sites."""
    names: list[NDArray[np.str_]] = []
    groups: list[NDArray[np.int64]] = []
    first = 0
    for site in sites:
        part = site.parts[split]
        ids = np.arange(len(part.labels)) if part.groups is None else part.groups
        number = np.unique(ids, return_inverse=True)[1].astype(np.int64)
        names.append(np.full(len(number), site.name))
        groups.append(number + first)
        first += int(number.max()) + 1
    return Origins(np.concatenate(names), np.concatenate(groups))


def _hospital(site: RealSite, seed: int) -> SimulatedHospital:
    """A site as it is, its calibration images taken from its training images."""
    part = site.parts["train"]
    draw = derive(seed, "benchmark", "calibration", site.name)
    held_out = calibration_part(part.labels, part.groups, CALIBRATION, draw)
    train = site.images["train"].take(np.flatnonzero(~held_out))
    held = [int(c) for c in np.unique(train.labels)]
    # A class whose only image fell to calibration is not one that the hospital's network can learn.
    calibration = site.images["train"].take(np.flatnonzero(held_out)).of_classes(held)
    return SimulatedHospital(site.name, train, calibration, site.images["val"].of_classes(held))


def _hide(
    hospital: SimulatedHospital, question: SimulatedQuery, settings: BenchmarkSettings, seed: int
) -> SimulatedHospital:
    """The hospital as it asks: without the classes asked for, of which a few training images stay if rare."""
    kept = [c for c in hospital.held if c not in question.query]
    stays = np.isin(hospital.train.labels, kept)
    if settings.regime == "rare":
        random = np.random.default_rng(derive(seed, "benchmark", "rare", question.asks_as))
        for c in question.query:
            mine = random.permutation(np.flatnonzero(hospital.train.labels == c))
            stays[mine[: settings.samples_per_rare_class]] = True
    return dataclasses.replace(
        hospital,
        name=question.asks_as,
        train=hospital.train.take(np.flatnonzero(stays)),
        calibration=hospital.calibration.of_classes(kept),
        val=hospital.val.of_classes(kept),
    )


# --- questions ------------------------------------------------------------------------------------


def _questions(
    sites: Sequence[RealSite], classes: tuple[str, ...], settings: BenchmarkSettings, seed: int
) -> tuple[SimulatedQuery, ...]:
    asked_sites = _named(settings.ask, [s.name for s in sites], "--ask", "site")
    asked_classes = _named(settings.query_classes, classes, "--query-classes", "class")
    found = [
        question
        for site in sites
        if site.name in asked_sites
        for question in _questions_of(site, sites, len(classes), settings)
        if {classes[q] for q in question.query} <= asked_classes
    ]
    if not found:
        raise ConfigError(
            f"no {settings.regime} query of {settings.query_size} class(es) exists at the sites asked: a "
            f"class must have {SMALLEST_COUNT} {settings.split} images that judge and "
            f"{MIN_TRAINING_IMAGES} training images at another site",
            remedy="Choose another --regime, --query-size or --split, or ask more sites and classes.",
        )
    return spread(found, settings.max_queries, derive(seed, "benchmark", "questions"))


def _named(wanted: Sequence[str], known: Sequence[str], option: str, what: str) -> set[str]:
    """What an option names, or all that there is where it names nothing."""
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{option}: no {what} {name!r}" + (f", did you mean {near[0]!r}?" if near else ""),
                remedy=f"Choose among {', '.join(known)}.",
            )
    return set(wanted or known)


def _questions_of(
    site: RealSite, sites: Sequence[RealSite], classes: int, settings: BenchmarkSettings
) -> Iterator[SimulatedQuery]:
    """All that one site can be asked; depends on no seed."""
    split = settings.split
    others = [s for s in sites if s is not site]
    train, judging = site.counts("train", classes), site.counts(split, classes)
    learned = np.any([s.counts("train", classes) >= MIN_TRAINING_IMAGES for s in others], axis=0)
    lasting = (train >= MIN_TRAINING_IMAGES) & (judging >= SMALLEST_COUNT)
    if settings.regime == "truly-absent":
        seen = sum(site.counts(part, classes) for part in site.parts)
        elsewhere = sum(s.counts(split, classes) for s in others)
        askable = learned & (seen == 0) & (elsewhere >= SMALLEST_COUNT)
    else:
        askable = learned & lasting
        if settings.regime == "rare":  # with no more than those that stay, nothing would be hidden
            askable &= (1 - CALIBRATION) * train > settings.samples_per_rare_class
    for query in combinations(map(int, np.flatnonzero(askable)), settings.query_size):
        if not set(np.flatnonzero(lasting)) - set(query):
            continue
        if settings.regime == "truly-absent":
            yield SimulatedQuery(site.name, query, judges="others")
        else:
            asks_as = f"{site.name}{WITHOUT}{'+'.join(map(str, query))}"
            yield SimulatedQuery(site.name, query, asks_as, "own")
