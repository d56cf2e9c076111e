"""The networks that take part in an answer: the hospital's own and its teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from qkt_clinical.config.params import TransferParams
from qkt_clinical.errors import QueryError
from qkt_clinical.models.bundle import Bundle
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.consensus import consensus_rows
from qkt_clinical.records.card import SharedEncoder
from qkt_clinical.records.phases import Curves, Phase1
from qkt_clinical.task import Task

LIGHT_LOCAL_WEIGHT = 2.0
"""The local model weight where it is not chosen: the teachers of ``qkt-light`` serve the query alone."""


@dataclass(frozen=True)
class Teacher:
    """Another hospital's network and the classes that it claims to know."""

    site: str
    network: Classifier
    claimed: tuple[int, ...]
    """By its mask; after screening, without the claims that its network does not support."""
    verified: tuple[int, ...] | None = None
    """By its network, see :func:`qkt_clinical.qkt.masks.verified_classes`; None: it was not read again."""
    share: float = 0.0
    """Of the asking hospital's statistics in the network's, see :mod:`qkt_clinical.qkt.adaptation`."""
    unlike: bool = False
    """Whether its images look unlike the asking hospital's: the shift is larger than within one centre."""
    class_means: Mapping[int, Tensor] = field(default_factory=dict, hash=False)
    """Class to its mean features (F,) at home; of older bundles and under differential privacy none."""

    encoder_means: Mapping[int, Tensor] = field(default_factory=dict, hash=False)
    """Class to its mean features at home by the encoder that the asking hospital has too; else none."""

    @property
    def supported(self) -> tuple[int, ...]:
        """The claims that its network bears out; all of them where it was not read again."""
        return tuple(c for c in self.claimed if self.verified is None or c in self.verified)

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        verified: tuple[int, ...] | None = None,
        *,
        encoder: SharedEncoder | None = None,
    ) -> Teacher:
        """From a validated bundle.

        Args:
            encoder: the asking hospital's; class means by another say nothing to it.

        Raises:
            QueryError: the bundle has no mask.
        """
        if bundle.mask is None:
            raise QueryError("teacher without a mask", remedy="Plan the query again.", site=bundle.card.site)
        claimed = tuple(i for i, known in enumerate(bundle.mask.known) if known)
        alike = encoder is not None and bundle.card.shared_encoder == encoder
        return cls(
            bundle.card.site,
            bundle.network,
            claimed,
            verified,
            class_means=bundle.class_means,
            encoder_means=bundle.encoder_means if alike else {},
        )


def same_extractor(one: Classifier, other: Classifier) -> bool:
    """Whether two networks compute the same features: of one frozen encoder, say."""
    if (one.spec.name, one.spec.encoder) != (other.spec.name, other.spec.encoder):
        return False
    here, there = one.extractor.state_dict(), other.extractor.state_dict()
    return here.keys() == there.keys() and all(torch.equal(t.cpu(), there[n].cpu()) for n, t in here.items())


def head_of(network: Classifier) -> tuple[Tensor, Tensor]:
    """A frozen network's head on the CPU: weight (C, F) and bias (C,)."""
    return network.head.weight.detach().cpu(), network.head.bias.detach().cpu()


@dataclass(frozen=True)
class Panel:
    """The networks that are included, the hospital's own first, and the classes that each knows."""

    networks: tuple[Classifier, ...]
    known: tuple[tuple[int, ...], ...]
    relevant: tuple[int, ...]
    sites: tuple[str, ...]
    """Of the teachers."""
    local_weight: float = LIGHT_LOCAL_WEIGHT

    @cached_property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """Places of the networks, those with the same extractor together: a student needs it once."""
        found: list[list[int]] = []
        for place, network in enumerate(self.networks):
            alike = (part for part in found if same_extractor(self.networks[part[0]], network))
            part = next(alike, None)
            if part is None:
                found.append([place])
            else:
                part.append(place)
        return tuple(map(tuple, found))

    @property
    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """The consensus as rows over each network's features."""
        heads = [head_of(network) for network in self.networks]
        return consensus_rows(heads, self.known, self.relevant, self.local_weight)

    @property
    def part_rows(self) -> list[tuple[Tensor, Tensor]]:
        """The same over each part's features."""
        each = self.rows
        return [_sum([each[place] for place in part]) for part in self.parts]


def _sum(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Rows over the same features, added up; of a single one these very tensors."""
    (weight, bias), *others = rows
    for more_weight, more_bias in others:
        weight, bias = weight + more_weight, bias + more_bias
    return weight, bias


@dataclass(frozen=True)
class PhaseSettings:
    """How the phases are run."""

    task: Task
    params: TransferParams
    seed: int
    device: torch.device
    progress: Callable[[int, int], None] | None = None


def phase_record(kind: str, views: int, panel: Panel, curves: Curves, *, rank: float | None = None) -> Phase1:
    """The record of phase 1, for ``phases.json``."""
    passes = views * len(panel.sites)
    return Phase1(kind=kind, curves=curves, views=views, teacher_passes=passes, rank=rank)
