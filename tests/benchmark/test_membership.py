from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.membership import auc, confidence, found_at, halves, lira, negative_loss

MEMBERS = np.array([True, True, False, False])


def test_confidence_is_the_log_odds_of_the_right_class() -> None:
    logits = np.array([[math.log(3), 0.0, -np.inf], [math.log(2), 0.0, 0.0], [1000.0, 0.0, 0.0]])
    # p = 3/4; p = 2/4; and p = 1 within a double, whose odds are finite nevertheless.
    assert confidence(logits, np.array([0, 0, 0])) == pytest.approx([math.log(3), 0.0, 1000 - math.log(2)])
    # Of the second class of the first image p = 1/4.
    views = confidence(np.stack([logits, logits])[:, :1], np.array([1]))
    assert views == pytest.approx(np.full((2, 1), -math.log(3)))


def test_the_loss() -> None:
    logits = np.array([[math.log(3), 0.0], [-1000.0, 0.0]], dtype=np.float32)
    assert negative_loss(logits, np.array([0, 0])) == pytest.approx([math.log(3 / 4), -1000.0])


def test_every_image_is_in_half_of_the_models() -> None:
    inside = halves(6, 200, seed=0)
    assert inside.shape == (6, 200)
    assert (inside.sum(axis=0) == 3).all()
    assert 70 < inside.sum(axis=1).min() < inside.sum(axis=1).max() < 130
    assert np.array_equal(inside, halves(6, 200, seed=0))
    assert not np.array_equal(inside, halves(6, 200, seed=1))
    with pytest.raises(ValueError, match="no half"):
        halves(5, 200, seed=0)


SHADOWS = np.array([[1.0, 4.0], [3.0, 6.0], [5.0, 0.0], [9.0, 2.0]])
INSIDE = np.array([[False, True], [False, True], [True, False], [True, False]])


def test_lira_offline_by_hand() -> None:
    # Without image 0: 1 and 3; without image 1: 0 and 2. Squares 4, degrees of freedom 2: sd sqrt(2).
    found = lira(np.array([4.0, 1.0]), SHADOWS, INSIDE, online=False)
    assert found == pytest.approx([2 / math.sqrt(2), 0.0])


def test_lira_online_by_hand() -> None:
    # With image 0: 5 and 9, mean 7; with image 1: 4 and 6, mean 5. Squares 10: variance 5; outside 2.
    target = np.array([4.0, 1.0])
    wanted = [-(9 / 10) + (4 / 4), -(16 / 10) + 0.0]
    found = lira(target, SHADOWS, INSIDE, online=True)
    assert found == pytest.approx([w - 0.5 * math.log(5 / 2) for w in wanted])


def test_lira_finds_members_whose_confidence_rises() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, 300)  # how hard an image is, which the loss threshold takes for membership
    inside = halves(16, 300, seed=1)
    said = hard + 3.0 * inside + rng.normal(size=inside.shape)
    online = lira(said[0], said[1:], inside[1:], online=True)
    offline = lira(said[0], said[1:], inside[1:], online=False)
    # Two normals 3 standard deviations apart, image by image: AUC Phi(3 / sqrt 2) = 0.983.
    assert auc(online, inside[0]) == pytest.approx(0.98, abs=0.02)
    assert auc(offline, inside[0]) == pytest.approx(0.98, abs=0.02)
    assert auc(said[0], inside[0]) < 0.75
    assert found_at(online, inside[0]) > 0.5


@pytest.mark.parametrize("online", [True, False])
def test_an_image_without_shadow_models_of_a_kind(online: bool) -> None:
    inside = np.ones_like(INSIDE) if not online else np.zeros_like(INSIDE)
    with pytest.raises(ValueError, match="shadow model of each kind"):
        lira(np.zeros(2), SHADOWS, inside, online=online)


def test_auc_and_members_found_by_hand() -> None:
    scores = np.array([0.9, 0.4, 0.5, 0.1])
    # 3 of 4 pairs in order, ties half.
    assert auc(scores, MEMBERS) == 3 / 4
    assert auc(np.zeros(4), MEMBERS) == 0.5
    # No non-member taken for one: only the first is found; with half of them, both are.
    assert found_at(scores, MEMBERS) == 1 / 2
    assert found_at(scores, MEMBERS, 0.5) == 1.0
    assert found_at(-scores, MEMBERS) == 0.0
