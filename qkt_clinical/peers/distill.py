"""Unmasked distillation: the student learns what the mean of all teachers says, on local images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qkt_clinical.data import Images, Labels
from qkt_clinical.networks import Classifier, fast_layout
from qkt_clinical.peers.ensembles import mean_probability_scores, restrict
from qkt_clinical.peers.local import weighted_cross_entropy
from qkt_clinical.peers.params import PeerParams
from qkt_clinical.training import (
    Schedule,
    balanced_sample_weights,
    batches_per_epoch,
    fit,
    generator,
    predict,
    shuffled,
    to_input,
)
from qkt_clinical.transfer import make_views


def softened_divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened student logits (N, C) from target probabilities (N, C).

    Times the square of the temperature, so that its gradient keeps its size (Hinton et al., 2015).
    """
    student = (logits.float() / temperature).log_softmax(dim=1)
    return F.kl_div(student, target, reduction="batchmean") * temperature**2


def distill_all(
    student: Classifier,
    teachers: Sequence[Classifier],
    train: tuple[Images, Labels],
    relevant: Sequence[int],
    params: PeerParams,
    *,
    seed: int,
    device: torch.device,
    normalisation: str = "unit",
    progress: Callable[[int, int], None] | None = None,
) -> Classifier:
    """Distil the mean of all teachers' softened probabilities, over all classes, into the student.

    Beside it counts the class-balanced cross-entropy on local labels over the relevant classes. There is
    no early stopping: local validation images say nothing about an absent query.

    Args:
        student: the hospital's own network, where training starts; left as it is.
        teachers: the networks of all hospitals, the student's own among them, of any architecture.
        train: the hospital's own images and labels, every label relevant.
        relevant: indices of the relevant classes.

    Returns:
        A network on the CPU, in evaluation mode.
    """
    settings = params.distill
    network = fast_layout(copy.deepcopy(student).to(device))
    labels = torch.from_numpy(train[1])
    weights = balanced_sample_weights(train[1], range(student.spec.classes)).to(device)
    inputs = to_input(train[0], normalisation)
    views = make_views(inputs, settings.views, settings.augment, seed, device)
    # One pass per teacher and view, never repeated: what is kept is their mean.
    targets = torch.stack(
        [
            mean_probability_scores([predict(t, view, device) / settings.temperature for t in teachers]).exp()
            for view in views
        ]
    )

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        draw = generator(seed, "distill", str(epoch))
        chosen = torch.randint(len(views), (len(labels),), generator=draw)
        for index in shuffled(len(labels), settings.batch_size, draw):
            view = chosen[index]
            yield views[view, index].to(device), targets[view, index].to(device), labels[index].to(device)

    def loss(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, target, label = batch
        logits = network(images).float()
        supervised = weighted_cross_entropy(restrict(logits, relevant), label, weights)
        distilled = softened_divergence(logits, target, settings.temperature)
        return settings.labels * supervised + (1.0 - settings.labels) * distilled

    fit(
        network,
        batches,
        batches_per_epoch(len(labels), settings.batch_size),
        loss,
        Schedule(settings.epochs, settings.learning_rate, settings.weight_decay),
        device=device,
        progress=progress,
    )
    return network.cpu()
