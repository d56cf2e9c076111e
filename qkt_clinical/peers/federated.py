"""Federated averaging and FedProx, in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkt_clinical.card import NetworkSpec
from qkt_clinical.data import Images, Labels
from qkt_clinical.networks import Classifier, build, fast_layout
from qkt_clinical.peers.averaging import average_networks
from qkt_clinical.peers.params import FederatedParams
from qkt_clinical.seeding import derive
from qkt_clinical.training import (
    Schedule,
    augmented_batches,
    balanced_sample_weights,
    batches_per_epoch,
    fit,
    generator,
    learning_rate_factor,
    to_input,
    weighted_cross_entropy,
)


@dataclass(frozen=True)
class Participant:
    """A hospital of the federation: its name and its training images, as many as its weight."""

    site: str
    train: tuple[Images, Labels]


def proximal_term(network: Classifier, start: Sequence[Tensor], proximal: float) -> Tensor:
    """``mu / 2`` times the squared distance of the network's parameters from where the round started."""
    distances = [((p - q) ** 2).sum() for p, q in zip(network.parameters(), start, strict=True)]
    return 0.5 * proximal * torch.stack(distances).sum()


def train_round(
    network: Classifier,
    inputs: Tensor,
    labels: Tensor,
    params: FederatedParams,
    *,
    learning_rate: float,
    proximal: float,
    draw: torch.Generator,
    device: torch.device,
) -> Classifier:
    """One local epoch from the global network, with a teacher's class-balanced loss over all classes.

    Args:
        network: the global one; left as it is.
        inputs: (N, C, *spatial) float32 and labels (N,), on the CPU.
        learning_rate: of this round; within it, it rises and falls as in every other training.
        proximal: ``mu`` of FedProx; 0 is FedAvg.
        draw: where order and views of the images come from.
    """
    local = copy.deepcopy(network)
    start = [p.detach().clone() for p in network.parameters()]
    weights = balanced_sample_weights(labels.numpy(), range(network.spec.classes)).to(device)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return augmented_batches(inputs, labels, params.batch_size, params.augment, draw, device)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        value = weighted_cross_entropy(local(batch[0]), batch[1], weights)
        return value + proximal_term(local, start, proximal) if proximal else value

    fit(
        local,
        batches,
        batches_per_epoch(len(labels), params.batch_size),
        loss,
        Schedule(1, learning_rate, params.weight_decay),
        device=device,
    )
    return local


def federated(
    participants: Sequence[Participant],
    spec: NetworkSpec,
    params: FederatedParams,
    *,
    rounds: int,
    proximal: float = 0.0,
    seed: int,
    device: torch.device,
    normalisation: str = "unit",
    progress: Callable[[int, int], None] | None = None,
) -> Classifier:
    """FedAvg (McMahan et al., 2017) or, with ``proximal`` above 0, FedProx (Li et al., 2020).

    A plain loop in one process that stands in for a federation engine: nothing travels, but what would
    is one network to and one from every participant in every round. Each round is one local epoch at
    every participant and the mean of their networks, running statistics included, weighed by their
    numbers of images. The learning rate falls over the rounds along a cosine.

    Args:
        participants: in any order; names are unique.
        progress: called with (rounds done, rounds in all).

    Returns:
        The global network after the last round, on the CPU, in evaluation mode.
    """
    participants = sorted(participants, key=lambda p: p.site)
    data = [(to_input(p.train[0], normalisation), torch.from_numpy(p.train[1])) for p in participants]
    sizes = [len(labels) for _, labels in data]
    network = fast_layout(build(spec, seed=derive(seed, "federated")).to(device))
    for number in range(1, rounds + 1):
        rate = params.learning_rate * learning_rate_factor(number - 1, rounds, 0.0)
        networks = [
            train_round(
                network,
                inputs,
                labels,
                params,
                learning_rate=rate,
                proximal=proximal,
                draw=generator(seed, "federated", participant.site, str(number)),
                device=device,
            )
            for participant, (inputs, labels) in zip(participants, data, strict=True)
        ]
        network = average_networks(networks, sizes)
        if progress:
            progress(number, rounds)
    return network.cpu()
