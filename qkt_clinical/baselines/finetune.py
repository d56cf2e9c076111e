"""Fine-tuning: further training of the hospital's own or a global network on the relevant classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from qkt_clinical.baselines.ensembles import restrict
from qkt_clinical.baselines.params import FinetuneParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Images, Labels
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier, fast_layout
from qkt_clinical.task import Task
from qkt_clinical.training.classifier import augmented_batches
from qkt_clinical.training.loop import Schedule, batches_per_epoch, fit


def finetune(
    network: Classifier,
    train: tuple[Images, Labels],
    val: tuple[Images, Labels],
    relevant: Sequence[int],
    params: FinetuneParams,
    *,
    task: Task,
    seed: int,
    name: str,
    device: torch.device,
    normalisation: str = "unit",
    progress: Callable[[int, int], None] | None = None,
) -> Classifier:
    """Train a copy of a network on local images; the epoch best on local validation images is kept.

    The task's weighted loss over the relevant classes: the rows of all others stay as
    they are but for weight decay.

    Args:
        network: left as it is.
        train, val: the hospital's own; training labels are relevant, other validation images are not used.
        relevant: indices of the relevant classes.
        name: what the network is and whose; its seeds depend on it.

    Returns:
        A network on the CPU, in evaluation mode.
    """
    tuned = fast_layout(copy.deepcopy(network).to(device))
    inputs, labels = to_input(train[0], normalisation), torch.from_numpy(train[1])
    weights = task.weights(train[1], network.spec.classes).to(device)
    judged = np.isin(val[1], relevant)
    val_inputs, val_labels = to_input(val[0][judged], normalisation), torch.from_numpy(val[1][judged])

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        draw = generator(seed, "finetune", name, str(epoch))
        return augmented_batches(
            inputs, labels, params.batch_size, params.augment, draw, device, least=params.min_batches
        )

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return task.loss(restrict(tuned(batch[0]), relevant), batch[1], weights)

    def score() -> float:
        return task.validation_score(restrict(predict(tuned, val_inputs, device), relevant), val_labels)

    fit(
        tuned,
        batches,
        batches_per_epoch(len(labels), params.batch_size, params.min_batches),
        loss,
        Schedule(params.epochs, params.learning_rate, params.weight_decay),
        device=device,
        score=score if len(val_labels) else None,
        progress=progress,
    )
    return tuned.cpu()
