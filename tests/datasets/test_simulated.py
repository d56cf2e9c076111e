from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qkt_clinical.catalog import BLOOD_CELLS
from qkt_clinical.cli import main
from qkt_clinical.common.files import digest_folder
from qkt_clinical.config.loading import load_params, load_query, load_site, parse
from qkt_clinical.config.params import Params
from qkt_clinical.datasets import medmnist_file
from qkt_clinical.datasets.medmnist_file import SPLITS, read_medmnist
from qkt_clinical.datasets.partition import (
    choose_queries,
    dirichlet_shares,
    divide,
    partition_dirichlet,
    partition_pathological,
    pathological_shares,
)
from qkt_clinical.datasets.simulated import federate, list_presets, load_preset
from qkt_clinical.datasets.workspace import write_workspace
from qkt_clinical.errors import ConfigError, SourceError
from tests.places import SHARED

# No deadline: a busy machine is no failure. Derandomised: the same examples every time.
steady = settings(deadline=None, derandomize=True, max_examples=60)

COUNTS = {"train": 40, "val": 8, "test": 12}


def make_arrays(
    classes: int = 6, shape: tuple[int, ...] = (8, 8, 3), per_class: dict[str, int] = COUNTS
) -> dict[str, np.ndarray[Any, Any]]:
    """Every image's first pixel is its number within the split, and its second its label."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for split, each in per_class.items():
        labels = np.random.default_rng(len(split)).permutation(np.repeat(np.arange(classes), each))
        images = np.zeros((len(labels), *shape), dtype=np.uint16)
        flat = images.reshape(len(labels), -1)
        flat[:, 0], flat[:, 1] = np.arange(len(labels)), labels
        arrays |= {f"{split}_images": images, f"{split}_labels": labels[:, None].astype(np.uint8)}
    return arrays


def save(path: Path, arrays: dict[str, np.ndarray[Any, Any]], **changes: Any) -> Path:
    kept = {k: v for k, v in (arrays | changes).items() if v is not None}
    np.savez_compressed(path, **kept)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "cells.npz", make_arrays())


def content(out: Path, site: str) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(out / "hospitals" / site / "data" / "images.npz", allow_pickle=False) as file:
        return dict(file)


# --- shares ---------------------------------------------------------------------------------------


@steady
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 12), st.integers(0, 50))
def test_pathological_shares_are_balanced(classes: int, hospitals: int, each: int, seed: int) -> None:
    each = min(each, classes)
    if hospitals * each < classes:
        with pytest.raises(ConfigError, match="cannot hold all"):
            pathological_shares(classes, hospitals=hospitals, classes_per_hospital=each, seed=seed)
        return
    shares = pathological_shares(classes, hospitals=hospitals, classes_per_hospital=each, seed=seed)
    holders = np.count_nonzero(shares, axis=0)
    assert (np.count_nonzero(shares, axis=1) == each).all()
    assert holders.min() >= 1
    assert holders.max() - holders.min() <= 1
    np.testing.assert_allclose(shares.sum(axis=0), 1.0)
    np.testing.assert_allclose(shares, (shares > 0) / holders)


def test_more_classes_per_hospital_than_classes() -> None:
    with pytest.raises(ConfigError, match="4 classes each"):
        pathological_shares(3, hospitals=5, classes_per_hospital=4)


@pytest.mark.parametrize("seed", range(5))
def test_dirichlet_shares_keep_the_floor(seed: int) -> None:
    counts = np.array([735, 1871, 933, 1760, 711, 843, 1987, 3])
    shares = dirichlet_shares(counts, hospitals=6, beta=0.3, seed=seed)
    np.testing.assert_allclose(shares.sum(axis=0), 1.0)
    images = shares * counts
    assert (images.sum(axis=1) >= counts.sum() / 24).all()
    assert (np.count_nonzero(shares, axis=1) >= 2).all()
    # A class is held with at least 5 images or not at all; one that has only 3 goes to one hospital.
    assert images[:, :7][images[:, :7] > 0].min() >= 5
    assert np.count_nonzero(shares[:, 7]) == 1


def test_dirichlet_concentration_evens_out() -> None:
    counts = np.full(4, 10_000)
    even = dirichlet_shares(counts, hospitals=5, beta=1e5)
    np.testing.assert_allclose(even, 0.2, atol=0.01)
    assert dirichlet_shares(counts, hospitals=5, beta=0.3).max() > 0.6


def test_dirichlet_gives_up_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match="greater beta"):
        dirichlet_shares(np.array([10, 10]), hospitals=9, beta=0.1)


# --- division ---------------------------------------------------------------------------------------


def test_divide_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 2])
    shares = np.array([[0.5, 1 / 3, 0.0], [0.25, 2 / 3, 0.0], [0.25, 0.0, 1.0]])
    pieces = divide(labels, None, shares, seed=3)
    counts = [np.bincount(labels[p], minlength=3).tolist() for p in pieces]
    assert counts == [[2, 1, 0], [1, 2, 0], [1, 0, 1]]
    assert sorted(np.concatenate(pieces).tolist()) == list(range(8))


@steady
@given(
    st.lists(st.integers(0, 4), min_size=5, max_size=200),
    st.lists(st.lists(st.floats(0.01, 1.0), min_size=5, max_size=5), min_size=2, max_size=6),
    st.integers(0, 9),
)
def test_divide_without_groups_is_exact_to_one_image(
    values: list[int], weights: list[list[float]], seed: int
) -> None:
    labels = np.array(values)
    shares = np.array(weights) / np.sum(weights, axis=0)
    pieces = divide(labels, None, shares, seed=seed)
    assert sorted(np.concatenate(pieces).tolist()) == list(range(len(labels)))
    for h, piece in enumerate(pieces):
        assert (np.diff(piece) > 0).all()
        exact = shares[h] * np.bincount(labels, minlength=5)
        assert (np.abs(np.bincount(labels[piece], minlength=5) - exact) < 1 + 1e-6).all()


def test_divide_shuffles_by_seed() -> None:
    labels = np.zeros(100, dtype=np.int64)
    shares = np.full((2, 1), 0.5)
    first = divide(labels, None, shares, seed=1)[0]
    assert first.tolist() == divide(labels, None, shares, seed=1)[0].tolist()
    assert first.tolist() != divide(labels, None, shares, seed=2)[0].tolist()
    assert first.tolist() != list(range(50))


def test_groups_are_never_divided_and_stay_even() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, size=240)
    groups = np.repeat(np.array([f"p{i:03d}" for i in range(240)]), sizes)
    labels = np.repeat(rng.integers(0, 6, size=240), sizes)  # one class per patient
    pieces = partition_pathological(labels, groups, hospitals=6, classes_per_hospital=3, seed=5)
    assert sorted(np.concatenate(pieces).tolist()) == list(range(len(labels)))
    owners = [set(groups[p]) for p in pieces]
    assert sum(map(len, owners)) == 240
    counts = np.array([np.bincount(labels[p], minlength=6) for p in pieces])
    assert (np.count_nonzero(counts, axis=1) == 3).all()
    for column in counts.T:  # holders of a class differ by less than one patient's images
        assert np.ptp(column[column > 0]) <= 8


def test_patients_with_many_classes_bring_only_what_their_hospital_holds() -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(90), 8)
    labels = rng.integers(0, 6, size=len(groups))
    pieces = partition_pathological(labels, groups, hospitals=6, classes_per_hospital=3, seed=2)
    owners = [set(groups[p].tolist()) for p in pieces]
    assert sum(map(len, owners)) == len(set().union(*owners)) == 90
    assert {len(o) for o in owners} <= set(range(12, 19))  # 15 each if even
    for piece, own in zip(pieces, owners, strict=True):
        held = set(labels[piece].tolist())
        assert len(held) == 3
        mine = np.flatnonzero(np.isin(groups, list(own)) & np.isin(labels, list(held)))
        assert mine.tolist() == piece.tolist()


def test_partition_dirichlet_gives_out_everything() -> None:
    labels = np.random.default_rng(0).integers(0, 8, size=4000)
    pieces = partition_dirichlet(labels, hospitals=6, beta=0.3, seed=0)
    assert sorted(np.concatenate(pieces).tolist()) == list(range(4000))
    assert min(map(len, pieces)) >= 4000 / 24 - 8


def test_dirichlet_with_patients_follows_the_proportions() -> None:
    groups = np.arange(4000) // 4
    labels = np.random.default_rng(0).integers(0, 5, size=1000)[groups]
    shares = dirichlet_shares(np.bincount(labels), hospitals=4, beta=1.0, seed=3)
    pieces = divide(labels, groups, shares, seed=0)
    counts = np.array([np.bincount(labels[p], minlength=5) for p in pieces])
    assert (np.abs(counts - shares * np.bincount(labels)) <= 4).all()
    assert sum(len(set(groups[p])) for p in pieces) == 1000


# --- queries ----------------------------------------------------------------------------------------


@steady
@given(st.integers(0, 200), st.integers(1, 40))
def test_queries_are_absent_here_and_held_elsewhere(seed: int, count: int) -> None:
    held = pathological_shares(8, hospitals=6, classes_per_hospital=3, seed=seed) > 0
    if count > 30:
        with pytest.raises(ConfigError, match="30 exist"):
            choose_queries(held, count, seed=seed)
        return
    pairs = choose_queries(held, count, seed=seed)
    assert len(set(pairs)) == count
    assert pairs == sorted(pairs)
    assert all(not held[h, c] and held[:, c].any() for h, c in pairs)
    per_hospital = np.bincount([h for h, _ in pairs], minlength=6)
    per_class = np.bincount([c for _, c in pairs], minlength=8)
    assert np.ptp(per_hospital) <= 1
    assert np.ptp(per_class) <= 2


def test_one_query_per_hospital_each_another_class() -> None:
    held = np.eye(4, dtype=bool)
    pairs = choose_queries(held, None, seed=1)
    assert [h for h, _ in pairs] == [0, 1, 2, 3]
    assert sorted(c for _, c in choose_queries(held, 8, seed=1)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_class_that_nobody_holds_is_not_asked_for() -> None:
    held = np.array([[True, False, False], [True, True, False]])
    assert choose_queries(held, None) == [(0, 1)]
    with pytest.raises(ConfigError, match="0 exist"):
        choose_queries(np.ones((3, 2), dtype=bool), None)


# --- federate ---------------------------------------------------------------------------------------


def test_hospitals_can_be_read_by_the_pipeline(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = federate(source, out, partition="pathological", hospitals=4, classes_per_hospital=3)
    write_workspace(out, result.as_params())
    params = load_params(out)
    assert params.sites == ("h1", "h2", "h3", "h4")
    assert params.classes == tuple(f"class-{c}" for c in range(6))
    assert len(params.queries) == 4
    for site in params.sites:
        config = load_site(out, site)
        assert config.source.kind == "npz"
        assert [p.name for p in (out / "hospitals" / site / config.source.path).iterdir()] == ["images.npz"]
        assert (config.label.source, config.patient.source, config.splits) == ("npz", "none", "given")
        assert (config.image.size, config.image.channels) == ((8, 8), 3)
        labels = content(out, site)["train_labels"].reshape(-1)
        assert config.label_map == {str(c): f"class-{c}" for c in np.unique(labels)}
    for key, ref in params.queries.items():
        query = load_query(out, ref.hospital, ref.query)
        assert key == f"{ref.hospital}-{ref.query}"
        assert len(query.classes) == 1
        assert query.classes[0] not in load_site(out, ref.hospital).label_map.values()
        assert (query.method, query.budget) == ("qkt", 0.03)


def test_every_image_lies_in_one_hospital_with_its_label(source: Path, tmp_path: Path) -> None:
    result = federate(source, tmp_path / "out", partition="pathological", hospitals=5, classes_per_hospital=2)
    held: dict[str, set[tuple[int, ...]]] = {}
    for split in SPLITS:
        numbers: list[int] = []
        for site in result.sites:
            arrays = content(tmp_path / "out", site)
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            assert labels.shape == (len(images), 1)
            assert images[:, 0, 0, 1].tolist() == labels[:, 0].tolist()
            numbers += images[:, 0, 0, 0].tolist()
            held.setdefault(site, set()).add(tuple(np.unique(labels).tolist()))
        assert sorted(numbers) == list(range(6 * COUNTS[split]))
    assert all(len(kinds) == 1 for kinds in held.values())  # the same classes in all three splits


def test_dirichlet_mixture_is_the_same_in_every_split(tmp_path: Path) -> None:
    per_class = {"train": 200, "val": 100, "test": 100}
    path = save(tmp_path / "x.npz", make_arrays(5, (4, 4), per_class))
    result = federate(path, tmp_path / "out", partition="dirichlet", hospitals=4, beta=0.5, queries=2)
    assert len(result.queries) == 2
    for site in result.sites:
        arrays = content(tmp_path / "out", site)
        train, val, test = (np.bincount(arrays[f"{s}_labels"][:, 0], minlength=5) for s in SPLITS)
        assert np.abs(train / 2 - val).max() <= 2
        assert np.abs(val - test).max() <= 1
        assert not val[train == 0].any()
        assert not test[train == 0].any()


@pytest.mark.parametrize("seed", range(4))
def test_no_class_is_met_that_was_never_trained_on(tmp_path: Path, seed: int) -> None:
    # 20 images a patient in train: a small share gets no patient there, but single images in val.
    arrays = make_arrays(4, (4, 4), {"train": 200, "val": 100, "test": 100})
    for split in SPLITS:
        order = np.argsort(arrays[f"{split}_labels"][:, 0], kind="stable")
        groups = np.empty(len(order), dtype=np.int64)
        groups[order] = np.arange(len(order)) // (20 if split == "train" else 1)
        arrays[f"{split}_groups"] = groups + 1000 * len(split)
    path = save(tmp_path / "x.npz", arrays)
    result = federate(path, tmp_path, partition="dirichlet", hospitals=4, beta=0.4, seed=seed, queries=1)
    for site in result.sites:
        kinds = {s: set(content(tmp_path, site)[f"{s}_labels"][:, 0].tolist()) for s in SPLITS}
        assert kinds["val"] | kinds["test"] <= kinds["train"]
    kept = sum(len(content(tmp_path, site)["val_labels"]) for site in result.sites)
    assert kept == 400  # nothing is lost: other hospitals take it over


def test_same_arguments_same_bytes_and_other_seed_other_bytes(source: Path, tmp_path: Path) -> None:
    def run(out: str, seed: int) -> str:
        federate(source, tmp_path / out, partition="pathological", seed=seed)
        return digest_folder(tmp_path / out)

    first = run("a", 0)
    assert run("b", 0) == first
    assert run("a", 0) == first  # over its own output
    assert run("c", 1) != first


def test_a_real_hospital_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out" / "hospitals" / "h2"
    mine.mkdir(parents=True)
    (mine / "site.yaml").write_text("name: h2\n")
    with pytest.raises(ConfigError, match="already a hospital") as caught:
        federate(source, tmp_path / "out", partition="pathological")
    assert caught.value.where.site == "h2"
    assert [p.name for p in sorted((tmp_path / "out").rglob("*"))] == ["hospitals", "h2", "site.yaml"]


def test_a_salt_survives_a_second_call(source: Path, tmp_path: Path) -> None:
    federate(source, tmp_path, partition="pathological")
    salt = tmp_path / "hospitals" / "h1" / ".salt"
    salt.write_text("kept")
    federate(source, tmp_path, partition="pathological", queries=1)
    assert salt.read_text() == "kept"
    assert len(list(tmp_path.glob("hospitals/*/queries/*.yaml"))) == 1  # none of the first call's is left


@pytest.mark.parametrize(
    ("shape", "size", "channels"), [((8, 6), (8, 6), 1), ((8, 6, 3), (8, 6), 3), ((8, 6, 4), (8, 6, 4), 1)]
)
def test_grey_colour_and_volumes(
    tmp_path: Path, shape: tuple[int, ...], size: tuple[int, ...], channels: int
) -> None:
    path = save(tmp_path / "x.npz", make_arrays(4, shape))
    federate(path, tmp_path, partition="pathological", hospitals=2, classes_per_hospital=2)
    image = load_site(tmp_path, "h1").image
    assert (image.size, image.channels) == (size, channels)
    assert content(tmp_path, "h1")["val_images"].shape == (2 * COUNTS["val"], *shape)


def test_patients_stay_together(tmp_path: Path) -> None:
    arrays = make_arrays(4)
    for split in SPLITS:
        labels = arrays[f"{split}_labels"][:, 0]
        rank = np.array([(labels[:i] == label).sum() for i, label in enumerate(labels)])
        arrays[f"{split}_groups"] = np.array(
            [f"{split}-{c}-{r // 2}" for c, r in zip(labels, rank, strict=True)]
        )
    path = save(tmp_path / "x.npz", arrays)
    result = federate(path, tmp_path, partition="pathological", hospitals=4, classes_per_hospital=2)
    assert load_site(tmp_path, "h1").patient.source == "npz"
    for split in SPLITS:
        owners = [set(content(tmp_path, s)[f"{split}_groups"].tolist()) for s in result.sites]
        assert sum(map(len, owners)) == len(set().union(*owners)) == len(set(arrays[f"{split}_groups"]))
    arrays["val_groups"] = arrays["val_groups"].astype("<U40")
    arrays["val_groups"][0] = arrays["train_groups"][0]
    with pytest.raises(SourceError, match="two of its splits"):
        read_medmnist(save(tmp_path / "y.npz", arrays))


def test_medmnist_names_are_known_by_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "octmnist_64.npz", make_arrays(4))
    result = federate(path, tmp_path, partition="pathological", hospitals=4, classes_per_hospital=2)
    assert result.classes[1] == "diabetic macular edema"
    assert {q["query"] for q in result.queries.values()} <= {
        "choroidal-neovascularization",
        "diabetic-macular-edema",
        "drusen",
        "normal",
    }


def test_class_names_that_give_no_file_name(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", make_arrays(4))
    names = ["Über!", "ber", "日本", "A" * 60]
    result = federate(
        path,
        tmp_path,
        partition="pathological",
        hospitals=4,
        classes_per_hospital=2,
        classes=names,
        queries=8,
    )
    assert {q["query"] for q in result.queries.values()} == {"class-0", "class-1", "class-2", "a" * 40}
    write_workspace(tmp_path, result.as_params())
    assert load_params(tmp_path).classes == tuple(names)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"hospitals": 1}, "hospitals"),
        ({"beta": 0.0}, "beta"),
        ({"method": "magic"}, "method"),
        ({"prefix": "../h"}, "prefix"),
        ({"prefix": "h" * 63}, "prefix"),
        ({"classes_per_hospital": 7}, "cannot hold"),
        ({"classes": list("abcde")}, "5 different class names for labels 0 to 5"),
        ({"classes": list("abcdee")}, "5 different class names"),
        ({"classes": list("abcdefg")}, "'g' has no training image"),
        ({"queries": 99}, "99 absent"),
    ],
)
def test_wrong_arguments(source: Path, tmp_path: Path, arguments: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        federate(source, tmp_path / "out", **({"partition": "pathological"} | arguments))
    assert not (tmp_path / "out").exists()


def test_too_few_images(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", make_arrays(4, per_class={"train": 40, "val": 1, "test": 1}))
    with pytest.raises(SourceError, match="too few images"):
        federate(path, tmp_path / "out", partition="pathological", hospitals=9, classes_per_hospital=2)


def test_wrong_params_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'sites'"):
        write_workspace(tmp_path, {"classes": ["a", "b"], "sits": ["h1"], "queries": {}})
    assert list(tmp_path.iterdir()) == []


# --- files from elsewhere ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"val_images": None},
        {"test_labels": None},
        {"train_images": np.zeros((0, 8, 8), np.uint8)},
        {"train_images": np.zeros((240, 8), np.uint8)},
        {"train_images": np.full((240, 8, 8, 3), "x")},
        {"val_images": np.zeros((48, 9, 8, 3), np.uint16)},
        {"val_images": np.zeros((48, 8, 8, 3), np.uint8)},
        {"train_labels": np.zeros((240, 14), np.uint8)},
        {"train_labels": np.zeros(240)},
        {"train_labels": np.zeros(239, np.uint8)},
        {"train_labels": np.full(240, -1)},
        {"train_labels": np.full(240, 2**40)},
        {"train_groups": np.zeros((240, 2), np.int64)},
        {"train_groups": np.arange(240)},
    ],
)
def test_arrays_that_do_not_belong_together(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = save(tmp_path / "x.npz", make_arrays(), **changes)
    with pytest.raises(SourceError) as caught:
        read_medmnist(path)
    assert caught.value.where.file == str(path)


def test_no_pickle(tmp_path: Path) -> None:
    groups = np.array([{"a": 1}] * 240, dtype=object)
    with pytest.raises(SourceError, match="ValueError"):
        read_medmnist(save(tmp_path / "x.npz", make_arrays(), train_groups=groups))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY"])
def test_no_npz(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(data)
    with pytest.raises(SourceError, match="npz"):
        read_medmnist(path)
    with pytest.raises(SourceError, match="FileNotFoundError"):
        read_medmnist(tmp_path / "absent.npz")


def test_truncated_npz(source: Path) -> None:
    whole = source.read_bytes()
    middle = len(whole) // 4
    source.write_bytes(whole[:middle] + b"\0" * 64 + whole[middle + 64 :])
    with pytest.raises(SourceError, match="npz"):
        read_medmnist(source)


def header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_a_header_that_promises_more_than_the_file_holds(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            lie = name == "train_images.npy"
            new.writestr(name, header((10**9, 10**6)) if lie else old.read(name))
    with pytest.raises(SourceError, match="ValueError"):
        read_medmnist(path)


def test_too_large(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = sum(a.nbytes for a in make_arrays().values())
    monkeypatch.setattr(medmnist_file, "MAX_BYTES", declared)
    assert len(read_medmnist(source)["train"].labels) == 240
    monkeypatch.setattr(medmnist_file, "MAX_BYTES", declared - 1)
    with pytest.raises(SourceError, match="declares"):
        read_medmnist(source)


# --- presets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["--partition pathological --hospitals 4", "--preset pbc28"])
def test_hospitals_of_one_file_are_not_trained_on_stains(tmp_path: Path, given: str) -> None:
    path = save(tmp_path / "x.npz", make_arrays(8, (28, 28, 3)))
    with pytest.raises(SystemExit) as end:
        main(["federate", str(path), *given.split(), "--out", str(tmp_path / "out")])
    assert end.value.code == 0
    assert load_params(tmp_path / "out").train.appearance == 0


@pytest.mark.parametrize("name", list_presets())
def test_presets_make_a_workspace(name: str, tmp_path: Path) -> None:
    preset = load_preset(name)
    path = save(tmp_path / "x.npz", make_arrays(len(preset.federate.classes or ()), (28, 28, 3)))
    result = federate(path, tmp_path, **preset.federate.model_dump())
    write_workspace(tmp_path, {**preset.params, **result.as_params()})
    text = (tmp_path / "params.yaml").read_text()
    assert parse(Params, yaml.safe_load(text), file="params.yaml") == load_params(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [(2, 1, "RuntimeError"), (4, 99, "NotImplementedError")],
    ids=["encrypted", "compressed by an unknown method"],
)
def test_archives_that_python_cannot_open(source: Path, field: int, value: int, why: str) -> None:
    content = bytearray(source.read_bytes())
    # Flags and method stand behind signature and version; a directory entry has one more version.
    for signature, start in ((b"PK\x03\x04", 4), (b"PK\x01\x02", 6)):
        at = -1
        while (at := content.find(signature, at + 1)) >= 0:
            content[at + start + field : at + start + field + 2] = value.to_bytes(2, "little")
    source.write_bytes(content)
    with pytest.raises(SourceError, match=why):
        read_medmnist(source)


def test_pbc28_preset() -> None:
    preset = load_preset("pbc28")
    assert preset.federate.classes == BLOOD_CELLS
    assert (preset.federate.hospitals, preset.federate.classes_per_hospital) == (6, 3)
    with pytest.raises(ConfigError, match="pbc28"):
        load_preset("../pbc28")


def test_the_real_blood_cells() -> None:
    path = SHARED / "pbc28.npz"
    if not path.is_file():
        pytest.skip("../shared/data/pbc28.npz is not here")
    parts = read_medmnist(path)
    assert [len(parts[s].labels) for s in SPLITS] == [10273, 1430, 1996]
    pieces = partition_pathological(parts["train"].labels, hospitals=6, classes_per_hospital=3)
    counts = np.array([np.bincount(parts["train"].labels[p], minlength=8) for p in pieces])
    assert counts.sum(axis=0).tolist() == [735, 1871, 933, 1760, 711, 843, 1987, 1433]
    assert all(np.ptp(column[column > 0]) <= 1 for column in counts.T)
