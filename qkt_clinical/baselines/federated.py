"""One hospital's round of federated averaging, FedProx or SCAFFOLD.

Transport and averaging are NVIDIA FLARE's: :mod:`qkt_clinical.federation.peers`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qkt_clinical.baselines.params import FederatedParams
from qkt_clinical.common.seeding import derive
from qkt_clinical.data.prepared import Images, Labels
from qkt_clinical.models.generator import generator
from qkt_clinical.models.networks import Classifier, build, fast_layout
from qkt_clinical.records.card import NetworkSpec
from qkt_clinical.task import Task
from qkt_clinical.training.classifier import augmented_batches
from qkt_clinical.training.loop import Schedule, batches_per_epoch, fit, learning_rate_factor


@dataclass(frozen=True)
class Participant:
    """A hospital of the federation: its name and its training images, whose number is its weight."""

    site: str
    train: tuple[Images, Labels]


def first_network(spec: NetworkSpec, seed: int) -> Classifier:
    """The global network before the first round."""
    return fast_layout(build(spec, seed=derive(seed, "federated")))


def round_rate(params: FederatedParams, number: int, rounds: int) -> float:
    """Learning rate of a round, counted from 1: it falls over the rounds along a cosine."""
    return params.learning_rate * learning_rate_factor(number - 1, rounds, 0.0)


def round_draw(seed: int, site: str, number: int) -> torch.Generator:
    """Seed of the order and the views of a hospital's images in a round."""
    return generator(seed, "federated", site, str(number))


def train_round(
    network: Classifier,
    inputs: Tensor,
    labels: Tensor,
    params: FederatedParams,
    *,
    task: Task,
    learning_rate: float,
    draw: torch.Generator,
    device: torch.device,
    penalty: Callable[[Classifier], Tensor] | None = None,
    after_step: Callable[[Classifier, float], None] | None = None,
) -> Classifier:
    """One local epoch from the global network, with a teacher's loss over all classes.

    Args:
        network: the global one; left as it is.
        inputs: (N, C, *spatial) float32 and labels (N,), on the CPU.
        learning_rate: of this round; within it, it rises and falls as in every other training.
        draw: see :func:`round_draw`.
        penalty: of the local network, added to every batch's loss: FedProx.
        after_step: may move the local network after every step, of that learning rate: SCAFFOLD.
    """
    local = copy.deepcopy(network)
    weights = task.weights(labels.numpy(), network.spec.classes).to(device)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return augmented_batches(inputs, labels, params.batch_size, params.augment, draw, device)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        value = task.loss(local(batch[0]), batch[1], weights)
        return value if penalty is None else value + penalty(local)

    fit(
        local,
        batches,
        batches_per_epoch(len(labels), params.batch_size),
        loss,
        Schedule(1, learning_rate, params.weight_decay),
        device=device,
        after_step=None if after_step is None else lambda rate: after_step(local, rate),
    )
    return local
