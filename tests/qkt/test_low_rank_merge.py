from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor, nn

from qkt_clinical.catalog import NETWORKS, Network
from qkt_clinical.models.bundle import load_bundle, write_bundle
from qkt_clinical.models.low_rank import convolutions, factorised, kept_rank
from qkt_clinical.models.networks import Classifier, build, tensor_specs
from qkt_clinical.qkt import low_rank_merge
from qkt_clinical.qkt.consensus import consensus, consensus_rows
from qkt_clinical.qkt.low_rank_merge import (
    SAMPLES,
    WIDE_PATCH,
    WIDE_SAMPLES,
    corrected_weights,
    merge_networks,
    patches,
    reduce_extractor,
    reduce_layer,
    samples_of,
)
from qkt_clinical.records.card import Branch, NetworkSpec
from tests.shapes import CPU, counted, same, state

pytestmark = pytest.mark.slow

Dims = Literal[2, 3]
SIDE = {2: 32, 3: 16}
EVERY: tuple[tuple[Network, Dims], ...] = (
    *((cast(Network, name), 2) for name in NETWORKS),
    ("resnet-small", 3),
    ("densenet-small", 3),
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def views_of(dims: Dims = 2, count: int = 4) -> Tensor:
    return normal(count, 3, *[SIDE[dims]] * dims)


def network_of(name: Network = "resnet-small", dims: Dims = 2, seed: int = 0) -> Classifier:
    """A network whose running statistics are those of images, so that its features are not all alike."""
    network = build(NetworkSpec(name=name, spatial_dims=dims, in_channels=3, classes=4), seed=seed).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.momentum = None
    with torch.no_grad():
        network(views_of(dims, 8))
    return network.eval()


def features_of(extractor: nn.Module, views: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = extractor(views)
    return found


def lost_share(given: Tensor, wanted: Tensor) -> float:
    return float(((given - wanted) ** 2).sum() / (wanted**2).sum())


# --- what a layer sees ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dims"), EVERY)
def test_what_is_not_computed_twice_changes_no_input_of_a_layer(name: Network, dims: Dims) -> None:
    """Layers are reduced one after the other; what lies before the last one is computed once."""
    extractor = network_of(name, dims).extractor
    layers = convolutions(extractor, 0.5)
    views = views_of(dims, 3)
    settled = low_rank_merge._settled(extractor, {n: layer for n, (layer, _) in layers.items()}, views[:1])
    passed: list[str] = []
    for n, module in extractor.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.register_forward_hook(lambda _m, _i, _o, n=n: passed.append(n))
    kept: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for n in settled:
            layer, rank = layers[n]
            plain = low_rank_merge._inputs_of(extractor, layer, views, {}, ())
            passed.clear()
            found = low_rank_merge._inputs_of(extractor, layer, views, kept, settled[n])
            assert torch.equal(found, plain), n
            assert len(passed) <= len(layers) / 2 or len(layers) < 6, "not all of what lies before"
            low_rank_merge.replace_module(extractor, n, factorised(layer, rank))
    assert not any("forward" in vars(module) for module in extractor.modules()), "left as they were"


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dims", [2, 3])
def test_patches_times_weights_are_the_layers_output(dims: Dims, stride: int, padding: int) -> None:
    kind: Any = nn.Conv2d if dims == 2 else nn.Conv3d
    # Nothing is square, so that no axis can stand for another.
    kernel, size = (3, 2, 1)[:dims], (7, 6, 5)[:dims]
    torch.manual_seed(0)
    layer = kind(3, 4, kernel, stride=stride, padding=padding, bias=False)
    inputs = normal(2, 3, *size)
    output = layer(inputs).detach()
    places = [range(2), *map(range, output.shape[2:])]
    index = [i.flatten() for i in torch.meshgrid(*map(torch.tensor, places), indexing="ij")]
    found = patches(layer, inputs, index) @ layer.weight.detach().flatten(1).T
    assert torch.allclose(found, output.movedim(1, -1).reshape(-1, 4), atol=1e-5)


# --- one layer, smaller ---------------------------------------------------------------------------


def test_at_full_rank_unchanged_inputs_give_the_teachers_outputs_again() -> None:
    weight, seen = normal(6, 10), normal(50, 10, seed=1)
    wide, narrow, lost = reduce_layer(weight, seen, seen @ weight.T, 6)
    assert (wide.shape, narrow.shape, wide.dtype) == ((6, 6), (6, 10), torch.float32)
    assert torch.allclose(seen @ (wide @ narrow).T, seen @ weight.T, atol=1e-4)
    assert lost < 1e-8


def test_a_lower_rank_loses_more() -> None:
    weight, seen = normal(6, 10), normal(50, 10, seed=1)
    lost = [reduce_layer(weight, seen, seen @ weight.T, rank)[2] for rank in range(6, 0, -1)]
    assert lost == sorted(lost)
    assert all(one < other for one, other in itertools.pairwise(lost))
    assert lost[-1] < 1
    wide, narrow, share = reduce_layer(weight, seen, seen @ weight.T, 2)
    assert share == pytest.approx(lost_share(seen @ (wide @ narrow).T, seen @ weight.T))


def test_a_layer_makes_up_for_what_earlier_ones_lost() -> None:
    weight, before = normal(6, 10), normal(200, 10, seed=1)
    after, wanted = 0.5 * before, before @ weight.T  # an earlier layer lost half of everything
    wide, narrow, lost = reduce_layer(weight, after, wanted, 6)
    assert lost_share(after @ weight.T, wanted) == pytest.approx(0.25)
    assert lost < 0.025
    assert lost == pytest.approx(lost_share(after @ (wide @ narrow).T, wanted), abs=1e-6)


def test_layers_of_large_patches_see_fewer_of_them() -> None:
    assert (samples_of(WIDE_PATCH), samples_of(WIDE_PATCH + 1)) == (SAMPLES, WIDE_SAMPLES)


@pytest.mark.parametrize("seen", [3, 9, 10, 11, 40])
def test_both_forms_of_the_correction_are_the_ridge_regression(seen: int) -> None:
    """One unknown per value of a patch, or one per patch where fewer are seen; here one stacked problem."""
    weight, inputs, outputs = normal(6, 10), normal(seen, 10, seed=1), normal(seen, 6, seed=2)
    held = low_rank_merge.PULL * float((inputs**2).mean())
    stacked = torch.cat([inputs.double() / seen**0.5, held**0.5 * torch.eye(10, dtype=torch.float64)])
    wanted = torch.cat([outputs.double() / seen**0.5, held**0.5 * weight.double().T])
    expected = torch.linalg.lstsq(stacked, wanted).solution.T
    assert torch.allclose(corrected_weights(weight.double(), inputs, outputs), expected, atol=1e-5)


def test_a_correction_by_hand() -> None:
    """One patch of two values, 3 and 4, of mean square 12.5: the penalty is 1.25, the error 10 - 5."""
    weight, inputs = torch.tensor([[1.0, 0.5]]).double(), torch.tensor([[3.0, 4.0]])
    moved = corrected_weights(weight, inputs, torch.tensor([[10.0]]))
    share = 5 / (25 + 1.25)
    assert moved.tolist() == [[pytest.approx(1 + 3 * share), pytest.approx(0.5 + 4 * share)]]


def test_a_layer_that_sees_nothing_stays_finite() -> None:
    for weight in (normal(6, 10), torch.zeros(6, 10)):
        wide, narrow, lost = reduce_layer(weight, torch.zeros(20, 10), torch.zeros(20, 6), 3)
        assert bool(torch.isfinite(wide @ narrow).all())
        assert lost == 0


# --- one extractor, smaller -----------------------------------------------------------------------


def test_the_whole_share_keeps_the_extractor_bit_for_bit() -> None:
    network = network_of()
    with counted(network) as sizes:
        extractor, branch, losses = reduce_extractor(network, 1.0, views_of(), seed=1, device=CPU)
    assert same(state(extractor), state(network.extractor))
    assert extractor is not network.extractor
    assert (branch, losses, sizes) == (Branch(name="resnet-small", rank=1.0), [], [])


@pytest.mark.parametrize("name", ["resnet-small", "densenet-small"])
def test_a_part_sees_the_views_once_and_leaves_the_source_alone(name: Network) -> None:
    network = network_of(name).train()
    before, views = state(network), views_of(count=5)
    with counted(network) as sizes:
        extractor, branch, losses = reduce_extractor(network, 0.5, views, seed=1, device=CPU)
    assert sizes == [5, 1], "and one of them alone, for the order of layers"
    assert same(state(network), before)
    assert network.training
    assert not extractor.training
    assert branch == Branch(name=name, rank=0.5)
    assert len(losses) == len(convolutions(network.extractor, 0.5)) > 0
    assert all(0 <= lost < 1 for lost in losses)
    count = [sum(p.numel() for p in e.parameters()) for e in (extractor, network.extractor)]
    assert count[0] < count[1]


def test_same_seed_same_part_in_any_state_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank_merge, "SAMPLES", 64)
    network, views = network_of(), views_of()
    found = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        extractor, _, losses = reduce_extractor(network, 0.5, views, seed=seed, device=CPU)
        found.append((state(extractor), losses))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert not same(found[0][0], found[2][0])


def test_features_come_nearer_with_every_direction_kept() -> None:
    network, views = network_of(), views_of(count=16)
    wanted = features_of(network.extractor, views)
    parts = [
        reduce_extractor(network, share, views, seed=1, device=CPU)[0] for share in (0.75, 0.5, 0.25, 0.05)
    ]
    off = [float((features_of(part, views) - wanted).norm()) for part in parts]
    assert all(one < other for one, other in itertools.pairwise(off))


def test_an_extractor_with_layers_of_large_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer patches seen than a patch has values: the layers still say what the teacher's said."""
    network, views = network_of(), views_of(count=40)
    plain = reduce_extractor(network, 0.5, views, seed=1, device=CPU)
    monkeypatch.setattr(low_rank_merge, "WIDE_PATCH", 100)
    monkeypatch.setattr(low_rank_merge, "WIDE_SAMPLES", 90)
    extractor, branch, losses = reduce_extractor(network, 0.5, views, seed=1, device=CPU)
    assert branch == plain[1]
    assert list(state(extractor)) == list(state(plain[0]))
    assert len(losses) == len(plain[2])
    wanted = features_of(network.extractor, views)
    assert lost_share(features_of(extractor, views), wanted) < 0.5


def test_layers_that_would_not_shrink_are_left_whole() -> None:
    # 4 x 9 numbers per output: 32 outputs by rank 16 are 16 * (36 + 32) = 1088 numbers instead of 1152.
    plain = nn.Conv2d(4, 32, 3)
    assert kept_rank(plain, 0.5) == 16
    assert kept_rank(plain, 0.6) == 0
    assert kept_rank(plain, 1.0) == 0
    assert kept_rank(plain, 1e-9) == 1
    for odd in (
        nn.Conv2d(4, 32, 3, groups=4),
        nn.Conv2d(4, 32, 3, dilation=2),
        nn.Conv2d(4, 32, 3, padding="same"),
        nn.Conv2d(4, 32, 3, padding=1, padding_mode="reflect"),
    ):
        assert kept_rank(odd, 0.5) == 0
    smaller = factorised(nn.Conv3d(4, 32, 3, stride=2, padding=1), 5)
    assert smaller(torch.zeros(1, 4, 8, 8, 8)).shape == (1, 32, 4, 4, 4)


# --- all extractors in one network ----------------------------------------------------------------


def joined(
    sources: Sequence[Classifier], ranks: Sequence[float], known: Sequence[Sequence[int]], views: Tensor
) -> Classifier:
    parts = [
        reduce_extractor(n, rank, views, seed=3, device=CPU)[:2]
        for n, rank in zip(sources, ranks, strict=True)
    ]
    heads = [(n.head.weight.detach(), n.head.bias.detach()) for n in sources]
    return merge_networks(sources[0], parts, consensus_rows(heads, known, (0, 1, 3), 2.0))


@pytest.mark.parametrize(("name", "dims"), EVERY)
def test_every_network_is_taken_up_and_loads_again(tmp_path: Path, name: Network, dims: Dims) -> None:
    own, other = network_of("resnet-small", dims), network_of(name, dims, seed=1)
    views, known = views_of(dims), [(0, 1), (1, 3)]
    network = joined([own, other], [1.0, 1.0], known, views)
    with torch.no_grad():
        expected = consensus([own(views), other(views)], known, (0, 1, 3), 2.0)
        scale = float(expected.abs().max().clamp(min=1))
        assert torch.allclose(network(views) / scale, expected / scale, atol=1e-4)

    network = joined([own, other], [1.0, 0.5], known, views)
    assert network.spec.branches == (Branch(name="resnet-small", rank=1.0), Branch(name=name, rank=0.5))
    assert same(state(network.get_submodule("extractor.branches.0")), state(own.extractor))
    assert {k: tuple(v.shape) for k, v in state(network).items()} == {
        k: shape for k, (shape, _) in tensor_specs(network.spec).items()
    }
    write_bundle(tmp_path, network, student_card(dims))
    bundle = load_bundle(tmp_path)
    assert bundle.card.network == network.spec
    assert same(state(bundle.network), state(network))
    with torch.no_grad():
        logits = network(views)
        assert torch.allclose(bundle.network(views), logits, atol=1e-5)
    assert bool(torch.isfinite(logits).all())
    assert bool((logits[:, 2] == 0).all()), "a class outside R has no row"


def student_card(dims: Dims) -> dict[str, Any]:
    shape = (3, *[SIDE[dims]] * dims)
    return {
        "kind": "student",
        "site": "aster",
        "query": "q",
        "classes": ("a", "b", "c", "d"),
        "input": {"shape": shape, "normalisation": "unit", "spacing_mm": None},
        "training": {},
        "decision": {
            "method": "qkt",
            "local": (0, 1),
            "query": (3,),
            "offsets": (0.0,),
            "budget": 0.1,
            "own_weight": 2.0,
        },
    }
