from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkt_clinical.objectives import (
    allowed,
    balanced_cross_entropy,
    decide,
    feature_loss,
    given_away,
    logit_loss,
    margin,
    margin_row,
    offsets_for_budget,
    query_scores,
    ridge,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- margins --------------------------------------------------------------------------------------


def test_margin_by_hand() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0, 9.0], [4.0, 0.0, 3.0, -1.0]])
    # Class 3 is not known: however loud, it has no say.
    assert margin(logits, 1, [0, 1, 2]).tolist() == [3.0, -4.0]
    assert margin(logits, 1, [0, 2]).tolist() == [3.0, -4.0], "the query needs no place among the known"
    assert margin(logits, 1, [0, 1, 2, 3]).tolist() == [-4.0, -4.0]
    # A teacher that knows nothing else: against the mean of the rest, (1 + 2 + 9) / 3 and (4 + 3 - 1) / 3.
    assert margin(logits, 1, [1]).tolist() == [1.0, -2.0]


def test_margin_row_is_the_difference_to_the_mean_rival() -> None:
    weight, bias = normal(4, 6), normal(4, seed=1)
    features = normal(9, 6, seed=2)
    logits = features @ weight.T + bias
    row, shift = margin_row(weight, bias, 1, [0, 1, 3])
    expected = logits[:, 1] - (logits[:, 0] + logits[:, 3]) / 2
    assert torch.allclose(features @ row + shift, expected, atol=1e-5)
    # With one rival it is the margin itself, and with none too.
    for known in ([1, 2], [1]):
        row, shift = margin_row(weight, bias, 1, known)
        assert torch.allclose(features @ row + shift, margin(logits, 1, known), atol=1e-5)


# --- losses ---------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    mapped, target = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert float(feature_loss(mapped, target, 0.5)) == pytest.approx((0 + 4 + 9 + 0) / 4 / 0.5)
    # In units of 2 the differences are 0, 1, 1.5, 0: beyond 1 the loss is linear.
    assert float(logit_loss(mapped, target, 2.0)) == pytest.approx((0 + 0.5 + 1.0 + 0) / 4)


def test_losses_do_not_depend_on_a_teachers_scale() -> None:
    mapped, target = normal(5, 3), normal(5, 3, seed=1)
    assert torch.allclose(feature_loss(mapped, target, 2.0), feature_loss(10 * mapped, 10 * target, 200.0))
    assert torch.allclose(logit_loss(mapped, target, 2.0), logit_loss(10 * mapped, 10 * target, 20.0))


# --- ridge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1e-6, 0.1, 10.0])
def test_ridge_solves_the_normal_equations(strength: float) -> None:
    x = (normal(50, 4) * torch.tensor([1.0, 3.0, 0.2, 1.0]) + torch.tensor([5.0, 0.0, -2.0, 0.0])).double()
    y = (normal(50, 2, seed=1) + x[:, :2]).double()
    weight, bias = ridge(x, y, strength)
    a, b = x.numpy(), y.numpy()
    a, b = a - a.mean(0), b - b.mean(0)
    penalty = strength * a.var(axis=0).mean()
    expected = np.linalg.solve(a.T @ a + 50 * penalty * np.eye(4), a.T @ b).T
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-8)
    np.testing.assert_allclose(bias.numpy(), (y.mean(0) - weight @ x.mean(0)).numpy(), rtol=1e-8)


def test_ridge_without_penalty_is_least_squares_and_with_much_the_mean() -> None:
    x, y = normal(50, 4).double(), normal(50, 2, seed=1).double()
    weight, bias = ridge(x, y, 1e-12)
    design = np.hstack([x.numpy(), np.ones((50, 1))])
    expected = np.linalg.lstsq(design, y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(weight.numpy(), expected[:4].T, rtol=1e-6)
    np.testing.assert_allclose(bias.numpy(), expected[4], rtol=1e-6)
    weight, bias = ridge(x, y, 1e9)
    assert float(weight.abs().max()) < 1e-8
    assert torch.allclose(bias, y.mean(0))


def test_ridge_on_features_that_never_move() -> None:
    weight, bias = ridge(torch.ones(5, 3), torch.arange(5.0)[:, None], 1e-2)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, torch.zeros(1, 3))
    assert bias.tolist() == [2.0]


# --- the operating point --------------------------------------------------------------------------


def test_allowed_by_hand() -> None:
    # k of n go away where (k + 1) / (n + 1) is within the budget.
    assert allowed(0.05, 99) == 4
    assert allowed(0.05, 100) == 4
    assert allowed(0.5, 3) == 1
    assert allowed(0.05, 19) == 0
    assert allowed(0.05, 5) == 0, "too few images to promise anything: none is given away"


@given(st.floats(0.001, 0.5), st.integers(1, 2000))
def test_allowed_keeps_the_conformal_bound(budget: float, count: int) -> None:
    number = allowed(budget, count)
    assert number == 0 or (number + 1) / (count + 1) <= budget * (1 + 1e-9)
    assert (number + 2) / (count + 1) > budget * (1 - 1e-9)
    assert number / count <= budget


def test_query_scores_by_hand() -> None:
    logits = torch.tensor([[1.0, 4.0, 7.0, 0.0], [2.0, -2.0, 5.0, 1.0]])
    asked = torch.tensor([[7.0, 0.5], [5.0, 1.0]])
    # The largest local logits are 4 and 2.
    assert query_scores(logits, [0, 1], asked, [0.5, 2.0]).tolist() == [[5.0, -7.5], [4.0, -3.0]]


def test_offset_by_hand() -> None:
    # 19 images at 0, 1, ..., 18 and a budget of 0.2: (3 + 1) / 20, so that three go away.
    scores = torch.arange(19.0)[:, None]
    offsets, share = offsets_for_budget(scores, 0.2)
    assert share == pytest.approx(3 / 19)
    # The image at 15 stays, by a hair; that at 16 goes.
    assert float(offsets) == pytest.approx(-15.0, abs=1e-3)
    assert float(15 + offsets) < 0 < float(16 + offsets)


def test_two_query_classes_share_the_budget() -> None:
    # Class 1 speaks ten times as loud; each of the two gets one of the two images that may go.
    scores = torch.tensor([[0.0, 0.0]] * 26 + [[5.0, 0.0], [4.0, 0.0], [0.0, 50.0], [0.0, 40.0]])
    offsets, share = offsets_for_budget(scores, 0.13)
    assert allowed(0.13, 30) == 3
    assert share <= 3 / 30
    gone = ((scores + offsets) > 0).any(dim=1)
    assert bool(gone[26])
    assert bool(gone[28])


@st.composite
def calibration(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, float, list[float]]:
    """Logits (N, 5) of a student, query logits (N, Q), a budget, surprise (Q,)."""
    count, classes = draw(st.integers(1, 120)), draw(st.integers(1, 3))
    seed, scale = draw(st.integers(0, 10_000)), draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
    logits = normal(count, 5, seed=seed) * scale
    if draw(st.booleans()):
        logits = logits.round()  # ties
    surprise = draw(st.lists(st.floats(0, 4), min_size=classes, max_size=classes))
    return logits, logits[:, 2 : 2 + classes], draw(st.floats(0.001, 0.5)), surprise


@given(calibration())
def test_the_budget_is_kept_by_the_answers_themselves(
    case: tuple[torch.Tensor, torch.Tensor, float, list[float]],
) -> None:
    logits, asked, budget, surprise = case
    query = list(range(2, 2 + asked.shape[1]))
    scores = query_scores(logits, [0, 1], asked, surprise)
    offsets, share = offsets_for_budget(scores, budget)
    assert share == given_away(scores, offsets)
    assert share <= budget
    answers = decide(logits, asked, [0, 1], query, surprise, offsets).argmax(dim=1)
    assert sum(int((answers == q).sum()) for q in query) / len(logits) <= budget


@given(calibration())
def test_no_more_could_be_given_away(case: tuple[torch.Tensor, torch.Tensor, float, list[float]]) -> None:
    logits, asked, budget, surprise = case
    scores = query_scores(logits, [0, 1], asked, surprise)
    offsets, _ = offsets_for_budget(scores, budget)
    highest = (scores + offsets).max(dim=1).values
    kept = highest[highest <= 0]
    # Lift all offsets just past the next image: one more than allowed goes away.
    lifted = offsets - kept.max() + 1e-4 * scores.abs().max().clamp(min=1)
    assert given_away(scores, lifted) * len(scores) > allowed(budget, len(scores))


# --- the answer -----------------------------------------------------------------------------------


def test_decision_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 9.0, 0.0], [1.0, 2.0, 9.0, 0.0]])
    asked = torch.tensor([[1.0], [1.5]])
    scores = decide(logits, asked, [0, 1], [3], [0.5], torch.tensor([0.25]))
    # m = 3 and 2: the query scores 3 + 1 - 1.5 + 0.25 and 2 + 1.5 - 1 + 0.25; class 2 is not asked about.
    assert scores.tolist() == [[3.0, 1.0, -math.inf, 2.75], [1.0, 2.0, -math.inf, 2.75]]
    assert scores.argmax(dim=1).tolist() == [0, 3]


@given(st.integers(0, 10_000))
def test_the_answer_is_the_definitions(seed: int) -> None:
    """A query class is named where its score exceeds 0, the loudest of them first; else the local argmax."""
    local, query = [4, 0], [3, 1]
    logits, asked = normal(40, 6, seed=seed), normal(40, 2, seed=seed + 1)
    offsets, surprise = normal(2, seed=seed + 2), [0.4, 1.3]
    answers = decide(logits, asked, local, query, surprise, offsets).argmax(dim=1)
    for i in range(40):
        most = max(float(logits[i, c]) for c in local)
        speaks = [float(asked[i, k]) - surprise[k] * most + float(offsets[k]) for k in range(2)]
        if max(speaks) > 1e-4:
            assert int(answers[i]) == query[speaks.index(max(speaks))]
        elif max(speaks) < -1e-4:
            assert float(logits[i, int(answers[i])]) == most
            assert int(answers[i]) in local


def test_balanced_cross_entropy_by_hand() -> None:
    # Uniform over 2, 4 and 2 classes: log 2 for one image of class 0; log 4 and log 2 for class 1.
    inf = -math.inf
    scores = torch.tensor([[0.0, 0.0, inf, inf], [0.0, 0.0, 0.0, 0.0], [inf, 1.0, 1.0, inf]])
    labels = torch.tensor([0, 1, 1])
    expected = (math.log(2) + (math.log(4) + math.log(2)) / 2) / 2
    assert float(balanced_cross_entropy(scores, labels, [0, 1, 2])) == pytest.approx(expected)


def test_copies_of_a_class_do_not_change_the_balance() -> None:
    scores, labels = normal(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    once = balanced_cross_entropy(scores, labels, [0, 1, 2])
    again = balanced_cross_entropy(
        torch.cat([scores] + [scores[:2]] * 20), torch.cat([labels] + [labels[:2]] * 20), [0, 1, 2]
    )
    assert torch.allclose(once, again, atol=1e-6)
