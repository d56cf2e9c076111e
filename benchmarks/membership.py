"""Membership inference: was this image among a network's training images? Pure functions on logits.

Two attacks. The *loss threshold* (Yeom et al. 2018) takes an image for a member where its loss is small.
*LiRA* (Carlini et al. 2022) compares, image by image, with shadow models that were and that were not trained
on it: online with both kinds, offline with the latter alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def halves(models: int, images: int, seed: int) -> Bools:
    """Which model trains on which image, (models, images): every image is in exactly half of the models.

    Raises:
        ValueError: an odd number of models.
    """
    if models % 2:
        raise ValueError(f"{models} models have no half")
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(models)[:, None] < models // 2, (1, images)), axis=0)


def confidence(logits: NDArray[Any], labels: NDArray[Any]) -> Floats:
    """Log-odds of the right class, log p / (1 - p), for logits (..., N, C) and labels (N,): (..., N).

    Near to normally distributed over trainings, which the loss is not.
    """
    z = logits.astype(np.float64)
    right = np.arange(z.shape[-1]) == labels[:, None]
    return np.where(right, z, 0.0).sum(axis=-1) - logsumexp(np.where(right, -np.inf, z), axis=-1)


def negative_loss(logits: NDArray[Any], labels: NDArray[Any]) -> Floats:
    """Score of the loss threshold, log p of the right class, for logits (N, C) and labels (N,): (N,)."""
    return -np.logaddexp(0.0, -confidence(logits, labels))


def _fit(values: Floats, where: Bools) -> tuple[Floats, float]:
    """Mean per image and one standard deviation for all, of values (M, N) where ``where`` holds.

    One for all since a dozen shadow models are too few for a variance per image.
    """
    count = where.sum(axis=0)
    if not (count > 0).all() or int(count.sum()) <= len(count):
        raise ValueError("every image needs a shadow model of each kind, and some more than one")
    mean = np.where(where, values, 0.0).sum(axis=0) / count
    squares = np.where(where, (values - mean) ** 2, 0.0).sum()
    return mean, float(np.sqrt(squares / (count.sum() - len(count)))) or 1e-12


def lira(target: Floats, shadows: Floats, inside: Bools, *, online: bool) -> Floats:
    """Scores (N,), higher for members.

    Args:
        target: confidences (N,) of the attacked network.
        shadows: confidences (M, N) of the shadow models.
        inside: which shadow model was trained on which image, (M, N).
        online: likelihood ratio of member and non-member; otherwise how far the target lies above what
            networks say that never saw the image.

    Raises:
        ValueError: an image that no shadow model of a kind needed has.
    """
    out_mean, out_sd = _fit(shadows, ~inside)
    if not online:
        return (target - out_mean) / out_sd
    in_mean, in_sd = _fit(shadows, inside)
    ratio: Floats = norm.logpdf(target, in_mean, in_sd) - norm.logpdf(target, out_mean, out_sd)
    return ratio


def auc(scores: Floats, members: Bools) -> float:
    """Chance that a member scores above a non-member; 0.5 is guessing."""
    return float(roc_auc_score(members, scores))


def found_at(scores: Floats, members: Bools, false_positives: float = 0.01) -> float:
    """Share of members found with at most this share of non-members taken for members."""
    wrong, right, _ = roc_curve(members, scores, drop_intermediate=False)
    return float(right[wrong <= false_positives].max())
