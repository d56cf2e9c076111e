"""Ensembles of all hospitals' networks, and the restriction of any network to the relevant classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qkt_clinical.task import Task


def _sorted_stack(each: Sequence[Tensor]) -> Tensor:
    """(networks, N, C) float64, sorted over the networks: sums do not depend on the order of hospitals."""
    return torch.stack([part.double() for part in each]).sort(dim=0).values


def mean_probability_scores(logits: Sequence[Tensor], *, task: Task) -> Tensor:
    """Logarithm of the mean over the networks of their probabilities over all classes.

    Args:
        logits: (N, C) of each network.

    Returns:
        (N, C), in the logits' dtype.
    """
    stacked = _sorted_stack([task.log_probabilities(part.double()) for part in logits])
    return (stacked.logsumexp(dim=0) - math.log(len(logits))).to(logits[0])


def mean_logit_scores(logits: Sequence[Tensor]) -> Tensor:
    """Mean over the networks of their logits: (N, C) each to (N, C), in the logits' dtype."""
    return _sorted_stack(logits).mean(dim=0).to(logits[0])


def restrict(scores: Tensor, relevant: Sequence[int]) -> Tensor:
    """Scores (N, C) of the relevant classes, minus infinity elsewhere: what the task answers by."""
    out = torch.full_like(scores, -math.inf)
    out[:, list(relevant)] = scores[:, list(relevant)]
    return out
