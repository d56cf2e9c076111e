"""Phase 2: what the head takes up on frozen features.

For absent query classes what discriminant analysis says of the student's features
(:mod:`qkt_clinical.qkt.discriminant`), and of those of a frozen encoder beside it; for rare ones it is
refined on their few samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from qkt_clinical.common.seeding import derive
from qkt_clinical.data.prepared import Labels
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.consensus import forgotten
from qkt_clinical.qkt.discriminant import discriminant_rows, shared_rows
from qkt_clinical.qkt.operating_point import allowed, decide, query_scores
from qkt_clinical.qkt.panel import PhaseSettings, Teacher, head_of
from qkt_clinical.qkt.prediction import predict_features
from qkt_clinical.qkt.steps import EncodedHead, Merged, Refined, Screened, ValidQuery
from qkt_clinical.task import Task

MAX_REFINED = 1000
"""Local images at most on which a head is refined, of every class as many: of 20 classes all rare ones."""
DISCRIMINANT_SHARE = 0.35
"""Of discriminants in the head, the consensus having the rest. Within one centre less would do a little
better, where hospitals differ more, and the shift does not tell these two apart."""
MIN_SCALE = 1e-12
"""Of a head's rows, squared: rows of zeros have no scale to measure a drift by."""


def refine_head(
    network: Classifier,
    features: Tensor,
    labels: Tensor,
    local: Sequence[int],
    query: Sequence[int],
    *,
    task: Task,
    steps: int = 300,
    learning_rate: float = 1e-2,
    pull: float = 1e-2,
) -> list[dict[str, float]]:
    """Phase 2 for rare query classes: class-balanced refinement of the head on cached features.

    Full-batch Adam on the head's rows, pulled towards where they started, so that a handful of samples
    corrects the rows more than it rewrites them.

    Args:
        features: (N, F) of local training images; labels: (N,).
        query: the rare classes. Rows of absent ones are left alone: images that are none of them would
            push them down without end.

    Returns:
        The loss every 10 steps. The head is changed in place, the extractor is not used.
    """
    weight = network.head.weight.detach().clone().requires_grad_(True)
    bias = network.head.bias.detach().clone().requires_grad_(True)
    start, start_bias = weight.detach().clone(), bias.detach().clone()
    relevant = sorted({*local, *query})
    scale = (start[relevant].norm(dim=1).mean() ** 2).clamp(min=MIN_SCALE)
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
    none = torch.zeros(len(query))
    curves = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        scores = decide(features @ weight.T + bias, local, query, none)
        drift = ((weight - start) ** 2).sum() / scale + ((bias - start_bias) ** 2).sum() / scale
        value = task.balanced_loss(scores, labels, relevant) + pull * drift
        value.backward()
        optimizer.step()
        if step % 10 == 0:
            curves.append({"epoch": float(step), "loss": float(value.detach())})
    with torch.no_grad():
        network.head.weight.copy_(weight)
        network.head.bias.copy_(bias)
    return curves


def balanced_sample(labels: Labels, count: int, seed: int) -> Tensor:
    """Sorted indices of at most ``count`` images drawn at random, equally many of every class."""
    order = torch.randperm(len(labels), generator=generator(seed, "images")).tolist()
    turn: dict[int, itertools.count[int]] = {}
    ranked = sorted(order, key=lambda i: next(turn.setdefault(int(labels[i]), itertools.count())))
    return torch.tensor(sorted(ranked[:count]))


def _placing(question: ValidQuery, screened: Screened, settings: PhaseSettings) -> tuple[str, ...]:
    """Sites whose class means place the query; empty where some class asked for has none, or is rare."""
    if question.rare or not settings.params.discriminant:
        return ()
    means = {t.site: set(_means_of(t)) & set(question.query) for t in screened.teachers}
    placed = set().union(*means.values())
    return tuple(site for site, held in means.items() if held) if placed == set(question.query) else ()


def _means_of(teacher: Teacher, means: Mapping[int, Tensor] | None = None) -> dict[int, Tensor]:
    """The class means of a teacher that count: of classes that it knows.

    Args:
        means: over the features of an encoder; those over its own network's by default.
    """
    held = teacher.class_means if means is None else means
    return {c: mean for c, mean in held.items() if c in teacher.claimed}


def has_head_to_refine(question: ValidQuery, screened: Screened, settings: PhaseSettings) -> bool:
    """Whether phase 2 has something to change: a rare class, or class means of all that are absent."""
    return bool(question.rare or _placing(question, screened, settings))


def refine(question: ValidQuery, screened: Screened, merged: Merged, settings: PhaseSettings) -> Refined:
    """Phase 2: refine the head by discriminant analysis, or on the samples of rare classes.

    The former where all classes asked for are absent, and teachers say where they lie.
    """
    refined = _refined(question, screened, merged, settings)
    return refined if question.encoded is None else beside(question, screened, refined, settings)


def _refined(question: ValidQuery, screened: Screened, merged: Merged, settings: PhaseSettings) -> Refined:
    """The merged network with its head refined."""
    if not has_head_to_refine(question, screened, settings):
        return Refined(merged.network)
    if not question.rare:
        return _discriminate(question, screened, merged, settings)
    sample = balanced_sample(question.labels, MAX_REFINED, derive(settings.seed, "phase2"))
    features = predict_features(merged.network, question.inputs[sample], screened.flips, settings.device)
    labels = torch.from_numpy(question.labels)[sample]
    curves = refine_head(
        merged.network, features, labels, question.local, tuple(question.rare), task=settings.task
    )
    return Refined(merged.network, tuple(curves))


def _discriminate(
    question: ValidQuery, screened: Screened, merged: Merged, settings: PhaseSettings
) -> Refined:
    """Let discriminants have their share in the head beside the consensus, unless own classes pay for it."""
    network, panel = merged.network, screened.panel
    sample = balanced_sample(question.labels, MAX_REFINED, derive(settings.seed, "phase2"))

    def features(inputs: Tensor) -> Tensor:
        return predict_features(network, inputs, screened.flips, settings.device)

    weight, bias = head_of(network)
    means = [{}, *(_means_of(t) for t in screened.teachers)]
    rows, shifts = discriminant_rows(
        features(question.inputs[sample]),
        torch.from_numpy(question.labels)[sample],
        [panel.networks[part[0]].head.in_features for part in panel.parts],
        [[means[place] for place in part] for part in panel.parts],
        question.query,
        network.spec.classes,
    )
    held_out = features(question.calibration)
    before, added = F.linear(held_out, weight, bias), F.linear(held_out, rows, shifts)
    scale = _scale_of(added, before, question, screened, settings, DISCRIMINANT_SHARE)
    if scale is None:
        return Refined(network)
    _weigh_head(network, 1 - DISCRIMINANT_SHARE)
    with torch.no_grad():
        network.head.weight.add_(DISCRIMINANT_SHARE * scale * rows)
        network.head.bias.add_(DISCRIMINANT_SHARE * scale * shifts)
    return Refined(network, placed_by=_placing(question, screened, settings))


def _weigh_head(network: Classifier, share: float) -> None:
    """Leave a share of a head's rows, in place."""
    with torch.no_grad():
        network.head.weight.mul_(share)
        network.head.bias.mul_(share)


def _scale_of(
    added: Tensor,
    before: Tensor,
    question: ValidQuery,
    screened: Screened,
    settings: PhaseSettings,
    share: float,
) -> float | None:
    """What brings the discriminants' logits to the scale of those before, where these are calibrated.

    Args:
        added, before: (M, C) on the calibration images.
        share: of those added, where they are.

    Returns:
        None where they are not to be added: they have no scale, or own classes would pay for them more than
        the budget.
    """
    scores = [query_scores(z, question.local, question.query) for z in (before, added)]
    spreads = [s.max(dim=1).values.std() for s in scores]
    scale = float(spreads[0] / spreads[1])
    if not (math.isfinite(scale) and scale > 0):  # a single image, or answers that are all alike
        return None
    mixed = (1 - share) * before + share * scale * added
    own, labels = screened.outputs[0].logits, question.calibration_labels
    lost = [forgotten(own, z, question.local, labels, task=settings.task) for z in (before, mixed)]
    return None if lost[1] > max(lost[0], allowed(question.budget, len(before))) else scale


def beside(
    question: ValidQuery,
    screened: Screened,
    refined: Refined,
    settings: PhaseSettings,
    *,
    share: float = DISCRIMINANT_SHARE,
) -> Refined:
    """Put a frozen encoder beside the network, with the discriminants of class means over its features.

    Args:
        share: of the discriminants in the head, the network having the rest.
    """
    encoded, network = question.encoded, refined.network
    assert encoded is not None
    means = [_means_of(t, t.encoder_means) for t in screened.teachers]
    held = set(question.rare).union(*means)
    if not set(question.query) <= held:
        return refined
    sample = balanced_sample(question.labels, MAX_REFINED, derive(settings.seed, "phase2"))
    rows, shifts = shared_rows(
        encoded.train[sample],
        torch.from_numpy(question.labels)[sample],
        means,
        question.query,
        network.spec.classes,
    )
    before = predict(network, question.calibration, settings.device)
    added = F.linear(encoded.calibration, rows, shifts)
    scale = _scale_of(added, before, question, screened, settings, share)
    if scale is None:
        return refined
    _weigh_head(network, 1 - share)
    head = EncodedHead(
        encoded.encoder,
        share * scale * rows,
        share * scale * shifts,
        tuple(t.site for t, m in zip(screened.teachers, means, strict=True) if set(m) & set(question.query)),
    )
    return replace(refined, encoded=head)
