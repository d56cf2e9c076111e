"""A network's outputs on many images, batch by batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IMAGES_PER_BATCH = 512


@torch.no_grad()
def predict(network: nn.Module, inputs: Tensor, device: torch.device, *, features: bool = False) -> Tensor:
    """Logits (N, classes), or features (N, F), in evaluation mode, float32 on the CPU.

    Computed on ``device``; the network is left where and as it was.
    """
    was_training, home = network.training, next(network.parameters()).device
    network.eval().to(device)
    call: Any = network.features if features else network
    outputs = [call(part.to(device)).float().cpu() for part in inputs.split(IMAGES_PER_BATCH)]
    network.train(was_training).to(home)
    return torch.cat(outputs)
