"""The masked networks' common view of an image: pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qkt_clinical.qkt.operating_point import decide
from qkt_clinical.task import Task

LOCAL_WEIGHTS = (1.0, 2.0, 4.0)
"""Local model weights to choose from: what the own network counts for in the consensus, a teacher being 1."""

GUARDING_WEIGHTS = (16.0, 1000.0)
"""Larger ones, for where teachers confuse the own classes: with the last, the own network is as good as alone
among its classes. Not for rare ones, of which it has seen too little."""

NEAR = 0.05
"""A smaller weight is as good as the best one if its loss is higher by this share at most."""

TEMPERATURES = torch.logspace(-1, 1, 25).tolist()
"""At which scores are tried as logits."""


def rivals_of(named: int, known: Sequence[int], classes: int) -> list[int]:
    """What a network compares a class with: the other classes it knows, or all others if it knows none."""
    return [c for c in sorted(set(known)) if c != named] or [c for c in range(classes) if c != named]


def margin(logits: Tensor, named: int, known: Sequence[int]) -> Tensor:
    """Preference of a network for a class over the other classes that it knows: ``z_c - mean z_rival``, (N,).

    Linear in the logits, so that a head's row can say it (:func:`margin_row`).

    Args:
        logits: (N, C) of one network.
        named: index of the class.
        known: indices of the classes that the network knows.
    """
    rivals = rivals_of(named, known, logits.shape[1])
    return logits[:, named] - logits[:, rivals].mean(dim=1)


def margin_row(weight: Tensor, bias: Tensor, named: int, known: Sequence[int]) -> tuple[Tensor, Tensor]:
    """:func:`margin` as a row of the head: row (F,) and bias ().

    Args:
        weight, bias: of the network's head, (C, F) and (C,).
    """
    rivals = rivals_of(named, known, len(weight))
    return weight[named] - weight[rivals].mean(dim=0), bias[named] - bias[rivals].mean()


def _shares(named: int, known: Sequence[Sequence[int]], local_weight: float) -> list[float]:
    """Each network's share in the consensus on a class; 0 for those that do not know it."""
    weights = [(local_weight if i == 0 else 1.0) * (named in k) for i, k in enumerate(known)]
    return [w / sum(weights) for w in weights]


def consensus(
    logits: Sequence[Tensor],
    known: Sequence[Sequence[int]],
    relevant: Sequence[int],
    local_weight: float,
) -> Tensor:
    """The masked networks' common view: for each class the mean margin of the networks that know it.

    Args:
        logits: (N, C) each, one per network, the hospital's own first.
        known: the classes that each network knows; every relevant class is known to one at least.
        relevant: R.
        local_weight: what the hospital's own network counts for, a teacher being 1.

    Returns:
        (N, C), 0 outside R.
    """
    out = torch.zeros_like(logits[0])
    for c in relevant:
        shares = _shares(c, known, local_weight)
        included = [(s, z, k) for s, z, k in zip(shares, logits, known, strict=True) if s]
        out[:, c] = torch.stack([s * margin(z, c, k) for s, z, k in included]).sum(dim=0)
    return out


def consensus_rows(
    heads: Sequence[tuple[Tensor, Tensor]],
    known: Sequence[Sequence[int]],
    relevant: Sequence[int],
    local_weight: float,
) -> list[tuple[Tensor, Tensor]]:
    """:func:`consensus` as rows: one weight (C, F_i) and bias (C,) per network.

    The consensus is the sum over the networks of ``features_i @ weight_i.T + bias_i``.

    Args:
        heads: weight (C, F_i) and bias (C,) per network, the hospital's own first.
        known, relevant, local_weight: see :func:`consensus`.
    """
    rows = [(torch.zeros_like(weight), torch.zeros_like(bias)) for weight, bias in heads]
    for c in relevant:
        for i, share in enumerate(_shares(c, known, local_weight)):
            if share:
                row, shift = margin_row(*heads[i], c, known[i])
                rows[i][0][c], rows[i][1][c] = share * row, share * shift
    return rows


def calibrated_loss(scores: Tensor, labels: Tensor, classes: Sequence[int], *, task: Task) -> float:
    """The task's balanced loss over some classes, at the best-fitting temperature of the scores.

    Args:
        scores: (N, C).
        labels: (N,), each in ``classes``.

    Returns:
        Infinity where scores are not finite.
    """
    among = decide(scores.double(), classes, (), torch.zeros(0))
    losses = [float(task.balanced_loss(among / t, labels, classes)) for t in TEMPERATURES]
    return min((loss for loss in losses if math.isfinite(loss)), default=math.inf)


def forgotten(before: Tensor, after: Tensor, local: Sequence[int], labels: Tensor, *, task: Task) -> int:
    """How many images more the own network named rightly among the local classes; 0 where it was fewer.

    Args:
        before, after: logits (N, C) of the two; labels: (N,), each in ``local``.
    """
    none = torch.zeros(0)
    right = [int((task.answer(decide(z, local, (), none)) == labels).sum()) for z in (before, after)]
    return max(0, right[0] - right[1])


def local_weight(
    logits: Sequence[Tensor],
    known: Sequence[Sequence[int]],
    local: Sequence[int],
    labels: Tensor,
    *,
    task: Task,
    budget: float = 1.0,
    weights: Sequence[float] = LOCAL_WEIGHTS,
) -> float:
    """The local model weight: the weight of the own network in the consensus, relative to a teacher's 1.

    Teachers are strangers to the hospital's scanner and stain, some more than others. How far they can be
    relied on is seen on the hospital's own held-out images, of which it knows the class: by how well the
    local classes are told apart. The loss decides, not the accuracy, for such images are few. In doubt the
    smaller weight: the own network takes images of the query for local ones, which they do not show.

    Args:
        logits: (N, C) each, one per network, the hospital's own first, of held-out images.
        known: the classes that each network knows.
        local: the hospital's own classes beside the query.
        labels: (N,); images of other classes are not used.
        budget: at most this share of the images may be forgotten (:func:`forgotten`); where every weight
            costs more, the largest one counts.
        weights: to choose from, rising.

    Returns:
        One of ``weights``.
    """
    used = torch.isin(labels, torch.tensor(list(local)))
    if not bool(used.any()):
        return weights[0]
    seen, truth = [z[used] for z in logits], labels[used]
    losses: dict[float, float] = {}
    for weight in weights:
        view = consensus(seen, known, local, weight)
        lost = forgotten(seen[0], view, local, truth, task=task)
        if lost <= budget * len(truth) or (weight == weights[-1] and not losses):
            losses[weight] = calibrated_loss(view, truth, local, task=task)
    return next(weight for weight, loss in losses.items() if loss <= (1 + NEAR) * min(losses.values()))
