"""Prepared images to network input."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qkt_clinical.data.prepared import Images

MEAN, STD = 0.5, 0.5
"""Of images in [0, 1]; fixed, so that every site's network takes every site's images alike."""


def to_input(images: Images, normalisation: str = "unit") -> Tensor:
    """Prepared images to network input: uint8 0..255 or float32 to (N, C, *spatial) float32.

    ``unit`` images end in [-1, 1]; ``zscore`` images are used as they are.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    if tensor.dtype == torch.uint8:
        tensor = tensor.float().div_(255.0)
        return tensor if normalisation == "zscore" else tensor.sub_(MEAN).div_(STD)
    return tensor if normalisation == "zscore" else (tensor - MEAN).div_(STD)
