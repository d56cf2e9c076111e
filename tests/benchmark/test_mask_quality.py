from __future__ import annotations

import pytest
import torch

from benchmarks.masks import agreement
from qkt_clinical.benchmark.mask_quality import MaskQuality, quality, threshold_curve

SCORES = torch.tensor([[1.0, 0.5, 0.1], [0.2, 1.0, 0.5]])
TRUTH = torch.tensor([[True, False, False], [True, True, False]])


def test_quality_by_hand() -> None:
    # Taken as known: 1.0 and 0.5 of the first, 1.0 and 0.5 of the second. Right: two of four, of three.
    found = quality(SCORES, SCORES >= 0.5, TRUTH)
    # Known 1.0, 0.2, 1.0 against unknown 0.5, 0.1, 0.5: 3 + 1 + 3 wins of 9.
    assert found == MaskQuality(precision=2 / 4, recall=2 / 3, f1=4 / 7, auc=7 / 9)


def test_ties_count_half() -> None:
    scores = torch.tensor([[0.5, 0.5], [1.0, 0.5]])
    truth = torch.tensor([[True, False], [True, False]])
    assert quality(scores, truth, truth) == MaskQuality(1.0, 1.0, 1.0, auc=(0.5 * 2 + 1 * 2) / 4)


@pytest.mark.parametrize(
    ("known", "truth", "expected"),
    [
        ([[False, False]], [[False, False]], MaskQuality(1.0, 1.0, 1.0, 0.5)),
        ([[True, False]], [[False, False]], MaskQuality(0.0, 1.0, 0.0, 0.5)),
        ([[False, False]], [[True, True]], MaskQuality(1.0, 0.0, 0.0, 0.5)),
        ([[False, False]], [[True, False]], MaskQuality(1.0, 0.0, 0.0, 1.0)),
        ([[True, True]], [[True, True]], MaskQuality(1.0, 1.0, 1.0, 0.5)),
    ],
)
def test_where_there_is_nothing_to_divide_by(
    known: list[list[bool]], truth: list[list[bool]], expected: MaskQuality
) -> None:
    assert quality(torch.tensor([[0.9, 0.1]]), torch.tensor(known), torch.tensor(truth)) == expected


def test_curve_by_hand() -> None:
    assert threshold_curve(SCORES, TRUTH, [0.0, 0.2, 0.5, 1.0, 1.1]) == [
        {"lambda": 0.0, "precision": 3 / 6, "recall": 1.0, "f1": 6 / 9},
        {"lambda": 0.2, "precision": 3 / 5, "recall": 1.0, "f1": 6 / 8},
        {"lambda": 0.5, "precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7},
        {"lambda": 1.0, "precision": 1.0, "recall": 2 / 3, "f1": 4 / 5},
        {"lambda": 1.1, "precision": 1.0, "recall": 0.0, "f1": 0.0},
    ]


def test_the_order_of_teachers_and_of_classes_changes_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, truth = torch.rand((5, 7), generator=draw), torch.rand((5, 7), generator=draw) > 0.6
    teachers, classes = torch.randperm(5, generator=draw), torch.randperm(7, generator=draw)
    other = scores[teachers][:, classes], truth[teachers][:, classes]
    assert quality(scores, scores > 0.5, truth) == quality(other[0], other[0] > 0.5, other[1])
    assert threshold_curve(scores, truth, [0.3, 0.7]) == threshold_curve(*other, [0.3, 0.7])


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 2\)"):
        quality(SCORES, SCORES > 0.5, TRUTH[:, :2])
    with pytest.raises(ValueError, match="one shape"):
        threshold_curve(SCORES[0], TRUTH[0], [0.5])
    with pytest.raises(ValueError, match="finite"):
        threshold_curve(SCORES / 0, TRUTH, [0.5])


def test_agreement_by_hand() -> None:
    # Two classes of two images; within them teachers 0 and 1 agree, 2 says the opposite, 3 is constant.
    labels = torch.tensor([0, 0, 1, 1])
    rows = torch.tensor(
        [[1.0, 3.0, 10.0, 12.0], [0.0, 4.0, -9.0, -5.0], [3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 2.0, 2.0]]
    )
    third = 1 / 3
    assert agreement(rows, labels).tolist() == pytest.approx([0.0, 0.0, -2 * third, 0.0])
    assert agreement(rows[:2], labels).tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="at least two"):
        agreement(rows[:1], labels)
