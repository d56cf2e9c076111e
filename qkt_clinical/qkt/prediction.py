"""Scores of a student on images, for all methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qkt_clinical.errors import QueryError
from qkt_clinical.models.bundle import Bundle
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.consensus import consensus
from qkt_clinical.qkt.operating_point import decide
from qkt_clinical.qkt.panel import Teacher
from qkt_clinical.records.card import MIRRORS, DecisionRule


def mirrored(inputs: Tensor) -> Iterator[Tensor]:
    """The images and their mirror images."""
    for axes in MIRRORS:
        yield inputs.flip(axes) if axes else inputs


def routed_logits(
    network: Classifier,
    decision: DecisionRule,
    experts: Sequence[Teacher],
    inputs: Tensor,
    device: torch.device,
) -> Tensor:
    """Logits (N, C) of method ``routed``: the consensus of the own network and the experts."""
    networks = (network, *(e.network for e in experts))
    logits = [predict_logits(n, inputs, decision.flips, device) for n in networks]
    return routed_consensus(logits, decision, experts)


def routed_consensus(logits: Sequence[Tensor], decision: DecisionRule, experts: Sequence[Teacher]) -> Tensor:
    """The same from the logits of the own network and the experts, (N, C) each: :func:`predict_logits`."""
    known = [(*decision.local, *decision.rare), *(e.claimed for e in experts)]
    return consensus(logits, known, decision.relevant, decision.own_weight)


def _mean_over_views(
    network: Classifier, inputs: Tensor, flips: bool, device: torch.device, *, features: bool
) -> Tensor:
    views = mirrored(inputs) if flips else [inputs]
    return torch.stack([predict(network, view, device, features=features) for view in views]).mean(dim=0)


def predict_logits(network: Classifier, inputs: Tensor, flips: bool, device: torch.device) -> Tensor:
    """A network's logits (N, C) of every image; with ``flips`` the mean over it and its mirror images."""
    return _mean_over_views(network, inputs, flips, device, features=False)


def predict_features(network: Classifier, inputs: Tensor, flips: bool, device: torch.device) -> Tensor:
    """A network's features (N, F) of every image; with ``flips`` the mean over it and its mirror images."""
    return _mean_over_views(network, inputs, flips, device, features=True)


def predict_scores(bundle: Bundle, inputs: Tensor, device: torch.device | None = None) -> Tensor:
    """A student's scores (N, C), minus infinity outside the relevant classes.

    Args:
        bundle: of a student.
        inputs: from :func:`qkt_clinical.data.inputs.to_input`.

    Raises:
        QueryError: the bundle is a teacher's.
    """
    device = device or torch.device("cpu")
    decision = bundle.card.decision
    if decision is None:
        raise QueryError("a teacher answers no query", remedy="Give a student bundle.", site=bundle.card.site)
    experts = [Teacher.of(bundle.experts[name]) for name in decision.experts]
    return scores_of(bundle.network, decision, experts, inputs, device)


def scores_of(
    network: Classifier,
    decision: DecisionRule,
    experts: Sequence[Teacher],
    inputs: Tensor,
    device: torch.device,
) -> Tensor:
    """Like :func:`predict_scores`, from the parts."""
    logits = _logits_of(network, decision, experts, inputs, device)
    return decide(logits, decision.local, decision.query, torch.tensor(decision.offsets))


def _logits_of(
    network: Classifier,
    decision: DecisionRule,
    experts: Sequence[Teacher],
    inputs: Tensor,
    device: torch.device,
) -> Tensor:
    """The student's logits (N, C)."""
    if decision.experts:
        return routed_logits(network, decision, experts, inputs, device)
    return predict_logits(network, inputs, decision.flips, device)
