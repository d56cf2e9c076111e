from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qkt_clinical.common.files import digest_file
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import load_prepared
from qkt_clinical.errors import ConfigError, PreparedError
from qkt_clinical.ingest import subgroups
from qkt_clinical.ingest.subgroups import OTHER, UNKNOWN, band, group_of, pooled
from tests.ingest.test_stage import png
from tests.ingest_files import SITE, dicom, hospital, ingest, noise, save, series

EDGES = (40, 60, 80)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(-1, "<40"), (39.9, "<40"), (40, "40-59"), (59.5, "40-59"), (60, "60-79"), (80, "80+"), (1e9, "80+")],
)
def test_bands_by_hand(number: float, expected: str) -> None:
    assert band(number, EDGES) == expected
    assert band(number, (40,)) == ("<40" if number < 40 else "40+")


@pytest.mark.parametrize(
    ("text", "edges", "expected"),
    [
        ("063Y", EDGES, "60-79"),
        ("018M", EDGES, "<40"),
        ("097Y", EDGES, "80+"),
        (" 63 ", EDGES, "60-79"),
        ("sixty", EDGES, UNKNOWN),
        ("nan", EDGES, UNKNOWN),
        ("", EDGES, UNKNOWN),
        ("  Scanner\n One ", None, "Scanner One"),
        ("", None, UNKNOWN),
        ("x" * 41, None, OTHER),
        ("a\x00b", None, OTHER),
    ],
)
def test_values_become_groups(text: str, edges: tuple[int, ...] | None, expected: str) -> None:
    assert group_of(text, edges) == expected


def pool(groups: list[str], patients: list[str] | None = None, banded: bool = False) -> list[str]:
    patients = patients or [str(i) for i in range(len(groups))]
    return list(pooled("c", groups, patients, banded=banded, site="s").tolist())


def test_a_value_of_few_patients_is_pooled_and_a_band_is_not() -> None:
    groups = ["F"] * 5 + ["M"] * 4 + [UNKNOWN]
    assert pool(groups) == ["F"] * 5 + [OTHER] * 4 + [UNKNOWN]
    assert pool(groups, banded=True) == groups
    assert pool(["F"] * 9, ["one", "two", "three"] * 3) == [OTHER] * 9, "nine images of three patients"


def test_at_most_twenty_groups_stay() -> None:
    groups = [f"g{i:02d}" for i in range(25) for _ in range(5 + (i == 24))]
    found = pool(groups)
    assert len(set(found)) == subgroups.MOST + 1
    assert found[-1] == "g24", "the largest first, then by name"
    assert {"g18", OTHER} <= set(found)
    assert "g19" not in found


def test_a_column_that_tells_patients_apart_is_refused() -> None:
    with pytest.raises(ConfigError, match="tells patients apart") as caught:
        pool([f"MRN-{i}" for i in range(8)] + [UNKNOWN])
    assert caught.value.code == "subgroup-identifies"
    assert "MRN" not in str(caught.value)
    assert set(pool([f"g{i // 2}" for i in range(10)])) == {OTHER}, "two patients each: not apart, but few"
    pool([str(i) for i in range(8)], banded=True)


def cohort(root: Path, **changes: Any) -> Path:
    """Twenty-four patients, one file each: women with an odd number, scanners by halves, ages from 30."""
    data = hospital(
        root,
        "dicom",
        label={"from": "folder"},
        patient={"from": "tag", "tag": "PatientID"},
        **{
            "subgroups": {
                "sex": {"from": "tag", "tag": "PatientSex"},
                "age": {"from": "tag", "tag": "PatientAge", "bands": [40, 60, 80]},
                "scanner": {"from": "tag", "tag": "ManufacturerModelName"},
                "ward": {"from": "csv", "file": "wards.csv", "key": "file", "column": "ward"},
            },
            **changes,
        },
    )
    rows = ["file,ward"]
    for i in range(24):
        tags = {"PatientSex": "FM"[i % 2], "PatientAge": f"{30 + 3 * i:03d}Y"}
        if i != 7:
            tags["ManufacturerModelName"] = f"Model {'A' if i < 12 else 'B'}"
        kind = ("solid", "cavity")[i % 2]
        save(dicom(noise(i, 12, 12), patient=f"P-{i}", **tags), data / kind / f"f{i:02d}.dcm")
        rows.append(f"f{i:02d},{'north' if i % 3 else 'south'}")
    rows.append("f05,south")
    rows.append("f06,")
    (data / "wards.csv").write_text("\n".join(rows) + "\n")
    return data


def test_groups_of_a_dicom_site(tmp_path: Path) -> None:
    cohort(tmp_path)
    manifest, site = ingest(tmp_path)
    assert set(site.subgroups) == {"age", "scanner", "sex", "ward"}
    # Files of the folder cavity come first: those with odd numbers.
    order = [*range(1, 24, 2), *range(0, 24, 2)]
    assert site.subgroups["sex"].tolist() == ["FM"[i % 2] for i in order]
    ages = [30 + 3 * i for i in order]
    assert site.subgroups["age"].tolist() == [
        "<40" if a < 40 else "40-59" if a < 60 else "60-79" if a < 80 else "80+" for a in ages
    ]
    assert site.subgroups["scanner"].tolist() == [
        UNKNOWN if i == 7 else "Model A" if i < 12 else "Model B" for i in order
    ]
    ward = dict(zip(order, site.subgroups["ward"].tolist(), strict=True))
    assert (ward[1], ward[3], ward[5]) == ("north", "south", UNKNOWN), "two values are none"
    folder = Workspace(tmp_path).prepared(SITE)
    assert manifest.digests["subgroups.json"] == digest_file(folder / "subgroups.json")
    text = (folder / "subgroups.json").read_text()
    assert "099" not in text
    assert "99Y" not in text
    again, _ = ingest(tmp_path)
    assert again == manifest, "from the scratch file the same"


def test_without_columns_nothing_changes(tmp_path: Path) -> None:
    cohort(tmp_path / "a")
    cohort(tmp_path / "b", subgroups={})
    with_groups, _ = ingest(tmp_path / "a")
    (tmp_path / "b" / "hospitals" / SITE / ".salt").write_text(
        (tmp_path / "a" / "hospitals" / SITE / ".salt").read_text()
    )
    without, site = ingest(tmp_path / "b")
    assert not (site.folder / "subgroups.json").exists()
    assert site.subgroups == {}
    assert "subgroups.json" not in without.digests
    rest = {name: digest for name, digest in with_groups.digests.items() if name != "subgroups.json"}
    assert without.digests == rest


def test_a_volume_has_the_groups_of_its_first_slice(tmp_path: Path) -> None:
    data = hospital(
        tmp_path,
        "dicom",
        image={"size": [8, 8, 8], "channels": 1},
        subgroups={"age": {"from": "tag", "tag": "PatientAge", "bands": [40, 60]}},
    )
    for number, kind in enumerate(("solid", "cavity")):
        series(data / kind / "s", noise(number, 8, 8, 8), PatientAge=f"{45 + 30 * number:03d}Y")
    _, site = ingest(tmp_path)
    assert sorted(site.subgroups["age"].tolist()) == ["40-59", "60+"]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ({"from": "tag", "tag": "PatientAge"}, "ages need bands"),
        ({"from": "csv", "file": "t.csv", "key": "file", "column": "age"}, "ages need bands"),
        ({"from": "tag", "tag": "PatientAge", "bands": [40, 95]}, "may begin after 90"),
        ({"from": "tag", "tag": "KVP", "bands": [90, 60]}, "bands must rise"),
        ({"from": "tag", "tag": "PatientName"}, "'PatientName' is none of"),
        ({"from": "tag", "tag": "PatientID"}, "'PatientID' is none of"),
        ({"from": "none"}, "comes from csv, tag or folder"),
        ({"from": "csv", "file": "absent.csv", "key": "file", "column": "sex"}, "cannot be read"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path: Path, column: dict[str, Any], words: str) -> None:
    cohort(tmp_path, subgroups={"group": column})
    with pytest.raises(ConfigError, match=words):
        ingest(tmp_path)


def test_a_column_of_names_stops_the_site(tmp_path: Path) -> None:
    data = cohort(
        tmp_path, subgroups={"who": {"from": "csv", "file": "w.csv", "key": "file", "column": "who"}}
    )
    rows = "\n".join(f"f{i:02d},Name {i}" for i in range(24))
    (data / "w.csv").write_text(f"file,who\n{rows}\n")
    with pytest.raises(ConfigError, match="24 values for 24 patients"):
        ingest(tmp_path)
    assert not Workspace(tmp_path).prepared(SITE).exists()


def test_files_that_are_no_dicom_have_folders_and_tables(tmp_path: Path) -> None:
    data = hospital(
        tmp_path,
        "images",
        label={"from": "folder", "level": 1},
        subgroups={"scanner": {"from": "folder"}},
    )
    for i in range(20):
        png(data / ("east", "west")[i % 2] / ("solid", "cavity")[i // 10] / f"{i}.png", noise(i, 12, 12))
    _, site = ingest(tmp_path)
    assert np.unique(site.subgroups["scanner"], return_counts=True)[1].tolist() == [10, 10]
    hospital(tmp_path, "images", subgroups={"sex": {"from": "tag", "tag": "PatientSex"}})
    with pytest.raises(ConfigError, match="comes from a DICOM tag, but the source is images"):
        ingest(tmp_path)


@pytest.mark.parametrize(
    "held",
    [
        "[]",
        "{",
        '{"sex": {"groups": ["F"], "images": [0]}}',
        '{"sex": {"groups": ["F"], "images": [-1, 0]}}',
        '{"sex": {"groups": ["F"], "images": [0, 7]}}',
        '{"sex": {"groups": [], "images": ["a", "b"]}}',
        '{"sex": {"images": [0, 0]}}',
    ],
)
def test_damaged_groups_are_one_typed_error(tmp_path: Path, held: str) -> None:
    cohort(tmp_path)
    _, site = ingest(tmp_path)
    (site.folder / "subgroups.json").write_text(held)
    with pytest.raises(PreparedError):
        load_prepared(site.folder)
