"""Random views of a batch of images, on the images' own device.

MONAI's random transforms draw one transform per call; applied image by image they cost more than the
training of a small network. MONAI's batched ``AffineTransform`` draws the geometry of a whole batch at
once, and the few intensity changes are written out here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qkt_clinical.models.generator import generator
from qkt_clinical.models.libraries import monai_layers
from qkt_clinical.training.loop import shuffled


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def random_affine(count: int, dims: int, strength: float, generator: torch.Generator) -> Tensor:
    """Affine maps (count, dims, dims + 1) in normalised coordinates: flips, rotation, scale, shift."""
    angle = _uniform((count,), -math.pi, math.pi, generator) * min(1.0, strength)
    linear = torch.eye(dims).repeat(count, 1, 1)
    cos, sin = torch.cos(angle), torch.sin(angle)
    # In 3D the rotation is in the axial plane, the last two axes; anatomy has no up and down to lose.
    linear[:, -2, -2], linear[:, -2, -1], linear[:, -1, -2], linear[:, -1, -1] = cos, -sin, sin, cos
    flips = torch.where(torch.rand((count, dims), generator=generator) < 0.5, -1.0, 1.0)
    if strength == 0:
        flips = torch.ones_like(flips)
    scale = torch.exp(_uniform((count, 1), -0.15, 0.15, generator) * strength)
    linear = linear * (flips * scale)[:, None, :]
    shift = _uniform((count, dims, 1), -0.1, 0.1, generator) * strength
    return torch.cat([linear, shift], dim=2)


def augment(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A random view of every image.

    Args:
        images: (N, C, *spatial) float, normalised to about [-1, 1].
        strength: 0 returns the images unchanged, 1 is usual for training.
        generator: CPU generator; the draw does not depend on the device.

    Returns:
        Tensor like ``images``.
    """
    if strength == 0:
        return images
    count, channels, *spatial = images.shape
    dims = len(spatial)
    device, dtype = images.device, images.dtype
    theta = random_affine(count, dims, strength, generator).to(device, dtype)
    affine = monai_layers().AffineTransform(
        spatial_size=tuple(spatial),
        normalized=True,
        mode="bilinear",
        padding_mode="reflection",
        align_corners=False,
    )
    view: Tensor = affine(images, theta)
    ones = (1,) * dims
    contrast = torch.exp(_uniform((count, 1, *ones), -0.25, 0.25, generator) * strength)
    brightness = _uniform((count, 1, *ones), -0.15, 0.15, generator) * strength
    tint = _uniform((count, channels, *ones), -0.12, 0.12, generator) * strength
    noise = torch.randn(view.shape, generator=generator) * (
        torch.rand((count, 1, *ones), generator=generator) * 0.05 * strength
    )
    mean = view.mean(dim=tuple(range(1, view.ndim)), keepdim=True)
    shift = brightness + (tint if channels > 1 else 0.0)
    return (
        (view - mean) * contrast.to(device, dtype) + mean + shift.to(device, dtype) + noise.to(device, dtype)
    )


SOMETIMES = 0.8
"""Share of the images whose appearance is changed."""


def change_appearance(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Images as other scanners and stains might give them.

    In optical density, minus the logarithm of the light that comes through, stains add up (Beer and Lambert;
    Ruifrok and Johnston, 2001): the density of a channel is scaled at random, takes some of the other
    channels' and is shifted. Of one channel that is its contrast curve (gamma).

    Args:
        images: (N, C, *spatial) float in [-1, 1], about.
        strength: 0 returns the images unchanged, 1 is usual for training.
        generator: CPU generator; the draw does not depend on the device.

    Returns:
        Tensor like ``images``; one image in five is unchanged.
    """
    if strength == 0:
        return images
    count, channels = images.shape[:2]
    ones = (1,) * (images.ndim - 2)
    own = torch.exp(_uniform((count, channels, 1), -0.35, 0.35, generator) * strength)
    others = _uniform((count, channels, channels), -0.2, 0.2, generator) * strength
    mixing = torch.eye(channels) * own + (1 - torch.eye(channels)) * others
    shift = _uniform((count, channels, *ones), -0.05, 0.05, generator) * strength
    changed = torch.rand((count, 1, *ones), generator=generator) < SOMETIMES
    density = -torch.log(((images + 1) / 2).clamp(0.01, 1.2))
    density = torch.einsum("nij,nj...->ni...", mixing.to(images), density) + shift.to(images)
    return torch.where(changed.to(images.device), torch.exp(-density).clamp(0, 1.2) * 2 - 1, images)


VIEW_BATCH = 512


def make_views(inputs: Tensor, count: int, strength: float, seed: int, device: torch.device) -> Tensor:
    """The images themselves and ``count - 1`` random views of each: (count, N, C, *spatial)."""
    views = [inputs]
    for number in range(1, count):
        draw = generator(seed, "view", str(number))
        parts = [augment(part.to(device), strength, draw).cpu() for part in inputs.split(VIEW_BATCH)]
        views.append(torch.cat(parts))
    return torch.stack(views)


def view_batches(views: Tensor, batch_size: int, draw: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch over the images of (views, N, ...): view numbers and image numbers, each (batch,).

    Every image in a view of its own, not a whole epoch in one: batch statistics then cover all views.
    """
    count = views.shape[1]
    chosen = torch.randint(len(views), (count,), generator=draw)
    for index in shuffled(count, batch_size, draw):
        yield chosen[index], index
