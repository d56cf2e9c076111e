"""Adaptation: teachers are brought to the asking hospital's images before anything else uses them.

A network's batch-norm layers hold the mean and the variance of what they saw at home. Where the asking
hospital's scanner or stain differs, its images reach later layers off scale. The statistics are measured
anew on the hospital's own training images, without labels or gradients (AdaBN, Li et al. 2017,
arXiv 1603.04779), and mixed with the teacher's own by a *share*: 0 leaves the teacher as it was sent, bit for
bit. The share is the smallest with which the teacher tells the shared classes on the hospital's held-out
images apart as well as with any other; where it shares too few, about the mean of the other teachers' shares;
half at most where there is hardly a shift. All that costs one pass over the hospital's images at most.

Networks that normalise image by image (group norm, layer norm) hold no statistics. Their features are moved
instead, by as much as those of the classes that both hospitals have lie apart, of which the teacher's bundle
holds the means; under a linear head that is another bias.

How far the two lie apart is the *shift* between the hospitals, which can be told before anything is spent.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qkt_clinical.common.seeding import derive
from qkt_clinical.models.class_means import mean_features
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import images_at_once, predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.consensus import calibrated_loss
from qkt_clinical.qkt.panel import Teacher
from qkt_clinical.qkt.soundness import defect, observe
from qkt_clinical.task import Task

SHARES = (0.0, 0.5, 1.0)
"""Shares of the measured statistics to choose from."""
NEAR = 0.02
"""A smaller share is as good as the best one if its loss is higher by this part of it at most."""
SAME_CENTRE = 0.02
"""A shift below it is what hospitals of one centre show too, because they hold different cases.

Then half of the measured statistics is the most that is taken up.
"""
UNTOLD = 0.5
"""The share where no teacher's answers on held-out images tell which is best."""
MIN_SHARED = 10
"""Held-out images of shared classes on which a share is chosen, at least."""
IMAGES_PER_BATCH = 128
"""Over so many images, about, statistics are measured at a time."""
PIXELS_PER_BATCH = IMAGES_PER_BATCH * 112 * 112
"""Over fewer where they are larger, so that memory is bounded."""
FEWEST_PER_BATCH = 16
MIN_IMAGES = 20
"""Of fewer images statistics say too little, and too much of single patients."""


@dataclass(frozen=True)
class LayerStatistics:
    """Mean and variance of a layer's inputs, (channels,) each."""

    mean: Tensor
    variance: Tensor


def normalisation_layers(network: nn.Module) -> dict[str, _BatchNorm]:
    """The layers that hold statistics, by name, in the order in which they were built."""
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }


def stored_statistics(network: nn.Module) -> dict[str, LayerStatistics]:
    """What the layers of a network hold."""
    found = {}
    for name, layer in normalisation_layers(network).items():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        found[name] = LayerStatistics(layer.running_mean.clone(), layer.running_var.clone())
    return found


@torch.no_grad()
def measure_statistics(
    network: Classifier, inputs: Tensor, *, seed: int, device: torch.device, images: int | None = None
) -> dict[str, LayerStatistics]:
    """The statistics of every layer on images, measured in one pass.

    Each batch is normalised by its own statistics, as in training, so that a layer is measured on inputs that
    the layers before it have brought to scale. The means over equal batches count.

    Args:
        network: left as it is.
        inputs: (N, C, *spatial).
        seed: of the order in which images make up batches.
        images: so many of them, drawn at random; all by default.

    Returns:
        By the name of the layer, on the CPU.
    """
    measured = copy.deepcopy(network.extractor).to(device).eval()
    layers = normalisation_layers(measured)
    for layer in layers.values():
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches
        layer.train()
    order = torch.randperm(len(inputs), generator=generator(seed, "adaptation"))[:images]
    at_once = images_at_once(inputs, IMAGES_PER_BATCH, PIXELS_PER_BATCH, FEWEST_PER_BATCH)
    for batch in order.tensor_split(max(1, round(len(order) / at_once))):
        measured(inputs[batch].to(device))
    return stored_statistics(measured.cpu())


def with_statistics(network: Classifier, measured: Mapping[str, LayerStatistics], share: float) -> Classifier:
    """A copy of a network whose layers hold ``(1 - share) * own + share * measured`` statistics."""
    adapted = copy.deepcopy(network)
    if share == 0.0:
        return adapted
    for name, layer in normalisation_layers(adapted.extractor).items():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.lerp_(measured[name].mean.to(layer.running_mean), share)
        layer.running_var.lerp_(measured[name].variance.to(layer.running_var), share)
    return adapted


def features_apart(
    teacher: Teacher, inputs: Tensor, labels: Tensor, local: Sequence[int], device: torch.device
) -> tuple[Tensor, float] | None:
    """How much further a class's features lie at the teacher's home than here, (F,), and the shift.

    The mean over the classes that both have, so that it does not matter how many images of each.

    Args:
        inputs: training images (N, C, *spatial) and their labels (N,).
        local: the hospital's own classes.

    Returns:
        None where the teacher's bundle holds no mean of a class that both have.
    """
    shared = [c for c in local if c in teacher.supported and c in teacher.class_means and (labels == c).any()]
    if not shared:
        return None
    features = predict(teacher.network, inputs, device, features=True)
    here = mean_features(features, labels)
    apart = torch.stack([teacher.class_means[c] - here[c] for c in shared]).mean(dim=0)
    within = torch.stack([features[labels == c].var(dim=0, unbiased=False) for c in shared]).mean(dim=0)
    scale = within + 1e-6 * within.mean().clamp(min=1e-12)
    return apart, float((apart.square() / (2 * scale)).mean())


def with_moved_features(network: Classifier, apart: Tensor, share: float) -> Classifier:
    """A copy of a network whose head sees features moved by a share of what lies between two hospitals."""
    adapted = copy.deepcopy(network)
    with torch.no_grad():
        adapted.head.bias.add_(adapted.head.weight @ (share * apart))
    return adapted


def shift(network: Classifier, measured: Mapping[str, LayerStatistics]) -> float:
    """How far the images of two hospitals lie apart, as a network's layers see them; 0 is not at all.

    The symmetric Kullback-Leibler divergence between normal distributions of the stored and of the measured
    mean and variance, averaged over the channels of a layer and over layers.
    """
    found = []
    for name, layer in normalisation_layers(network.extractor).items():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        there, here = layer.running_var + layer.eps, measured[name].variance + layer.eps
        moved = (layer.running_mean - measured[name].mean) ** 2
        found.append((there / here + here / there - 2 + moved * (1 / there + 1 / here)).mean() / 4)
    return float(torch.stack(found).mean())


@dataclass(frozen=True)
class AdaptationResult:
    """How far a teacher was brought to the hospital's images."""

    site: str
    shift: float
    share: float
    """Of the statistics measured at the hospital; 0: left as it was sent."""


def best_share(losses: Mapping[float, float]) -> float:
    """The smallest share whose loss on the hospital's held-out images is as good as the best one.

    Args:
        losses: by share; not finite where the network then gives no usable answers.
    """
    best = min(losses.values())
    if not math.isfinite(best):
        return 0.0
    return min(share for share, loss in losses.items() if loss <= (1 + NEAR) * best)


def shared_loss(logits: Tensor, labels: Tensor, shared: Sequence[int], *, task: Task) -> float | None:
    """How well a teacher tells the classes that it shares with the hospital apart on held-out images.

    Args:
        logits: (N, C); labels: (N,).
        shared: classes that both know.

    Returns:
        The calibrated loss; None where too few images or classes are shared to tell.
    """
    used = torch.isin(labels, torch.tensor(list(shared), dtype=labels.dtype))
    if len(shared) < 2 or int(used.sum()) < MIN_SHARED:
        return None
    return calibrated_loss(logits[used], labels[used], shared, task=task)


def images_to_measure(inputs: int, held_out: int) -> int:
    """On how many training images statistics are measured: one pass over all images pays for everything.

    The held-out images are seen once for every share, so measuring gets what is left of the ``inputs`` and
    the ``held_out`` images, and :data:`MIN_IMAGES` at least.
    """
    left = inputs + held_out - len(SHARES) * held_out
    return min(inputs, max(MIN_IMAGES, left))


@dataclass(frozen=True)
class _Measured:
    """What was measured for one teacher."""

    brought: Callable[[float], Classifier]
    """The teacher's network, by the share."""
    shift: float
    told: float | None
    """The share that its own answers speak for."""
    most: float
    """The largest share that its shift allows."""


def _measure(
    teacher: Teacher,
    inputs: Tensor,
    labels_here: Tensor,
    held_out: tuple[Tensor, Tensor],
    local: Sequence[int],
    *,
    task: Task,
    seed: int,
    device: torch.device,
) -> _Measured | None:
    """Shift and share of one teacher; None where nothing can be measured or its answers are not usable."""
    network, (images, labels) = teacher.network, held_out
    as_sent = observe(network, images, False, device)
    if defect(network, as_sent, varied=bool((images != images[:1]).any())):
        return None
    enough = images_to_measure(len(inputs), len(images))
    brought: Callable[[float], Classifier]
    if normalisation_layers(network.extractor):
        statistics = measure_statistics(network, inputs, seed=seed, device=device, images=enough)
        brought, lies = partial(with_statistics, network, statistics), shift(network, statistics)
    else:
        order = torch.randperm(len(inputs), generator=generator(seed, "adaptation"))[:enough]
        found = features_apart(teacher, inputs[order], labels_here[order], local, device)
        if found is None:
            return None
        brought, lies = partial(with_moved_features, network, found[0]), found[1]
    if not math.isfinite(lies):
        return _Measured(brought, lies, 0.0, 0.0)
    shares = SHARES if lies >= SAME_CENTRE else SHARES[:2]
    logits = {0.0: as_sent.logits} | {share: predict(brought(share), images, device) for share in shares[1:]}
    shared = [c for c in local if c in teacher.supported]
    losses = {share: shared_loss(z, labels, shared, task=task) for share, z in logits.items()}
    told = {share: loss for share, loss in losses.items() if loss is not None}
    return _Measured(brought, lies, best_share(told) if told else None, shares[-1])


def adapt_teachers(
    teachers: Sequence[Teacher],
    inputs: Tensor,
    labels: Tensor,
    held_out: tuple[Tensor, Tensor],
    local: Sequence[int],
    *,
    task: Task,
    seed: int,
    device: torch.device,
) -> tuple[tuple[Teacher, ...], tuple[AdaptationResult, ...]]:
    """Bring teachers to a hospital's images, each by a share of its own.

    Args:
        teachers: left as they are; those that hold neither statistics nor class means, or that give no
            usable answers, stay the same.
        inputs: training images (N, C, *spatial); labels: (N,).
        held_out: images (M, C, *spatial) of local classes, and their labels (M,).
        local: the hospital's own classes.

    Returns:
        The teachers in their order, and a result for each that could be adapted.
    """
    measured = {
        t.site: _measure(
            t,
            inputs,
            labels,
            held_out,
            local,
            task=task,
            seed=derive(seed, "adaptation", t.site),
            device=device,
        )
        for t in teachers
        if normalisation_layers(t.network.extractor) or t.class_means
    }
    told = [m.told for m in measured.values() if m is not None and m.told is not None]
    mean = sum(told) / len(told) if told else UNTOLD
    usual = min(SHARES, key=lambda share: abs(share - mean))
    adapted, results = [], []
    for teacher in teachers:
        if (found := measured.get(teacher.site)) is None:
            adapted.append(teacher)
            continue
        share = min(usual, found.most) if found.told is None else found.told
        network = found.brought(share) if share else teacher.network
        unlike = math.isfinite(found.shift) and found.shift >= SAME_CENTRE
        adapted.append(replace(teacher, network=network, share=share, unlike=unlike))
        results.append(AdaptationResult(teacher.site, found.shift, share))
    return tuple(adapted), tuple(results)
