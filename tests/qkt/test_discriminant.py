"""Phase 2 for absent query classes: discriminants against hand-computed ones and scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qkt_clinical.qkt import discriminant
from qkt_clinical.qkt.discriminant import (
    SHRINKAGE,
    aligned_mean,
    discriminant_rows,
    no_longer_than_one,
    shared_rows,
)

WIDTHS = (4, 3)
LABELS = torch.tensor([0] * 12 + [1] * 12 + [3] * 12)
"""Of three local classes; 2 is asked for and 4 is nobody's."""


LONG = 30.0
"""Longer than any of the features of :func:`clouds`: an encoder's have length 1."""


def clouds(seed: int = 0, spread: float = 1.0) -> Tensor:
    """Features (36, 7) of three classes around means of their own."""
    draw = torch.Generator().manual_seed(seed)
    means = torch.randn(5, sum(WIDTHS), generator=draw) * 3
    return means[LABELS] + spread * torch.randn(len(LABELS), sum(WIDTHS), generator=draw)


def means_of(features: Tensor, part: slice) -> dict[int, Tensor]:
    return {c: features[c == LABELS][:, part].mean(dim=0) for c in (0, 1, 3)}


TEACHERS = slice(4, 7)


def test_a_query_mean_moves_as_the_shared_classes_moved() -> None:
    there = {0: torch.tensor([0.0, 0.0]), 1: torch.tensor([2.0, 0.0]), 5: torch.tensor([1.0, 4.0])}
    here = {0: torch.tensor([1.0, 1.0]), 1: torch.tensor([3.0, 3.0]), 2: torch.tensor([9.0, 9.0])}
    # Class 0 moved by (1, 1), class 1 by (1, 3): by (1, 2) on the whole.
    assert aligned_mean(5, there, here).tolist() == [2.0, 6.0]


def test_without_a_shared_class_a_query_mean_stays() -> None:
    there = {5: torch.tensor([1.0, 4.0])}
    assert aligned_mean(5, there, {0: torch.tensor([7.0, 7.0])}).tolist() == [1.0, 4.0]


def test_one_feature_by_hand() -> None:
    # Two classes at -1 and 1, each with one to either side by 0.5: the variance within is 1 / 2 = 0.5, and a
    # part of one feature is shrunk towards its own mean square residual, 0.25.
    features = torch.tensor([[-1.5], [-0.5], [0.5], [1.5]])
    weight, bias = discriminant_rows(
        features, torch.tensor([0, 0, 1, 1]), (1,), [[{2: torch.tensor([4.0])}]], [2], 3
    )
    variance = (1 - SHRINKAGE) * 0.5 + SHRINKAGE * 0.25
    assert weight.flatten().tolist() == pytest.approx([-1 / variance, 1 / variance, 4 / variance], rel=1e-4)
    assert bias.tolist() == pytest.approx([-0.5 / variance, -0.5 / variance, -8 / variance], rel=1e-4)


def test_local_classes_are_told_apart_as_scikit_learn_does() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    features = clouds()
    weight, bias = discriminant_rows(features, LABELS, (7,), [[]], [2], 5)
    found = (features @ weight.T + bias)[:, [0, 1, 3]].numpy()
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3, shrinkage=SHRINKAGE)
    # Its covariance is the mean square, ours the unbiased one; both shrink to the mean of the former.
    expected = reference.fit(features.double().numpy(), LABELS.numpy()).decision_function(
        features.double().numpy()
    )
    ours, theirs = found - found.mean(axis=1, keepdims=True), expected - expected.mean(axis=1, keepdims=True)
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9999


def test_a_class_in_the_teachers_place_is_found_and_own_classes_stay() -> None:
    features = clouds()
    asked = means_of(features, TEACHERS)[0] + torch.tensor([9.0, -9.0, 9.0])
    weight, bias = discriminant_rows(features, LABELS, WIDTHS, [[], [{2: asked}]], [2], 5)
    assert ((features @ weight.T + bias)[:, [0, 1, 2, 3]].argmax(dim=1) != 2).all()
    own = torch.stack([features[c == LABELS].mean(dim=0) for c in (0, 1, 3)]).mean(dim=0)
    image = torch.cat([own[:4], asked])
    assert int((weight @ image + bias)[[0, 1, 2, 3]].argmax()) == 2


def test_where_nobody_says_anything_the_query_lies_amid_the_local_classes() -> None:
    features = clouds()
    weight, bias = discriminant_rows(features, LABELS, WIDTHS, [[], []], [2], 5)
    assert weight[2].abs().max() < 1e-5
    centre = torch.stack([features[c == LABELS].mean(dim=0) for c in (0, 1, 3)]).mean(dim=0)
    assert (weight @ centre + bias)[[0, 1, 2, 3]].argmax() == 2


def test_rows_of_other_classes_are_zero() -> None:
    weight, bias = discriminant_rows(clouds(), LABELS, WIDTHS, [[], [{2: torch.ones(3)}]], [2], 5)
    assert weight[4].abs().max() == 0
    assert bias[4] == 0


def test_scale_of_a_teachers_features_does_not_matter() -> None:
    features, asked = clouds(), torch.tensor([5.0, -5.0, 5.0])
    plain = discriminant_rows(features, LABELS, WIDTHS, [[], [{2: asked}]], [2], 5)
    larger = features.clone()
    larger[:, TEACHERS] *= 1000
    scaled = discriminant_rows(larger, LABELS, WIDTHS, [[], [{2: 1000 * asked}]], [2], 5)
    before, after = features @ plain[0].T + plain[1], larger @ scaled[0].T + scaled[1]
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-2)


def test_a_feature_without_variance_gives_finite_rows() -> None:
    features = clouds()
    features[:, TEACHERS] = 0.5
    weight, bias = discriminant_rows(
        features, LABELS, WIDTHS, [[], [{2: torch.tensor([0.5, 0.5, 9.0])}]], [2], 5
    )
    assert torch.isfinite(weight).all()
    assert torch.isfinite(bias).all()


def test_more_features_than_images_and_a_single_image() -> None:
    wide = torch.randn(6, 200, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    weight, bias = discriminant_rows(wide, labels, (200,), [[{2: torch.ones(200)}]], [2], 3)
    assert ((wide @ weight.T + bias)[:, :2].argmax(dim=1) == labels).all()
    single = discriminant_rows(wide[:1], labels[:1], (200,), [[{2: torch.ones(200)}]], [2], 3)
    assert all(bool(torch.isfinite(t).all()) for t in single)


def test_order_of_images_does_not_matter() -> None:
    features = clouds()
    order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(1))
    first = discriminant_rows(features, LABELS, WIDTHS, [[], [{2: torch.ones(3)}]], [2], 5)
    second = discriminant_rows(features[order], LABELS[order], WIDTHS, [[], [{2: torch.ones(3)}]], [2], 5)
    assert torch.allclose(first[0], second[0], atol=1e-4)
    assert torch.allclose(first[1], second[1], atol=1e-4)


# --- features that all hospitals have alike -----------------------------------------------------------


def test_one_teacher_says_the_same_of_shared_features_as_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discriminant, "SHARED_SHRINKAGE", SHRINKAGE)
    features = clouds() / LONG
    there = {c: m + 0.05 for c, m in means_of(features, slice(0, 7)).items()} | {2: torch.full((7,), 0.1)}
    found = shared_rows(features, LABELS, [there], [2], 5)
    expected = discriminant_rows(features, LABELS, (7,), [[there]], [2], 5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_places_that_teachers_give_are_averaged() -> None:
    features = clouds() / LONG
    here = means_of(features, slice(0, 7))
    first, second = here | {2: torch.zeros(7)}, here | {2: torch.full((7,), 0.2)}
    both = shared_rows(features, LABELS, [first, {0: here[0]}, second], [2], 5)
    between = shared_rows(features, LABELS, [here | {2: torch.full((7,), 0.1)}], [2], 5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(both, between, strict=True))
    parted = discriminant_rows(features, LABELS, (7,), [[first, second]], [2], 5)
    joined = discriminant_rows(features, LABELS, (7,), [[here | {2: torch.full((7,), 0.1)}]], [2], 5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(parted, joined, strict=True))


def test_a_mean_longer_than_features_are_counts_like_any_other() -> None:
    features = clouds() / LONG
    here = means_of(features, slice(0, 7))
    place = torch.full((7,), 0.1)
    far = torch.eye(7)[0]
    long = [here | {2: place}, here | {2: 60_000 * far}]
    cut = [here | {2: place}, here | {2: far}]
    found, expected = (shared_rows(features, LABELS, means, [2], 5) for means in (long, cut))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(no_longer_than_one(place), place)


def test_of_a_rare_class_the_own_images_count_like_a_teacher() -> None:
    features = clouds()
    labels = LABELS.clone()
    labels[labels == 3] = 2
    own = {c: features[labels == c].mean(dim=0) for c in (0, 1, 2)}
    there = {c: own[c] for c in (0, 1)} | {2: own[2] + 2.0}
    weight, bias = shared_rows(features, labels, [there], [2], 5)
    assert weight[[3, 4]].abs().max() == 0
    # Halfway between the own mean and the teacher's lies the query; the local means do not.
    points = torch.stack([own[0], own[1], own[2] + 1.0])
    assert (points @ weight.T + bias)[:, :3].argmax(dim=1).tolist() == [0, 1, 2]
    alone = shared_rows(features, labels, [], [2], 5)
    assert not torch.allclose(alone[0], weight)
