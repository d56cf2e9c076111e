"""Unmasked distillation: the student learns the teachers' mean prediction on local images.

What FedDF (Lin et al., 2020, arXiv 2006.07242) does at its server in every round, once and at the asking
hospital, whose own images are the only ones there. FedDF averages logits; here it is probabilities, as
of ``ensemble-prob``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qkt_clinical.baselines.ensembles import mean_probability_scores
from qkt_clinical.baselines.params import DistillParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Images
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier, fast_layout
from qkt_clinical.task import Task
from qkt_clinical.training.augment import make_views, view_batches
from qkt_clinical.training.loop import Schedule, batches_per_epoch, fit


def softened_divergence(logits: Tensor, target: Tensor, temperature: float, *, task: Task) -> Tensor:
    """Kullback-Leibler divergence of softened student logits (N, C) from target probabilities (N, C).

    Times the square of the temperature, so that its gradient keeps its size (Hinton et al., 2015).
    """
    student = task.log_probabilities(logits.float() / temperature)
    return F.kl_div(student, target, reduction="batchmean") * temperature**2


def distill_all(
    student: Classifier,
    teachers: Sequence[Classifier],
    images: Images,
    params: DistillParams,
    *,
    task: Task,
    seed: int,
    device: torch.device,
    normalisation: str = "unit",
    progress: Callable[[int, int], None] | None = None,
) -> Classifier:
    """Distil the mean of all teachers' softened probabilities, over all classes, into the student.

    Labels play no part: a share of cross-entropy on them kept more of the local classes and gained less of
    the query, to no better balance. There is no early stopping: local validation images say nothing about
    an absent query.

    Args:
        student: the hospital's own network, where training starts; left as it is.
        teachers: the networks of all hospitals, the student's own among them, of any architecture.
        images: the hospital's own training images.

    Returns:
        A network on the CPU, in evaluation mode.
    """
    network = fast_layout(copy.deepcopy(student).to(device))
    views = make_views(to_input(images, normalisation), params.views, params.augment, seed, device)
    count = len(images)
    # One pass per teacher and view, never repeated: what is kept is their mean.
    targets = torch.stack(
        [
            mean_probability_scores(
                [predict(t, view, device) / params.temperature for t in teachers], task=task
            ).exp()
            for view in views
        ]
    )

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        draw = generator(seed, "distill", str(epoch))
        for view, index in view_batches(views, params.batch_size, draw):
            yield views[view, index].to(device), targets[view, index].to(device)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return softened_divergence(network(batch[0]), batch[1], params.temperature, task=task)

    fit(
        network,
        batches,
        batches_per_epoch(count, params.batch_size),
        loss,
        Schedule(params.epochs, params.learning_rate, params.weight_decay),
        device=device,
        progress=progress,
    )
    return network.cpu()
