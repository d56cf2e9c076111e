from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkt_clinical.benchmark.mask_estimators import NORM_POWER, class_scores, estimate_mask, head_row_norm
from qkt_clinical.catalog import ESTIMATORS, Estimator, Network
from qkt_clinical.data.inputs import to_input
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier, build
from qkt_clinical.qkt import masks
from qkt_clinical.qkt.masks import (
    MIN_RATIO,
    compute_mask,
    conviction,
    gap_threshold,
    gaussian,
    mixed,
    smooth,
    stretched,
    uniform,
    verified_classes,
)
from qkt_clinical.records.card import NetworkSpec
from tests.shapes import CLASSES, CPU, shapes, spec, teacher

pytestmark = pytest.mark.slow

SHAPE = (3, 16, 16)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Pool(nn.Module):
    """Features: the mean of every channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=tuple(range(2, images.ndim)))


def by_hand(rows: list[list[float]], bias: list[float] | None = None, norm: bool = False) -> Classifier:
    """Mean of 3 channels, then a head of known rows; with ``norm`` a batch norm with far-off statistics."""
    body: nn.Module = Pool()
    if norm:
        layer = nn.BatchNorm2d(3)
        layer.running_mean = torch.full((3,), 100.0)
        body = nn.Sequential(layer, Pool())
    network = Classifier(spec("resnet-small", len(rows)), body, 3)
    with torch.no_grad():
        network.head.weight.copy_(torch.tensor(rows))
        network.head.bias.copy_(torch.tensor(bias or [0.0] * len(rows)))
    return network.eval()


def scores(network: Classifier, estimator: Estimator, seed: int = 0, probes: int = 64) -> list[float]:
    found = class_scores(network, SHAPE, estimator=estimator, probes=probes, seed=seed)
    assert found.dtype == torch.float64
    return [float(s) for s in found]


# --- estimators on a network whose head is known --------------------------------------------------


def test_head_row_norm_by_hand() -> None:
    # The median row is (0, 0, 1); what is left has norms 5, 0, 0, 2, 0.
    rows = torch.tensor(
        [[3.0, 4.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [-2.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    )
    assert head_row_norm(rows).tolist() == pytest.approx([5.0, 0.0, 0.0, 2.0, 0.0])
    # What all rows share is no knowledge.
    assert head_row_norm(rows + torch.tensor([7.0, -3.0, 2.0])).tolist() == pytest.approx([5, 0, 0, 2, 0])
    found = scores(by_hand(rows.tolist()), "head-row-norm")
    assert found == pytest.approx([1.0, 0.0, 0.0, 0.4**NORM_POWER, 0.0])


@pytest.mark.parametrize("estimator", ["gaussian-noise", "uniform-noise", "smooth-noise", "mixed-noise"])
def test_noise_through_a_constant_network_gives_the_softmax_of_its_bias(estimator: Estimator) -> None:
    network = by_hand([[0.0] * 3] * 4, [math.log(8), math.log(4), math.log(1), 0.0])
    assert scores(network, estimator) == pytest.approx([1.0, 1 / 2, 1 / 8, 1 / 8])


def test_feature_noise_by_hand() -> None:
    rows, bias = [[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0]], [0.0, 0.5, 0.0]
    features = torch.randn((64, 3), generator=draw(4)).abs().double()
    logits = features @ torch.tensor(rows, dtype=torch.float64).T + torch.tensor(bias, dtype=torch.float64)
    share = logits.softmax(1).mean(0)
    assert scores(by_hand(rows, bias), "feature-noise", seed=4) == pytest.approx(
        (share / share.max()).tolist()
    )


def test_only_batch_statistics_bring_noise_to_the_head() -> None:
    """Running means far away send all plain noise to class 2; the batch's own statistics do not."""
    rows = [[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [-1.0, -1.0, -1.0], [0.0, 0.0, 0.0]]
    network = by_hand(rows, norm=True)
    plain = scores(network, "mixed-noise")
    assert plain[2] == 1.0
    assert max(plain[0], plain[1], plain[3]) < 1e-6
    found = scores(network, "batch-norm-noise", probes=600)
    assert min(found[0], found[1]) > 0.5


def test_conviction_is_the_mean_of_the_most_convinced_probes() -> None:
    # 40 probes, so 5 % are two: for class 0 those with 0.9 and 0.7, for class 1 those with 0.5.
    first = torch.tensor([0.9, 0.7] + [0.5] * 38, dtype=torch.float64)
    found = conviction(torch.stack([first, 1 - first], dim=1).log())
    assert found.tolist() == pytest.approx([0.8, 0.5])
    # With fewer than 20 probes it is the best one.
    assert conviction(torch.stack([first, 1 - first], dim=1).log()[:3]).tolist() == pytest.approx([0.9, 0.5])


def test_stretched_by_hand() -> None:
    # Around the means (2, 1): 2 - 3 * 2 would lie below the least feature, 0.
    features = torch.tensor([[0.0, 1.0], [4.0, 1.0]])
    assert stretched(features).tolist() == [[0.0, 1.0], [8.0, 1.0]]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_scores_lie_between_0_and_1_and_depend_on_the_seed_alone(estimator: Estimator) -> None:
    network = build(spec("densenet-small"), seed=0).eval()
    torch.manual_seed(1)
    first = scores(network, estimator)
    torch.manual_seed(2)
    assert scores(network, estimator) == first
    assert max(first) == 1.0
    assert min(first) >= 0.0
    if estimator != "head-row-norm":
        assert scores(network, estimator, seed=1) != first


def test_an_estimator_that_is_not_there() -> None:
    name: Any = "crystal-ball"
    with pytest.raises(ValueError, match="crystal-ball"):
        scores(by_hand([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), name)


# --- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(13, 3, 16, 16), (13, 1, 8, 9, 10)])
@pytest.mark.parametrize("kind", [gaussian, uniform, smooth, mixed])
def test_noise_has_the_shape_asked_for(kind: Any, shape: tuple[int, ...]) -> None:
    noise = kind(shape, draw())
    assert noise.shape == shape
    assert torch.equal(noise, kind(shape, draw()))
    assert not torch.equal(noise, kind(shape, draw(1)))
    assert len({tuple(n.flatten()[:4].tolist()) for n in noise}) == 13, "no probe is there twice"


def test_noise_ranges() -> None:
    shape = (64, 3, 16, 16)
    plain = gaussian(shape, draw())
    assert abs(float(plain.mean())) < 0.02
    assert float(plain.std()) == pytest.approx(1.0, abs=0.02)
    flat = uniform(shape, draw())
    assert (-1 <= float(flat.min()) < -0.99, 0.99 < float(flat.max()) <= 1) == (True, True)
    low = smooth(shape, draw())
    assert float(low.abs().max()) <= 1.5
    # Neighbours are alike in smooth noise and strangers in uniform noise.
    step = [float((n[..., 1:] - n[..., :-1]).abs().mean()) for n in (low, flat)]
    assert step[0] < 0.4 * step[1]


# --- threshold ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "threshold"),
    [
        # The widest gap is that from 0.5 to 0.01; its middle in logarithms is the square root of 0.005.
        ([1.0, 0.01, 0.5, 0.008], math.sqrt(0.5 * 0.01)),
        ([1.0, 0.04], math.sqrt(0.04)),
        # Below TINY all are alike: the gap from 1e-4 to 1e-9 is none.
        ([1.0, 1e-4, 1e-9, 0.0], math.sqrt(1e-4)),
        # A gap narrower than the ratio is none: everything is known.
        ([1.0, 0.6, 0.9, 0.51], 0.51),
        ([1.0, 1.0, 1.0], 1.0),
        ([1.0, 1 / (MIN_RATIO + 0.01)], math.sqrt(1 / (MIN_RATIO + 0.01))),
    ],
)
def test_threshold_by_hand(values: list[float], threshold: float) -> None:
    assert gap_threshold(torch.tensor(values, dtype=torch.float64)) == pytest.approx(threshold)


def test_a_teacher_without_a_gap_knows_everything() -> None:
    network = by_hand([[0.0] * 3] * 4, [0.5, 0.4, 0.3, 0.2])
    mask = estimate_mask(network, SHAPE, CLASSES, estimator="gaussian-noise", probes=8)
    assert mask.known == (True,) * 4
    assert mask.automatic


@pytest.mark.parametrize(
    ("threshold", "known"), [(0.5, (True, True, False, False)), (0.6, (True, False, False, False))]
)
def test_a_threshold_that_is_given_is_kept(threshold: float, known: tuple[bool, ...]) -> None:
    network = by_hand([[0.0] * 3] * 4, [math.log(8), math.log(4), math.log(1), 0.0])
    mask = estimate_mask(
        network, SHAPE, CLASSES, estimator="uniform-noise", threshold=threshold, probes=8, seed=5
    )
    assert mask.known == known
    assert (mask.threshold, mask.automatic, mask.probes, mask.seed) == (threshold, False, 8, 5)
    assert mask.scores == pytest.approx((1.0, 0.5, 0.125, 0.125))


# --- real networks --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["resnet-small", "densenet-small"])
def trained(request: pytest.FixtureRequest) -> Classifier:
    name: Network = request.param
    network = teacher((1, 3), site="birch", name=name)
    images, labels = shapes((1, 3), 20, 50)
    right = predict(network, to_input(images), CPU).argmax(1) == torch.from_numpy(labels)
    assert float(right.float().mean()) > 0.9
    return network


def test_the_mask_of_a_teacher_is_what_it_was_trained_on(trained: Classifier) -> None:
    for seed in range(3):
        mask = compute_mask(trained, SHAPE, CLASSES, seed=seed)
        assert mask.known == (False, True, False, True)
        assert [c for c in CLASSES if mask.knows(c)] == ["cross", "frame"]


def test_whoever_computes_it_gets_the_same_mask(trained: Classifier) -> None:
    assert compute_mask(trained, SHAPE, CLASSES, seed=3) == compute_mask(
        copy.deepcopy(trained).train(), SHAPE, CLASSES, seed=3
    )


def test_a_bias_sends_noise_to_a_class_but_shows_no_knowledge_of_it(trained: Classifier) -> None:
    def shown(network: Classifier) -> tuple[int, ...]:
        return verified_classes(network, SHAPE, threshold="auto", probes=256, seed=3)

    assert shown(trained) == (1, 3)
    biased = copy.deepcopy(trained)
    with torch.no_grad():
        biased.head.bias[0] += 1000
    assert compute_mask(biased, SHAPE, CLASSES, seed=3).known == (True, False, False, False)
    assert shown(biased) == (1, 3)
    assert float(biased.head.bias.detach().max()) >= 900, "left as it was"


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_network_is_left_bit_identical(trained: Classifier, estimator: Estimator) -> None:
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    for mode in (True, False):
        trained.train(mode)
        class_scores(trained, SHAPE, estimator=estimator, probes=32, seed=0)
        assert all(m.training == mode for m in trained.modules())
    after = trained.state_dict()
    assert any("running_var" in k for k in after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.requires_grad for p in trained.parameters())


def test_volumes_too() -> None:
    network = build(NetworkSpec(name="resnet-small", spatial_dims=3, in_channels=1, classes=4), seed=0)
    with torch.no_grad():
        network.head.weight[2:] *= 0.01
    mask = estimate_mask(network, (1, 12, 12, 12), CLASSES, estimator="head-row-norm", probes=16)
    assert mask.known == (True, True, False, False)
    found = class_scores(network, (1, 12, 12, 12), estimator="combined", probes=16, seed=0)
    assert (float(found.max()), found.shape) == (1.0, (4,))


def test_large_volumes_are_probed_a_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is that of a batch; how large it is depends on the images' size alone."""
    network = build(spec("resnet-small"), seed=1)
    sizes: list[int] = []
    features = network.features

    def counted(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return features(images)

    monkeypatch.setattr(copy, "deepcopy", lambda _: network)
    monkeypatch.setattr(network, "features", counted)
    monkeypatch.setattr(masks, "PIXELS_PER_BATCH", 64 * 16 * 16)
    seven = [15, 15, 14, 14, 14, 14, 14]  # 16 at most, and no fewer of larger ones
    for side, batches in ((8, [100]), (16, [50, 50]), (32, seven), (64, seven)):
        sizes.clear()
        found = masks.noise_features(network, torch.randn(100, 3, side, side), batch_statistics=False)
        assert (sizes, found.shape[0]) == (batches, 100)
