from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from qkt_clinical.evaluation.metrics import (
    Assessment,
    assess,
    auroc,
    average_precision,
    by_subgroup,
    calibration_errors,
    error_interval,
    expected_calibration_error,
    false_query_rate,
    paired_p,
    patient_weights,
    reliability,
)
from qkt_clinical.evaluation.metrics import TestSet as Held
from qkt_clinical.records.base import Estimate
from qkt_clinical.records.evaluation import Bin, SubgroupScores
from qkt_clinical.task import MULTICLASS


def one_hot(predicted: list[int], classes: int) -> NDArray[np.float64]:
    return np.eye(classes)[predicted] * 5.0


# --- parts ----------------------------------------------------------------------------------------


def test_patients_are_drawn_whole() -> None:
    patients = np.array(["b", "a", "b", "c", "a", "b"])
    weights = patient_weights(patients, 400, seed=0)
    assert weights.shape == (400, 6)
    assert (weights[:, [0]] == weights[:, [2, 5]]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    # Three patients drawn with replacement: their counts sum to 3, and on average each comes once.
    counts = weights[:, [0, 1, 3]]
    assert (counts.sum(axis=1) == 3).all()
    np.testing.assert_allclose(counts.mean(axis=0), 1.0, atol=0.15)
    assert set(np.unique(counts)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(weights, patient_weights(patients, 400, seed=0))
    assert (weights != patient_weights(patients, 400, seed=1)).any()


@pytest.mark.parametrize("digits", [0, 1, 8])
def test_auroc_is_that_of_scikit_learn_with_ties_and_weights(digits: int) -> None:
    random = np.random.default_rng(1)
    positive = random.random(80) < 0.3
    scores = (random.normal(size=80) + positive).round(digits)
    weights = np.concatenate([np.ones((1, 80)), random.integers(0, 4, (5, 80))])
    found = auroc(scores, positive, weights)
    expected = [roc_auc_score(positive, scores, sample_weight=w) for w in weights]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_auroc_by_hand() -> None:
    # 2 x 3 pairs: 3 beats all three, 1 beats one and ties one.
    scores, positive = np.array([3.0, 1.0, 0.0, 1.0, 2.0]), np.array([True, True, False, False, False])
    assert auroc(scores, positive, np.ones((1, 5))).tolist() == [(3 + 1 + 0.5) / 6]
    assert np.isnan(auroc(scores, positive, np.array([[0.0, 0.0, 1.0, 1.0, 1.0]]))).all()


def test_calibration_error_by_hand() -> None:
    # Confidences 0.9 (right), 0.9 (wrong), 0.6 (right) and 1.0 (right), in ten bins.
    confidence, right = np.array([0.9, 0.9, 0.6, 1.0]), np.array([True, False, True, True])
    # 0.9 and 1.0 share the last bin: |2/3 - 2.8/3| x 3/4; 0.6 alone: |1 - 0.6| x 1/4.
    expected = abs(2 - 2.8) / 4 + 0.4 / 4
    assert expected_calibration_error(confidence, right, bins=10) == pytest.approx(expected)
    assert expected_calibration_error(np.ones(3), np.ones(3, bool)) == 0.0
    assert expected_calibration_error(np.ones(3), np.zeros(3, bool)) == 1.0


def test_calibration_errors_of_draws_are_those_of_the_images_drawn() -> None:
    random = np.random.default_rng(3)
    confidence, right = random.uniform(0.3, 1.0, 60), random.random(60) < 0.6
    weights = random.integers(0, 4, (5, 60))
    found = calibration_errors(confidence, right, weights.astype(float))
    for row, error in zip(weights, found, strict=True):
        drawn = np.repeat(np.arange(60), row)
        assert error == pytest.approx(expected_calibration_error(confidence[drawn], right[drawn]))


def test_the_interval_of_the_calibration_error_by_hand() -> None:
    draws = np.linspace(0.05, 0.15, 101)
    found = error_interval(np.array([0.08, *draws]), 0.9)
    assert found.value == 0.08
    assert (found.low, found.high) == pytest.approx((2 * 0.08 - 0.145, 2 * 0.08 - 0.055))
    far = error_interval(np.array([0.02, *draws]), 0.9)
    assert far == Estimate(value=0.02, low=0.0, high=0.02), "no less than nothing, and it holds the figure"
    assert error_interval(np.array([0.08]), 0.9) == Estimate(value=0.08, low=0.08, high=0.08)


def test_the_interval_of_the_calibration_error_holds_the_true_one() -> None:
    """A model that is 0.07 too sure of itself, measured sixty times on 150 images of 75 patients."""
    random = np.random.default_rng(0)
    patients = np.repeat(np.arange(75), 2).astype(str)
    holds, quantiles = 0, 0
    for seed in range(60):
        sure = np.clip(random.beta(6, 1.2, 150), 0.26, 0.9999)
        right = random.random(150) < sure - 0.07
        weights = np.concatenate([np.ones((1, 150)), patient_weights(patients, 200, seed)])
        errors = calibration_errors(sure, right, weights)
        found = error_interval(errors, 0.95)
        holds += found.low <= 0.07 <= found.high
        quantiles += bool(np.quantile(errors[1:], 0.025) <= 0.07)
    assert holds >= 0.8 * 60
    assert quantiles < holds, "the draws' own quantiles lie too high"


def test_the_calibration_error_is_drawn_by_patient() -> None:
    """The same images of many patients and of few: of few, less is known."""
    random = np.random.default_rng(4)
    labels = np.repeat([0, 1, 2], 40)
    scores = 3 * random.normal(size=(120, 3)) + 2 * np.eye(3)[labels]
    many, few = np.arange(120).astype(str), np.repeat(np.arange(12), 10).astype(str)
    found = [
        assess(held(p, labels), scores, scores, draws=300, confidence=0.95, seed=0).after.ece
        for p in (many, few)
    ]
    sure = MULTICLASS.confidence(MULTICLASS.probabilities(scores), labels)
    for ece in found:
        assert ece.value == pytest.approx(expected_calibration_error(*sure), abs=1e-6)
        assert 0.0 <= ece.low < ece.value <= ece.high <= 1.0
    assert found[0] != found[1]


@pytest.mark.parametrize("digits", [0, 1, 8])
def test_average_precision_is_that_of_scikit_learn_with_ties_and_weights(digits: int) -> None:
    random = np.random.default_rng(digits)
    positive = random.random(150) < 0.3
    scores = (random.normal(size=150) + positive).round(digits)
    weights = random.integers(0, 4, (5, 150)).astype(float)
    found = average_precision(scores, positive, weights)
    expected = [average_precision_score(positive, scores, sample_weight=w) for w in weights]
    np.testing.assert_allclose(found, expected)
    assert np.isnan(average_precision(scores, positive, weights * ~positive)).all()


def test_reliability_by_hand() -> None:
    confidence, right = np.array([0.95, 0.95, 0.91, 0.6, 1.0]), np.array([True, False, True, False, True])
    assert reliability(confidence, right) == (
        Bin(confidence=0.6, accuracy=0.0, images=1),
        Bin(confidence=(0.95 + 0.95 + 0.91 + 1.0) / 4, accuracy=0.75, images=4),
    )


def test_paired_p_by_hand_and_by_patient() -> None:
    """Ten images of one class that all became right: of 1,024 ways to swap ten patients, two are as large."""
    test = Held(
        labels=np.zeros(10, int), patients=np.arange(10).astype(str), classes=1, query=(0,), task=MULTICLASS
    )
    wrong, right = np.zeros(10, bool), np.ones(10, bool)
    p = paired_p(test, wrong, right, draws=5000, seed=0)
    assert p == pytest.approx(2 / 1024, abs=1e-6)
    assert p == paired_p(test, right, wrong, draws=5000, seed=0)
    assert paired_p(test, wrong, right, draws=500, seed=0) <= 0.02, "of more ways than draws some at random"
    one = Held(labels=test.labels, patients=np.array(["a"] * 10), classes=1, query=(0,), task=MULTICLASS)
    assert paired_p(one, wrong, right, draws=1000, seed=0) == 1.0, "one patient says nothing"
    assert paired_p(test, right, right, draws=1000, seed=0) == 1.0


# --- the whole ------------------------------------------------------------------------------------

# Nine images, classes 0 and 1 local, class 2 the query.
LABELS = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
BEFORE = [0, 0, 0, 0, 1, 0, 0, 1, 1]
AFTER = [0, 0, 0, 2, 1, 1, 2, 2, 0]
PATIENTS = np.array([f"p{i}" for i in range(9)])


def held(
    patients: NDArray[Any] = PATIENTS, labels: NDArray[Any] = LABELS, query: tuple[int, ...] = (2,)
) -> Held:
    return Held(labels=labels, patients=patients, classes=3, query=query, task=MULTICLASS)


def run(test: Held, before: list[int], after: list[int], **changes: Any) -> Assessment:
    settings = {"draws": 200, "confidence": 0.95, "seed": 0, **changes}
    return assess(test, one_hot(before, 3), one_hot(after, 3), **settings)


def test_assess_by_hand() -> None:
    result = run(held(), BEFORE, AFTER)
    before, after = result.before, result.after
    assert held().local == (0, 1)
    assert before.query_accuracy.value == 0.0
    assert before.retained_accuracy.value == pytest.approx((1 + 1 / 2) / 2)
    assert before.balanced_accuracy.value == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert after.query_accuracy.value == pytest.approx(2 / 3, abs=1e-6)
    assert after.retained_accuracy.value == pytest.approx((3 / 4 + 1) / 2)
    assert after.balanced_accuracy.value == pytest.approx((3 / 4 + 1 + 2 / 3) / 3, abs=1e-6)
    assert [r.value for r in after.recall] == pytest.approx([3 / 4, 1.0, 2 / 3], abs=1e-6)
    assert before.confusion == ((4, 0, 0), (1, 1, 0), (1, 2, 0))
    assert after.confusion == ((3, 0, 1), (0, 2, 0), (1, 0, 2))
    # Query images score above (5) or below (-5): 2 of 3 above, 1 of 6 others above.
    assert after.auroc.value == pytest.approx((2 * (5 + 0.5) + 1 * (0.5 * 5)) / 18)
    assert before.auroc.value == 0.5
    assert result.gain.value == pytest.approx((3 / 4 + 1 + 2 / 3 - 1.5) / 3, abs=1e-6)
    assert result.query_gain.value == pytest.approx(2 / 3, abs=1e-6)
    assert result.forgetting.value == pytest.approx(0.75 - 0.875)
    assert [p.value for p in after.precision] == pytest.approx([3 / 4, 1.0, 2 / 3], abs=1e-6)
    # Class 0: 3 of its 4 images and one other score high, 1 of its images and 4 others low.
    assert after.class_auroc[0].value == pytest.approx((3 * (4 + 0.5) + 1 * (4 * 0.5)) / 20)
    assert after.class_auprc[0].value == pytest.approx(3 / 4 * 3 / 4 + 1 / 4 * 4 / 9, abs=1e-6)
    assert [f.value for f in result.class_forgetting] == pytest.approx([0.25, -0.5, -2 / 3], abs=1e-6)
    assert 0 < result.gain_p <= 1
    assert sum(b.images for b in after.reliability) == 9
    confidence = np.exp(5) / (np.exp(5) + 2)
    assert before.ece.value == pytest.approx(abs(5 / 9 - confidence), abs=1e-6)
    assert after.ece.value == pytest.approx(abs(7 / 9 - confidence), abs=1e-6)


def test_intervals_hold_the_value_and_shrink_with_confidence() -> None:
    wide, narrow = run(held(), BEFORE, AFTER), run(held(), BEFORE, AFTER, confidence=0.6)
    for side in ("before", "after"):
        for key in ("query_accuracy", "retained_accuracy", "balanced_accuracy"):
            w, n = (getattr(getattr(r, side), key) for r in (wide, narrow))
            assert w.low <= n.low <= n.high <= w.high
            assert w.low <= w.value <= w.high
    w, n = wide.after.balanced_accuracy, narrow.after.balanced_accuracy
    assert w.high - w.low > n.high - n.low > 0


def test_a_patients_images_move_together() -> None:
    """Forty images, half of them right: of two patients nothing is known, of forty a good deal."""
    labels = np.array([0] * 20 + [2] * 40 + [1] * 20)
    predicted = [0] * 20 + [2] * 20 + [0] * 20 + [1] * 20
    many = np.array([f"p{i}" for i in range(80)])
    few = np.array(["a"] * 20 + ["b"] * 20 + ["c"] * 20 + ["d"] * 20)
    fine = run(held(many, labels), predicted, predicted).after.query_accuracy
    coarse = run(held(few, labels), predicted, predicted).after.query_accuracy
    assert fine.value == coarse.value == 0.5
    assert (coarse.low, coarse.high) == (0.0, 1.0)
    assert fine.high - fine.low < 0.4


def test_no_change_is_no_gain_for_certain() -> None:
    result = run(held(), BEFORE, BEFORE)
    assert result.before == result.after
    for key in ("gain", "query_gain", "forgetting"):
        assert getattr(result, key) == Estimate(value=0.0, low=0.0, high=0.0)


def test_differences_are_paired() -> None:
    """One image more is right in every draw that has it: the gain is never below zero."""
    after = [*BEFORE[:5], 1, *BEFORE[6:]]
    gain = run(held(), BEFORE, after).gain
    assert gain.low >= 0.0
    assert gain.value == pytest.approx(0.5 / 3, abs=1e-6)


def test_same_seed_same_figures_and_no_draws_no_width() -> None:
    assert run(held(), BEFORE, AFTER) == run(held(), BEFORE, AFTER)
    assert run(held(), BEFORE, AFTER) != run(held(), BEFORE, AFTER, seed=1)
    value = run(held(), BEFORE, AFTER, draws=0).after.balanced_accuracy
    assert value.low == value.value == value.high


def test_several_query_classes_and_a_class_without_images() -> None:
    result = run(held(query=(1, 2)), BEFORE, AFTER)
    assert result.after.query_accuracy.value == pytest.approx((1 + 2 / 3) / 2, abs=1e-6)
    assert result.after.retained_accuracy.value == pytest.approx(3 / 4)
    part = held(PATIENTS[:6], LABELS[:6])
    result = run(part, BEFORE[:6], AFTER[:6])
    assert result.after.recall[2] is None
    assert result.after.auroc is None


def test_means_over_classes_and_calibration_of_one_class_by_hand() -> None:
    after = run(held(), BEFORE, AFTER).after
    assert after.macro_precision.value == pytest.approx((3 / 4 + 1 + 2 / 3) / 3, abs=1e-6)
    for name in ("auroc", "auprc"):
        mean = np.mean([c.value for c in getattr(after, f"class_{name}")])
        assert getattr(after, f"macro_{name}").value == pytest.approx(mean, abs=1e-6)
        assert getattr(after, f"macro_{name}").low < getattr(after, f"macro_{name}").high
    # Of class 1 two images score high, both rightly; of the seven others none is of it.
    high, low = np.exp(5) / (np.exp(5) + 2), 1 / (np.exp(5) + 2)
    assert after.class_ece[1] == pytest.approx((2 * (1 - high) + 7 * low) / 9, abs=1e-6)
    assert [(b.accuracy, b.images) for b in after.class_reliability[1]] == [(0.0, 7), (1.0, 2)]
    before = run(held(), BEFORE, BEFORE).before
    assert before.precision[2] is None, "never predicted"
    assert before.macro_precision.value == pytest.approx((4 / 6 + 1 / 3) / 2)


# --- groups and the operating point -----------------------------------------------------------------


def figures_of(scores: SubgroupScores) -> list[Estimate | None]:
    return [getattr(scores, name) for name in SubgroupScores.model_fields]


HOW: dict[str, Any] = {"draws": 100, "confidence": 0.95, "seed": 0}


def test_groups_by_hand() -> None:
    """Eighteen women, always right afterwards, and eighteen men, a third of them: one image each."""
    labels = np.array([0, 0, 1, 1, 2, 2] * 6)
    sex = np.array(["F"] * 18 + ["M"] * 18)
    after = [0, 0, 1, 1, 2, 2] * 3 + [0, 1, 0, 2, 2, 0] * 3
    before = [0, 0, 1, 1, 0, 0] * 6
    patients = np.array([f"p{i}" for i in range(36)])
    test = Held(labels=labels, patients=patients, classes=3, query=(2,), task=MULTICLASS)
    found = by_subgroup(test, one_hot(before, 3), one_hot(after, 3), {"sex": sex}, **HOW)
    assert set(found) == {"sex"}
    women, men = found["sex"]["F"], found["sex"]["M"]
    assert (women.images, women.patients) == (18, 18)
    for figure in figures_of(women.after):
        assert figure == Estimate(value=1.0, low=1.0, high=1.0)
    assert women.before.balanced_accuracy.value == pytest.approx(2 / 3, abs=1e-6)
    assert women.before.query_accuracy.value == 0.0
    assert men.after.query_accuracy.value == 0.5
    assert men.after.retained_accuracy.value == 0.25
    assert men.after.balanced_accuracy.value == pytest.approx((1 / 2 + 0 + 1 / 2) / 3, abs=1e-6)
    assert men.after.balanced_accuracy.low < men.after.balanced_accuracy.high


def test_no_figure_lets_one_of_few_patients_be_told() -> None:
    """Six patients with images of own classes, four with one of the query."""
    labels = np.array([0, 1, 0, 1, 0, 1, 2, 2, 2, 2])
    test = Held(labels=labels, patients=np.arange(10).astype(str), classes=3, query=(2,), task=MULTICLASS)
    scores = one_hot(labels.tolist(), 3)
    group = by_subgroup(test, scores, scores, {"x": np.array(["g"] * 10)}, **HOW)["x"]["g"]
    assert group.patients == 10
    assert group.after.retained_accuracy.value == 1.0
    assert group.after.query_accuracy is None
    assert group.after.balanced_accuracy is None


def test_groups_of_few_patients_have_no_figures_and_others_none_at_all() -> None:
    labels = np.array([0, 1, 2] * 4)
    column = np.array(["a"] * 6 + ["b"] * 3 + [""] * 3)
    patients = np.array(["p", "q"] * 3 + ["r", "s", "t"] * 2)
    test = Held(labels=labels, patients=patients, classes=3, query=(2,), task=MULTICLASS)
    scores = one_hot(labels.tolist(), 3)
    found = by_subgroup(test, scores, scores, {"scanner": column}, **HOW)["scanner"]
    assert {g: (v.images, v.patients) for g, v in found.items()} == {"a": (6, 2), "b": (3, 3)}
    assert all(
        figure is None for g in found.values() for side in (g.before, g.after) for figure in figures_of(side)
    )


def test_a_group_without_a_class_is_judged_by_the_others() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    test = Held(labels=labels, patients=np.arange(8).astype(str), classes=3, query=(2,), task=MULTICLASS)
    after = one_hot([0, 0, 0, 1, 1, 0, 2, 2], 3)
    group = by_subgroup(test, after, after, {"x": np.array(["g"] * 6 + [""] * 2)}, **HOW)["x"]["g"]
    assert group.after.query_accuracy is None
    assert group.after.retained_accuracy.value == pytest.approx((1 + 2 / 3) / 2, abs=1e-6)
    assert group.after.balanced_accuracy == group.after.retained_accuracy


def test_false_query_rate_on_own_images() -> None:
    """Of six images of own classes, four are the hospital's; one of them goes to the query."""
    own = np.array([True] * 4 + [False] * 2 + [True] * 3)
    found = false_query_rate(held(), own, one_hot(AFTER, 3), **HOW)
    assert found is not None
    assert found.value == 0.25
    assert 0.0 <= found.low < 0.25 < found.high <= 1.0
    assert false_query_rate(held(), np.zeros(9, bool), one_hot(AFTER, 3), **HOW) is None
