from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, precision_score, recall_score

from qkt_clinical.catalog import DEFAULT_TASK, TaskName
from qkt_clinical.errors import ConfigError
from qkt_clinical.task import MULTICLASS, TASKS, mean_recall, task_of

INF = math.inf


# --- which there are ------------------------------------------------------------------------------


def test_tasks_bear_their_names() -> None:
    assert set(TASKS) == set(TaskName.__args__)  # type: ignore[attr-defined]
    assert all(task.name == name for name, task in TASKS.items())
    assert task_of("multiclass") is task_of(DEFAULT_TASK) is MULTICLASS


@pytest.mark.parametrize("name", ["multilabel", "", "Multiclass", "multi\nclass"])
def test_an_unknown_task_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task_of(name)
    assert caught.value.code == "unknown-task"
    assert repr(name) in caught.value.message
    assert "multiclass" in caught.value.remedy


# --- loss -----------------------------------------------------------------------------------------


def test_class_weights_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 0, 0, 2, 2, 2, 3])
    assert MULTICLASS.counts(labels, 5).tolist() == [6, 0, 3, 1, 0]
    weights = MULTICLASS.weights(labels, 5)
    # 10 images, 3 classes: 10 / (3 x 6), none, 10 / (3 x 3), 10 / (3 x 1), none
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([10 / 18, 0.0, 10 / 9, 10 / 3, 0.0])
    assert float(weights[torch.from_numpy(labels)].mean()) == pytest.approx(1.0)


def test_the_weighted_loss_by_hand() -> None:
    # Three images of class 0 and one of class 2: weights 4/3/2 = 2/3 and 4/1/2 = 2.
    labels = torch.tensor([0, 0, 0, 2])
    weights = MULTICLASS.weights(labels.numpy(), 3)
    logits = torch.tensor([[0.0, 0.0, 0.0]] * 3 + [[math.log(2.0), 0.0, 0.0]])
    expected = (3 * (2 / 3) * math.log(3) + 2 * math.log(4)) / 4
    assert float(MULTICLASS.loss(logits, labels, weights)) == pytest.approx(expected)
    # A batch without the rare class is weighed as all images are.
    assert float(MULTICLASS.loss(logits[:3], labels[:3], weights)) == pytest.approx(2 / 3 * math.log(3))
    half = MULTICLASS.loss(logits.half(), labels, weights)
    assert half.dtype == torch.float32, "mixed precision adds up in single precision"


def test_losses_by_hand() -> None:
    scores = torch.tensor([[0.0, 0.0, -INF], [0.0, 0.0, 0.0], [-INF, 1.0, 1.0]], dtype=torch.float64)
    found = MULTICLASS.losses(scores, torch.tensor([0, 1, 1]))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([math.log(2), math.log(3), math.log(2)])


def test_the_balanced_loss_by_hand() -> None:
    # Uniform over 2, 4 and 2 classes: log 2 for one image of class 0; log 4 and log 2 for class 1.
    scores = torch.tensor([[0.0, 0.0, -INF, -INF], [0.0, 0.0, 0.0, 0.0], [-INF, 1.0, 1.0, -INF]])
    labels = torch.tensor([0, 1, 1])
    expected = (math.log(2) + (math.log(4) + math.log(2)) / 2) / 2
    assert float(MULTICLASS.balanced_loss(scores, labels, [0, 1, 2])) == pytest.approx(expected)


def test_copies_of_a_class_do_not_change_the_balance() -> None:
    scores = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    once = MULTICLASS.balanced_loss(scores, labels, [0, 1, 2])
    again = MULTICLASS.balanced_loss(
        torch.cat([scores] + [scores[:2]] * 20), torch.cat([labels] + [labels[:2]] * 20), [0, 1, 2]
    )
    assert torch.allclose(once, again, atol=1e-6)


# --- answer and probabilities ---------------------------------------------------------------------


def test_the_answer_is_the_highest_score_of_those_that_may_be_answered() -> None:
    scores = torch.tensor([[3.0, 1.0, -INF, 2.75], [-INF, 2.0, -INF, 2.25], [-INF, -9.0, -INF, -INF]])
    assert MULTICLASS.answer(scores).tolist() == [0, 3, 1]
    assert MULTICLASS.answer(scores.double().numpy()).tolist() == [0, 3, 1]
    ties = np.array([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    assert MULTICLASS.answer(ties).tolist() == MULTICLASS.answer(torch.from_numpy(ties)).tolist() == [1, 0]
    assert MULTICLASS.answer(scores[:0]).shape == (0,)


def test_probabilities_by_hand() -> None:
    scores = np.array([[0.0, math.log(3), -INF], [1000.0, 1000.0 + math.log(3), -INF]])
    expected = [[0.25, 0.75, 0.0]] * 2
    found = MULTICLASS.probabilities(scores)
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(MULTICLASS.probabilities(torch.from_numpy(scores)).numpy(), expected)
    found_logs = MULTICLASS.log_probabilities(torch.from_numpy(scores))
    np.testing.assert_allclose(found_logs.exp().numpy(), expected)


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_probabilities_add_up_to_one_and_keep_the_answer(seed: int, classes: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = 30 * torch.randn(20, classes, generator=draw, dtype=torch.float64)
    scores[:, 1:] = scores[:, 1:].masked_fill(torch.rand(20, classes - 1, generator=draw) < 0.3, -INF)
    for found in (MULTICLASS.probabilities(scores), MULTICLASS.probabilities(scores.numpy())):
        numbers = np.asarray(found)
        np.testing.assert_allclose(numbers.sum(axis=1), 1.0)
        assert ((numbers == 0) >= np.isinf(scores.numpy())).all()
        assert (MULTICLASS.answer(numbers) == MULTICLASS.answer(scores.numpy())).all()


def test_confidence_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [1.0, 0.0]])
    sure, right = MULTICLASS.confidence(probabilities, np.array([0, 1, 1, 0]))
    assert sure.tolist() == [0.9, 0.9, 0.6, 1.0]
    assert right.tolist() == [True, False, True, True]


# --- figures --------------------------------------------------------------------------------------


def test_recall_by_hand() -> None:
    labels, answers = torch.tensor([0, 0, 0, 0, 2, 2]), torch.tensor([0, 0, 0, 1, 2, 0])
    assert MULTICLASS.recall(answers, labels) == {0: 3 / 4, 2: 1 / 2}
    assert mean_recall(answers, labels) == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert MULTICLASS.recall(answers[:0], labels[:0]) == {}


def test_the_validation_score_by_hand() -> None:
    """Mean recall, less a thousandth of the cross-entropy."""
    log = math.log
    outputs = torch.tensor([[log(3), 0.0, -INF], [0.0, log(3), -INF], [0.0, log(7), -INF]])
    # Answers 0, 1, 1: recall 1/2 and 1; cross-entropies log 4/3, log 4 and log 8/7.
    expected = 3 / 4 - 1e-3 * (log(4 / 3) + log(4) + log(8 / 7)) / 3
    assert MULTICLASS.validation_score(outputs, torch.tensor([0, 0, 1])) == pytest.approx(expected)


def test_the_loss_decides_among_equal_recalls() -> None:
    labels = torch.tensor([0, 1])
    sure, doubtful = (torch.eye(2) * k for k in (3.0, 1.0))
    assert MULTICLASS.validation_score(sure, labels) > MULTICLASS.validation_score(doubtful, labels)
    wrong = torch.tensor([[0.1, 0.0], [0.1, 0.0]])
    assert MULTICLASS.validation_score(doubtful, labels) > MULTICLASS.validation_score(wrong, labels)


def test_figures_by_hand() -> None:
    labels, answers = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 2, 1])
    weights = np.array([[1.0] * 5, [2.0, 0.0, 1.0, 3.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.0]])
    found = MULTICLASS.figures(answers, labels, 3, weights)
    recall = [[2 / 3, 1 / 2, np.nan], [2 / 3, 1 / 4, np.nan], [1.0, np.nan, np.nan]]
    precision = [[1.0, 1 / 2, 0.0], [1.0, 1 / 2, 0.0], [1.0, np.nan, np.nan]]
    np.testing.assert_allclose(found.recall, recall)
    np.testing.assert_allclose(found.precision, precision)
    assert found.confusion.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_figures_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    labels, answers = random.integers(0, 4, 200), random.integers(0, 3, 200)
    weights = random.integers(0, 3, (2, 200)).astype(float)
    found = MULTICLASS.figures(answers, labels, 4, weights)
    for draw, weight in enumerate(weights):
        recall = recall_score(labels, answers, average=None, sample_weight=weight)
        precision = precision_score(labels, answers, average=None, sample_weight=weight, zero_division=np.nan)
        np.testing.assert_allclose(found.recall[draw], recall)
        np.testing.assert_allclose(found.precision[draw], precision)
    assert np.isnan(found.precision[0, 3])
    np.testing.assert_array_equal(found.confusion, confusion_matrix(labels, answers))
