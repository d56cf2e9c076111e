from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from qkt_clinical.benchmark.distillation import feature_loss, logit_loss, ridge
from qkt_clinical.qkt import consensus as objectives
from qkt_clinical.qkt.consensus import (
    GUARDING_WEIGHTS,
    LOCAL_WEIGHTS,
    calibrated_loss,
    consensus,
    consensus_rows,
    forgotten,
    local_weight,
    margin,
    margin_row,
)
from qkt_clinical.qkt.operating_point import (
    allowed,
    as_if_held_out,
    class_weights,
    decide,
    false_query_rate,
    kept_today,
    offset_for_budget,
    offsets_for_budget,
    query_scores,
)
from qkt_clinical.task import MULTICLASS


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- margins --------------------------------------------------------------------------------------


def test_margin_by_hand() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0, 9.0], [4.0, 0.0, 3.0, -1.0]])
    # Class 3 is not known: however loud, it has no say.
    assert margin(logits, 1, [0, 1, 2]).tolist() == [3.5, -3.5]
    assert margin(logits, 1, [0, 2]).tolist() == [3.5, -3.5], "the class needs no place among the known"
    # A network that knows nothing else is compared with all the rest.
    expected = [5 - (1 + 2 + 9) / 3, 0 - (4 + 3 - 1) / 3]
    for known in ([1], [], [0, 1, 2, 3]):
        assert margin(logits, 1, known).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("known", [[0, 1, 3], [1, 2], [1], [0, 1, 2, 3]])
def test_a_margin_is_a_row_of_the_head(known: list[int]) -> None:
    weight, bias, features = normal(4, 6), normal(4, seed=1), normal(9, 6, seed=2)
    row, shift = margin_row(weight, bias, 1, known)
    expected = margin(features @ weight.T + bias, 1, known)
    assert torch.allclose(features @ row + shift, expected, atol=1e-5)


# --- consensus ------------------------------------------------------------------------------------


def test_consensus_by_hand() -> None:
    # One knows 0 and 1, the other 1 and 3; class 2 is nobody's.
    one, other = torch.tensor([[4.0, 1.0, 9.0, 9.0]]), torch.tensor([[9.0, 2.0, 9.0, 7.0]])
    known = [(0, 1), (1, 3)]
    assert consensus([one, other], known, (0, 1, 3), local_weight=1.0).tolist() == [
        [3.0, (-3.0 - 5.0) / 2, 0.0, 5.0]
    ]
    # The first is the hospital's own.
    assert consensus([one, other], known, (1,), local_weight=2.0)[0, 1] == pytest.approx((2 * -3.0 - 5.0) / 3)
    assert consensus([one, other], known, (0,), local_weight=2.0).tolist() == [[3.0, 0.0, 0.0, 0.0]]


def test_calibrated_loss_by_hand() -> None:
    scores = torch.tensor([[9.0, 4.0, 4.0], [9.0, 4.0, 4.0], [9.0, 0.0, 8.0]])
    # All alike at every temperature; class 0 is none of the classes.
    assert calibrated_loss(scores[:2], torch.tensor([1, 2]), (1, 2), task=MULTICLASS) == pytest.approx(
        math.log(2)
    )
    # Class 1 at ln 2, class 2 at ln(1 + exp(-8 / 0.1)) = 0, the lowest temperature: classes count alike.
    found = calibrated_loss(scores, torch.tensor([1, 1, 2]), (1, 2), task=MULTICLASS)
    assert found == pytest.approx(math.log(2) / 2)
    wrong = calibrated_loss(scores[2:], torch.tensor([1]), (1, 2), task=MULTICLASS)
    assert wrong == pytest.approx(math.log(1 + math.exp(0.8))), "at 10, the highest temperature"


def test_local_weight_relies_on_teachers_as_far_as_they_know_the_hospitals_images() -> None:
    labels = torch.arange(3).repeat(40)
    right = 4 * F.one_hot(labels, 4).float() + normal(120, 4)
    stranger = 40 * normal(120, 4, seed=1)
    known = [(0, 1, 2), (0, 1, 2, 3)]
    assert local_weight([right, stranger], known, (0, 1, 2), labels, task=MULTICLASS) == 4.0
    better = 4 * F.one_hot(labels, 4).float() + normal(120, 4, seed=2)
    assert local_weight([right, better], known, (0, 1, 2), labels, task=MULTICLASS) == 1.0
    wrong = 4 * F.one_hot((labels + 1) % 3, 4).float()
    assert local_weight([wrong, right], known, (0, 1, 2), labels, task=MULTICLASS) == 1.0
    # Nothing to choose by: no teacher of a local class, one local class, no image of any.
    for kn, local, y in (
        ([(0, 1, 2), (3,)], (0, 1, 2), labels),
        (known, (0,), torch.zeros_like(labels)),
        (known, (0, 1), torch.full_like(labels, 2)),
    ):
        assert local_weight([right, stranger], kn, local, y, task=MULTICLASS) == 1.0


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, 3e38])
def test_local_weight_of_answers_that_are_not_finite(nonsense: float) -> None:
    labels, logits = torch.tensor([0, 1]), torch.tensor([[1.0, nonsense], [nonsense, -nonsense]])
    assert local_weight([logits, logits], [(0, 1), (0, 1)], (0, 1), labels, task=MULTICLASS) in LOCAL_WEIGHTS


def test_local_weight_is_the_smallest_that_is_as_good_as_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, logits = torch.tensor([0, 1]), [torch.zeros(2, 3), torch.zeros(2, 3)]
    for losses, expected in (
        ((1.06, 1.04, 1.0), 2.0),
        ((1.05, 1.0, 1.0), 1.0),
        ((1.2, 1.1, 1.0), 4.0),
        ((1.0, 2.0, 3.0), 1.0),
    ):
        given = iter(losses)
        monkeypatch.setattr(objectives, "calibrated_loss", lambda *_, g=given, **__: next(g))
        assert local_weight(logits, [(0, 1), (0, 1)], (0, 1), labels, task=MULTICLASS) == expected


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_the_consensus_is_linear_in_all_features_side_by_side(seed: int, count: int) -> None:
    draw = np.random.default_rng(seed)
    known = [tuple(sorted(draw.choice(5, draw.integers(1, 5), replace=False).tolist())) for _ in range(count)]
    relevant = sorted({c for k in known for c in k if c != draw.integers(5)})
    widths = [2 + i for i in range(count)]
    heads = [(normal(5, w, seed=seed + w), normal(5, seed=seed + 9 * w)) for w in widths]
    features = [normal(7, w, seed=seed + 100 * w) for w in widths]
    logits = [f @ weight.T + bias for f, (weight, bias) in zip(features, heads, strict=True)]
    rows = consensus_rows(heads, known, relevant, 4.0)
    summed = torch.stack([f @ w.T + b for f, (w, b) in zip(features, rows, strict=True)]).sum(dim=0)
    expected = consensus(logits, known, relevant, 4.0)
    assert torch.allclose(summed, expected, atol=1e-4)
    outside = [c for c in range(5) if c not in relevant]
    assert bool((expected[:, outside] == 0).all())
    assert all(bool((w[outside] == 0).all()) and bool((b[outside] == 0).all()) for w, b in rows)


def test_a_network_says_nothing_of_a_class_that_it_does_not_know() -> None:
    heads = [(normal(4, 3), normal(4, seed=1)), (normal(4, 2, seed=2), normal(4, seed=3))]
    rows = consensus_rows(heads, [(0, 1), (1, 3)], (0, 1, 3), 2.0)
    assert [w.shape for w, _ in rows] == [(4, 3), (4, 2)]
    assert bool((rows[0][0][3] == 0).all())
    assert bool((rows[1][0][0] == 0).all())
    assert torch.equal(rows[0][0][0], heads[0][0][0] - heads[0][0][1])


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


def test_ridge_beyond_single_precision_is_an_error() -> None:
    with pytest.raises(ArithmeticError, match="no finite solution"):
        ridge(normal(50, 4) * 1e-30, normal(50, 2, seed=1) * 1e30, 1e-2)


# --- the operating point --------------------------------------------------------------------------


def test_allowed_by_hand() -> None:
    # k of n go away where (k + 1) / (n + 1) is within the budget.
    assert allowed(0.05, 99) == 4
    assert allowed(0.05, 100) == 4
    assert allowed(0.5, 3) == 1
    assert allowed(0.05, 19) == 0
    assert allowed(0.05, 5) == 0, "too few images to promise anything: no false query is allowed"


@given(st.floats(0.001, 0.5), st.integers(1, 2000))
def test_allowed_keeps_the_conformal_bound(budget: float, count: int) -> None:
    number = allowed(budget, count)
    assert number == 0 or (number + 1) / (count + 1) <= budget * (1 + 1e-9)
    assert (number + 2) / (count + 1) > budget * (1 - 1e-9)
    assert number / count <= budget


def test_query_scores_by_hand() -> None:
    logits = torch.tensor([[1.0, 4.0, 7.0, 0.0], [2.0, -2.0, 5.0, 1.0]])
    # The largest local logits are 4 and 2.
    assert query_scores(logits, [0, 1], [3, 2]).tolist() == [[-4.0, 3.0], [-1.0, 3.0]]


def test_offset_by_hand() -> None:
    # 19 images at 0, 1, ..., 18 and a budget of 0.2: (3 + 1) / 20, so that three go away.
    scores = torch.arange(19.0)[:, None]
    offset = offset_for_budget(scores, 0.2)
    assert isinstance(offset, float)
    # The image at 15 stays, by a hair; that at 16 goes.
    assert offset == pytest.approx(-15.0, abs=1e-3)
    assert 15 + offset < 0 < 16 + offset
    assert false_query_rate(scores, torch.tensor([offset])) == pytest.approx(3 / 19)


def test_offset_between_two_images_by_hand() -> None:
    # 29 images and a budget of 0.05: 1.5 of 30, half way between the highest two. One goes away.
    scores = torch.arange(29.0)[:, None]
    assert offset_for_budget(scores, 0.05) == pytest.approx(-27.5, abs=1e-3)
    # One was given away already: half an image is left, for which none goes.
    assert offset_for_budget(scores, 0.05, lost=1 / 29) == pytest.approx(-28.0, abs=1e-3)
    # Of 18 images none can promise it.
    assert offset_for_budget(scores[:18], 0.05) == pytest.approx(-17.0, abs=1e-3)


def test_small_classes_weigh_more_by_hand() -> None:
    # 18 images of a class at 0 to 17, two of another at 18 and 19. The mean class has 10 images, so that the
    # small one weighs as if it had 5: 18 x 1 + 2 x 2.5 = 23.
    scores, labels = torch.arange(20.0)[:, None], torch.tensor([0] * 18 + [1] * 2)
    assert class_weights(labels).tolist() == pytest.approx([20 / 23] * 18 + [50 / 23] * 2)
    # Of a budget of 0.2, 4.2 of 21: four images by number; weighed one of 50 / 23, and 0.932 of the second.
    assert offset_for_budget(scores, 0.2) == pytest.approx(-15.8, abs=1e-3)
    assert offset_for_budget(scores, 0.2, labels=labels) == pytest.approx(-18.068, abs=1e-3)
    # By number it is less where the large class comes near the query: then that counts.
    assert offset_for_budget(-scores, 0.2, labels=labels) == offset_for_budget(-scores, 0.2)
    # Of classes of about one size it is the same.
    alike = torch.tensor([0] * 11 + [1] * 5 + [2] * 4)
    assert class_weights(alike).tolist() == [1.0] * 20
    assert offset_for_budget(scores, 0.2, labels=alike) == offset_for_budget(scores, 0.2)


@given(st.integers(0, 1000), st.floats(0.02, 0.4), st.integers(1, 3))
def test_offsets_keep_both_budgets(seed: int, budget: float, classes: int) -> None:
    scores, labels = normal(120, classes, seed=seed), torch.tensor([0] * 90 + [1] * 24 + [2] * 6)
    gone = (scores + offsets_for_budget(scores, budget, labels=labels)).max(dim=1).values > 0
    assert float(gone.double().mean()) <= budget
    assert float((class_weights(labels) * gone).mean()) <= budget


def test_scores_of_training_images_as_if_held_out_by_hand() -> None:
    labels = torch.tensor([0] * 5 + [1] * 5 + [2] * 4)
    held_out = torch.tensor([*range(5), *range(10, 15), *[90.0] * 4])[:, None]
    learned = held_out - torch.tensor([3.0] * 5 + [5.0] * 5 + [70.0] * 4)[:, None]
    # Medians lie 3 and 5 lower; four images of a class say nothing.
    moved = as_if_held_out(learned, labels, held_out, labels)
    torch.testing.assert_close(moved, learned + 4.0)
    # Of two query classes the louder counts, and both are moved alike.
    quiet = torch.full_like(learned, -1000.0)
    both = as_if_held_out(
        torch.cat([learned, quiet], dim=1), labels, torch.cat([quiet, held_out], dim=1), labels
    )
    torch.testing.assert_close(both, torch.cat([learned, quiet], dim=1) + 4.0)
    assert torch.equal(as_if_held_out(learned[10:], labels[10:], held_out, labels), learned[10:])


@given(st.integers(0, 1000), st.floats(-5, 5))
def test_images_of_the_same_kind_are_moved_back(seed: int, lower: float) -> None:
    scores, labels = normal(60, 2, seed=seed), torch.arange(60) % 3
    moved = as_if_held_out(scores - lower, labels, scores, labels)
    torch.testing.assert_close(moved, scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [20, 30, 50, 75])
def test_few_images_spend_the_budget(count: int) -> None:
    # Of uniform scores a share of 1 - bound exceeds the bound: on average the budget, of few images too.
    draws = torch.rand(4000, count, generator=torch.Generator().manual_seed(count))
    spent = [1 + offset_for_budget(scores[:, None], 0.05) for scores in draws]
    assert sum(spent) / len(spent) == pytest.approx(0.05, abs=0.002)


def test_two_query_classes_share_the_offset() -> None:
    # Of each image the louder class counts: the highest scores are 50, 40, 5 and 4.
    scores = torch.tensor([[0.0, 0.0]] * 26 + [[5.0, 1.0], [4.0, 3.0], [0.0, 50.0], [0.0, 40.0]])
    assert allowed(0.13, 30) == 3
    offset = offset_for_budget(scores, 0.13)
    assert offset == pytest.approx(-4.0, abs=1e-2)
    assert false_query_rate(scores, torch.full((2,), offset)) == pytest.approx(3 / 30)
    assert offset_for_budget(scores.flip(1), 0.13) == offset


def test_offsets_of_two_query_classes_by_hand() -> None:
    # 99 images; the first class's scores reach 98, the second's 9.8. Of a budget of 0.1 each alone has 0.05
    # of 100, the fifth highest: 94 and 9.4. They differ by 84.6, a quarter of it stays between the offsets.
    ramp = torch.arange(99.0)
    scores = torch.stack([ramp, 0.1 * ramp.flip(0)], dim=1)
    offsets = offsets_for_budget(scores, 0.1)
    assert float(offsets[1] - offsets[0]) == pytest.approx(0.25 * 84.6, abs=1e-2)
    assert round(false_query_rate(scores, offsets) * 99) == 9, "the budget is spent"
    (alone,) = offsets_for_budget(scores[:, :1], 0.1).tolist()
    assert alone == pytest.approx(offset_for_budget(scores[:, :1], 0.1))
    # Classes whose scores lie alike share an offset.
    alike = torch.stack([ramp, ramp.flip(0)], dim=1)
    one, other = offsets_for_budget(alike, 0.1).tolist()
    assert one == other == pytest.approx(offset_for_budget(alike, 0.1))


@given(st.integers(0, 1000), st.floats(0.01, 0.3), st.integers(1, 4))
def test_offsets_together_keep_the_budget(seed: int, budget: float, classes: int) -> None:
    scores = normal(120, classes, seed=seed) * torch.arange(1, classes + 1)
    assert false_query_rate(scores, offsets_for_budget(scores, budget)) <= budget


@st.composite
def calibration(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], float]:
    """Logits (N, 5) of a student, the query, a budget."""
    count, classes = draw(st.integers(1, 120)), draw(st.integers(1, 3))
    seed, scale = draw(st.integers(0, 10_000)), draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
    logits = normal(count, 5, seed=seed) * scale
    if draw(st.booleans()):
        logits = logits.round()  # ties
    return logits, list(range(2, 2 + classes)), draw(st.floats(0.001, 0.5))


@given(calibration())
def test_the_budget_is_kept_by_the_answers_themselves(case: tuple[torch.Tensor, list[int], float]) -> None:
    logits, query, budget = case
    scores = query_scores(logits, [0, 1], query)
    offsets = torch.full((len(query),), offset_for_budget(scores, budget))
    assert false_query_rate(scores, offsets) <= budget
    answers = decide(logits, [0, 1], query, offsets).argmax(dim=1)
    assert sum(int((answers == q).sum()) for q in query) / len(logits) <= budget


@given(calibration())
def test_no_more_could_be_false_query_rate(case: tuple[torch.Tensor, list[int], float]) -> None:
    logits, query, budget = case
    scores = query_scores(logits, [0, 1], query)
    offset = offset_for_budget(scores, budget)
    highest = (scores + offset).max(dim=1).values
    kept = highest[highest <= 0]
    # Lift the offset just past the next image: one more than allowed goes away.
    lifted = offset - kept.max() + 1e-4 * scores.abs().max().clamp(min=1)
    assert false_query_rate(scores, lifted.expand(len(query))) * len(scores) > allowed(budget, len(scores))


# --- the answer -----------------------------------------------------------------------------------


def test_what_is_kept_today_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 9.0, 2.5], [1.0, 2.0, 9.0, 2.5], [0.0, 0.0, 9.0, 5.0]])
    # Class 2 is not asked about; the second and third image go to class 3 already.
    assert kept_today(logits, [0, 1], [3], task=MULTICLASS).tolist() == [True, False, False]
    assert kept_today(logits[1:], [0, 1], [3], task=MULTICLASS).tolist() == [True, True], (
        "nothing is left to promise"
    )


def test_decision_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 9.0, 2.5], [1.0, 2.0, 9.0, 2.0]])
    scores = decide(logits, [0, 1], [3], torch.tensor([0.25]))
    # Class 2 is not asked about.
    assert scores.tolist() == [[3.0, 1.0, -math.inf, 2.75], [1.0, 2.0, -math.inf, 2.25]]
    assert scores.argmax(dim=1).tolist() == [0, 3]


@given(st.integers(0, 10_000))
def test_the_answer_is_the_definitions(seed: int) -> None:
    """A query class is named where its score exceeds 0, the loudest of them first; else the local argmax."""
    local, query = [4, 0], [3, 1]
    logits, offsets = normal(40, 6, seed=seed), normal(2, seed=seed + 2)
    answers = decide(logits, local, query, offsets).argmax(dim=1)
    for i in range(40):
        most = max(float(logits[i, c]) for c in local)
        speaks = [float(logits[i, q]) - most + float(o) for q, o in zip(query, offsets, strict=True)]
        if max(speaks) > 1e-4:
            assert int(answers[i]) == query[speaks.index(max(speaks))]
        elif max(speaks) < -1e-4:
            assert float(logits[i, int(answers[i])]) == most
            assert int(answers[i]) in local


# --- the budget covers all that is forgotten ----------------------------------------------------------


def test_forgotten_by_hand() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    right = F.one_hot(labels, 3).float()
    worse = F.one_hot(torch.tensor([0, 1, 1, 0]), 3).float()
    loud = right + torch.tensor([0.0, 0.0, 9.0])  # class 2 is none of the hospital's own
    assert forgotten(right, worse, (0, 1), labels, task=MULTICLASS) == 2
    assert forgotten(worse, right, (0, 1), labels, task=MULTICLASS) == 0, "what is gained is not owed"
    assert forgotten(right, loud, (0, 1), labels, task=MULTICLASS) == 0


def test_what_is_forgotten_is_taken_off_the_budget() -> None:
    scores = torch.arange(99.0).reshape(-1, 1)
    for lost, spent in ((0, 9), (4, 5), (9, 0), (50, 0)):
        offset = torch.tensor([offset_for_budget(scores, 0.1, lost=lost / 99)])
        assert round(false_query_rate(scores, offset) * 99) == spent


def test_where_a_teacher_confuses_own_classes_the_own_network_stands_alone() -> None:
    labels = torch.arange(40) % 2
    own = 0.1 * F.one_hot(labels, 3).float()
    wrong = 20.0 * F.one_hot(1 - labels, 3).float()
    known, weights = [(0, 1), (0, 1, 2)], (*LOCAL_WEIGHTS, *GUARDING_WEIGHTS)

    def chosen(budget: float) -> float:
        return local_weight(
            [own, wrong], known, (0, 1), labels, task=MULTICLASS, budget=budget, weights=weights
        )

    assert chosen(0.05) == GUARDING_WEIGHTS[-1]
    view = consensus([own, wrong], known, (0, 1), chosen(0.05))
    assert forgotten(own, view, (0, 1), labels, task=MULTICLASS) == 0
    hopeless = [own, 100 * wrong]
    largest = local_weight(hopeless, known, (0, 1), labels, task=MULTICLASS, budget=0.0, weights=weights)
    assert largest == GUARDING_WEIGHTS[-1], "every weight costs more: the largest counts"
