"""Settings of the baselines.

Searched on validation images of pbc28: the federations' learning rate, the temperature of distillation,
the personal training of a global network. The others are a teacher's or phase 1's.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qkt_clinical.config.base import Strict


class FinetuneParams(Strict):
    """Training of a given network on the hospital's own images."""

    epochs: Annotated[int, Field(ge=1, le=10_000)] = 20
    batch_size: Annotated[int, Field(ge=2, le=4096)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 5e-2
    augment: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    min_batches: Annotated[int, Field(ge=1, le=1000)] = 1
    """Of an epoch, as in the training of a teacher."""


class DistillParams(Strict):
    """Unmasked distillation, as long and on as many views as QKT's own distillation."""

    epochs: Annotated[int, Field(ge=1, le=10_000)] = 24
    batch_size: Annotated[int, Field(ge=2, le=4096)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    views: Annotated[int, Field(ge=1, le=64)] = 8
    augment: Annotated[float, Field(ge=0.0, le=3.0)] = 1.5
    temperature: Annotated[float, Field(gt=0, le=100.0)] = 4.0


class FederatedParams(Strict):
    """One round at one hospital; the learning rate is the first round's."""

    batch_size: Annotated[int, Field(ge=2, le=4096)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0)] = 5e-2
    augment: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    appearance: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    appearance_images: Annotated[int, Field(ge=1, le=1_000_000)] = 640
    min_batches: Annotated[int, Field(ge=1, le=1000)] = 1
    """Of a round; this and the three above as in the training of a teacher."""


class SmallFederationParams(Strict):
    """Federated averaging of a small module on tensors; the learning rate is the first round's."""

    rounds: Annotated[int, Field(ge=1, le=10_000)] = 50
    batch_size: Annotated[int, Field(ge=2, le=4096)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2


class AggregatorParams(SmallFederationParams):
    """Of FENS."""

    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    hidden: Annotated[int, Field(ge=1, le=65536)] = 16384
    """Units between the networks' logits and the answer."""


class BaselineParams(Strict):
    """All baselines that are trained."""

    finetune: FinetuneParams = FinetuneParams()
    """Of a hospital's own network."""
    personal: FinetuneParams = FinetuneParams(epochs=1, learning_rate=1e-4)
    """Of a global network at one hospital, gentle: even so an absent query is largely forgotten."""
    distill: DistillParams = DistillParams()
    federated: FederatedParams = FederatedParams()
    """Of FedAvg and FedProx."""
    scaffold: FederatedParams = FederatedParams()
    """Of SCAFFOLD."""
    proximal: Annotated[float, Field(gt=0)] = 1e-1
    """``mu`` of FedProx, the best of 0.001 to 1 on val."""
    head: SmallFederationParams = SmallFederationParams()
    """Of ``federated-head``."""
    aggregator: AggregatorParams = AggregatorParams()
    """Of ``fens``."""
