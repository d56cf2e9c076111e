"""Coloured shapes of 16 x 16 pixels: four classes that a small network learns in seconds."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from qkt_clinical.catalog import Network
from qkt_clinical.config.params import TrainParams
from qkt_clinical.data.prepared import Images, Labels
from qkt_clinical.models.networks import Classifier
from qkt_clinical.records.card import NetworkSpec
from qkt_clinical.task import MULTICLASS
from qkt_clinical.training.classifier import train_teacher

CLASSES = ("disc", "cross", "bars", "frame")
COLOURS = np.array([[210, 60, 60], [60, 190, 70], [70, 90, 220], [220, 200, 60]], dtype=np.float64)
SIDE = 16
CPU = torch.device("cpu")


def _outline(kind: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Which pixels belong to the shape, by distance from its centre."""
    down, right = np.abs(rows), np.abs(columns)
    match kind:
        case 0:
            return np.asarray(rows**2 + columns**2 < 18)
        case 1:
            return np.asarray((np.minimum(down, right) < 1.5) & (np.maximum(down, right) < 6))
        case 2:
            return np.asarray((np.maximum(down, right) < 6) & (rows.astype(int) % 3 == 0))
        case _:
            return np.asarray((np.maximum(down, right) < 6) & (np.maximum(down, right) > 3.5))


def shapes(classes: Sequence[int], each: int, seed: int) -> tuple[Images, Labels]:
    """``each`` images (N, 3, 16, 16) uint8 of every class named, in shuffled order, with labels (N,)."""
    random = np.random.default_rng([seed, *classes])
    labels = random.permutation(np.repeat(np.asarray(classes, dtype=np.int64), each))
    grid = np.arange(SIDE, dtype=np.float64)
    images = np.empty((len(labels), 3, SIDE, SIDE), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        centre = random.uniform(6, 10, size=2)
        rows, columns = np.meshgrid(grid - centre[0], grid - centre[1], indexing="ij")
        inside = _outline(int(label), rows, columns)
        paint = COLOURS[label][:, None, None] + random.normal(0, 12, size=(3, 1, 1))
        base = np.where(inside[None], paint, random.uniform(90, 130))
        image[:] = np.clip(base + random.normal(0, 10, size=base.shape), 0, 255)
    return images, labels


def spec(name: Network = "resnet-small", classes: int = len(CLASSES)) -> NetworkSpec:
    return NetworkSpec(name=name, spatial_dims=2, in_channels=3, classes=classes)


def teacher(
    classes: Sequence[int], *, site: str, name: Network = "resnet-small", epochs: int = 12
) -> Classifier:
    """A network trained on 40 images of each class; a copy of its own, trained once for all tests."""
    return copy.deepcopy(_trained(tuple(classes), site, name, epochs))


@functools.cache
def _trained(classes: tuple[int, ...], site: str, name: Network, epochs: int) -> Classifier:
    seed = sum(map(ord, site))
    network, _ = train_teacher(
        spec(name),
        shapes(classes, 40, seed),
        shapes(classes, 10, seed + 1),
        TrainParams(network=name, epochs=epochs, batch_size=32, patience=epochs),
        seed=0,
        site=site,
        device=CPU,
        task=MULTICLASS,
    )
    return network


def state(network: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in network.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[k], two[k]) for k in one)


@contextmanager
def counted(network: Classifier) -> Iterator[list[int]]:
    """Number of images of every forward pass of the extractor, in copies of the network too."""
    sizes: list[int] = []
    hook = network.extractor.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
    try:
        yield sizes
    finally:
        hook.remove()
