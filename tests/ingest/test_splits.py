from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qkt_clinical.catalog import SPLITS
from qkt_clinical.cli import main
from qkt_clinical.config.params import SplitFractions
from qkt_clinical.errors import SourceError
from qkt_clinical.ingest import warnings_of
from qkt_clinical.ingest.splits import SEATS, assign, empty_splits, keep_given
from qkt_clinical.stages.evaluate import NoTestImages, _judging_parts, _stacked
from qkt_clinical.stages.train import train_site
from tests.ingest_files import CLASSES, SITE, dicom, hospital, ingest, noise, params, save

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


FRACTIONS = {"train": 0.55, "calibration": 0.15, "val": 0.1, "test": 0.2}


@pytest.mark.parametrize(
    ("patients", "fractions", "words"),
    [
        (
            {"train": 1, "calibration": 0, "val": 0, "test": 0},
            FRACTIONS,
            ("calibration", "anonymiser", "1 patient "),
        ),
        ({"train": 2, "calibration": 0, "val": 1, "test": 1}, FRACTIONS, ("calibration", "4 patients")),
        ({"train": 2, "calibration": 0, "val": 1, "test": 1}, FRACTIONS | {"calibration": 0.0}, None),
        ({"train": 2, "calibration": 1, "val": 1, "test": 1}, FRACTIONS, None),
    ],
)
def test_an_empty_split_is_told(
    patients: dict[str, int], fractions: dict[str, float], words: tuple[str, ...] | None
) -> None:
    told = empty_splits(patients, fractions)
    assert (told is None) == (words is None)
    assert all(word in str(told) for word in words or ())


PATIENTS: dict[str, dict[str, Any]] = {
    "folder": {"from": "folder", "level": 1},
    "csv": {"from": "csv", "file": "t.csv", "key": "file", "column": "patient"},
    "tag": {"from": "tag", "tag": "PatientID"},
    "name": {"from": "tag", "tag": "PatientName"},
}


def site_of(root: Path, source: str, ids: Sequence[str]) -> Path:
    """A hospital of one image for each id."""
    data = hospital(root, "dicom", patient=PATIENTS[source])
    table = ["file,patient"]
    for i, patient in enumerate(ids):
        folder = data / "solid" / patient if source == "folder" else data / "solid"
        image = dicom(noise(i, 8, 8), patient=f"P{i}", SpecificCharacterSet="ISO_IR 192")
        if source == "tag":
            image.PatientID = patient
        if source == "name":
            image.PatientName = patient
        save(image, folder / f"{i}.dcm")
        table.append(f'{i}.dcm,"{patient}"')
    (data / "t.csv").write_text("\n".join(table), encoding="utf-8")
    return data


@pytest.mark.parametrize(
    ("source", "ids"),
    [
        *(
            (source, [unicodedata.normalize(f, "M\u00fcller_\u00c5_01") for f in ("NFC", "NFD")])
            for source in PATIENTS
        ),
        ("tag", ["P1", "P1 ", " P1", "P1\u3000"]),
        ("csv", ["P1", "P1  ", "  P1"]),
        ("csv", ["P1", "\uff30\uff11"]),
        ("name", ["Doe^Jane", "Doe^Jane^^^", "Doe ^Jane ", "Doe^Jane^^=^="]),
    ],
)
def test_one_patient_spelt_in_several_ways_is_one(tmp_path: Path, source: str, ids: list[str]) -> None:
    site_of(tmp_path, source, ids)
    assert len(set(ingest(tmp_path)[1].groups)) == 1


@pytest.mark.parametrize("source", PATIENTS)
def test_patients_who_only_look_alike_are_two(tmp_path: Path, source: str) -> None:
    site_of(tmp_path, source, ["Muller^A", "M\u00fcller^A", "m\u00fcller^A"])
    assert len(set(ingest(tmp_path)[1].groups)) == 3


@pytest.mark.parametrize("source", PATIENTS)
@pytest.mark.parametrize("word", ["ANONYMOUS", "Anonymous", "NA", "0", "0000000", "unknown", "De-Identified"])
def test_a_placeholder_for_all_patients_is_told_and_keeps_nobody_together(
    tmp_path: Path, source: str, word: str
) -> None:
    site_of(tmp_path, source, [word] * 3)
    manifest, prepared = ingest(tmp_path)[:2]
    assert len(set(prepared.groups)) == 3
    assert manifest.risks == {"patients-unknown": 3}
    assert [code for code, _ in warnings_of(manifest, FRACTIONS)] == ["patients-unknown", "split-empty"]


def test_a_placeholder_among_ids_keeps_its_images_together(tmp_path: Path) -> None:
    site_of(tmp_path, "tag", ["ANONYMOUS", "P1", "ANONYMOUS"])
    assert len(set(ingest(tmp_path)[1].groups)) == 2


def test_one_patient_is_told_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site_of(tmp_path, "tag", ["P-1"] * 3)
    (tmp_path / "params.yaml").write_text(
        yaml.safe_dump({"classes": list(CLASSES), "sites": [SITE], "queries": {}})
    )
    with suppress(SystemExit):
        main(["ingest", "run", SITE, "--root", str(tmp_path), "--workers", "1"])
    err = capsys.readouterr().err
    assert "warning [split-empty]" in err
    assert "calibration and val and test" in err
    assert SITE in err


def test_later_stages_name_an_empty_split(tmp_path: Path) -> None:
    data = hospital(tmp_path, "dicom", patient=PATIENTS["tag"])
    for i in range(6):
        save(dicom(noise(i, 8, 8), patient="P-1"), data / CLASSES[i % 2] / f"{i}.dcm")
    _, site = ingest(tmp_path)
    with pytest.raises(SourceError) as raised:
        train_site(tmp_path, SITE, params(), device="cpu")
    assert (raised.value.code, raised.value.where.site) == ("split-empty", SITE)
    with pytest.raises(NoTestImages):
        _stacked(_judging_parts({SITE: site}, SITE, (0,), (1,)), (), SITE)


def test_files_are_found_by_keys_in_another_form_of_unicode(tmp_path: Path) -> None:
    table = {"from": "csv", "file": "t.csv", "key": "file", "column": "dx"}
    data = hospital(
        tmp_path, "dicom", label=table, label_map={unicodedata.normalize("NFD", "Tum\u00f6r"): "solid"}
    )
    for i, form in enumerate(("NFC", "NFD")):
        save(dicom(noise(i, 8, 8)), data / unicodedata.normalize(form, f"B\u00e4r {i}") / "a.dcm")
    other = [unicodedata.normalize("NFD", "B\u00e4r 0/a.dcm,Tum\u00f6r"), "B\u00e4r 1/a.dcm,Tum\u00f6r"]
    (data / "t.csv").write_text("\n".join(["file,dx", *other]), encoding="utf-8")
    assert ingest(tmp_path)[0].count == 2
