"""Alternatives to the merged low-rank network in phase 1, for the benchmark's ablations.

- ``distill``: the own extractor learns the teachers' features and logits on augmented local images, one
  linear map per network.
- ``joint``: extractor and head learn the consensus, together with the labels.
- ``none``: the extractor stays, and only the head learns the consensus.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkt_clinical.benchmark.phases import DistillationParams
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier, fast_layout
from qkt_clinical.qkt.consensus import consensus
from qkt_clinical.qkt.panel import Panel, PhaseSettings, head_of, phase_record
from qkt_clinical.qkt.steps import Merged
from qkt_clinical.training.augment import make_views, view_batches
from qkt_clinical.training.loop import Schedule, batches_per_epoch, fit


@dataclass(frozen=True)
class Training:
    """Data and settings on which phase 1 is trained."""

    panel: Panel
    inputs: Tensor
    """The hospital's training images (N, C, *spatial)."""
    labels: Tensor
    """(N,)."""
    settings: PhaseSettings
    params: DistillationParams

    def views(self) -> Tensor:
        """Of the training images, (views, N, C, *spatial)."""
        s = self.settings
        return make_views(self.inputs, self.params.views, s.params.augment, s.seed, s.device)


def consensus_on_views(panel: Panel, views: Tensor, device: torch.device) -> Tensor:
    """The consensus on every view (views, N, C); one pass per network and view."""
    logits = [[predict(n, view, device) for n in panel.networks] for view in views]
    return torch.stack([consensus(each, panel.known, panel.relevant, panel.local_weight) for each in logits])


def feature_loss(mapped: Tensor, target: Tensor, variance: float) -> Tensor:
    """Mean squared error of mapped student features (N, F) against a source's, in units of its variance."""
    return F.mse_loss(mapped, target) / variance


def logit_loss(logits: Tensor, target: Tensor, scale: float) -> Tensor:
    """Smooth L1 of logits (N, K) on a teacher's sub-space of known classes, in units of their spread."""
    return F.smooth_l1_loss(logits / scale, target / scale)


def ridge(features: Tensor, targets: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Ridge regression in closed form.

    Args:
        features: (N, F); targets: (N, K).
        strength: penalty on the weights in units of the features' mean variance; the bias is free.

    Returns:
        Weight (K, F) and bias (K,), in the features' dtype.

    Raises:
        ArithmeticError: they are not finite in that dtype.
    """
    x, y = features.double(), targets.double()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    covariance = x.T @ x / len(x)
    scale = float(covariance.diagonal().mean()) or 1.0
    penalty = strength * scale * torch.eye(covariance.shape[0], dtype=covariance.dtype)
    weight = torch.linalg.solve(covariance + penalty, x.T @ y / len(x)).T
    solution = weight.to(features.dtype), (y_mean - weight @ x_mean).to(features.dtype)
    if not all(bool(torch.isfinite(part).all()) for part in solution):
        raise ArithmeticError("the ridge regression has no finite solution")
    return solution


@dataclass(frozen=True)
class _Distilled:
    """Distillation targets of one network: its features and logits on every view, computed once."""

    network: Classifier
    known: tuple[int, ...]
    features: Tensor
    """(views, N, F)."""
    logits: Tensor
    """(views, N, classes)."""

    @property
    def variance(self) -> float:
        """Mean variance of the features over all views."""
        return float(self.features.flatten(0, 1).var(dim=0).mean().clamp(min=1e-8))

    @property
    def spread(self) -> float:
        """Standard deviation of the logits of known classes over all views."""
        return float(self.logits[:, :, list(self.known)].std().clamp(min=1e-4))


def _observe(network: Classifier, views: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features and logits of a frozen network on every view: one pass per view, never repeated."""
    features = torch.stack([predict(network, view, device, features=True) for view in views])
    return features, F.linear(features, *head_of(network))


def _align(student: Tensor, target: Tensor) -> nn.Linear:
    """A linear map (F to G) that starts at the ridge solution between two networks' features."""
    linear = nn.Linear(student.shape[1], target.shape[1])
    weight, bias = ridge(student, target, 1e-2)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return linear


def distill(
    student: Classifier,
    sources: Sequence[_Distilled],
    views: Tensor,
    params: DistillationParams,
    *,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Classifier, list[nn.Linear], list[dict[str, float]]]:
    """Phase 1 by distillation: one network learns the features and logits of all sources.

    On each source's sub-space of known classes, and in its feature space through a linear map. The own
    model weighs as much as all teachers together.

    Args:
        student: the hospital's own network; left as it is.
        sources: the own model first, then the relevant teachers.
        views: of the local training images, (views, N, C, *spatial), on the CPU.

    Returns:
        The new network (its head still the old one), one linear map per source from its features to the
        source's, and one row per epoch.
    """
    network = fast_layout(copy.deepcopy(student).to(device))
    start = sources[0].features[0]
    linears = [_align(start, source.features[0]).to(device) for source in sources]
    heads = [
        (s.network.head.weight.detach().to(device), s.network.head.bias.detach().to(device)) for s in sources
    ]
    variances, spreads = [s.variance for s in sources], [s.spread for s in sources]
    weights = [1.0, *(1.0 / max(1, len(sources) - 1) for _ in sources[1:])]
    count = views.shape[1]
    modules = nn.ModuleDict({"extractor": network.extractor, "maps": nn.ModuleList(linears)})

    def batches(epoch: int) -> Iterator[tuple[Tensor, list[Tensor], list[Tensor]]]:
        for view, index in view_batches(views, params.batch_size, generator(seed, "phase1", str(epoch))):
            yield (
                views[view, index].to(device),
                [s.features[view, index].to(device) for s in sources],
                [s.logits[view, index].to(device) for s in sources],
            )

    def loss(batch: tuple[Tensor, list[Tensor], list[Tensor]]) -> Tensor:
        images, wanted, answers = batch
        own = network.features(images).float()
        total = own.new_zeros(())
        for i, source in enumerate(sources):
            mapped = linears[i](own).float()
            known = list(source.known)
            produced = mapped @ heads[i][0][known].T + heads[i][1][known]
            total = total + weights[i] * (
                feature_loss(mapped, wanted[i], variances[i])
                + logit_loss(produced, answers[i][:, known], spreads[i])
            )
        return total

    history = fit(
        modules,
        batches,
        batches_per_epoch(count, params.batch_size),
        loss,
        Schedule(params.epochs, params.learning_rate, params.weight_decay),
        device=device,
        progress=progress,
    )
    return network.cpu(), [linear.cpu() for linear in linears], history.curves


@torch.no_grad()
def carry_rows(network: Classifier, maps: Sequence[nn.Linear], rows: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write the head of a distilled student: rows over the sources' features, mapped to its own.

    Args:
        network: changed in place, its head only.
        maps: student features (F) to source features (G), one per source.
        rows: weight (C, G) and bias (C,) per source, see :func:`consensus_rows`.
    """
    pairs = list(zip(maps, rows, strict=True))
    network.head.weight.copy_(torch.stack([w @ m.weight for m, (w, _) in pairs]).sum(dim=0))
    network.head.bias.copy_(torch.stack([w @ m.bias + b for m, (w, b) in pairs]).sum(dim=0))


def merge_by_distillation(training: Training) -> Merged:
    """Phase 1 by distillation."""
    panel, settings, views = training.panel, training.settings, training.views()
    sources = [
        _Distilled(n, k, *_observe(n, views, settings.device))
        for n, k in zip(panel.networks, panel.known, strict=True)
    ]
    network, maps, curves = distill(
        panel.networks[0],
        sources,
        views,
        training.params,
        seed=settings.seed,
        device=settings.device,
        progress=settings.progress,
    )
    carry_rows(network, maps, panel.rows)
    return Merged(network, phase_record("distill", len(views), panel, tuple(curves)))


@torch.no_grad()
def learn_head(training: Training) -> Merged:
    """Without phase 1: the head learns the consensus from the own features, by ridge regression."""
    panel, device, views = training.panel, training.settings.device, training.views()
    network = copy.deepcopy(panel.networks[0])
    features = torch.cat([predict(network, view, device, features=True) for view in views])
    weight, bias = ridge(features, consensus_on_views(panel, views, device).flatten(0, 1), 1e-2)
    network.head.weight.copy_(weight)
    network.head.bias.copy_(bias)
    return Merged(network, phase_record("none", len(views), panel, ()))


def learn_jointly(training: Training) -> Merged:
    """Both phases at once: extractor and head learn the consensus and the labels of held classes."""
    panel, params, settings = training.panel, training.params, training.settings
    device, labels, views = settings.device, training.labels, training.views()
    network = fast_layout(copy.deepcopy(panel.networks[0]).to(device))
    wanted = consensus_on_views(panel, views, device)
    relevant, held = list(panel.relevant), sorted(panel.known[0])
    spread = float(wanted[:, :, relevant].std().clamp(min=1e-4))
    targets = torch.searchsorted(torch.tensor(held), labels)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        draw = generator(settings.seed, "joint", str(epoch))
        for view, index in view_batches(views, params.batch_size, draw):
            yield (
                views[view, index].to(device),
                wanted[view, index].to(device),
                targets[index].to(device),
            )

    def loss(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, goal, target = batch
        logits = network(images).float()
        return logit_loss(logits[:, relevant], goal[:, relevant], spread) + settings.task.balanced_loss(
            logits[:, held], target, range(len(held))
        )

    history = fit(
        network,
        batches,
        batches_per_epoch(len(labels), params.batch_size),
        loss,
        Schedule(params.epochs, params.learning_rate, params.weight_decay),
        device=device,
        progress=settings.progress,
    )
    return Merged(network.cpu(), phase_record("joint", len(views), panel, tuple(history.curves)))
