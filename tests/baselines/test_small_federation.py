"""Federated averaging of small modules: one round by hand, the mean, and the two baselines made of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkt_clinical.baselines.federated_head import common_scale, federated_head
from qkt_clinical.baselines.fens import side_by_side, train_aggregator, untrained_aggregator
from qkt_clinical.baselines.params import AggregatorParams, SmallFederationParams
from qkt_clinical.baselines.small_federation import bytes_moved, federate, weighted_mean
from qkt_clinical.task import MULTICLASS

WIDTH, CLASSES = 6, 5
MEANS = 3 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(9))


def clouds(labels: Tensor, seed: int = 0) -> Tensor:
    return MEANS[labels] + torch.randn(len(labels), WIDTH, generator=torch.Generator().manual_seed(seed))


def member(held: tuple[int, ...], each: int, seed: int) -> tuple[Tensor, Tensor]:
    labels = torch.tensor(held).repeat(each)
    return clouds(labels, seed), labels


def test_the_mean_counts_every_hospital_by_its_images() -> None:
    one, two = nn.Linear(2, 1), nn.Linear(2, 1)
    for module, value in ((one, 1.0), (two, 5.0)):
        nn.init.constant_(module.weight, value)
        nn.init.constant_(module.bias, -value)
    mean = weighted_mean([one, two], [30, 10])
    assert mean.weight.tolist() == [[2.0, 2.0]]
    assert mean.bias.tolist() == [-2.0]
    assert one.weight.tolist() == [[1.0, 1.0]]


def test_a_round_of_whole_batches_is_a_step_of_adamw_at_every_hospital_and_the_mean() -> None:
    start = nn.Linear(WIDTH, CLASSES)
    members = [member((0, 1), 10, 1), member((1, 2, 3), 10, 2)]
    params = SmallFederationParams(rounds=1, batch_size=64, learning_rate=0.01, weight_decay=0.1)
    found = federate(start, members, CLASSES, params, task=MULTICLASS, seed=0)

    trained = []
    for features, labels in members:
        local = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(local.parameters(), lr=0.01, weight_decay=0.1)
        F.cross_entropy(local(features), labels).backward()  # every class has as many images
        optimizer.step()
        trained.append(local)
    expected = 0.4 * trained[0].weight + 0.6 * trained[1].weight
    torch.testing.assert_close(found.weight, expected, rtol=1e-5, atol=1e-6)
    assert bytes_moved(found, 2, 1) == 4 * CLASSES * (WIDTH + 1) * 2 * 2


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_start_alone() -> None:
    start = nn.Linear(WIDTH, CLASSES)
    before = start.weight.clone()
    members = [member((0, 1), 40, 1), member((1, 2, 3), 30, 2)]
    params = SmallFederationParams(rounds=3, batch_size=16)
    one, two = (federate(start, members, CLASSES, params, task=MULTICLASS, seed=4) for _ in range(2))
    other = federate(start, members, CLASSES, params, task=MULTICLASS, seed=5)
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, other.weight)
    assert torch.equal(start.weight, before)


def test_the_common_scale_is_that_of_all_images_in_one_place() -> None:
    parts = [5 + 3 * torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in (7, 50, 20)]
    mean, deviation = common_scale(parts)
    whole = torch.cat(parts)
    torch.testing.assert_close(mean, whole.mean(dim=0))
    torch.testing.assert_close(deviation, whole.std(dim=0, unbiased=False))


def test_a_federated_head_tells_classes_of_different_hospitals_apart() -> None:
    members = [member((0, 1, 2), 60, 1), member((2, 3, 4), 60, 2), member((0, 3, 4, 1), 60, 3)]
    members = [(100 + 20 * features, labels) for features, labels in members]
    (weight, bias), moved = federated_head(
        members, CLASSES, SmallFederationParams(learning_rate=0.03), task=MULTICLASS, seed=0
    )
    labels = torch.arange(CLASSES).repeat(100)
    answers = (100 + 20 * clouds(labels, 7)) @ weight.T + bias
    assert float((answers.argmax(dim=1) == labels).double().mean()) > 0.9
    assert moved == 4 * 3 * 2 * (50 * CLASSES * (WIDTH + 1) + 1 + 2 * WIDTH)


def test_an_aggregator_learns_which_network_to_believe_about_which_class() -> None:
    """Network 0 knows classes 0 to 2, network 1 classes 2 to 4; the others are class 2 to both."""

    def networks(labels: Tensor, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        each = []
        for knows in ((0, 1, 2), (2, 3, 4)):
            told = torch.tensor([c if c in knows else 2 for c in labels.tolist()])
            each.append(6.0 * F.one_hot(told, CLASSES) + torch.randn(len(labels), CLASSES, generator=draw))
        return side_by_side(each)

    labels = [torch.tensor(held).repeat(60) for held in ((0, 1, 2), (2, 3, 4))]
    members = [(networks(held, n), held) for n, held in enumerate(labels)]
    params = AggregatorParams(learning_rate=0.01)
    found = train_aggregator(members, 2, CLASSES, params, task=MULTICLASS, seed=0)
    fresh = torch.arange(CLASSES).repeat(50)
    start = untrained_aggregator(2, CLASSES, params.hidden, 0)
    with torch.no_grad():
        right, untrained = (m(networks(fresh, 9)).argmax(dim=1) == fresh for m in (found, start))
    assert float(right.double().mean()) > 0.95
    assert float(untrained.double().mean()) < 0.6


@pytest.mark.parametrize("seed", [0, 1])
def test_an_untrained_aggregator_is_a_function_of_its_seed(seed: int) -> None:
    one, two = (untrained_aggregator(3, CLASSES, 8, seed) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert [tuple(p.shape) for p in one.parameters()] == [(8, 15), (8,), (CLASSES, 8), (CLASSES,)]
