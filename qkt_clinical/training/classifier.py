"""Train a hospital's classifier, the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from qkt_clinical.common.seeding import derive
from qkt_clinical.config.encoder_specs import ENCODERS
from qkt_clinical.config.params import TrainParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Images, Labels
from qkt_clinical.errors import ConfigError
from qkt_clinical.models.encoder_network import EncoderExtractor
from qkt_clinical.models.encoders import Encoder
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import images_at_once, predict
from qkt_clinical.models.networks import Classifier, build, check_size, fast_layout
from qkt_clinical.records.card import EncoderPart, NetworkSpec
from qkt_clinical.task import Task
from qkt_clinical.training.augment import augment, change_appearance
from qkt_clinical.training.frozen import feature_batches, feature_views
from qkt_clinical.training.loop import Checkpoint, History, Schedule, batches_per_epoch, fit, shuffled
from qkt_clinical.training.processes import averaged, processes

PIXELS_PER_BATCH = 64 * 224 * 224
"""Pixels or voxels of a batch, at most: what training holds of every layer needs about 4 GB then."""
FEWEST_PER_BATCH = 4
"""Images of a batch, however large: layers are normalised by its statistics."""


def augmented_batches(
    inputs: Tensor,
    labels: Tensor,
    batch_size: int,
    strength: float,
    draw: torch.Generator,
    device: torch.device,
    *,
    appearance: float = 0.0,
    least: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order over inputs (N, C, *spatial) and labels (N,): a random view per image.

    Args:
        strength: of :func:`.augment.augment`.
        appearance: strength of :func:`.augment.change_appearance`.
        least: batches, at least; see :func:`.loop.shuffled`.

    Of several :mod:`.processes` each has batches of this size, which are parts of one.
    """
    here = processes()
    views = here.draws(draw)
    for whole in shuffled(len(labels), batch_size * here.count, draw, least, 2 * here.count):
        index = here.part(whole)
        view = augment(inputs[index].to(device), strength, views)
        yield change_appearance(view, appearance, views), labels[index].to(device)


def appearance_of(params: TrainParams, normalisation: str, count: int) -> float:
    """Strength with which a site's training images change their appearance; 0 where they do not.

    Args:
        count: of the site's training images.
    """
    changes = params.privacy is None and normalisation == "unit" and count >= params.appearance_images
    return params.appearance if changes else 0.0


def train_network(
    network: Classifier,
    train: tuple[Images, Labels],
    val: tuple[Images, Labels],
    params: TrainParams,
    *,
    task: Task,
    seed: int,
    site: str,
    normalisation: str = "unit",
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> History:
    """Train a network on ``device``, in place, on a site's images with the task's weighted loss.

    The loss runs over all the federation's classes: the rows of classes that the site never saw only ever
    fall, which is what masks read later. Where the extractor is frozen its features are computed once.

    Raises:
        ConfigError: differential privacy is asked for, which only ``qkt_clinical.training.private`` gives.
    """
    if params.privacy is not None:
        raise ConfigError(
            "differential privacy is not possible here",
            remedy="Leave train.privacy out; 'qkt train' trains teachers with it.",
            code="privacy-unavailable",
        )
    if network.spec.encoder is not None and normalisation != "unit":
        raise ConfigError(
            "an encoder takes images in [0, 1], these are standardised one by one",
            remedy="Set normalisation: unit in site.yaml, or leave train.encoder out.",
            code="encoder-input",
        )
    inputs, labels = to_input(train[0], normalisation), torch.from_numpy(train[1])
    size, least = params.batch_size, params.min_batches
    weights = task.weights(train[1], network.spec.classes).to(device)
    val_inputs, val_labels = to_input(val[0], normalisation), torch.from_numpy(val[1])
    appearance = appearance_of(params, normalisation, len(labels))
    frozen = network.spec.encoder is not None and network.spec.encoder.mode == "frozen"
    learnt: nn.Module = network
    if frozen:
        learnt, draw = network.head, generator(seed, "train", site, "views")
        views = feature_views(network, inputs, params.augment, draw, device, appearance=appearance)
        if len(val_labels):
            val_inputs = predict(network, val_inputs, device, features=True)
    else:
        size = images_at_once(inputs, size, PIXELS_PER_BATCH, FEWEST_PER_BATCH)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        draw = generator(seed, "train", site, str(epoch))
        if frozen:
            return feature_batches(views, labels, size, draw, device, least=least)
        return augmented_batches(
            inputs, labels, size, params.augment, draw, device, appearance=appearance, least=least
        )

    def score() -> float:
        return task.validation_score(predict(learnt, val_inputs, device), val_labels)

    network.eval()  # an extractor that is not trained stays so
    here = processes()
    forward = cache(lambda: averaged(learnt, device))  # once it is settled what of it is trained
    return fit(
        learnt,
        batches,
        batches_per_epoch(len(labels), size * here.count, least, 2 * here.count),
        lambda batch: task.loss(forward()(batch[0]), batch[1], weights),
        Schedule(params.epochs, params.learning_rate, params.weight_decay, params.patience),
        device=device,
        score=score if len(val_labels) else None,
        checkpoint=checkpoint,
        progress=progress,
    )


def at_home(params: TrainParams) -> TrainParams:
    """How a site's own network is trained: on images as they are."""
    return params.model_copy(update={"appearance": 0.0})


def network_spec(params: TrainParams, shape: Sequence[int], classes: int) -> NetworkSpec:
    """The network that a site trains on images (C, *spatial).

    Raises:
        ConfigError: they are too small for it, or no images for the encoder (code ``encoder-input``).
    """
    channels, *spatial = shape
    dims: Literal[2, 3] = 3 if len(spatial) == 3 else 2
    encoder = params.encoder
    takes = ENCODERS[encoder.name] if encoder else None
    if encoder and takes and (takes.spatial_dims != dims or channels not in (1, takes.channels)):
        raise ConfigError(
            f"images of {channels} channels and {dims} dimensions, which {encoder.name} does not take",
            remedy="Choose another encoder, see 'qkt encoder list'.",
            code="encoder-input",
        )
    part = EncoderPart(name=encoder.name, side=encoder.side, mode=encoder.mode) if encoder else None
    spec = NetworkSpec(
        name="encoder" if encoder else params.network,
        encoder=part,
        spatial_dims=dims,
        in_channels=channels,
        classes=classes,
    )
    check_size(spec, tuple(spatial))
    return spec


def first_network(spec: NetworkSpec, seed: int, pretrained: Encoder | None = None) -> Classifier:
    """A network before its training: drawn by the seed, but for what was trained elsewhere.

    Args:
        pretrained: of a network whose extractor is an encoder.
    """
    network = build(spec, seed=seed)
    if isinstance(network.extractor, EncoderExtractor):
        assert pretrained is not None
        network.extractor.network.load_state_dict(pretrained.network.state_dict())
    return fast_layout(network)


def train_teacher(
    spec: NetworkSpec,
    train: tuple[Images, Labels],
    val: tuple[Images, Labels],
    params: TrainParams,
    *,
    task: Task,
    seed: int,
    site: str,
    normalisation: str = "unit",
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int, int], None] | None = None,
    pretrained: Encoder | None = None,
) -> tuple[Classifier, History]:
    """Build a site's network and train it; see :func:`first_network` and :func:`train_network`."""
    network = first_network(spec, derive(seed, "train", site), pretrained).to(device)
    history = train_network(
        network,
        train,
        val,
        params,
        task=task,
        seed=seed,
        site=site,
        normalisation=normalisation,
        device=device,
        checkpoint=checkpoint,
        progress=progress,
    )
    return network, history
