"""Training of a head over a frozen encoder: features of a few views of every image are computed once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.training.augment import augment, change_appearance
from qkt_clinical.training.loop import shuffled
from qkt_clinical.training.processes import processes

VIEWS = 4
"""Of an image, the first as it is: an epoch of a network that is trained sees a new one each time."""

IMAGES_AT_ONCE = 256
"""Of which views are held: large images need the memory of these, not of all."""


def feature_views(
    network: Classifier,
    inputs: Tensor,
    strength: float,
    draw: torch.Generator,
    device: torch.device,
    *,
    appearance: float = 0.0,
) -> Tensor:
    """Features (``VIEWS``, N, F) of the network's extractor, on the CPU.

    Args:
        inputs: (N, C, *spatial), on the CPU.
        strength: of :func:`.augment.augment`.
        appearance: strength of :func:`.augment.change_appearance`.
    """

    def view(images: Tensor) -> Tensor:
        return change_appearance(augment(images, strength, draw), appearance, draw)

    found = [predict(network, inputs, device, features=True)]
    for _ in range(VIEWS - 1):
        parts = (predict(network, view(p), device, features=True) for p in inputs.split(IMAGES_AT_ONCE))
        found.append(torch.cat(list(parts)))
    return torch.stack(found)


def feature_batches(
    views: Tensor,
    labels: Tensor,
    batch_size: int,
    draw: torch.Generator,
    device: torch.device,
    *,
    least: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order over :func:`feature_views` and labels (N,): a random view per image.

    Args:
        least: batches, at least; see :func:`.loop.shuffled`.
    """
    here = processes()
    chosen = here.draws(draw)
    for whole in shuffled(len(labels), batch_size * here.count, draw, least, 2 * here.count):
        index = here.part(whole)
        view = torch.randint(len(views), (len(index),), generator=chosen)
        yield views[view, index].to(device), labels[index].to(device)
