"""Convolutions of reduced rank: factorise them, and replace them in a network."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

Convolution = nn.Conv2d | nn.Conv3d


def kept_rank(convolution: Convolution, share: float) -> int:
    """Rank of a convolution in a merged network; 0 where factorising it would save nothing."""
    patch = convolution.in_channels * math.prod(convolution.kernel_size)
    rank = max(1, round(share * convolution.out_channels))
    smaller = rank * (patch + convolution.out_channels) < patch * convolution.out_channels
    plain = convolution.groups == 1 and set(convolution.dilation) == {1}
    zeros = convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)
    return rank if smaller and plain and zeros else 0


def factorised(convolution: Convolution, rank: int) -> nn.Sequential:
    """Factorise a convolution: one to ``rank`` channels, then a pointwise one to all."""
    kind: Any = type(convolution)
    shape: dict[str, Any] = {"stride": convolution.stride, "padding": convolution.padding, "bias": False}
    narrow: nn.Module = kind(convolution.in_channels, rank, convolution.kernel_size, **shape)
    wide: nn.Module = kind(rank, convolution.out_channels, 1, bias=convolution.bias is not None)
    return nn.Sequential(narrow, wide)


def convolutions(extractor: nn.Module, share: float) -> dict[str, tuple[Convolution, int]]:
    """The convolutions that a merged network factorises, by name, each with the rank kept.

    The first one, which sees the image, is left whole.
    """
    found = [(n, m) for n, m in extractor.named_modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    ranks = {name: (module, kept_rank(module, share)) for name, module in found[1:]}
    return {name: pair for name, pair in ranks.items() if share < 1 and pair[1]}


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a module by its dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)
