"""What the trained peers take from a teacher's training: batches of views and the class-balanced loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from qkt_clinical.augment import augment
from qkt_clinical.training import shuffled


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
        weights: (C,) from :func:`qkt_clinical.training.balanced_sample_weights`, over all of the
            hospital's images: a rare class is missing from many a batch.
    """
    each = F.cross_entropy(logits.float(), labels, reduction="none")
    return (each * weights[labels]).mean()
