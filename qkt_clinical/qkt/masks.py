"""Data-free masks: which classes a teacher knows, computed from its network alone.

A network is overconfident towards the classes it was trained on, so noise shows them (QKT, section on
masking). Plain noise shows only some: most networks send all Gaussian noise to one class. So the noise is
made to reach the head at the scale that the head was trained on.

Noise can be averaged in two ways. The *mean* probability of a class, as in the paper, is small for a known
class that other known classes outshine. Its *conviction*, the mean over the few probes that convince the
network most of it, is near 1 for every known class: a class never trained is not convinced by any noise.

A network gets one score per class in [0, 1], the largest being 1. A mask computed by the teacher's site and
one computed from its bundle are equal: the probes depend on the seed alone.
"""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkt_clinical.catalog import DEFAULT_ESTIMATOR, Estimator
from qkt_clinical.errors import BundleError
from qkt_clinical.models.inference import images_at_once
from qkt_clinical.models.networks import Classifier
from qkt_clinical.records.card import Mask

TINY = 1e-4
"""Scores below this are all alike: nothing is learned from how far below they lie."""

MIN_RATIO = 3.0
"""A gap of less than this ratio is no gap: a teacher without one knows every class."""

CONVINCED = 0.05
"""Share of the probes, those that convince a network most of a class, that count for its conviction."""

STRETCH = 3.0
"""Factor by which ``combined`` stretches features from their mean: real images move them more."""

PROBES_PER_BATCH = 256
PIXELS_PER_BATCH = PROBES_PER_BATCH * 128 * 128
"""Pixels or voxels of a batch: it is of fewer probes where they are larger, so that its memory is bounded."""
FEWEST_PER_BATCH = 16
"""Probes from which statistics of a layer are taken, even of the largest volumes."""


def normalised(scores: Tensor) -> Tensor:
    """Scores divided by their maximum, and not below 0."""
    scores = scores.double().clamp(min=0)
    top = scores.max()
    return scores / top if float(top) > 0 else scores


def gaussian(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Standard normal noise."""
    return torch.randn(shape, generator=draw)


def uniform(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Uniform noise over the input range [-1, 1]."""
    return torch.rand(shape, generator=draw) * 2 - 1


def smooth(shape: tuple[int, ...], draw: torch.Generator, *, cells: int = 4) -> Tensor:
    """Low-frequency noise: a coarse uniform grid, interpolated; about [-1, 1]."""
    count, channels, *spatial = shape
    coarse = torch.rand((count, channels, *[cells] * len(spatial)), generator=draw) * 2 - 1
    mode = "bilinear" if len(spatial) == 2 else "trilinear"
    return F.interpolate(coarse, size=tuple(spatial), mode=mode, align_corners=True) * 1.5


def mixed(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Equal parts of six kinds.

    Gaussian, uniform, smooth, smooth plus Gaussian, smooth on a flat colour, Gaussian on a flat colour.
    """
    count, channels, *spatial = shape
    parts: list[Tensor] = []
    sizes = [len(p) for p in torch.arange(count).tensor_split(6)]
    ones = [1] * len(spatial)
    for kind, size in enumerate(sizes):
        part = (size, channels, *spatial)
        flat = (torch.rand((size, channels, *ones), generator=draw) * 2 - 1).expand(part)
        match kind:
            case 0:
                parts.append(gaussian(part, draw))
            case 1:
                parts.append(uniform(part, draw))
            case 2:
                parts.append(smooth(part, draw))
            case 3:
                parts.append(smooth(part, draw, cells=8) + 0.3 * gaussian(part, draw))
            case 4:
                parts.append(flat + 0.5 * smooth(part, draw))
            case _:
                parts.append(flat + 0.1 * gaussian(part, draw))
    return torch.cat(parts)


_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
"""Layers that may normalise by running statistics; group and layer norm always go by the input itself."""


@torch.no_grad()
def noise_features(network: Classifier, probes: Tensor, *, batch_statistics: bool) -> Tensor:
    """Features (N, F), float64, in another order than the probes.

    The network is copied, so that its running statistics stay as they are.
    """
    probe = copy.deepcopy(network).eval()
    if batch_statistics:
        for module in probe.modules():
            if isinstance(module, _NORMS):
                module.train()
    # Every batch gets every kind of noise and about as many probes as the others.
    at_once = images_at_once(probes, PROBES_PER_BATCH, PIXELS_PER_BATCH, FEWEST_PER_BATCH)
    count = math.ceil(len(probes) / at_once)
    return torch.cat([probe.features(probes[start::count]) for start in range(count)]).double()


def conviction(logits: Tensor) -> Tensor:
    """Confidence of the network in each class on the probes that favour the class most.

    Args:
        logits: (N, C), one row per probe.

    Returns:
        (C,) in [0, 1]: the mean probability over the ``CONVINCED`` share of the probes, at least one, in
        which it is highest; other probes for each class.
    """
    probabilities = torch.softmax(logits, dim=1)
    return probabilities.topk(max(1, round(CONVINCED * len(logits))), dim=0).values.mean(dim=0)


def stretched(features: Tensor) -> Tensor:
    """Features (N, F), ``STRETCH`` times as far from their mean, but none below the least of all.

    (After a rectifier that is about 0, and real features do not lie below it either.)
    """
    centre = features.mean(dim=0)
    return (centre + STRETCH * (features - centre)).clamp(min=float(features.min()))


def class_scores(network: Classifier, shape: tuple[int, ...], *, probes: int, seed: int) -> Tensor:
    """Scores (C,), float64 in [0, 1], largest 1.

    Mixed noise, with layers that keep running statistics on those of the noise itself, so that it reaches
    the head at the scale the head was trained on; read by its :func:`conviction`, as it is and with features
    :func:`stretched`; the geometric mean of both. The benchmark compares it with other estimators.

    Args:
        network: on the CPU; left as it was, bit for bit.
        shape: of one input, (channels, *spatial).
        probes: number of noise inputs.
    """
    draw = torch.Generator().manual_seed(seed)
    weight, bias = network.head.weight.detach().double(), network.head.bias.detach().double()
    features = noise_features(network, mixed((probes, *shape), draw), batch_statistics=True)
    parts = [normalised(conviction(f @ weight.T + bias)) for f in (features, stretched(features))]
    # A geometric mean: a class must look known to both.
    return normalised(torch.stack(parts).clamp(min=TINY).log().mean(dim=0).exp())


def gap_threshold(scores: Tensor) -> float:
    """Lambda from a teacher's own scores: the middle, in logarithms, of their widest gap.

    Where no neighbouring scores differ by ``MIN_RATIO``, every class counts as known.
    """
    logs = scores.clamp(min=TINY).log().sort(descending=True).values
    gaps = logs[:-1] - logs[1:]
    widest = int(gaps.argmax())
    if float(gaps[widest]) < math.log(MIN_RATIO):
        return math.exp(float(logs[-1]))
    return math.exp(float(logs[widest] + logs[widest + 1]) / 2)


def _threshold(scores: Tensor, threshold: float | Literal["auto"]) -> float:
    return gap_threshold(scores) if threshold == "auto" else float(threshold)


def verified_classes(
    network: Classifier,
    shape: tuple[int, ...],
    *,
    threshold: float | Literal["auto"],
    probes: int,
    seed: int,
) -> tuple[int, ...]:
    """Verified classes: those that the network itself supports, whatever its mask claims.

    It is read as for its mask, but for the head's biases: one large enough sends all noise to a class of
    which the network has learned nothing. What was learned stands in the rows.

    Returns:
        None at all where the network gives no finite answer to noise.
    """
    probe = copy.deepcopy(network)
    with torch.no_grad():
        probe.head.bias.zero_()
    scores = class_scores(probe, shape, probes=probes, seed=seed)
    if not bool(torch.isfinite(scores).all()):
        return ()
    value = _threshold(scores, threshold)
    return tuple(c for c, score in enumerate(scores.tolist()) if round(score, 6) >= round(value, 6))


def mask_of(
    scores: Tensor,
    classes: tuple[str, ...],
    *,
    estimator: Estimator,
    threshold: float | Literal["auto"],
    probes: int,
    seed: int,
) -> Mask:
    """The mask that scores (C,) give.

    Raises:
        BundleError: scores are not finite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise BundleError(
            "the network gives no finite answer to noise, so that its mask cannot be read",
            remedy="Run 'qkt train' for this hospital again.",
            code="bundle-values",
        )
    value = _threshold(scores, threshold)
    # Rounded, so that the file does not depend on the last bits of a sum.
    rounded = tuple(round(float(s), 6) for s in scores)
    return Mask(
        estimator=estimator,
        probes=probes,
        seed=seed,
        classes=classes,
        scores=rounded,
        threshold=round(value, 6),
        automatic=threshold == "auto",
        known=tuple(s >= round(value, 6) for s in rounded),
    )


def compute_mask(
    network: Classifier,
    shape: tuple[int, ...],
    classes: tuple[str, ...],
    *,
    threshold: float | Literal["auto"] = "auto",
    probes: int = 256,
    seed: int = 0,
) -> Mask:
    """The mask of a teacher. The same network, shape and seed give the same mask, whoever computes it.

    Raises:
        BundleError: the network gives no finite answer to noise.
    """
    scores = class_scores(network, shape, probes=probes, seed=seed)
    return mask_of(
        scores, classes, estimator=DEFAULT_ESTIMATOR, threshold=threshold, probes=probes, seed=seed
    )
