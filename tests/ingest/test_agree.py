"""`qkt ingest check` and `qkt ingest run` judge alike: both over the same files, verdict by verdict."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from qkt_clinical.config.site import ImageSpec
from qkt_clinical.ingest import check_folder
from qkt_clinical.ingest.decode import decoded
from qkt_clinical.ingest.listing import list_files
from qkt_clinical.ingest.source import Refusal, Request
from qkt_clinical.ingest.store import ScratchStore
from tests.ingest_files import dicom, nifti, noise, save
from tests.places import ROOT, SHARED

FIELD, CONFORMANCE = SHARED / "field", SHARED / "dicom-conformance"
OF_SITE = frozenset(
    {
        *("other-kind", "dimensions", "multi-frame", "spacing-missing", "resampled-too-large"),
        *("geometry-missing", "orientation-mixed", "sizes-mixed", "slice-missing", "slice-duplicate"),
        *("spacing-uneven", "slices-shifted", "too-few-slices", "series-incomplete", "localiser"),
        *("duplicate", "time-series", "volume-missing", "mosaic", "contrast-lost"),
    }
)
"""Codes that depend on site.yaml or other files, or on what a readable file shows: no question of a check."""
SIZES = ((8, 8), (8, 8, 8))
LIMIT_MB = 100
Verdicts = dict[str, str | None]


def by_run(folder: Path, kind: str, size: tuple[int, ...], store: Path) -> Verdicts:
    """What ingest makes of each file of a folder before it asks for labels."""
    request = Request(ImageSpec(size=size, channels=1), (), LIMIT_MB * 1_000_000, "alder", 0, b"s" * 32, True)
    listing = list_files(folder, kind)
    found: Verdicts = {file.name: refusal.code for refusal in listing.refused for file in refusal.files}
    with ScratchStore(store, site="alder", salt=request.salt, recipe=None) as opened:
        for _, result in decoded(kind, listing.files, request, opened, workers=1, step=lambda *_: None):
            code = result.code if isinstance(result, Refusal) else None
            found |= {file.name: code for file in result.files}
    for file in listing.files:  # the .img of a pair is never named
        found.setdefault(file.name, found.get(f"{file.name[:-4]}.hdr"))
    return found


def disagreements(folder: Path, scratch: Path) -> list[str]:
    """Files that the two judge otherwise, as lines to read."""
    checked = {row["file"]: row for row in check_folder(folder, max_file_mb=LIMIT_MB)}
    wrong = []
    for kind in ("dicom", "nifti", "images"):
        runs = [by_run(folder, kind, size, scratch / f"{kind}-{len(size)}.sqlite") for size in SIZES]
        for name, row in checked.items():
            codes = [run[name] for run in runs if name in run]
            mine = row["kind"] == kind or (row["kind"] is None and set(codes) - {"other-kind"})
            if codes and mine and not alike(row["code"], codes):
                wrong.append(f"{kind} {name}: check {row['code']}, run {codes}")
    return wrong


def alike(check: str | None, runs: list[str | None]) -> bool:
    """What a site could take is accepted; what is refused for itself, is refused for the same reason."""
    if check is None:
        return None in runs or all(code in OF_SITE for code in runs)
    return None not in runs and (check in runs or all(code in OF_SITE | {"not-dicom"} for code in runs))


@pytest.mark.skipif(not CONFORMANCE.is_dir(), reason="needs ../shared/data/dicom-conformance")
def test_over_real_files(tmp_path: Path) -> None:
    assert disagreements(CONFORMANCE, tmp_path) == []


CASES = sorted(path.parent.name for path in FIELD.glob("*/gen.py"))


@pytest.mark.nightly
@pytest.mark.skipif(not CASES, reason="needs ../shared/data/field")
@pytest.mark.parametrize("case", CASES)
def test_over_files_after_hospitals_reports(case: str, tmp_path: Path) -> None:
    environment = {**os.environ, "FIELD_OUT": str(tmp_path / "field"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(FIELD / case / "gen.py")]
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    folders = sorted((tmp_path / "field").glob("*/*/hospitals/alder/data"))
    assert folders
    assert [line for folder in folders for line in disagreements(folder, tmp_path)] == []
    subprocess.run(["rm", "-rf", str(tmp_path / "field")], check=True)  # deeper than shutil can walk


def odd_files(folder: Path) -> None:
    """Files at which the two were once of two minds."""
    nifti(folder / "sound.nii.gz", noise(0, 6, 7, 8))
    volume = nibabel.Nifti1Image(noise(1, 6, 7, 8), np.eye(4))
    for name, code in (("no-form.nii", 0), ("one-form.nii", 1)):
        volume.set_sform(np.eye(4), code=code)
        volume.set_qform(np.diag([1, 1, 3, 1]) if code else None, code=code)
        (folder / name).write_bytes(volume.to_bytes())
    not_a_number = bytearray((folder / "one-form.nii").read_bytes())
    not_a_number[280:284] = np.array([np.nan], "<f4").tobytes()  # in the sform
    (folder / "nan.nii").write_bytes(not_a_number)
    nibabel.save(nibabel.Nifti1Pair(noise(2, 6, 7, 8), np.eye(4)), folder / "pair.hdr")
    (folder / "alone.img").write_bytes((folder / "pair.img").read_bytes())
    (folder / "empty.nii").write_bytes(b"")
    nothing = np.full((8, 8, 1), np.nan, np.float32)
    nibabel.save(nibabel.Nifti1Image(nothing, np.eye(4)), folder / "nothing.nii")
    Image.fromarray(nothing[..., 0]).save(folder / "nothing.tif")
    pages = [Image.fromarray(noise(3, *size)) for size in ((8, 8), (9, 9))]
    pages[0].save(folder / "mixed.tif", save_all=True, append_images=pages[1:])
    pages[0].save(folder / "same.tif", save_all=True, append_images=[Image.fromarray(noise(4, 8, 8))])
    pages[0].save(folder / "short.png")
    (folder / "short.png").write_bytes((folder / "short.png").read_bytes()[:-30])
    for name in ("notes.txt", "README", "picture.pdf", "DICOMDIR", ".hidden.png"):
        pages[0].save(folder / name, "PNG")
    save(dicom(noise(5, 8, 8)), folder / "1.2.3")
    save(dicom(np.full((8, 8), 7, np.uint16)), folder / "even.dcm")
    save(dicom(noise(6, 3, 8, 8)), folder / "frames.dcm")
    (folder / "nowhere.png").symlink_to("not-there.png")
    (folder / "outside.png").symlink_to(Path(os.__file__))
    os.mkfifo(folder / "pipe.png")


def test_over_files_that_once_were_judged_in_two_ways(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    odd_files(tmp_path / "data")
    assert disagreements(tmp_path / "data", tmp_path) == []
    codes = {row["file"]: row["code"] for row in check_folder(tmp_path / "data")}
    assert {name: codes[name] for name in ("pair.hdr", "pair.img", "one-form.nii", "1.2.3", "same.tif")} == {
        **dict.fromkeys(("pair.hdr", "pair.img", "1.2.3", "same.tif")),
        "one-form.nii": "affine-conflict",
    }
    assert codes["no-form.nii"] == "geometry-missing"
    assert codes["nan.nii"] == "geometry-invalid"
    assert codes["nothing.nii"] == codes["nothing.tif"] == "no-finite-values"
    assert codes["picture.pdf"] == "side-file"
    assert codes["pipe.png"] == "not-a-file"
