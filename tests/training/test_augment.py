from __future__ import annotations

import math

import pytest
import torch

from qkt_clinical.training.augment import SOMETIMES, augment, change_appearance, random_affine


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 8, channels: int = 3, dims: int = 2, side: int = 12) -> torch.Tensor:
    return torch.rand((count, channels, *[side] * dims), generator=draw(9)) * 2 - 1


def test_strength_zero_changes_nothing_and_draws_nothing() -> None:
    batch, generator = images(), draw()
    before = generator.get_state()
    assert augment(batch, 0.0, generator) is batch
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(("channels", "dims"), [(3, 2), (1, 2), (1, 3), (3, 3)])
def test_views_keep_shape_and_come_from_the_generator_alone(channels: int, dims: int) -> None:
    batch = images(4, channels, dims)
    kept = batch.clone()
    torch.manual_seed(1)
    first = augment(batch, 1.0, draw())
    torch.manual_seed(2)
    second = augment(batch, 1.0, draw())
    assert torch.equal(first, second)
    assert torch.equal(batch, kept)
    assert first.shape == batch.shape
    assert first.dtype == batch.dtype
    assert bool(torch.isfinite(first).all())
    assert not torch.allclose(first, augment(batch, 1.0, draw(1)))
    for view, image in zip(first, batch, strict=True):
        assert not torch.allclose(view, image)


def test_every_image_gets_a_view_of_its_own() -> None:
    batch = images(1).repeat(6, 1, 1, 1)
    views = augment(batch, 1.0, draw())
    for i in range(6):
        for j in range(i):
            assert not torch.allclose(views[i], views[j], atol=0.05)


@pytest.mark.parametrize("dims", [2, 3])
def test_affine_maps_keep_their_bounds(dims: int) -> None:
    theta = random_affine(500, dims, 1.0, draw())
    assert theta.shape == (500, dims, dims + 1)
    linear, shift = theta[:, :, :dims].double(), theta[:, :, dims]
    assert float(shift.abs().max()) <= 0.1
    # Columns are orthogonal and of one length, the scale: no shear, no stretching.
    gram = linear.transpose(1, 2) @ linear
    scale = gram.diagonal(dim1=1, dim2=2)
    assert torch.allclose(gram, torch.diag_embed(scale), atol=1e-6)
    assert torch.allclose(scale, scale[:, :1].expand_as(scale), atol=1e-6)
    size = scale[:, 0].sqrt()
    assert math.exp(-0.15) - 1e-6 <= float(size.min()) < 0.95
    assert 1.05 < float(size.max()) <= math.exp(0.15) + 1e-6
    # Mirrored about as often as not.
    assert 0.4 < float((torch.linalg.det(linear) < 0).double().mean()) < 0.6
    if dims == 3:
        # Turned in the axial plane only: depth stays depth.
        assert float(linear[:, 0, 1:].abs().max()) == 0
        assert float(linear[:, 1:, 0].abs().max()) == 0


def test_affine_of_strength_zero_is_the_identity() -> None:
    theta = random_affine(5, 2, 0.0, draw())
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert torch.allclose(theta, expected.expand(5, 2, 3), atol=1e-6)


def test_flat_images_stay_flat_but_for_brightness_and_noise() -> None:
    flat = torch.full((200, 3, 12, 12), 0.3)
    views = augment(flat, 1.0, draw())
    colour = views.mean(dim=(2, 3))
    # brightness within 0.15, tint within 0.12, noise of at most 0.05 averaged over 144 pixels
    assert float((colour - 0.3).abs().max()) < 0.15 + 0.12 + 0.03
    assert 0.05 < float((colour - 0.3).std()) < 0.15
    spread = views.std(dim=(2, 3))
    assert float(spread.max()) < 0.065
    assert float(spread.min()) < 0.01
    grey = augment(flat[:, :1], 1.0, draw()).mean(dim=(2, 3))
    assert float((grey - 0.3).abs().max()) < 0.15 + 0.03


def test_intensities_change_in_proportion_to_the_strength() -> None:
    flat = torch.full((64, 3, 12, 12), 0.3)
    half, whole = ((augment(flat, s, draw()) - 0.3).mean(dim=(2, 3)) for s in (0.5, 1.0))
    assert torch.allclose(2 * half, whole, atol=1e-5)


# --- appearance -----------------------------------------------------------------------------------


def test_no_change_of_appearance_draws_nothing() -> None:
    batch, generator = images(), draw()
    before = generator.get_state()
    assert change_appearance(batch, 0.0, generator) is batch
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(("channels", "dims"), [(3, 2), (1, 2), (1, 3)])
def test_appearance_keeps_shape_range_and_comes_from_the_generator_alone(channels: int, dims: int) -> None:
    batch = images(200, channels, dims, 6)
    kept = batch.clone()
    torch.manual_seed(1)
    first = change_appearance(batch, 1.0, draw())
    torch.manual_seed(2)
    assert torch.equal(first, change_appearance(batch, 1.0, draw()))
    assert torch.equal(batch, kept)
    assert (first.shape, first.dtype) == (batch.shape, batch.dtype)
    assert -1.0 <= float(first.min()) <= float(first.max()) <= 1.4 + 1e-6
    changed = (first != batch).flatten(1).any(1).double().mean()
    assert float(changed) == pytest.approx(SOMETIMES, abs=0.1)


def test_a_change_of_appearance_is_linear_in_optical_density() -> None:
    """Density after is a matrix times density before, and a shift, the same for every pixel of an image."""
    batch = images(40, 3, 2, 8).clamp(-0.9, 0.9)
    after = change_appearance(batch, 0.3, draw())
    solvable = 0
    for x, y in zip(batch, after, strict=True):
        if torch.equal(x, y) or float(y.max()) > 1.39:
            continue
        solvable += 1
        before, then = (-torch.log((v.double() + 1) / 2).flatten(1) for v in (x, y))
        system = torch.cat([before, torch.ones(1, before.shape[1])]).T
        solved = torch.linalg.lstsq(system, then.T).solution
        assert torch.allclose(system @ solved, then.T, atol=1e-4)
        mixing, shift = solved[:3].T, solved[3]
        assert float((torch.diag(mixing).log()).abs().max()) <= 0.35 * 0.3 + 1e-4
        assert float((mixing - torch.diag(torch.diag(mixing))).abs().max()) <= 0.2 * 0.3 + 1e-4
        assert float(shift.abs().max()) <= 0.05 * 0.3 + 1e-4
    assert solvable > 20


def test_of_one_channel_it_is_a_contrast_curve() -> None:
    """Brighter pixels stay brighter."""
    ramp = torch.linspace(-0.9, 0.9, 30).reshape(1, 1, 5, 6).repeat(20, 1, 1, 1)
    after = change_appearance(ramp, 1.0, draw()).flatten(1)
    assert bool((after.diff(dim=1) > 0).all())
    assert len({round(float(v), 4) for v in after[:, 10]}) > 10, "each image its own"
