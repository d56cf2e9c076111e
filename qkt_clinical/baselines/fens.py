"""An ensemble whose answers a small network combines, which all hospitals train together.

Every hospital gets every network. On images that none of them was trained on, the logits of all networks side
by side go into an aggregator of two layers, and federated averaging trains that alone (FENS; Allouah et al.,
NeurIPS 2024, arXiv 2411.07182).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qkt_clinical.baselines.params import AggregatorParams
from qkt_clinical.baselines.small_federation import federate
from qkt_clinical.models.generator import generator
from qkt_clinical.task import Task


def untrained_aggregator(networks: int, classes: int, hidden: int, seed: int) -> nn.Sequential:
    """Logits of all networks side by side (N, networks * classes) to logits (N, classes)."""
    draw = generator(seed, "fens")
    layers = [nn.Linear(networks * classes, hidden), nn.ReLU(), nn.Linear(hidden, classes)]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=draw)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def side_by_side(each: Sequence[Tensor]) -> Tensor:
    """Logits (N, C) of every network to one input (N, networks * C) of the aggregator."""
    return torch.cat(list(each), dim=1)


def train_aggregator(
    members: Sequence[tuple[Tensor, Tensor]],
    networks: int,
    classes: int,
    params: AggregatorParams,
    *,
    task: Task,
    seed: int,
) -> nn.Sequential:
    """The aggregator after all rounds.

    Args:
        members: of every hospital, :func:`side_by_side` of images that no network was trained on, and
            labels (N,).
    """
    start = untrained_aggregator(networks, classes, params.hidden, seed)
    return federate(start, members, classes, params, task=task, seed=seed)
