"""Federated averaging of a linear head over the features of a frozen encoder that all hospitals have.

Features are put on one scale first, from every hospital's sums and sums of squares, which move once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qkt_clinical.baselines.params import SmallFederationParams
from qkt_clinical.baselines.small_federation import bytes_moved, federate
from qkt_clinical.baselines.statistics import BYTES_PER_NUMBER
from qkt_clinical.task import Task


def common_scale(each: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (F,) of all hospitals' features (N, F) together, from their sums."""
    count = sum(len(features) for features in each)
    first = torch.stack([f.double().sum(dim=0) for f in each]).sum(dim=0)
    second = torch.stack([f.double().square().sum(dim=0) for f in each]).sum(dim=0)
    mean = first / count
    return mean.float(), (second / count - mean.square()).clamp(min=1e-12).sqrt().float()


def federated_head(
    members: Sequence[tuple[Tensor, Tensor]],
    classes: int,
    params: SmallFederationParams,
    *,
    task: Task,
    seed: int,
) -> tuple[tuple[Tensor, Tensor], int]:
    """A linear head of all hospitals, and the bytes that its making moves.

    Args:
        members: every hospital's features (N, F) and labels (N,).

    Returns:
        weight (C, F) and bias (C,) over the features as they were given; bytes.
    """
    mean, scale = common_scale([features for features, _ in members])
    width = len(mean)
    head = nn.Linear(width, classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    scaled = [((features - mean) / scale, labels) for features, labels in members]
    trained = federate(head, scaled, classes, params, task=task, seed=seed)
    weight = trained.weight.detach() / scale
    bias = trained.bias.detach() - weight @ mean
    sums = BYTES_PER_NUMBER * (1 + 2 * width) * 2 * len(members)
    return (weight, bias), sums + bytes_moved(trained, len(members), params.rounds)
