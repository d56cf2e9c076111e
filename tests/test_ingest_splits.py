from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkt_clinical.catalog import SPLITS
from qkt_clinical.config.params import SplitFractions
from qkt_clinical.errors import SourceError
from qkt_clinical.ingest.splits import SEATS, assign, keep_given

SHARES = {s: getattr(SplitFractions(), s) for s in SPLITS}


def labels_of(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


cohorts = st.lists(  # one patient: its class, how many images
    st.tuples(st.integers(0, 4), st.integers(1, 30)), min_size=1, max_size=60
)


@settings(max_examples=150, deadline=None)
@given(cohorts, st.integers(0, 2**31))
def test_no_patient_is_divided_and_every_class_gets_its_seats(
    cohort: list[tuple[int, int]], seed: int
) -> None:
    patients = [f"p{i}" for i, (_, n) in enumerate(cohort) for _ in range(n)]
    labels = labels_of([c for c, n in cohort for _ in range(n)])
    splits = assign(patients, labels, SHARES, seed)
    together = np.sort(np.concatenate([splits[s] for s in SPLITS]))
    np.testing.assert_array_equal(together, np.arange(len(patients)))
    owners = [{patients[i] for i in splits[s]} for s in SPLITS]
    assert sum(map(len, owners)) == len(set(patients))
    for c in set(labels.tolist()):
        count = sum(1 for kind, _ in cohort if kind == c)
        for split in SEATS[:count]:
            assert c in labels[splits[split]], (c, count, split)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=30),
    st.integers(0, 99),
)
def test_patients_with_several_classes_are_not_divided_either(cohort: list[list[int]], seed: int) -> None:
    patients = [f"p{i}" for i, images in enumerate(cohort) for _ in images]
    labels = labels_of([c for images in cohort for c in images])
    splits = assign(patients, labels, SHARES, seed)
    assert sorted(np.concatenate([splits[s] for s in SPLITS]).tolist()) == list(range(len(patients)))
    owners = [{patients[i] for i in splits[s]} for s in SPLITS]
    assert sum(map(len, owners)) == len(set(patients))
    assert len(splits["train"])  # somebody to train on


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.permutations(range(60)))
def test_order_of_images_does_not_matter(seed: int, order: list[int]) -> None:
    rng = np.random.default_rng(1)
    patients = [f"p{i}" for i in rng.integers(0, 20, 60)]
    labels = labels_of(rng.integers(0, 3, 60).tolist())
    straight = assign(patients, labels, SHARES, seed)
    shuffled = assign([patients[i] for i in order], labels[order], SHARES, seed)
    for split in SPLITS:
        assert {patients[i] for i in straight[split]} == {patients[order[i]] for i in shuffled[split]}


@pytest.mark.parametrize("seed", range(5))
def test_shares_per_class_are_near_the_wanted_ones(seed: int) -> None:
    """80 patients of 2 to 12 images, 4 classes of very different size."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(4, 80, p=[0.5, 0.25, 0.15, 0.1])
    sizes = rng.integers(2, 13, 80)
    patients = [f"p{i}" for i, n in enumerate(sizes) for _ in range(n)]
    labels = labels_of(np.repeat(kinds, sizes).tolist())
    splits = assign(patients, labels, SHARES, seed)
    for c in range(4):
        total = (labels == c).sum()
        for split in SPLITS:
            got = (labels[splits[split]] == c).sum() / total
            assert abs(got - SHARES[split]) < max(0.03, 8 / total), (c, split)


def test_single_images_split_exactly() -> None:
    splits = assign([f"p{i}" for i in range(1000)], labels_of([0, 1] * 500), SHARES, 3)
    assert {s: len(splits[s]) for s in SPLITS} == {"train": 550, "calibration": 150, "val": 100, "test": 200}


def test_seed_decides_and_share_zero_gets_nothing() -> None:
    patients, labels = [f"p{i}" for i in range(100)], labels_of([0] * 100)
    first, second = (assign(patients, labels, SHARES, seed)["test"] for seed in (0, 1))
    assert first.tolist() != second.tolist()
    none = assign(patients, labels, {"train": 0.8, "calibration": 0.0, "val": 0.0, "test": 0.2}, 0)
    assert [len(none[s]) for s in ("train", "calibration", "val", "test")] == [80, 0, 0, 20]


def test_given_splits_stay_and_calibration_comes_out_of_train() -> None:
    given_splits = ["train"] * 70 + ["val"] * 10 + ["test"] * 20
    patients = [f"p{i // 2}" for i in range(100)]
    labels = labels_of([i // 2 % 2 for i in range(100)])
    splits = keep_given(given_splits, patients, labels, SHARES, 0, site="s")
    assert splits["val"].tolist() == list(range(70, 80))
    assert splits["test"].tolist() == list(range(80, 100))
    assert sorted([*splits["train"], *splits["calibration"]]) == list(range(70))
    assert len(splits["calibration"]) == 16  # 15 of 70, in patients of two images
    assert not {patients[i] for i in splits["train"]} & {patients[i] for i in splits["calibration"]}


def test_patient_in_two_given_splits_is_an_error() -> None:
    with pytest.raises(SourceError) as caught:
        keep_given(["train", "test"], ["p", "p"], labels_of([0, 0]), SHARES, 0, site="s")
    assert caught.value.code == "patient-in-two-splits"
