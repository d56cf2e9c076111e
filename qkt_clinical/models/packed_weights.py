"""Weights in a byte each, for networks that travel: a quarter of single precision.

Every matrix and filter bank has 255 levels for each output, symmetric about zero, as far apart as its largest
weight needs. The distance has so few digits that level times distance is exact in single precision: weights
that were packed once come out of another packing as they are. Written here, since torch's quantised tensors
cannot be stored as safetensors and have other distances.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qkt_clinical.models.tensor_file import Specs

LEVELS = 127
"""On either side of zero."""
DIGITS = 16
"""Binary digits of a distance; with the seven of a level fewer than the 24 of single precision."""
SCALE = ".scale"
"""After a tensor's name: the distance of its levels, (outputs,)."""


def is_packed(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a tensor is stored in levels: matrices and filters, no biases and no statistics."""
    return dtype == torch.float32 and len(shape) >= 2


def packed_specs(specs: Specs) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The tensors of a file that holds those of ``specs`` packed."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, (shape, dtype) in specs.items():
        if is_packed(shape, dtype):
            found[name] = (shape, torch.int8)
            found[name + SCALE] = (shape[:1], torch.float32)
        else:
            found[name] = (shape, dtype)
    return found


def level_distances(weights: Tensor) -> Tensor:
    """Distances (outputs,) of the levels of weights (outputs, ...): the smallest of few digits that suffice.

    Zero where all weights are.
    """
    largest = weights.detach().flatten(1).abs().amax(dim=1).double() / LEVELS
    mantissa, exponent = torch.frexp(largest)
    rounded = torch.ldexp(torch.ceil(torch.ldexp(mantissa, torch.tensor(DIGITS))), exponent - DIGITS)
    return rounded.float()


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's tensors, those of two and more dimensions as levels (int8) beside their distances."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if is_packed(tuple(tensor.shape), tensor.dtype):
            scale = level_distances(tensor)
            apart = scale.where(scale > 0, torch.ones(())).view(-1, *(1,) * (tensor.ndim - 1))
            found[name] = (tensor.detach() / apart).round().to(torch.int8)
            found[name + SCALE] = scale
        else:
            found[name] = tensor
    return found


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that :func:`pack` was given, in single precision, each within half a level."""
    found: dict[str, Tensor] = {}
    for name, tensor in packed.items():
        if tensor.dtype == torch.int8:
            scale = packed[name + SCALE].view(-1, *(1,) * (tensor.ndim - 1))
            found[name] = tensor.float() * scale
        elif not name.endswith(SCALE):
            found[name] = tensor
    return found
