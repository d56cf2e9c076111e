"""Variants of phase 1 in the benchmark's ablations, and their settings. Free of torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qkt_clinical.config.base import Strict

Phase1Way = Literal["merge", "distill", "joint", "none"]
"""``merge`` is the method's own."""


class DistillationParams(Strict):
    """Duration and data of training in phase 1; ``none`` uses the views only."""

    epochs: Annotated[int, Field(ge=1, le=10_000)] = 24
    batch_size: Annotated[int, Field(ge=2, le=4096)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    views: Annotated[int, Field(ge=1, le=64)] = 8
    """Augmented views per local image; each teacher sees each view once."""
