"""Averages of networks, weight by weight."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch

from qkt_clinical.models.networks import Classifier


@torch.no_grad()
def average_networks(networks: Sequence[Classifier], weights: Sequence[float]) -> Classifier:
    """The weighted mean of every parameter and running statistic.

    Args:
        networks: of one specification; left as they are.
        weights: one per network, at least 0, such as its number of training images; need not sum to 1.

    Returns:
        A new network on the first one's device, averaged in float64. Sums do not depend on the order of
        the networks; integer buffers (counters of batches) are the first one's.

    Raises:
        ValueError: no network, specifications that differ, or weights that are not one per network, are
            negative or sum to 0.
    """
    total = math.fsum(weights)
    if not networks or len(networks) != len(weights) or min(weights) < 0 or not total > 0:
        raise ValueError(f"{len(networks)} networks cannot be averaged with weights {list(weights)}")
    if any(network.spec != networks[0].spec for network in networks):
        raise ValueError("networks of different specifications cannot be averaged")
    states = [network.state_dict() for network in networks]
    average = copy.deepcopy(networks[0])
    for name, target in average.state_dict().items():
        if target.is_floating_point():
            shares = zip(states, weights, strict=True)
            parts = [state[name].to(target.device).double() * (w / total) for state, w in shares]
            target.copy_(torch.stack(parts).sort(dim=0).values.sum(dim=0))
    return average
