from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qkt_clinical.common.files import digest_file
from qkt_clinical.data.integrity import FileOutcome
from qkt_clinical.data.prepared import Manifest, load_prepared, read_manifest, write_prepared
from qkt_clinical.errors import PreparedError

# Ten images of five patients, two each; the last two images stand in no split.
LABELS = np.array([0, 0, 2, 2, 0, 2, 2, 2, 0, 0], dtype=np.int64)
GROUPS = np.array(["p0", "p0", "p1", "p1", "p2", "p2", "p3", "p3", "p4", "p4"])
SPLITS = {
    "train": np.array([3, 0, 2, 1]),
    "calibration": np.array([4, 5]),
    "val": np.array([7, 6]),
    "test": np.array([], dtype=np.int64),
}
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 3, 5, 4)).astype(np.uint8)
OUTCOMES = [
    FileOutcome(file=file, accepted=code is None, code=code, kind="images")
    for file, code in (("a", None), ("b", "unreadable"), ("c", "unreadable"), ("d", "no-label"))
]


def write(folder: Path, **changes: Any) -> Path:
    data: dict[str, Any] = {
        "site": "aster",
        "source_kind": "images",
        "classes": ("a", "b", "c"),
        "images": IMAGES,
        "labels": LABELS,
        "groups": GROUPS,
        "splits": SPLITS,
        "spacing_mm": None,
        "normalisation": "unit",
        "transforms": ("resized",),
        "outcomes": OUTCOMES,
        **changes,
    }
    write_prepared(folder, **data)
    return folder


def test_round_trip(tmp_path: Path) -> None:
    site = load_prepared(write(tmp_path / "aster"))
    assert site.name == "aster"
    np.testing.assert_array_equal(site.images, IMAGES)
    np.testing.assert_array_equal(site.labels, LABELS)
    np.testing.assert_array_equal(site.groups, GROUPS)
    assert {s: v.tolist() for s, v in site.splits.items()} == {
        "train": [0, 1, 2, 3],
        "calibration": [4, 5],
        "val": [6, 7],
        "test": [],
    }
    assert site.local_classes() == (0, 2)
    images, labels = site.part("val", "calibration")
    np.testing.assert_array_equal(images, IMAGES[4:8])
    np.testing.assert_array_equal(labels, [0, 2, 2, 2])
    assert not isinstance(images, np.memmap)
    assert site.part("test")[0].shape == (0, 3, 5, 4)


def test_manifest_counts_by_hand(tmp_path: Path) -> None:
    folder = write(tmp_path / "aster")
    manifest = read_manifest(folder)
    assert manifest.counts == {
        "train": {"a": 2, "c": 2},
        "calibration": {"a": 1, "c": 1},
        "val": {"c": 2},
        "test": {},
    }
    assert manifest.patients == {"train": 2, "calibration": 1, "val": 1, "test": 0}
    assert manifest.rejected == {"unreadable": 2, "no-label": 1}
    assert (manifest.count, manifest.shape, manifest.dtype) == (10, (3, 5, 4), "uint8")
    assert manifest.digests == {n: digest_file(folder / n) for n in manifest.digests}
    assert set(manifest.digests) == {"images.npy", "labels.npy", "groups.npy", "splits.json"}


def test_images_stay_on_disk(tmp_path: Path) -> None:
    site = load_prepared(write(tmp_path / "aster"))
    assert isinstance(site.images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        site.images[0] = 0


def test_volumes_and_floats(tmp_path: Path) -> None:
    images = np.random.default_rng(1).random((10, 1, 3, 4, 5), dtype=np.float32)
    site = load_prepared(
        write(tmp_path / "x", images=images, spacing_mm=(2.0, 1.0, 1.0), normalisation="zscore")
    )
    np.testing.assert_array_equal(site.part("train")[0], images[:4])
    assert (site.manifest.dtype, site.manifest.spacing_mm) == ("float32", (2.0, 1.0, 1.0))


def test_same_content_same_bytes(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    for file in sorted(one.iterdir()):
        assert file.read_bytes() == (two / file.name).read_bytes()


def test_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    for splits in (
        {**SPLITS, "test": np.array([8]), "val": np.array([9])},
        {**SPLITS, "test": np.array([3])},
        {**SPLITS, "train": np.array([0, 0])},
    ):
        with pytest.raises(PreparedError, match="stands in two splits"):
            write(tmp_path / "aster", splits=splits)
    assert list(tmp_path.iterdir()) == []


def test_lengths_that_differ_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PreparedError, match="9 images, 10 labels and 10 patient ids"):
        write(tmp_path / "aster", images=IMAGES[:9])
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_leaves_nothing_or_what_was(tmp_path: Path) -> None:
    def fail(manifest: Manifest) -> str:
        """The page is written last: the arrays are already there."""
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        write(tmp_path / "aster", page=fail)
    assert list(tmp_path.iterdir()) == []
    folder = write(tmp_path / "aster")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(OSError, match="full"):
        write(tmp_path / "aster", page=fail, labels=LABELS[::-1].copy())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["aster"]


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def splits(folder: Path, value: Any) -> None:
    (folder / "splits.json").write_text(json.dumps(value))


GIVEN = {s: v.tolist() for s, v in SPLITS.items()}


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: shutil.rmtree(f),
        lambda f: (f / "manifest.json").unlink(),
        lambda f: (f / "manifest.json").write_text("{"),
        lambda f: (f / "manifest.json").write_text("[]"),
        lambda f: edit(f, format="qkt-prepared/2"),
        lambda f: edit(f, strange=1),
        lambda f: edit(f, count=9),
        lambda f: edit(f, shape=[3, 4, 5]),
        lambda f: edit(f, dtype="float32"),
        lambda f: (f / "images.npy").unlink(),
        lambda f: (f / "images.npy").write_bytes(b""),
        lambda f: (f / "images.npy").write_bytes((f / "images.npy").read_bytes()[:-1]),
        lambda f: np.save(f / "images.npy", IMAGES.astype(np.float64)),
        lambda f: (f / "labels.npy").write_bytes(b""),
        lambda f: np.save(f / "labels.npy", LABELS[:9]),
        lambda f: np.save(f / "labels.npy", np.array([object()] * 10), allow_pickle=True),
        lambda f: np.save(f / "groups.npy", GROUPS[:9]),
        lambda f: (f / "splits.json").unlink(),
        lambda f: (f / "splits.json").write_text("{"),
        lambda f: splits(f, {s: v for s, v in GIVEN.items() if s != "val"}),
        lambda f: splits(f, GIVEN | {"more": []}),
        lambda f: splits(f, GIVEN | {"val": [10]}),
        lambda f: splits(f, GIVEN | {"val": [-1]}),
        lambda f: splits(f, GIVEN | {"val": ["x"]}),
        lambda f: splits(f, [1, 2]),
        lambda f: splits(f, GIVEN | {"val": {"a": 1}}),
        lambda f: splits(f, GIVEN | {"val": [2**70]}),
    ],
)
def test_damage_ends_in_one_error_with_a_remedy(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    folder = write(tmp_path / "aster")
    damage(folder)
    with pytest.raises(PreparedError) as caught:
        load_prepared(folder)
    assert "qkt ingest" in caught.value.remedy
    assert caught.value.where.site == "aster"


def with_groups(folder: Path) -> Path:
    return write(folder, subgroups={"sex": np.array(["F", "M"] * 5)})


def test_groups_are_read_back(tmp_path: Path) -> None:
    site = load_prepared(with_groups(tmp_path / "aster"))
    assert site.subgroups["sex"].tolist() == ["F", "M"] * 5


@pytest.mark.parametrize("file", ["subgroups.json", "splits.json"])
def test_json_of_any_size_is_not_read(tmp_path: Path, file: str) -> None:
    """A file a hundred times larger than so many images need; padded with blanks it would be good JSON."""
    folder = with_groups(tmp_path / "aster")
    text = (folder / file).read_text()
    (folder / file).write_text(text + " " * 100_000)
    if file == "splits.json":
        with pytest.raises(PreparedError, match="ValueError"):
            load_prepared(folder)
        return
    load_prepared(folder)  # eight columns may be there
    (folder / file).write_text(text + " " * 600_000)
    with pytest.raises(PreparedError, match="ValueError") as caught:
        load_prepared(folder)
    assert "qkt ingest" in caught.value.remedy


def test_a_groups_name_of_any_length_is_not_taken(tmp_path: Path) -> None:
    """Every image's group would be as long: a megabyte each."""
    folder = with_groups(tmp_path / "aster")
    held = {"sex": {"groups": ["F", "M" * 1000], "images": [0, 1] * 5}}
    (folder / "subgroups.json").write_text(json.dumps(held))
    with pytest.raises(PreparedError, match="cannot be read"):
        load_prepared(folder)


def test_json_nested_without_end_is_one_error(tmp_path: Path) -> None:
    folder = with_groups(tmp_path / "aster")
    (folder / "subgroups.json").write_text("[" * 200_000)
    with pytest.raises(PreparedError, match="cannot be read"):
        load_prepared(folder)
