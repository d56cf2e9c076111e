"""Operating points: offsets that bound the false-query rate on the hospital's own images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qkt_clinical.task import Task

ROUNDING = 1e-5
"""Relative; single precision rounds by a hundredth of it."""
APART = 0.25
"""Of the way from one offset for all query classes to one of its own for each."""
SMALL = 0.5
"""Of the images of the mean class: with fewer a class is small beside the others."""
LEVEL_IMAGES = 5
"""Of a class, at least, for its median to say something."""


def query_scores(logits: Tensor, local: Sequence[int], query: Sequence[int]) -> Tensor:
    """``z_q - max z_local`` (N, Q): above minus the offset, an image goes to the query.

    Args:
        logits: (N, C).
    """
    return logits[:, list(query)] - logits[:, list(local)].max(dim=1, keepdim=True).values


def as_if_held_out(learned: Tensor, learned_labels: Tensor, held_out: Tensor, labels: Tensor) -> Tensor:
    """Query scores of images that networks were trained on, brought to the level of held-out ones.

    Networks are surer of images that they were trained on. How much, the medians of each class tell; how far
    scores reach above them, which is what an operating point is about, can then be seen on both.

    Args:
        learned: (N, Q) of training images; learned_labels: (N,).
        held_out: (M, Q) of held-out images; labels: (M,).

    Returns:
        (N, Q): all moved by the same, the mean over the classes of which both have images enough.
    """
    moves = []
    for c in labels.unique().tolist():
        here, there = held_out[labels == c], learned[learned_labels == c]
        if min(len(here), len(there)) >= LEVEL_IMAGES:
            moves.append(here.max(dim=1).values.median() - there.max(dim=1).values.median())
    return learned + torch.stack(moves).mean() if moves else learned


def allowed(budget: float, count: int) -> int:
    """How many of ``count`` calibration images may go to the query.

    The k-th largest of n scores is exceeded by a new image of the same kind with probability k / (n + 1)
    (conformal prediction), so that k false queries are paid for as k + 1. With fewer than 1 / budget
    images no offset can promise the budget; then none may go.
    """
    return max(0, math.floor(budget * (count + 1)) - 1)


def offset_for_budget(
    scores: Tensor, budget: float, *, lost: float = 0.0, labels: Tensor | None = None
) -> float:
    """The operating point: the offset at which at most ``budget`` of the images go to the query.

    A Neyman-Pearson operating point: a bound on the false-query rate, most of the query for it. All query
    classes, absent or rare, share it; :func:`offsets_for_budget` moves them apart.

    Between two images where the bound lies between them (a fractional order statistic; Hyndman and Fan, 1996,
    definition 6): of 30 images a new one exceeds the highest score with 1 in 31, and 5 % are 1.55 in 31. A
    hospital of few images else pays for a budget that it cannot use.

    Args:
        scores: (N, Q) from :func:`query_scores` on the hospital's own images, none of a query class.
        budget: share of these images, in (0, 1).
        lost: share of them that is given away already, by own classes that change places with each other.
        labels: (N,), where at most ``budget`` may go as well if images weigh by :func:`class_weights`.
    """
    highest = scores.max(dim=1).values
    # A hair lower, so that rounding in ``decide`` does not make the image at the bound a false query.
    hair = ROUNDING * float(scores.abs().max().clamp(min=1))
    bound = _bound(highest, torch.ones(len(highest), dtype=torch.float64), budget, lost)
    if labels is not None:
        bound = max(bound, _bound(highest, class_weights(labels), budget, lost))
    return -bound - hair


def class_weights(labels: Tensor) -> Tensor:
    """A weight (N,) of every image, 1 in the mean, with which small classes weigh as if they were larger.

    A class of fewer images than ``SMALL`` of the mean class weighs as one of so many.
    """
    _, place, counts = labels.unique(return_inverse=True, return_counts=True)
    sizes = counts.double()
    weights: Tensor = (SMALL * sizes.mean() / sizes).clamp(min=1)[place]
    return weights / weights.mean()


def _bound(highest: Tensor, weights: Tensor, budget: float, lost: float) -> float:
    """The score above which lies what the budget allows, of images (N,) with weights (N,), 1 in the mean."""
    order = highest.argsort(descending=True)
    highest, weights = highest[order], weights[order]
    count, reached = len(highest), weights.cumsum(dim=0)
    place = budget * (count + 1) - lost * count
    whole = max(1, int((reached <= place).sum()))
    following, so_far = min(whole, count - 1), float(reached[whole - 1])
    share = (place - so_far) / float(weights[following]) if so_far <= min(place, budget * count) else 0.0
    share = min(share, 1.0)
    return (1 - share) * float(highest[whole - 1]) + share * float(highest[following])


def offsets_for_budget(
    scores: Tensor, budget: float, *, lost: float = 0.0, labels: Tensor | None = None
) -> Tensor:
    """An offset (Q,) for each query class, so that together at most ``budget`` of the images go to them.

    One offset for all lets a class go short whose scores lie lower; an offset by each class's own scores is
    set on the few images that come near it. So they lie a part of the way between, moved together until the
    budget is spent.

    Args:
        scores, budget, lost, labels: as of :func:`offset_for_budget`.
    """
    classes = scores.shape[1]
    if classes == 1:
        return torch.tensor([offset_for_budget(scores, budget, lost=lost, labels=labels)])
    own = [
        offset_for_budget(scores[:, [i]], budget / classes, lost=lost / classes, labels=labels)
        for i in range(classes)
    ]
    apart = APART * (torch.tensor(own) - sum(own) / classes)
    return apart + offset_for_budget(scores + apart, budget, lost=lost, labels=labels)


def false_query_rate(scores: Tensor, offsets: Tensor) -> float:
    """Share of images (N, Q), none of a query class, that go to the query at these offsets (Q,)."""
    return float(((scores + offsets).max(dim=1).values > 0).double().mean())


def kept_today(logits: Tensor, local: Sequence[int], query: Sequence[int], *, task: Task) -> Tensor:
    """Images that the own model does not take for a rare query today: only those can become false queries.

    Args:
        logits: (N, C) of the own model.

    Returns:
        (N,) bool; all of them where it tells none.
    """
    today = task.answer(decide(logits, local, query, torch.zeros(len(query))))
    kept = ~torch.isin(today, torch.tensor(list(query)))
    return kept if bool(kept.any()) else torch.ones_like(kept)


def decide(logits: Tensor, local: Sequence[int], query: Sequence[int], offsets: Tensor) -> Tensor:
    """Scores (N, C) over the relevant label space, minus infinity elsewhere: what the task answers by.

    Args:
        logits: (N, C).
        offsets: (Q,), added to the query's logits.
    """
    scores = torch.full_like(logits, -math.inf)
    scores[:, list(local)] = logits[:, list(local)]
    scores[:, list(query)] = logits[:, list(query)] + offsets.to(logits)
    return scores
