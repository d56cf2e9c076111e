"""Federated training: what its methods share, a hospital's round above all, and what a method has to say.

Transport and averaging are NVIDIA FLARE's: :mod:`qkt_clinical.federation.peers`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from qkt_clinical.baselines.params import FederatedParams
from qkt_clinical.common.seeding import derive
from qkt_clinical.data.prepared import Images, Labels
from qkt_clinical.models.encoders import Encoder
from qkt_clinical.models.generator import generator
from qkt_clinical.models.networks import Classifier
from qkt_clinical.records.card import NetworkSpec
from qkt_clinical.task import Task
from qkt_clinical.training.classifier import augmented_batches, first_network
from qkt_clinical.training.loop import Schedule, batches_per_epoch, fit, learning_rate_factor

if TYPE_CHECKING:
    from nvflare.app_common.abstract.fl_model import FLModel


class FederatedMethod(Protocol):
    """A federated method: one file of this room, and an entry in ``federation.peer_job.METHODS``."""

    def controller(self, proximal: float, **settings: Any) -> Any:
        """FLARE's controller of the rounds, made with FLARE's ``settings``; ``proximal`` is FedProx's mu."""

    def begin(self, network: Classifier) -> None:
        """At a hospital, before its first round from the global network."""

    def local_round(
        self, network: Classifier, received: FLModel, train: Callable[..., Classifier]
    ) -> tuple[Classifier, dict[str, Any]]:
        """A hospital's round.

        Args:
            network: the global one; left as it is.
            received: the server's message.
            train: :func:`train_round` from that network, with ``penalty`` and ``after_step`` free.

        Returns:
            The hospital's network, and what FLARE sends with it.
        """


@dataclass(frozen=True)
class Participant:
    """A hospital of the federation: its name and its training images, whose number is its weight."""

    site: str
    train: tuple[Images, Labels]


def global_network(spec: NetworkSpec, seed: int, pretrained: Encoder | None = None) -> Classifier:
    """The global network before the first round; see :func:`.training.classifier.first_network`."""
    return first_network(spec, derive(seed, "federated"), pretrained)


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
        return augmented_batches(
            inputs,
            labels,
            params.batch_size,
            params.augment,
            draw,
            device,
            appearance=params.appearance if len(labels) >= params.appearance_images else 0.0,
            least=params.min_batches,
        )

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        value = task.loss(local(batch[0]), batch[1], weights)
        return value if penalty is None else value + penalty(local)

    fit(
        local,
        batches,
        batches_per_epoch(len(labels), params.batch_size, params.min_batches),
        loss,
        Schedule(1, learning_rate, params.weight_decay),
        device=device,
        after_step=None if after_step is None else lambda rate: after_step(local, rate),
    )
    return local


def by_name(results: Sequence[FLModel]) -> list[FLModel]:
    """Replies sorted by site name: the last digits of a sum depend on its order."""
    return sorted(results, key=lambda result: str(result.meta["client_name"]))
