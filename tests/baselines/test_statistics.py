"""Class statistics: what hospitals add up to, and the head that follows, against scikit-learn's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from qkt_clinical.baselines.statistics import (
    SHRINKAGES,
    ClassStatistics,
    best_head,
    class_statistics,
    covariance_within,
    linear_head,
    pool,
)
from qkt_clinical.task import MULTICLASS

CLASSES, WIDTH = 5, 6
LABELS = torch.tensor([0, 1, 3] * 20)


def head_of(found: ClassStatistics, relevant: Sequence[int], shrinkage: float) -> tuple[Tensor, Tensor]:
    return linear_head(found, covariance_within(found), relevant, shrinkage)


def clouds(labels: Tensor, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(9))
    return means[labels] + torch.randn(len(labels), WIDTH, generator=draw)


def test_hospitals_add_up_to_the_statistics_of_all_images() -> None:
    features = clouds(LABELS)
    whole = class_statistics(features, LABELS, CLASSES)
    parts = [class_statistics(features[i::3], LABELS[i::3], CLASSES) for i in range(3)]
    assert [int((p.counts > 0).sum()) for p in parts] == [1, 1, 1], "each holds one class alone"
    pooled = pool(parts)
    assert pooled.counts.tolist() == whole.counts.tolist() == [20, 20, 0, 20, 0]
    assert torch.allclose(pooled.sums, whole.sums)
    assert torch.allclose(pooled.moment, whole.moment)


def test_one_feature_by_hand() -> None:
    # Two classes at -1 and 3, each with one image to either side by 0.5: the variance within is 0.25.
    features = torch.tensor([[-1.5], [-0.5], [2.5], [3.5]])
    found = class_statistics(features, torch.tensor([0, 0, 1, 1]), 3)
    weight, bias = head_of(found, [0, 1], 0.5)
    assert weight.flatten().tolist() == pytest.approx([-4.0, 12.0, 0.0])
    assert bias.tolist() == pytest.approx([-2.0, -18.0, 0.0])
    assert float((weight[1] - weight[0]) * 1.0 + bias[1] - bias[0]) == pytest.approx(0.0), "half way"


def test_the_head_is_scikit_learns_of_the_pooled_images() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    features = clouds(LABELS)
    weight, bias = head_of(class_statistics(features, LABELS, CLASSES), [0, 1, 3], 0.1)
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3, shrinkage=0.1)
    theirs = reference.fit(features.double().numpy(), LABELS.numpy()).decision_function(features.numpy())
    ours = (features @ weight.T + bias)[:, [0, 1, 3]].numpy()
    assert np.allclose(
        ours - ours.mean(axis=1, keepdims=True), theirs - theirs.mean(axis=1, keepdims=True), atol=5e-2
    )
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).all()


def test_classes_that_are_not_asked_about_shape_the_covariance_alone() -> None:
    features = clouds(LABELS)
    weight, bias = head_of(class_statistics(features, LABELS, CLASSES), [0, 3], 0.1)
    assert not weight[[1, 2, 4]].any()
    assert not bias[[1, 2, 4]].any()


def test_bytes_are_sums_of_held_classes_and_half_a_moment() -> None:
    found = class_statistics(clouds(LABELS), LABELS, CLASSES)
    assert found.bytes == 4 * (3 * (1 + WIDTH) + 21)


def test_shrinkage_is_that_of_the_least_loss_on_held_out_images() -> None:
    few, many = torch.tensor([0, 1, 3] * 3), torch.tensor([0, 1, 3] * 100)
    statistics = class_statistics(clouds(few), few, CLASSES)
    held_out = clouds(many, seed=1)
    chosen = best_head(statistics, [0, 1, 3], [0, 1, 3], held_out, many, task=MULTICLASS)

    def right(head: tuple[Tensor, Tensor]) -> float:
        return float(((held_out @ head[0].T + head[1]).argmax(dim=1) == many).double().mean())

    every = [head_of(statistics, [0, 1, 3], s) for s in SHRINKAGES]
    assert any(torch.equal(chosen[0], h[0]) for h in every)
    assert right(chosen) >= max(map(right, every)) - 0.02
    assert right(chosen) > right(every[0]), "of 9 images in 6 dimensions the covariance alone says little"


def test_features_without_variance_give_finite_heads() -> None:
    found = class_statistics(torch.ones(len(LABELS), WIDTH), LABELS, CLASSES)
    assert all(bool(torch.isfinite(t).all()) for t in head_of(found, [0, 1, 3], 0.001))
