"""Settings of a benchmark, the names of its methods, and the table of ablations.

Free of torch, so that wrong names are refused before anything heavy is loaded.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from qkt_clinical import __version__
from qkt_clinical.baselines.params import BaselineParams
from qkt_clinical.benchmark.phases import DistillationParams, Phase1Way
from qkt_clinical.catalog import (
    BENCHMARK_METHODS,
    DEFAULT_ESTIMATOR,
    ESTIMATORS,
    METHODS,
    ON_STATISTICS,
    OWN_WITH_QUERY,
    REFERENCES,
    WITH_ENCODER,
    Device,
    EncoderMode,
    EncoderName,
    EvaluationSplit,
    Method,
    Partition,
    Regime,
)
from qkt_clinical.common.files import digest_bytes
from qkt_clinical.config.base import Sha256, Strict
from qkt_clinical.config.params import EncoderParams, MaskParams, TrainParams, TransferParams
from qkt_clinical.errors import ConfigError

Variant = Literal[
    "full", "sent", "weak", "label-noise-10", "label-noise-30", "images-100", "images-30", "images-10"
]
"""What a network was trained on: all images of a hospital, the same in changing appearance, a tenth of those,
wrong labels among them, or at most so many of every class."""

TEACHERS: tuple[Variant, ...] = ("sent", "weak")
"""Variants of networks that others get: trained on images of changing appearance, where that is asked for."""

Bad = Literal["flipped-labels", "lying-mask", "noise-bias"]
"""What an adversarial teacher does.

- ``flipped-labels``: every class that it holds has the name of the next one, as if it had been trained so.
- ``lying-mask``: it claims to know every class.
- ``noise-bias``: noise, and whatever else tells it nothing, is the class asked for to it, and it claims that
  class beside its own.
"""
BAD: tuple[Bad, ...] = get_args(Bad)

BUDGETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2)
"""Budgets of the budget curve."""


@dataclass(frozen=True)
class Setup:
    """How QKT answers a query: defaults, except for the fields that an ablation changes."""

    method: Method = "qkt"
    mask: str = "default"
    """Source of masks: ``default``, an estimator, ``oracle`` (the truth), or ``none`` (all know all)."""
    max_teachers: int | None = None
    """Maximum number of teachers for every class asked for: those with the highest mask scores."""
    rivals: bool = True
    """Whether teachers that know a local class, but none of the query, are included."""
    phase1: Phase1Way = "merge"
    """How the student learns from the teachers, see :mod:`qkt_clinical.benchmark.distillation`."""
    phase2: bool = True
    """Whether the head is refined on rare samples and given its operating point."""
    transfer: tuple[tuple[str, Any], ...] = ()
    """Settings of the transfer that differ: name and value."""
    own: Variant = "full"
    """Of the student's own network and images."""
    teachers: Variant = "sent"
    bad: Bad | None = None
    """Attack of some of the other hospitals' teachers, drawn at random for every query."""
    bad_teachers: int = 0
    exact_means: bool = False
    """Class means without noise, of own features and of the encoder's."""
    on_training: bool = True
    """Whether the operating point is set on training images too."""


def _transfer(method: Method, **changed: Any) -> Setup:
    return Setup(method=method, transfer=tuple(changed.items()))


def _mask(mask: str) -> Setup:
    """The effect of a mask alone, without screening, which would correct some of its errors."""
    return Setup(mask=mask, transfer=(("screening", False),))


STATISTICS_EXACT = "ablation/qkt-statistics-exact"
OF_STATISTICS = (STATISTICS_EXACT,)
SETUPS: MappingProxyType[str, Setup] = MappingProxyType(
    {
        **{method: Setup(method=method) for method in METHODS},
        **{f"ablation/mask-{e}": _mask(e) for e in ESTIMATORS if e != DEFAULT_ESTIMATOR},
        STATISTICS_EXACT: Setup(method=ON_STATISTICS, exact_means=True),
        "ablation/mask-oracle": _mask("oracle"),
        "ablation/mask-none": _mask("none"),
        "ablation/query-teachers-only": Setup(rivals=False),
        "ablation/routed-query-teachers-only": Setup(method="routed", rivals=False),
        "ablation/routed-one-view": _transfer("routed", flips=False),
        "ablation/phase-1-only": Setup(phase2=False),
        "ablation/phase-2-only": Setup(phase1="none"),
        "ablation/one-joint-phase": Setup(phase1="joint"),
        "ablation/phase1-distill": Setup(phase1="distill"),
        "ablation/rank-1": _transfer("qkt", rank=1.0),
        "ablation/rank-0.35": _transfer("qkt", rank=0.35),
        "ablation/rank-0.25": _transfer("qkt", rank=0.25),
        "ablation/teachers-1": Setup(max_teachers=1),
        "ablation/teachers-2": Setup(max_teachers=2),
        "ablation/images-100": Setup(own="images-100"),
        "ablation/images-30": Setup(own="images-30"),
        "ablation/images-10": Setup(own="images-10"),
        "ablation/label-noise-10": Setup(own="label-noise-10"),
        "ablation/label-noise-30": Setup(own="label-noise-30"),
        "ablation/weak-teachers": Setup(teachers="weak"),
        "ablation/no-screening": _transfer("qkt", screening=False),
        "ablation/no-discriminant": _transfer("qkt", discriminant=False),
        "ablation/calibration-alone": Setup(on_training=False),
        "ablation/exact-means": Setup(exact_means=True),
        **{
            f"ablation/{bad}-{count}{name}": Setup(bad=bad, bad_teachers=count, transfer=changed)
            for bad in BAD
            for count in (1, 2)
            for name, changed in (("", ()), ("-no-screening", (("screening", False),)))
        },
    }
)
"""Methods and ablations that are each a single answer by QKT."""

RECALIBRATED: MappingProxyType[str, tuple[str, float]] = MappingProxyType(
    {
        f"ablation/{prefix}budget-{budget}": (method, float(budget))
        for method, prefix in (("qkt", ""), ("routed", "routed-"))
        for budget in ("0.01", "0.05", "0.10")
    }
)
"""Ablations that change nothing but the budget: method and budget, read off the method's budget curve."""

FEDERATED = ("fedavg", "fedprox", "scaffold")
"""Baselines that NVIDIA FLARE runs."""
FINETUNED = "ablation/fedavg-finetuned"
FINETUNE, DISTILLED = "finetune", "distill-all"
ON_TEACHERS = (FINETUNE, DISTILLED)
"""Baselines whose network starts from the teachers and is the same whatever its hospital asks."""


PARTITION = ("partition", "hospitals", "classes_per_hospital", "beta")
"""Settings of simulated hospitals alone."""
SITES = ("sites", "ask", "query_classes")
"""Settings of real hospitals alone."""


class EncoderUse(Strict):
    """The encoder whose features baselines read, and with which networks may start."""

    name: EncoderName
    digest: Sha256
    """Of its weights file."""
    side: Annotated[int, Field(ge=16, le=518)] = 112
    """Pixels along an edge to which images are enlarged or reduced."""

    def start(self, mode: EncoderMode) -> EncoderParams:
        """The same for the training of a network; where the weights lie is told apart."""
        weights = f"{self.name}.safetensors"
        return EncoderParams(name=self.name, weights=weights, digest=self.digest, side=self.side, mode=mode)


class BenchmarkSettings(Strict):
    """Everything on which a benchmark's figures depend beside the data."""

    sites: bool = False
    """Whether every hospital is a real site with a file of its own."""
    ask: tuple[str, ...] = ()
    """Sites that ask; empty: all."""
    query_classes: tuple[str, ...] = ()
    """Classes that are asked for; empty: all."""
    partition: Partition = "pathological"
    hospitals: Annotated[int, Field(ge=2)] = 6
    classes_per_hospital: Annotated[int, Field(ge=2)] = 3
    beta: Annotated[float, Field(gt=0)] = 0.3
    regime: Regime = "absent"
    samples_per_rare_class: Annotated[int, Field(ge=1, le=50)] = 20
    query_size: Annotated[int, Field(ge=1)] = 1
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2), min_length=1)
    methods: tuple[str, ...] = ("all",)
    max_queries: Annotated[int, Field(ge=1)] | None = None
    """Per seed."""
    budget: Annotated[float, Field(gt=0, lt=1)] = 0.02
    split: EvaluationSplit = "test"
    device: Device = "auto"
    encoder: EncoderUse | None = None
    train: TrainParams = TrainParams(appearance=0.0)
    """Images of one centre look alike: their appearance need not change. Those of real sites do not."""
    mask: MaskParams = MaskParams()
    transfer: TransferParams = TransferParams()
    distillation: DistillationParams = DistillationParams()
    """Of ablations whose phase 1 is trained."""
    baselines: BaselineParams = BaselineParams()
    rounds: tuple[Annotated[int, Field(ge=1)], ...] = (20, 50)
    """Numbers of rounds of every federation; the best on validation images counts."""

    @model_validator(mode="after")
    def _one_kind_of_hospital(self) -> Self:
        """ConfigError for what real or simulated hospitals do not have."""
        fields = type(self).model_fields
        foreign = PARTITION if self.sites else ("ask", "query_classes")
        wrong = [name for name in foreign if getattr(self, name) != fields[name].default]
        if not self.sites and self.regime == "truly-absent":
            wrong.append("regime truly-absent")
        if wrong:
            source = "sites" if self.sites else "data"
            raise ConfigError(
                f"{', '.join(wrong)}: not with --{source}",
                remedy="Partitions are of --data; whom and what to ask, and truly-absent, of --sites.",
            )
        return self

    def trained_as(self, variant: Variant) -> Variant:
        """The variant itself, or ``full`` for ``sent`` where one network of a hospital serves both."""
        return "full" if variant == "sent" and not self.train.appearance else variant

    @property
    def references(self) -> tuple[str, ...]:
        """Methods of real hospitals alone: where the class is truly absent, no network is trained with it."""
        if not self.sites:
            return ()
        return tuple(m for m in REFERENCES if m != OWN_WITH_QUERY or self.regime != "truly-absent")

    @property
    def ablations(self) -> tuple[str, ...]:
        """Names of all ablations."""
        rounds = tuple(f"ablation/{name}-{count}" for name in FEDERATED for count in self.rounds)
        every = (*(s for s in SETUPS if s.startswith("ablation/")), *RECALIBRATED, *rounds, FINETUNED)
        return tuple(name for name in every if self.encoder or name not in OF_STATISTICS)

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the methods to run, each once, in the order of the catalogue.

        Raises:
            ConfigError: a name that is none.
        """
        every = (*BENCHMARK_METHODS, *self.references, *(WITH_ENCODER if self.encoder else ()))
        groups = {"all": every, "ablations": self.ablations}
        known = (*every, *self.ablations)
        wanted: set[str] = set()
        for name in self.methods:
            if name in (*WITH_ENCODER, *OF_STATISTICS) and not self.encoder:
                raise ConfigError(
                    f"method {name!r} reads the features of an encoder, and none is given",
                    remedy="Add --encoder and --encoder-weights; see 'qkt encoder list'.",
                    code="encoder",
                )
            if name not in groups and name not in known:
                near = difflib.get_close_matches(name, (*groups, *known), n=1)
                raise ConfigError(
                    f"unknown method {name!r}" + (f", did you mean {near[0]!r}?" if near else ""),
                    remedy=f"Choose among {', '.join((*groups, *known))}.",
                    code="method",
                )
            wanted.update(groups.get(name, (name,)))
        return tuple(name for name in known if name in wanted)

    def key(self, data: str, device: str) -> str:
        """Digest of all that a finished row depends on.

        Which seeds and methods were asked for, the encoder, and of real hospitals whom and what to ask, is
        left out: a run may be resumed with more of them.

        Args:
            data: digest of the data file, or of all sites' files.
            device: what ``device`` stands for on this machine.
        """
        left_out: dict[str, Any] = dict.fromkeys(("seeds", "methods", "encoder", *SITES), True)
        left_out["train"] = {"encoder": {"weights", "licence"}}  # its digest counts
        parts = self.model_dump(mode="json", exclude=left_out)
        whole: dict[str, Any] = {**parts, "device": device, "data": data, "version": __version__}
        return digest_bytes(json.dumps(whole, sort_keys=True).encode())


def parse_list(text: str) -> tuple[str, ...]:
    """``a,b`` to its parts, without blanks."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_numbers(text: str, option: str, minimum: int = 0) -> tuple[int, ...]:
    """``0,1,2`` to whole numbers, each once.

    Args:
        option: where it was given, such as ``--seeds``.

    Raises:
        ConfigError: not such a list.
    """
    parts: Sequence[str] = parse_list(text)
    if not parts or not all(p.isascii() and p.isdigit() and int(p) >= minimum for p in parts):
        above = f" from {minimum} on" if minimum else ""
        raise ConfigError(
            f"{option} {text!r} are no whole numbers{above}", remedy=f"Give them as in {option} 1,2,3."
        )
    return tuple(dict.fromkeys(map(int, parts)))
