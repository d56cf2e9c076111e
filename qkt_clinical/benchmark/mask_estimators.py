"""Mask estimators that the benchmark compares, the product's own (``combined``) among them.

Every estimator maps a network to one score per class in [0, 1], the largest being 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qkt_clinical.catalog import ESTIMATORS, Estimator
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt import masks
from qkt_clinical.qkt.masks import gaussian, mask_of, mixed, noise_features, normalised, smooth, uniform
from qkt_clinical.records.card import Mask

NORM_POWER = 4
"""Head-row norms of known and unknown classes differ by a factor of about 2, softmax scores by 100 or
more; the power brings them to comparable gaps."""


NOISE = {
    "gaussian-noise": gaussian,
    "uniform-noise": uniform,
    "smooth-noise": smooth,
    "mixed-noise": mixed,
}
"""Kinds of noise that are fed to a network as it is."""


def _mean_softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=1).mean(dim=0)


def head_row_norm(weight: Tensor) -> Tensor:
    """Norm of each head row (C, F) around the mean row: rows of classes never trained stay alike.

    Cross-entropy pushes all rows of classes that never occur in the same direction, so what they have in
    common is taken out before the norm.
    """
    weight = weight.double()
    norms: Tensor = (weight - weight.median(dim=0).values).norm(dim=1)
    return norms


def class_scores(
    network: Classifier, shape: tuple[int, ...], *, estimator: Estimator, probes: int, seed: int
) -> Tensor:
    """Scores (C,), float64 in [0, 1], largest 1.

    The estimators:

    - ``gaussian-noise``, ``uniform-noise``, ``smooth-noise``, ``mixed-noise``: mean softmax over noise.
    - ``batch-norm-noise``: the same over mixed noise, with layers that keep running statistics on those of
      the noise itself, so that it reaches the head at the scale the head was trained on. Without such
      layers it is ``mixed-noise``: instance, group and layer norm do the same by themselves.
    - ``feature-noise``: mean softmax over half-normal noise, fed straight into the head.
    - ``head-row-norm``: see :func:`head_row_norm`.
    - ``combined``: see :func:`qkt_clinical.qkt.masks.class_scores`.

    Args:
        network: on the CPU; left as it was, bit for bit.
        shape: of one input, (channels, *spatial).
        probes: number of noise inputs.

    Raises:
        ValueError: no such estimator.
    """
    draw = torch.Generator().manual_seed(seed)
    full = (probes, *shape)
    weight, bias = network.head.weight.detach().double(), network.head.bias.detach().double()
    match estimator:
        case "gaussian-noise" | "uniform-noise" | "smooth-noise" | "mixed-noise":
            features = noise_features(network, NOISE[estimator](full, draw), batch_statistics=False)
        case "batch-norm-noise":
            features = noise_features(network, mixed(full, draw), batch_statistics=True)
        case "feature-noise":
            features = torch.randn((probes, weight.shape[1]), generator=draw).abs().double()
        case "head-row-norm":
            return normalised(head_row_norm(weight)) ** NORM_POWER
        case "combined":
            return masks.class_scores(network, shape, probes=probes, seed=seed)
        case _:
            raise ValueError(f"unknown estimator {estimator!r}; one of {', '.join(ESTIMATORS)}")
    return normalised(_mean_softmax(features @ weight.T + bias))


def estimate_mask(
    network: Classifier,
    shape: tuple[int, ...],
    classes: tuple[str, ...],
    *,
    estimator: Estimator,
    threshold: float | Literal["auto"] = "auto",
    probes: int = 256,
    seed: int = 0,
) -> Mask:
    """The mask of a teacher by any estimator.

    Raises:
        BundleError: the network gives no finite answer to noise.
    """
    scores = class_scores(network, shape, estimator=estimator, probes=probes, seed=seed)
    return mask_of(scores, classes, estimator=estimator, threshold=threshold, probes=probes, seed=seed)
