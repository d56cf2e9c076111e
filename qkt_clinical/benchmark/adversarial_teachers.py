"""Adversarial teachers made from trained ones, to measure teacher screening. Pure functions."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from qkt_clinical.benchmark.settings import Bad
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.masks import mixed

PROBES = 256
SHARE = 0.99
"""Of the noise that a biased teacher takes for the class asked for."""


def draw_bad(names: Sequence[str], count: int, seed: int) -> tuple[str, ...]:
    """Draw ``count`` names at random; with the same names and seed, a larger count adds to a smaller one."""
    order = np.random.default_rng(seed).permutation(len(names))
    return tuple(names[i] for i in order[:count])


@torch.no_grad()
def spoil(
    network: Classifier,
    known: Sequence[int],
    class_means: Mapping[int, Tensor],
    bad: Bad,
    asked: int,
    *,
    shape: tuple[int, ...],
    seed: int,
) -> tuple[Classifier, tuple[int, ...], Mapping[int, Tensor]]:
    """Make a teacher adversarial: its changed network, the classes that it claims and its class means.

    Args:
        network: an honest one; left as it is.
        known: what its mask says.
        class_means: what its bundle holds.
        asked: the class asked for.
        shape: of one input.
    """
    spoilt = copy.deepcopy(network)
    weight, bias = spoilt.head.weight, spoilt.head.bias
    known = sorted(known)
    match bad:
        case "flipped-labels":
            following = [*known[1:], *known[:1]]
            weight[known], bias[known] = weight[following].clone(), bias[following].clone()
            renamed = dict(zip(known, following, strict=True))
            means = {c: class_means[f] for c, f in renamed.items() if f in class_means}
            return spoilt, tuple(known), means
        case "lying-mask":
            return spoilt, tuple(range(len(weight))), class_means
        case "noise-bias":
            probes = mixed((PROBES, *shape), torch.Generator().manual_seed(seed))
            logits = predict(spoilt, probes, torch.device("cpu"))
            behind = logits.max(dim=1).values - logits[:, asked]
            bias[asked] += behind.quantile(SHARE)
            return spoilt, tuple(sorted({*known, asked})), class_means
