"""Phase 1 by distillation: one network learns the features and logits of several."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkt_clinical.config.params import DistillationParams
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier, fast_layout
from qkt_clinical.qkt.losses import balanced_cross_entropy, feature_loss, logit_loss, ridge
from qkt_clinical.qkt.panel import Panel, PhaseSettings, consensus_on_views, head_of, phase_record
from qkt_clinical.training.augment import view_batches
from qkt_clinical.training.loop import Checkpoint, Schedule, batches_per_epoch, fit


@dataclass(frozen=True)
class _Source:
    """What distillation learns from one network: its features and logits on every view, computed once."""

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
    sources: Sequence[_Source],
    views: Tensor,
    params: DistillationParams,
    *,
    seed: int,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
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
        checkpoint=checkpoint,
        progress=progress,
    )
    return network.cpu(), [linear.cpu() for linear in linears], history.curves


@torch.no_grad()
def carry_rows(network: Classifier, maps: Sequence[nn.Linear], rows: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write a distilled student's head: rows over the sources' features, through their maps.

    Args:
        network: changed in place, its head only.
        maps: student features (F) to source features (G), one per source.
        rows: weight (C, G) and bias (C,) per source, see :func:`consensus_rows`.
    """
    pairs = list(zip(maps, rows, strict=True))
    network.head.weight.copy_(torch.stack([w @ m.weight for m, (w, _) in pairs]).sum(dim=0))
    network.head.bias.copy_(torch.stack([w @ m.bias + b for m, (w, b) in pairs]).sum(dim=0))


def merge_by_distillation(
    panel: Panel, inputs: Tensor, run: PhaseSettings
) -> tuple[Classifier, dict[str, Any]]:
    """Phase 1 by distillation; the student and the phase's record."""
    views = run.views(inputs)
    sources = [
        _Source(n, k, *_observe(n, views, run.device))
        for n, k in zip(panel.networks, panel.known, strict=True)
    ]
    network, maps, curves = distill(
        panel.networks[0],
        sources,
        views,
        run.params.distillation,
        seed=run.seed,
        device=run.device,
        checkpoint=run.checkpoint,
        progress=run.progress,
    )
    carry_rows(network, maps, panel.rows)
    return network, phase_record("distill", len(views), panel, curves)


@torch.no_grad()
def learn_head(panel: Panel, inputs: Tensor, run: PhaseSettings) -> tuple[Classifier, dict[str, Any]]:
    """Without phase 1: the head learns the consensus from the own features, by ridge regression."""
    network = copy.deepcopy(panel.networks[0])
    views = run.views(inputs)
    features = torch.cat([predict(network, view, run.device, features=True) for view in views])
    weight, bias = ridge(features, consensus_on_views(panel, views, run.device).flatten(0, 1), 1e-2)
    network.head.weight.copy_(weight)
    network.head.bias.copy_(bias)
    return network, phase_record("none", len(views), panel, [])


def learn_jointly(
    panel: Panel, inputs: Tensor, labels: Tensor, run: PhaseSettings
) -> tuple[Classifier, dict[str, Any]]:
    """Both phases in one: extractor and head learn the consensus, and the labels among the held classes."""
    setting, device = run.params.distillation, run.device
    network = fast_layout(copy.deepcopy(panel.networks[0]).to(device))
    views = run.views(inputs)
    wanted = consensus_on_views(panel, views, device)
    relevant, held = list(panel.relevant), sorted(panel.known[0])
    spread = float(wanted[:, :, relevant].std().clamp(min=1e-4))
    targets = torch.searchsorted(torch.tensor(held), labels)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        draw = generator(run.seed, "joint", str(epoch))
        for view, index in view_batches(views, setting.batch_size, draw):
            yield (
                views[view, index].to(device),
                wanted[view, index].to(device),
                targets[index].to(device),
            )

    def loss(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, said, target = batch
        logits = network(images).float()
        return logit_loss(logits[:, relevant], said[:, relevant], spread) + balanced_cross_entropy(
            logits[:, held], target, range(len(held))
        )

    history = fit(
        network,
        batches,
        batches_per_epoch(len(labels), setting.batch_size),
        loss,
        Schedule(setting.epochs, setting.learning_rate, setting.weight_decay),
        device=device,
        checkpoint=run.checkpoint,
        progress=run.progress,
    )
    return network.cpu(), phase_record("joint", len(views), panel, history.curves)
