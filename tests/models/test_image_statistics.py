"""What training images look like, per channel."""

from __future__ import annotations

import numpy as np
import pytest

from qkt_clinical.models.image_statistics import IMAGES_AT_A_TIME, image_statistics


def test_by_hand() -> None:
    # Two images of two channels, two by two pixels, used as they are.
    images = np.zeros((2, 2, 2, 2), dtype=np.float32)
    images[0, 0] = [[0, 2], [0, 2]]
    images[1, 1] = 4
    found = image_statistics(images, "zscore")
    assert found.mean == (0.5, 2.0)
    # Squares: (4 + 4) / 8 = 1 and 16 / 2 = 8, less the squares of the means.
    assert found.spread == (round((1 - 0.25) ** 0.5, 3), 2.0)
    # Differences along rows are 2 in the first image's first channel, along columns 0: 4 / 2 / 2 images.
    assert found.gradient == (1.0, 0.0)


def test_bytes_are_taken_as_the_network_takes_them() -> None:
    images = np.full((1, 1, 4, 4), 255, dtype=np.uint8)
    found = image_statistics(images, "unit")
    assert (found.mean, found.spread, found.gradient) == ((1.0,), (0.0,), (0.0,))


@pytest.mark.parametrize("shape", [(3, 5, 4), (1, 4, 5, 6)])
def test_batches_and_volumes(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).normal(0.2, 1.5, (IMAGES_AT_A_TIME + 7, *shape)).astype(np.float32)
    found = image_statistics(images, "zscore")
    axes = (0, *range(2, images.ndim))
    assert np.allclose(found.mean, images.mean(axes, dtype=np.float64), atol=0.0006)
    assert np.allclose(found.spread, images.std(axes, dtype=np.float64), atol=0.0006)
    differences = [
        np.square(np.diff(images.astype(np.float64), axis=axis)).mean(axes) for axis in range(2, images.ndim)
    ]
    assert np.allclose(found.gradient, np.sqrt(np.mean(differences, axis=0)), atol=0.0006)
