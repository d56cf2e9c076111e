"""Soundness checks: whether a network gives usable answers.

A file can be valid and its network nonsense: weights near the largest number there is, which end in infinity
or drown all other networks; zeros or huge variances, after which every image looks alike. Such a network says
nothing of an image, and sums over networks would hide that. The bounds lie far from what training leads to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.panel import head_of
from qkt_clinical.qkt.prediction import predict_features

MAX_WEIGHT = 1e10
"""Of weights and running statistics; squares of larger ones could leave single precision."""
MAX_ACTIVATION = 1e6
"""Of any layer's output on the hospital's images."""
MAX_LOGIT = 1e4
"""Beyond it, one network outweighs hundreds of others in any mean."""
MIN_SPREAD = 1e-6
"""Standard deviation over images of what depends on them."""
ROUNDING = 1e-5
"""The same as a share of the largest logit: single precision rounds by a hundredth of it."""


@dataclass(frozen=True)
class NetworkOutputs:
    """Outputs of a network on the hospital's held-out images."""

    features: Tensor
    """(N, F)."""
    logits: Tensor
    """(N, C)."""
    largest: float
    """The largest magnitude among the outputs of all layers; infinite or NaN where one of them is."""


def _largest(tensors: Iterable[Tensor]) -> float:
    """The largest magnitude; NaN if any value is NaN."""
    found = [t.detach().abs().max().float().cpu() for t in tensors if t.is_floating_point() and t.numel()]
    return float(torch.stack(found).max()) if found else 0.0


def observe(network: Classifier, inputs: Tensor, flips: bool, device: torch.device) -> NetworkOutputs:
    """Run the network once over images (N, C, *spatial) and record the magnitudes in every layer.

    Args:
        flips: see :func:`qkt_clinical.qkt.prediction.predict_features`.
    """
    extremes: list[Tensor] = []

    def watch(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        extremes.extend(torch.aminmax(output.detach()))

    leaves = [m for m in network.extractor.modules() if not any(True for _ in m.children())]
    handles = [leaf.register_forward_hook(watch) for leaf in leaves]
    try:
        features = predict_features(network, inputs, flips, device)
    finally:
        for handle in handles:
            handle.remove()
    logits = F.linear(features, *head_of(network))
    return NetworkOutputs(features, logits, _largest([*extremes, features]))


def _floor(logits: Tensor) -> float:
    """A spread of logits (N, C) at or below it is none."""
    return max(MIN_SPREAD, ROUNDING * float(logits.abs().max()))


def defect(network: Classifier, outputs: NetworkOutputs, *, varied: bool = True) -> str:
    """Reason why a network is unusable as a whole; empty if it is usable.

    Args:
        outputs: see :func:`observe`.
        varied: whether the images differ at all: from equal ones nobody can tell whether a network looks.
    """
    if not _largest(network.state_dict().values()) <= MAX_WEIGHT:
        return f"its weights are not finite or beyond {MAX_WEIGHT:g}"
    if not outputs.largest <= MAX_ACTIVATION:
        return f"on the hospital's images its layers are not finite or beyond {MAX_ACTIVATION:g}"
    logits = outputs.logits.double()
    if not float(logits.abs().max()) <= MAX_LOGIT:
        return f"its answers are not finite or beyond {MAX_LOGIT:g}"
    preferences = logits - logits.mean(dim=1, keepdim=True)
    if varied and len(logits) > 1 and not float(preferences.std(dim=0).max()) > _floor(logits):
        return "its answer does not depend on the image"
    return ""


def indistinct(logits: Tensor, claimed: Sequence[int]) -> frozenset[int]:
    """The claimed classes of which a network's logits (N, C) do not depend on the image, or equal another's.

    No two classes that a network has learned have one and the same logit but for a constant.
    """
    if len(logits) < 2:
        return frozenset()
    mine = logits[:, list(claimed)].double()
    centred = (mine - mine.mean(dim=0)).T.contiguous()
    floor = _floor(logits) * (len(logits) - 1) ** 0.5
    apart = torch.cdist(centred, centred, compute_mode="donot_use_mm_for_euclid_dist")
    apart.fill_diagonal_(torch.inf)
    near = (centred.norm(dim=1) <= floor) | (apart <= floor).any(dim=1)
    return frozenset(c for c, same in zip(claimed, near.tolist(), strict=True) if same)
