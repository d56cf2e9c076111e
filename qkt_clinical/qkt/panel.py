"""The networks that take part in an answer: the hospital's own and its teachers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkt_clinical.config.params import TransferParams
from qkt_clinical.errors import QueryError
from qkt_clinical.models.bundle import Bundle
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.consensus import consensus, consensus_rows
from qkt_clinical.training.augment import make_views
from qkt_clinical.training.loop import Checkpoint

LIGHT_OWN_WEIGHT = 2.0
"""What the own network counts for where that is not chosen: its teachers are there for the query alone."""


@dataclass(frozen=True)
class Teacher:
    """Another hospital's network and the classes that its mask says it knows."""

    site: str
    network: Classifier
    known: tuple[int, ...]
    """As its mask claims."""
    shown: tuple[int, ...] | None = None
    """As its network shows, see :func:`qkt_clinical.qkt.masks.shown_classes`; None: it was not read again."""

    @classmethod
    def of(cls, bundle: Bundle, shown: tuple[int, ...] | None = None) -> Teacher:
        """From a validated bundle.

        Raises:
            QueryError: the bundle has no mask.
        """
        if bundle.mask is None:
            raise QueryError("teacher without a mask", remedy="Plan the query again.", site=bundle.card.site)
        known = tuple(i for i, k in enumerate(bundle.mask.known) if k)
        return cls(bundle.card.site, bundle.network, known, shown)


def head_of(network: Classifier) -> tuple[Tensor, Tensor]:
    """A frozen network's head on the CPU: weight (C, F) and bias (C,)."""
    return network.head.weight.detach().cpu(), network.head.bias.detach().cpu()


@dataclass(frozen=True)
class Panel:
    """The networks that are heard, the hospital's own first, and the classes that each knows."""

    networks: tuple[Classifier, ...]
    known: tuple[tuple[int, ...], ...]
    relevant: tuple[int, ...]
    sites: tuple[str, ...]
    """Of the teachers."""
    own_weight: float = LIGHT_OWN_WEIGHT

    @property
    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """The consensus as rows over each network's features."""
        heads = [head_of(network) for network in self.networks]
        return consensus_rows(heads, self.known, self.relevant, self.own_weight)


@dataclass(frozen=True)
class PhaseSettings:
    """How a phase is run, whatever it does."""

    params: TransferParams
    seed: int
    device: torch.device
    checkpoint: Checkpoint | None
    progress: Callable[[int, int], None] | None

    def views(self, inputs: Tensor) -> Tensor:
        """For phases that are learned: (views, N, C, *spatial)."""
        count, strength = self.params.distillation.views, self.params.augment
        return make_views(inputs, count, strength, self.seed, self.device)


def consensus_on_views(panel: Panel, views: Tensor, device: torch.device) -> Tensor:
    """The consensus on every view (views, N, C); one pass per network and view."""
    heard = [[predict(n, view, device) for n in panel.networks] for view in views]
    return torch.stack([consensus(logits, panel.known, panel.relevant, panel.own_weight) for logits in heard])


def phase_record(kind: str, views: int, panel: Panel, curves: list[dict[str, float]]) -> dict[str, Any]:
    """What ``phases.json`` says of phase 1."""
    return {"kind": kind, "curves": curves, "views": views, "teacher_passes": views * len(panel.sites)}
