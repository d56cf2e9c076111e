"""Federated averaging of a small module on tensors: a head over features, an aggregator of answers.

McMahan et al., 2017 (arXiv 1602.05629), in one process: NVIDIA FLARE, which runs the federations of whole
networks, takes half a minute to start, where all rounds of these take seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from qkt_clinical.baselines.params import SmallFederationParams
from qkt_clinical.baselines.statistics import BYTES_PER_NUMBER
from qkt_clinical.models.generator import generator
from qkt_clinical.task import Task
from qkt_clinical.training.loop import learning_rate_factor

Module = TypeVar("Module", bound=nn.Module)


def local_epoch(
    module: Module,
    member: tuple[Tensor, Tensor],
    weights: Tensor,
    params: SmallFederationParams,
    *,
    task: Task,
    learning_rate: float,
    draw: torch.Generator,
) -> Module:
    """A hospital's round: a copy of the module after one epoch over its tensors.

    Args:
        module: inputs (N, F) to logits (N, C); left as it is.
        member: inputs (N, F) and labels (N,).
        weights: (C,) of classes in the loss.
        draw: of the order.
    """
    local = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(local.parameters(), lr=learning_rate, weight_decay=params.weight_decay)
    inputs, labels = member
    for index in torch.randperm(len(labels), generator=draw).split(params.batch_size):
        optimizer.zero_grad()
        task.loss(local(inputs[index]), labels[index], weights).backward()
        optimizer.step()
    return local


def weighted_mean(modules: Sequence[Module], counts: Sequence[int]) -> Module:
    """A module whose parameters are the mean of the modules', each as heavy as its count."""
    mean, total = copy.deepcopy(modules[0]), sum(counts)
    with torch.no_grad():
        for target, *each in zip(mean.parameters(), *(m.parameters() for m in modules), strict=True):
            target.copy_(sum(p.double() * (n / total) for p, n in zip(each, counts, strict=True)))
    return mean


def federate(
    module: Module,
    members: Sequence[tuple[Tensor, Tensor]],
    classes: int,
    params: SmallFederationParams,
    *,
    task: Task,
    seed: int,
) -> Module:
    """The module after all rounds: in each, every hospital's epoch from the mean of the last ones.

    Args:
        module: where the first round starts; left as it is.
        members: every hospital's inputs (N, F) and labels (N,); N at least 1.
        classes: C, of the module's logits. In a hospital's loss its own classes count alike.
    """
    weights = [task.weights(labels.numpy(), classes) for _, labels in members]
    counts = [len(labels) for _, labels in members]
    for number in range(params.rounds):
        rate = params.learning_rate * learning_rate_factor(number, params.rounds, 0.0)
        trained = [
            local_epoch(
                module,
                member,
                weights[place],
                params,
                task=task,
                learning_rate=rate,
                draw=generator(seed, "small-federation", str(place), str(number)),
            )
            for place, member in enumerate(members)
        ]
        module = weighted_mean(trained, counts)
    return module


def bytes_moved(module: nn.Module, members: int, rounds: int) -> int:
    """To and from every hospital, in every round."""
    return BYTES_PER_NUMBER * sum(p.numel() for p in module.parameters()) * 2 * members * rounds
