"""Train a hospital's classifier, the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qkt_clinical.common.seeding import derive
from qkt_clinical.config.params import TrainParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Images, Labels
from qkt_clinical.errors import ConfigError
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier, build, fast_layout
from qkt_clinical.records.card import NetworkSpec
from qkt_clinical.training.augment import augment
from qkt_clinical.training.loop import Checkpoint, History, Schedule, batches_per_epoch, fit, shuffled


def balanced_sample_weights(labels: Labels, classes: Sequence[int]) -> Tensor:
    """Weight per class, (max class + 1,), so that every class present counts alike; mean 1 over images."""
    counts = np.bincount(labels, minlength=max(classes) + 1).astype(np.float64)
    weights = np.where(counts > 0, len(labels) / np.maximum(counts, 1) / max(1, (counts > 0).sum()), 0.0)
    return torch.from_numpy(weights).float()


def mean_recall(predicted: Tensor, labels: Tensor) -> float:
    """Mean over the classes present in ``labels`` of the share predicted right."""
    recalls = [float((predicted[labels == c] == c).float().mean()) for c in labels.unique()]
    return sum(recalls) / len(recalls)


def augmented_batches(
    inputs: Tensor,
    labels: Tensor,
    batch_size: int,
    strength: float,
    draw: torch.Generator,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order over inputs (N, C, *spatial) and labels (N,): a random view per image."""
    for index in shuffled(len(labels), batch_size, draw):
        yield augment(inputs[index].to(device), strength, draw), labels[index].to(device)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy of logits (N, C), every image weighed by its class.

    Args:
        labels: (N,).
        weights: (C,) from :func:`balanced_sample_weights`, over all of the hospital's images: a rare class
            is missing from many a batch.
    """
    each = F.cross_entropy(logits.float(), labels, reduction="none")
    return (each * weights[labels]).mean()


def train_network(
    network: Classifier,
    train: tuple[Images, Labels],
    val: tuple[Images, Labels],
    params: TrainParams,
    *,
    seed: int,
    site: str,
    normalisation: str = "unit",
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> History:
    """Train a network on ``device``, in place, on a site's images with class-balanced cross-entropy.

    The softmax runs over all the federation's classes: the rows of classes that the site never saw only
    ever fall, which is what masks read later.

    Raises:
        ConfigError: differential privacy is asked for, which only ``qkt_clinical.training.private`` gives.
    """
    if params.privacy is not None:
        raise ConfigError(
            "differential privacy is not possible here",
            remedy="Leave train.privacy out; 'qkt train' trains teachers with it.",
            code="privacy-unavailable",
        )
    inputs, labels = to_input(train[0], normalisation), torch.from_numpy(train[1])
    weights = balanced_sample_weights(train[1], range(network.spec.classes)).to(device)
    val_inputs, val_labels = to_input(val[0], normalisation), torch.from_numpy(val[1])

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        draw = generator(seed, "train", site, str(epoch))
        return augmented_batches(inputs, labels, params.batch_size, params.augment, draw, device)

    def score() -> float:
        logits = predict(network, val_inputs, device)
        recall = mean_recall(logits.argmax(1), val_labels)
        # Small validation sets give the same recall for many epochs; the loss decides among them.
        return recall - 1e-3 * float(F.cross_entropy(logits, val_labels))

    return fit(
        network,
        batches,
        batches_per_epoch(len(labels), params.batch_size),
        lambda batch: weighted_cross_entropy(network(batch[0]), batch[1], weights),
        Schedule(params.epochs, params.learning_rate, params.weight_decay, params.patience),
        device=device,
        score=score if len(val_labels) else None,
        checkpoint=checkpoint,
        progress=progress,
    )


def train_teacher(
    spec: NetworkSpec,
    train: tuple[Images, Labels],
    val: tuple[Images, Labels],
    params: TrainParams,
    *,
    seed: int,
    site: str,
    normalisation: str = "unit",
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Classifier, History]:
    """Build a site's network and train it; see :func:`train_network`."""
    network = fast_layout(build(spec, seed=derive(seed, "train", site)).to(device))
    history = train_network(
        network,
        train,
        val,
        params,
        seed=seed,
        site=site,
        normalisation=normalisation,
        device=device,
        checkpoint=checkpoint,
        progress=progress,
    )
    return network, history
