"""The measurement of the pipeline at larger images, on small ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import resolution
from qkt_clinical.config.loading import load_params


@pytest.mark.parametrize(("dims", "shape"), [(2, (20, 20, 3)), (3, (16, 16, 16))], ids=["cells", "chests"])
def test_images_are_drawn_at_the_size_asked_for(dims: int, shape: tuple[int, ...]) -> None:
    draw = resolution.drawn_cells if dims == 2 else resolution.drawn_chests
    images, labels = draw(9, shape[0], np.random.default_rng(0))
    assert (images.shape, images.dtype) == ((9, *shape), np.uint8)
    assert images.reshape(9, -1).std(axis=1).min() > 5, "none is even"
    assert sorted(set(labels.tolist()))[:2] == [0, 1]


@pytest.mark.nightly
@pytest.mark.parametrize(("dims", "side", "count"), [(2, 96, 240), (3, 24, 90)], ids=["cells", "chests"])
def test_a_pipeline_is_measured_stage_by_stage(tmp_path: Path, dims: int, side: int, count: int) -> None:
    root = tmp_path / "root"
    root.mkdir()
    resolution.write_root(root, dims, side, count, {"epochs": 1, "appearance": 0.0})
    assert len(load_params(root).sites) == 3
    row = resolution.run_pipeline(root)
    assert 0.0 <= float(row["balanced_accuracy"]) <= 1.0
    assert int(str(row["peak MB"]).split()[0]) > 100
    assert (root / "reports" / "index.html").is_file()
