from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from qkt_clinical.common.files import write_json
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.inputs import to_input
from qkt_clinical.errors import BundleError
from qkt_clinical.models.bundle import load_bundle
from qkt_clinical.models.networks import build
from qkt_clinical.models.out_of_distribution import (
    MAX_SCORE,
    first_convolution,
    load_reference,
    make_reference,
    responses,
    scores,
    threshold_of,
)
from qkt_clinical.records.card import REFERENCE, NetworkSpec, Reference, read_card, read_reference
from qkt_clinical.records.plan import SHARED
from tests.sample_run import SHAPE, sample_params, write_sample_run

pytestmark = pytest.mark.slow

PARAMS = sample_params()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unlike")
    write_sample_run(root, PARAMS, weights=True)
    return Workspace(root).teacher("h0")


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """A bright disc on a darker ground, uint8: something that noise and blank frames are not."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: SHAPE[1], : SHAPE[2]]
    centre, size = rng.uniform(5, 11, (count, 2, 1, 1)), rng.uniform(2, 4, (count, 1, 1))
    disc = (x - centre[:, 0]) ** 2 + (y - centre[:, 1]) ** 2 < size**2
    image = rng.uniform(60, 80, (count, 1, 1, 1)) + 100 * disc[:, None] + rng.normal(0, 4, (count, *SHAPE))
    return np.clip(image, 0, 255).astype(np.uint8)


def reference_of(folder: Path) -> Reference:
    bundle = load_bundle(folder)
    return make_reference(bundle.network, bundle.card, pictures(100), pictures(60, seed=1), "unit")


def test_responses_are_means_and_spreads_of_the_first_convolution(folder: Path) -> None:
    network = load_bundle(folder).network
    inputs = to_input(pictures(20))
    layer = first_convolution(network)
    out = functional.conv2d(inputs, layer.weight, layer.bias, layer.stride, layer.padding).detach().numpy()
    expected = np.concatenate([out.mean(axis=(2, 3)), out.std(axis=(2, 3))], axis=1)
    found = responses(network, inputs)
    assert found.shape == (20, 2 * layer.out_channels)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet-small", "densenet-small", "efficientnet-b0"])
@pytest.mark.parametrize("dims", [2, 3])
def test_every_network_has_a_first_convolution_that_takes_the_image(name: str, dims: int) -> None:
    spec = NetworkSpec.model_validate(
        {"name": name, "spatial_dims": dims, "in_channels": 2, "classes": 3, "branches": ()}
    )
    network = build(spec, seed=0)
    inputs = torch.rand(2, 2, *(16,) * dims)
    assert first_convolution(network).in_channels == 2
    assert np.isfinite(responses(network, inputs)).all()


def test_the_score_is_a_distance_in_standard_deviations() -> None:
    reference = Reference(weights="0" * 64, mean=(1.0, 2.0), spread=(0.5, 1.0), threshold=1.0)
    found = scores(reference, np.array([[1.0, 2.0], [2.0, 2.0], [1.5, 5.0]]))
    np.testing.assert_allclose(found, [0.0, np.sqrt(2), np.sqrt(5)])
    strange = scores(reference, np.array([[np.inf, 0.0], [np.nan, 0.0], [1e300, 0.0]]))
    assert strange.tolist() == [MAX_SCORE] * 3


def test_the_threshold_keeps_99_of_100() -> None:
    assert threshold_of(np.arange(1.0, 1000.0)) == 990.0
    assert threshold_of(np.arange(1.0, 100.0)) == 99.0
    assert threshold_of(np.array([3.0, 1.0, 2.0])) == 3.0, "of few images the largest"
    assert threshold_of(np.array([])) is None


def test_images_like_the_training_images_pass_and_strange_ones_do_not(folder: Path) -> None:
    network, reference = load_bundle(folder).network, reference_of(folder)
    assert reference.threshold is not None

    def flagged(images: np.ndarray) -> float:
        return float((scores(reference, responses(network, to_input(images))) > reference.threshold).mean())

    own = pictures(200, seed=2)
    assert flagged(own) <= 0.05
    rng = np.random.default_rng(0)
    strange = {
        "noise": rng.integers(0, 256, (50, *SHAPE), dtype=np.uint8),
        "black": np.zeros((1, *SHAPE), np.uint8),
        "white": np.full((1, *SHAPE), 255, np.uint8),
        "inverted": 255 - own,
    }
    for name, images in strange.items():
        assert flagged(images) == 1.0, name


def test_the_same_images_give_the_same_reference(folder: Path) -> None:
    assert reference_of(folder) == reference_of(folder)


def test_without_calibration_images_there_is_no_threshold(folder: Path) -> None:
    bundle = load_bundle(folder)
    none = np.zeros((0, *SHAPE), np.uint8)
    assert make_reference(bundle.network, bundle.card, pictures(10), none, "unit").threshold is None


def test_images_that_are_all_alike_make_no_division_by_zero(folder: Path) -> None:
    bundle = load_bundle(folder)
    blank = np.zeros((5, *SHAPE), np.uint8)
    reference = make_reference(bundle.network, bundle.card, blank, blank, "unit")
    assert min(reference.spread) > 0
    assert reference.threshold == pytest.approx(0.0, abs=0.01)


def test_it_never_leaves_with_a_teacher(folder: Path) -> None:
    assert REFERENCE not in SHARED


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "f" * 64},
        {"spread": [0.0] * 32},
        {"mean": [0.0] * 31},
        {"mean": [0.0] * 5000, "spread": [1.0] * 5000},
        {"mean": [0.0, 0.0], "spread": [1.0, 1.0]},
        {"threshold": -1.0},
        {"extra": 1},
        {"format": "qkt-reference/2"},
    ],
    ids=["other weights", "no spread", "odd", "huge", "other network", "negative", "unknown key", "format"],
)
def test_a_reference_that_is_none_is_refused(folder: Path, tmp_path: Path, change: dict[str, object]) -> None:
    for name in ("bundle.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    write_json(tmp_path / REFERENCE, {**reference_of(folder).model_dump(mode="json"), **change})
    with pytest.raises(BundleError) as caught:
        load_reference(load_bundle(tmp_path))
    assert caught.value.code == "bundle-reference"
    assert caught.value.remedy


def test_a_bundle_without_one_has_none(folder: Path, tmp_path: Path) -> None:
    assert load_reference(load_bundle(folder)) is None
    reference = reference_of(folder)
    for name in ("bundle.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    write_json(tmp_path / REFERENCE, reference.model_dump(mode="json"))
    assert read_reference(tmp_path, read_card(tmp_path)) == reference
    (tmp_path / REFERENCE).write_text("{not json")
    with pytest.raises(BundleError):
        read_reference(tmp_path, read_card(tmp_path))
    (tmp_path / REFERENCE).write_text(json.dumps({"threshold": float("nan")}))
    with pytest.raises(BundleError):
        read_reference(tmp_path, read_card(tmp_path))
