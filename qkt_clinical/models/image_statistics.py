"""Statistics of a site's training images, for its teacher's card."""

from __future__ import annotations

import torch

from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Images
from qkt_clinical.records.card import ImageStatistics

IMAGES_AT_A_TIME = 256
DIGITS = 3
"""More would tell of single images."""


def image_statistics(images: Images, normalisation: str) -> ImageStatistics:
    """Mean, spread and gradient of every channel over all images.

    Args:
        images: (N, C, *spatial) as prepared, at least one.
        normalisation: of the network's input.
    """
    channels = images.shape[1]
    # Sums over images of each image's mean, mean square, and mean squared difference.
    sums = torch.zeros((3, channels), dtype=torch.float64)
    for start in range(0, len(images), IMAGES_AT_A_TIME):
        part = to_input(images[start : start + IMAGES_AT_A_TIME], normalisation).double()
        axes = tuple(range(2, part.ndim))
        differences = [part.diff(dim=axis).square().mean(dim=axes) for axis in axes if part.shape[axis] > 1]
        sums[0] += part.mean(dim=axes).sum(dim=0)
        sums[1] += part.square().mean(dim=axes).sum(dim=0)
        if differences:
            sums[2] += torch.stack(differences).mean(dim=0).sum(dim=0)
    mean, square, difference = sums / len(images)
    spread = (square - mean.square()).clamp(min=0.0).sqrt()

    def rounded(values: torch.Tensor) -> tuple[float, ...]:
        return tuple(round(v, DIGITS) for v in values.tolist())

    return ImageStatistics(
        mean=rounded(mean), spread=rounded(spread), gradient=rounded(difference.clamp(min=0.0).sqrt())
    )
