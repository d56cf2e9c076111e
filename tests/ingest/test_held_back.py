"""Images kept for evaluation alone: read apart, refused where they would leak, seen by nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qkt_clinical.catalog import HELD_BACK
from qkt_clinical.cli import main
from qkt_clinical.common.files import digest_folder
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import PreparedSite, load_held_back
from qkt_clinical.errors import ConfigError, SourceError
from qkt_clinical.ingest import check_folder, find_crossings, ingest_site, locate
from tests.ingest_files import CLASSES, SITE, dicom, hospital, ingest, noise, params, save

NAME = "held-back"
CSV = {"from": "csv", "file": "patients.csv", "key": "file", "column": "patient"}


def png(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed, 8, 8)).save(path)


def held(root: Path) -> PreparedSite:
    found = load_held_back(Workspace(root).held_back(SITE))
    assert found is not None
    return found


def rows(root: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((Workspace(root).held_back(SITE) / "integrity.json").read_text())
    return found


def smear(root: Path, *, apart: bool = True, **changes: Any) -> Path:
    """Ten patients with an image of two classes; three held-back ones of the third."""
    named = {"held_back": NAME} if apart else {}
    data = hospital(root, "images", patient=CSV, **named, **changes)
    table = ["file,patient"]
    for i in range(20):
        png(data / CLASSES[i % 2] / f"{i}.png", i)
        table.append(f"{CLASSES[i % 2]}/{i}.png,p{i // 2}")
    (data / "patients.csv").write_text("\n".join(table) + "\n")
    if apart:
        keep(data, {f"calcified/{i}.png": f"q{i}" for i in range(3)})
    return data


def keep(data: Path, patients: dict[str, str]) -> None:
    shutil.rmtree(data / NAME, ignore_errors=True)
    for seed, name in enumerate(patients):
        png(data / NAME / name, 100 + seed)
    lines = ["file,patient", *(f"{name},{patient}" for name, patient in patients.items())]
    (data / NAME / "patients.csv").write_text("\n".join(lines) + "\n")


def test_held_back_images_are_a_split_of_their_own_and_change_nothing_else(tmp_path: Path) -> None:
    smear(tmp_path / "without", apart=False)
    smear(tmp_path / "with")
    for name in ("without", "with"):  # one salt for both
        (tmp_path / name / "hospitals" / SITE / ".salt").write_text("0" * 32)
    first, _ = ingest(tmp_path / "without")
    second, site = ingest(tmp_path / "with")
    assert first == second
    prepared = [Workspace(tmp_path / name).prepared(SITE) for name in ("without", "with")]
    assert digest_folder(prepared[0]) == digest_folder(prepared[1])
    assert list(Workspace(tmp_path / "without").held_back(SITE).iterdir()) == []
    assert load_held_back(Workspace(tmp_path / "without").held_back(SITE)) is None
    found = held(tmp_path / "with")
    assert set(found.splits) == {HELD_BACK}
    assert found.labels.tolist() == [2, 2, 2]
    assert found.manifest.counts == {HELD_BACK: {"calcified": 3}}
    assert set(found.groups.tolist()).isdisjoint(site.groups.tolist())
    assert 2 not in site.local_classes()
    with pytest.raises(KeyError):
        found.part("train")
    known = locate(tmp_path / "with", SITE)
    assert {known[row["file"]] for row in rows(tmp_path / "with")} == {
        f"{NAME}/calcified/{i}.png" for i in range(3)
    }
    again = digest_folder(Workspace(tmp_path / "with").held_back(SITE))
    ingest(tmp_path / "with")
    assert digest_folder(Workspace(tmp_path / "with").held_back(SITE)) == again


def test_a_patient_with_images_elsewhere_and_copies_are_refused_one_by_one(tmp_path: Path) -> None:
    data = smear(tmp_path)
    keep(
        data,
        {
            "calcified/new.png": "q1",
            "calcified/known.png": "p3",
            "cavity/copy.png": "q2",
            "solid/conflict.png": "q3",
            "calcified/nobody.png": "ANONYMOUS",
            "unheard/strange.png": "q4",
        },
    )
    for name in ("cavity/copy.png", "solid/conflict.png"):
        (data / NAME / name).write_bytes((data / "cavity" / "1.png").read_bytes())
    (data / NAME / "calcified" / "damaged.png").write_bytes(b"\x89PNG no more")
    (data / NAME / "calcified" / "link.png").symlink_to(data / "cavity" / "3.png")
    manifest, _ = ingest(tmp_path)
    assert manifest.rejected == {}, "the site itself is whole"
    known = locate(tmp_path, SITE)
    codes = {known[row["file"]].removeprefix(f"{NAME}/"): row["code"] for row in rows(tmp_path)}
    assert codes == {
        "calcified/new.png": None,
        "calcified/known.png": "held-back-patient",
        "cavity/copy.png": "duplicate",
        "solid/conflict.png": "duplicate-conflict",
        "calcified/nobody.png": "patient-missing",
        "unheard/strange.png": "label-unknown",
        "calcified/damaged.png": codes["calcified/damaged.png"],
        "calcified/link.png": "outside-source",
    }
    assert codes["calcified/damaged.png"] == "not-picture"
    assert held(tmp_path).manifest.count == 1
    # What 'check' says of files by themselves is what 'run' says of them.
    judged = {row["file"]: row["code"] for row in check_folder(data / NAME)}
    for name in ("calcified/new.png", "calcified/damaged.png", "calcified/link.png"):
        assert judged[name] == codes[name]
    page = (Workspace(tmp_path).held_back(SITE) / "integrity.html").read_text()
    assert "held-back-patient" in page
    assert '<th scope="col" class="n">held_back</th>' in page


def test_a_link_among_the_other_files_does_not_bring_a_held_back_image_in(tmp_path: Path) -> None:
    data = smear(tmp_path)
    (data / "solid" / "link.png").symlink_to(data / NAME / "calcified" / "0.png")
    manifest, _ = ingest(tmp_path)
    assert manifest.count == 20
    assert held(tmp_path).manifest.count == 3


def test_rows_of_the_sources_own_table_may_name_held_back_files(tmp_path: Path) -> None:
    data = smear(tmp_path, label={"from": "folder", "level": 0})
    (data / NAME / "patients.csv").unlink()
    with (data / "patients.csv").open("a") as stream:
        stream.write(f"{NAME}/calcified/0.png,q0\n{NAME}/calcified/1.png,p1\n")
    ingest(tmp_path)
    codes = sorted(str(row["code"]) for row in rows(tmp_path))
    assert codes == ["None", "held-back-patient", "patient-missing"]


def test_groups_of_few_held_back_patients_become_other(tmp_path: Path) -> None:
    sex = {"sex": {"from": "csv", "file": "patients.csv", "key": "file", "column": "sex"}}
    data = smear(tmp_path, subgroups=sex)
    for table, groups in ((data / "patients.csv", "FM"), (data / NAME / "patients.csv", "FX")):
        lines = table.read_text().splitlines()
        body = [f"{line},{groups[i // 2 % 2]}" for i, line in enumerate(lines[1:])]
        table.write_text("\n".join([f"{lines[0]},sex", *body]) + "\n")
    _, site = ingest(tmp_path)
    assert set(site.subgroups["sex"].tolist()) == {"F", "M"}
    assert held(tmp_path).subgroups["sex"].tolist() == ["F", "F", "other"]


def test_dicom_patients_are_told_by_their_tags(tmp_path: Path) -> None:
    data = hospital(tmp_path, "dicom", patient={"from": "tag", "tag": "PatientID"}, held_back=NAME)
    for i in range(12):
        save(dicom(noise(i, 8, 8), patient=f"P{i}"), data / CLASSES[i % 2] / f"{i}.dcm")
    for i, patient in enumerate(("P4", "Q1")):
        save(dicom(noise(50 + i, 8, 8), patient=patient), data / NAME / "calcified" / f"{i}.dcm")
    ingest(tmp_path)
    assert [row["code"] for row in sorted(rows(tmp_path), key=lambda r: str(r["code"]))] == [
        None,
        "held-back-patient",
    ]


def test_an_npz_file_may_lie_beside_that_of_the_source(tmp_path: Path) -> None:
    data = hospital(
        tmp_path,
        "npz",
        source={"kind": "npz", "path": "data/images.npz"},
        label={"from": "npz"},
        patient={"from": "npz"},
        splits="given",
        held_back=NAME,
    )

    def arrays(part: str, count: int, first: int, label: int) -> dict[str, Any]:
        return {
            f"{part}_images": np.array([noise(first + i, 8, 8) for i in range(count)], np.uint8).reshape(
                count, 8, 8
            ),
            f"{part}_labels": np.full((count, 1), label, np.uint8),
            f"{part}_groups": np.array([f"p{first + i}" for i in range(count)], dtype="U8"),
        }

    np.savez(
        data / "images.npz", **arrays("train", 9, 0, 0), **arrays("val", 3, 10, 1), **arrays("test", 3, 20, 1)
    )
    (data / NAME).mkdir()
    parts = {**arrays("train", 0, 0, 2), **arrays("val", 0, 0, 2), **arrays("test", 4, 22, 2)}
    np.savez(data / NAME / "images.npz", **parts)
    manifest, _ = ingest(tmp_path)
    assert manifest.count == 15
    codes = [row["code"] for row in rows(tmp_path) if row.get("item")]
    assert codes == ["held-back-patient"], "p22 stands in both"
    assert held(tmp_path).manifest.counts == {HELD_BACK: {"calcified": 3}}


def test_a_folder_without_a_usable_image_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = smear(tmp_path)
    keep(data, {f"calcified/{i}.png": "p1" for i in range(3)})
    (tmp_path / "params.yaml").write_text(params().model_dump_json())
    with pytest.raises(SystemExit) as ended:
        main(["ingest", "--root", str(tmp_path), SITE])
    assert not ended.value.code
    said = capsys.readouterr()
    assert "warning [held-back-empty]" in said.err
    assert "0 images held back for evaluation, 3 files rejected" in said.out
    assert load_held_back(Workspace(tmp_path).held_back(SITE)) is None
    assert [row["code"] for row in rows(tmp_path)] == ["held-back-patient"] * 3


@pytest.mark.parametrize("case", ["absent", "file", "link"])
def test_a_folder_that_is_none_is_one_typed_error(case: str, tmp_path: Path) -> None:
    data = smear(tmp_path)
    (data / NAME).rename(tmp_path / "elsewhere")
    if case == "file":
        (data / NAME).write_text("no folder")
    if case == "link":
        (data / NAME).symlink_to(data / "solid")
    with pytest.raises(SourceError) as error:
        ingest(tmp_path)
    assert error.value.code == "no-held-back"
    assert f"site {SITE}" in str(error.value)


@pytest.mark.parametrize("name", ["", ".", "..", "../other", "a/../..", "/data", "a\\b", "a\0b", "./."])
def test_names_of_no_folder_below_the_source_are_refused(name: str, tmp_path: Path) -> None:
    smear(tmp_path, apart=False)
    hospital(tmp_path, "images", held_back=name)
    with pytest.raises(ConfigError, match="held_back"):
        ingest(tmp_path)


def test_a_source_without_files_can_hold_none_back(tmp_path: Path) -> None:
    hospital(tmp_path, "phantom", label={"from": "npz"}, held_back=NAME)
    with pytest.raises(ConfigError, match="held_back: a source of kind phantom"):
        ingest(tmp_path)


def test_what_one_hospital_holds_back_another_may_not_train_on(tmp_path: Path) -> None:
    smear(tmp_path)
    ingest(tmp_path)
    other = tmp_path / "hospitals" / "birch"
    (tmp_path / "hospitals" / SITE).rename(tmp_path / "kept")
    data = hospital(tmp_path, "images", name="birch")
    for i in range(12):
        png(data / CLASSES[i % 2] / f"{i}.png", 300 + i)
    for i in range(12):  # copies of one image each, for one lands in the training split
        (data / "calcified").mkdir(exist_ok=True)
        (data / "calcified" / f"{i}.png").write_bytes(
            (tmp_path / "kept" / "data" / NAME / "calcified" / f"{i % 3}.png").read_bytes()
        )
    (tmp_path / "hospitals" / SITE).rename(other)
    (tmp_path / "kept").rename(tmp_path / "hospitals" / SITE)
    ingest_site(tmp_path, "birch", params(sites=[SITE, "birch"]))
    crossings = [c for c in find_crossings(tmp_path, [SITE, "birch"]) if c.trains == "birch"]
    assert [c.tests for c in crossings] == [SITE]
    assert crossings[0].images
