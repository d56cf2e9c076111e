"""Random number generators of torch that depend on a seed and names alone."""

from __future__ import annotations

import torch

from qkt_clinical.common.seeding import derive


def generator(seed: int, *names: str) -> torch.Generator:
    """A CPU generator whose stream depends on the seed and the names alone."""
    return torch.Generator().manual_seed(derive(seed, *names))
