from __future__ import annotations

import subprocess
import sys
from typing import Literal

import pytest
import torch
from torch import nn

from qkt_clinical.catalog import NETWORKS, Network
from qkt_clinical.errors import ConfigError, DeviceError
from qkt_clinical.models.low_rank import factorised
from qkt_clinical.models.networks import (
    begin_computing,
    build,
    check_size,
    multiply_adds,
    pick_device,
    tensor_specs,
)
from qkt_clinical.records.card import Branch, NetworkSpec

pytestmark = pytest.mark.slow

QUICK: tuple[Network, ...] = ("resnet-small", "densenet-small")


def spec(
    name: Network = "resnet-small", dims: Literal[2, 3] = 2, channels: int = 3, classes: int = 5
) -> NetworkSpec:
    return NetworkSpec(name=name, spatial_dims=dims, in_channels=channels, classes=classes)


@pytest.mark.parametrize(("dims", "channels"), [(2, 1), (2, 3), (3, 1)])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_builds_in_2d_and_3d(name: Network, dims: Literal[2, 3], channels: int) -> None:
    with torch.device("meta"):
        network = build(spec(name, dims, channels)).eval()
        images = torch.empty(2, channels, *[32] * dims)
        features = network.features(images)
        assert features.shape == (2, network.head.in_features)
        assert network.head(features).shape == network(images).shape == (2, 5)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_merged_network_has_the_features_of_all_its_branches(dims: Literal[2, 3]) -> None:
    with torch.device("meta"):
        widths = [build(spec(name, dims)).head.in_features for name in NETWORKS]  # type: ignore[arg-type]
        branches = tuple(Branch(name=name, rank=0.5) for name in NETWORKS)  # type: ignore[arg-type]
        network = build(
            spec("resnet-small", dims).model_copy(update={"name": "amalgam", "branches": branches})
        )
        images = torch.empty(2, 3, *[32] * dims)
        assert network.head.in_features == sum(widths)
        assert network.eval().features(images).shape == (2, sum(widths))
        assert network(images).shape == (2, 5)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_the_head_of_the_features(name: Network) -> None:
    network = build(spec(name), seed=0).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = network.extractor(images)
        logits = network(images)
        assert torch.equal(network.head(features), logits)
        assert torch.equal(network.features(images), features)
        assert torch.allclose(features @ network.head.weight.T + network.head.bias, logits, atol=1e-6)
    assert bool(torch.isfinite(logits).all())
    # Two images that differ are told apart: the features are pooled over space, not over the batch.
    assert not torch.equal(features[0], features[1])


@pytest.mark.parametrize("name", NETWORKS)
def test_same_seed_same_weights(name: Network) -> None:
    torch.manual_seed(1)
    first = build(spec(name), seed=7).state_dict()
    torch.manual_seed(2)
    second, other = build(spec(name), seed=7).state_dict(), build(spec(name), seed=8).state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    body = next(k for k, v in first.items() if k.startswith("extractor.") and v.ndim == 4)
    assert not torch.equal(first[body], other[body])


def test_multiply_adds_by_hand() -> None:
    layer = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    # 4 x 4 positions, 4 outputs of 3 x 9 numbers each; then 8 outputs of 64 numbers.
    network = nn.Sequential(layer, nn.Flatten(), nn.Linear(64, 8)).eval()
    assert multiply_adds(network, (3, 8, 8)) == 16 * 4 * 27 + 8 * 64
    assert multiply_adds(nn.Conv2d(4, 4, 3, groups=4), (4, 3, 3)) == 4 * 9
    # Of rank 2: 2 outputs of 27 numbers, then 4 of 2.
    assert multiply_adds(factorised(layer, 2), (3, 8, 8)) == 16 * (2 * 27 + 4 * 2)
    cost = [multiply_adds(build(spec(name)).eval(), (3, 16, 16)) for name in QUICK]
    branches = tuple(Branch(name=name, rank=1.0) for name in QUICK)
    whole = spec().model_copy(update={"name": "amalgam", "branches": branches})
    assert multiply_adds(build(whole).eval(), (3, 16, 16)) == sum(cost)


@pytest.mark.parametrize("seed", [None, 3])
def test_building_leaves_the_global_stream_alone(seed: int | None) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    build(spec(), seed=seed)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", QUICK)
def test_tensor_specs_are_those_of_the_real_network(name: Network, dims: Literal[2, 3]) -> None:
    found = tensor_specs(spec(name, dims, 1, 4))
    real = build(spec(name, dims, 1, 4)).state_dict()
    assert found == {k: (tuple(v.shape), v.dtype) for k, v in real.items()}


def test_gradients_reach_every_parameter() -> None:
    for name in QUICK:
        network = build(spec(name), seed=0)
        network(torch.randn(4, 3, 32, 32)).square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in network.parameters())


def test_images_too_small_for_the_network_are_refused() -> None:
    with pytest.raises(ConfigError, match="images of 16x16 are too small for densenet121") as caught:
        check_size(spec("densenet121"), (16, 16))
    assert caught.value.code == "size"
    with pytest.raises(ConfigError, match="16x16x16"):
        check_size(spec("densenet121", 3), (16, 16, 16))
    check_size(spec("densenet121"), (32, 32))
    for name in QUICK:
        check_size(spec(name), (16, 16))
        check_size(spec(name, 3), (16, 16, 16))


def test_device() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        assert pick_device("auto").type == pick_device("cuda").type == "cuda"
    else:
        assert pick_device("auto") == torch.device("cpu")
        with pytest.raises(DeviceError):
            pick_device("cuda")


def test_optional_packages_are_not_loaded_but_can_be_afterwards() -> None:
    code = """
import sys
from importlib.util import find_spec
from qkt_clinical.records.card import NetworkSpec
from qkt_clinical.models.libraries import _NOT_NEEDED
from qkt_clinical.models.networks import build
build(NetworkSpec(name="resnet-small", spatial_dims=2, in_channels=3, classes=4))
print(sorted(n for n in _NOT_NEEDED if n in sys.modules))
print([n for n in ("mlflow", "pandas", "sklearn", "matplotlib", "nibabel", "pydicom") if not find_spec(n)])
import nibabel
print(nibabel.Nifti1Image.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]", "Nifti1Image"]


def test_a_process_computes_with_the_threads_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        for threads in (3, 1):
            assert begin_computing("cpu", threads) == torch.device("cpu")
            assert torch.get_num_threads() == threads
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        begin_computing("cpu", 3)
        assert torch.get_num_threads() == 1, "a cluster says how many cores a job has"
    finally:
        torch.set_num_threads(before)
