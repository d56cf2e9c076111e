"""The loss of phase 2: a pure function of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def balanced_cross_entropy(scores: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Cross-entropy in which every class of ``labels`` counts alike, however few its images.

    Args:
        scores: (N, C), minus infinity outside the relevant classes.
        labels: (N,), each in ``classes``.
    """
    each = F.cross_entropy(scores, labels, reduction="none")
    means = [each[labels == c].mean() for c in classes if bool((labels == c).any())]
    return torch.stack(means).mean()
