from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from qkt_clinical.catalog import BLOOD_CELLS
from qkt_clinical.common.files import digest_folder
from qkt_clinical.config.params import Params
from qkt_clinical.config.site import ImageSpec
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import load_prepared, read_consent
from qkt_clinical.errors import ConfigError, FileRejected, PreparedError, SourceError
from qkt_clinical.ingest import check_file, check_folder, ingest_site, locate, reasons
from qkt_clinical.ingest.arrays import Picture, prepare
from tests.ingest_files import CLASSES, SITE, dicom, hospital, ingest, nifti, noise, params, save, series
from tests.places import SHARED

PBC28 = SHARED / "pbc28.npz"


def png(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def prepared(root: Path) -> Path:
    return Workspace(root).prepared(SITE)


def integrity(root: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((prepared(root) / "integrity.json").read_text())
    return rows


# --- arrays -----------------------------------------------------------------------------------------


def spec(size: tuple[int, ...], **changes: Any) -> ImageSpec:
    return ImageSpec.model_validate({"size": size, "channels": 1, **changes})


def test_shrinking_by_a_whole_number_takes_block_means() -> None:
    pixels = noise(0, 16, 24)
    image = prepare(Picture(pixels, limits=(0.0, 255.0), eight_bit=True), spec((8, 8)))
    means = pixels.reshape(8, 2, 8, 3).mean(axis=(1, 3))
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image[0], means, atol=0.51)


def test_gradient_survives_resampling_by_spacing() -> None:
    """A ramp of 1 per mm along the columns, 2 mm pixels, brought to 1 mm: still 1 per mm, same place."""
    ramp = np.tile(2.0 * np.arange(8) + 1, (8, 1))  # value = mm from the left edge, at pixel centres
    picture = Picture(ramp, spacing_mm=(2.0, 2.0))
    wanted = spec((16, 16), spacing_mm=(1, 1), window={"center": 8, "width": 16})
    image = prepare(picture, wanted) * 16
    expected = np.clip(np.arange(16) + 0.5, 1, 15)  # beyond the outer pixel centres the edge is repeated
    np.testing.assert_allclose(image[0], np.tile(expected, (16, 1)), atol=1e-4)


def test_spacing_keeps_constants_and_pads_with_black() -> None:
    picture = Picture(np.full((8, 8), 5.0), spacing_mm=(1.0, 2.0))
    image = prepare(picture, spec((12, 12), spacing_mm=(2, 2), window={"center": 5, "width": 10}))
    assert image.shape == (1, 12, 12)  # 4 x 8 pixels of 2 mm in the middle
    np.testing.assert_allclose(image[0, 4:8, 2:10], 0.5, atol=1e-5)
    assert float(image.sum()) == pytest.approx(0.5 * 32, abs=1e-3)


def test_volume_is_resized_in_three_dimensions() -> None:
    pixels = noise(1, 8, 8, 8)
    image = prepare(Picture(pixels, limits=(0.0, 255.0), eight_bit=True), spec((4, 4, 4)))
    np.testing.assert_allclose(image[0], pixels.reshape(4, 2, 4, 2, 4, 2).mean(axis=(1, 3, 5)), atol=0.51)


def test_zscore_constant_images_and_channels() -> None:
    picture = Picture(noise(2, 8, 8), limits=(0.0, 255.0), eight_bit=True)
    image = prepare(picture, spec((8, 8), normalisation="zscore", channels=3))
    assert (image.shape, image.dtype) == ((3, 8, 8), np.float32)
    assert float(image.mean()) == pytest.approx(0, abs=1e-5)
    assert float(image.std()) == pytest.approx(1, abs=1e-4)
    flat = Picture(np.full((8, 8), 7.0))
    for normalisation in ("unit", "zscore"):
        assert not prepare(flat, spec((8, 8), normalisation=normalisation)).any()


def test_spacing_wanted_but_unknown() -> None:
    with pytest.raises(FileRejected) as caught:
        prepare(Picture(noise(0, 8, 8)), spec((8, 8), spacing_mm=(1, 1)))
    assert caught.value.code == "spacing-missing"


# --- images -----------------------------------------------------------------------------------------


def one(root: Path, path: str, **image: Any) -> NDArray[Any]:
    data = root / "hospitals" / SITE / "data"
    hospital(root, "images", image={"size": [8, 8], "channels": 3, **image})
    assert (data / path).exists()
    return np.asarray(ingest(root)[1].images[0])


def test_rgb_and_grey(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "images")
    rgb = noise(0, 8, 8, 3)
    png(folder / "solid" / "a.png", rgb)
    np.testing.assert_array_equal(one(tmp_path, "solid/a.png"), rgb.transpose(2, 0, 1))
    grey = noise(1, 8, 8)
    png(folder / "solid" / "a.png", grey)
    np.testing.assert_array_equal(one(tmp_path, "solid/a.png"), np.stack([grey] * 3))


def test_palette_transparency_cmyk_and_16_bit(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "images") / "solid"
    folder.mkdir()
    path = folder / "a.tiff"

    rgba = np.full((8, 8, 4), 200, dtype=np.uint8)
    rgba[..., 3] = 255
    rgba[0, 0, 3] = 0  # transparent: black shows through
    Image.fromarray(rgba).save(path)
    image = one(tmp_path, "solid/a.tiff")
    assert image[:, 0, 0].tolist() == [0, 0, 0]
    assert (image[:, 1:] == 200).all()

    index = Image.fromarray((np.arange(64).reshape(8, 8) % 3).astype(np.uint8), mode="P")
    index.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    index.save(path)
    assert one(tmp_path, "solid/a.tiff")[:, 0, :3].T.tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]

    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path)
    assert one(tmp_path, "solid/a.tiff")[:, 0, 0].tolist() == [255, 0, 0]

    deep = (np.arange(64, dtype=np.uint16).reshape(8, 8)) * 1000
    Image.fromarray(deep).save(path)
    image = one(tmp_path, "solid/a.tiff", window={"center": 32000, "width": 64000})
    np.testing.assert_allclose(image[0], deep / 64000, atol=1e-6)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "images")
    pixels = noise(3, 8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn by 90 degrees clockwise to look at it
    png(folder / "solid" / "a.png", pixels, exif=exif)
    np.testing.assert_array_equal(one(tmp_path, "solid/a.png", channels=1)[0], np.rot90(pixels, -1))


def test_pages_of_a_tiff_are_a_volume(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "images", image={"size": [4, 8, 8], "channels": 1}) / "solid"
    folder.mkdir()
    pages = noise(0, 4, 8, 8)
    first, *rest = [Image.fromarray(page) for page in pages]
    first.save(folder / "a.tif", save_all=True, append_images=rest)
    np.testing.assert_array_equal(ingest(tmp_path)[1].images[0, 0], pages)


def frames(path: Path) -> None:
    first, second = Image.fromarray(noise(0, 8, 8)), Image.fromarray(noise(1, 8, 8))
    first.save(path, format="TIFF", save_all=True, append_images=[second])


def half(path: Path) -> None:
    png(path, noise(0, 64, 64), format="JPEG")
    path.write_bytes(path.read_bytes()[:-800])


BROKEN_IMAGES = {
    "empty": lambda p: p.write_bytes(b""),
    "not-picture": lambda p: p.write_text("hello"),
    "truncated": half,
    "multi-frame": frames,
    "too-large": lambda p: Image.new("1", (20_000, 20_000)).save(p),
    "colour-unknown": lambda p: Image.new("LAB", (8, 8)).save(p, format="TIFF"),
    "unreadable": lambda p: p.symlink_to("nowhere.png"),
    "outside-source": lambda p: p.symlink_to(Path(os.__file__)),
    "not-a-file": lambda p: os.mkfifo(p),
}


@pytest.mark.parametrize("code", sorted(BROKEN_IMAGES))
def test_bad_image_gets_its_code_and_the_rest_goes_on(tmp_path: Path, code: str) -> None:
    folder = hospital(tmp_path, "images") / "solid"
    png(folder / "good.png", noise(9, 8, 8))
    BROKEN_IMAGES[code](folder / "bad.png")
    manifest, _ = ingest(tmp_path, ingest={"max_file_mb": 100})
    assert (manifest.count, manifest.rejected) == (1, {code: 1})
    assert code in reasons


# --- files of a source ------------------------------------------------------------------------------


def test_side_files_are_left_out_and_other_kinds_named(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "images")
    png(folder / "solid" / "a.png", noise(0, 8, 8))
    for name in ("README", "labels.csv", ".DS_Store", "notes.txt", "DICOMDIR", ".hidden/b.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    save(dicom(noise(1, 8, 8)), folder / "solid" / "c.dcm")
    manifest, _ = ingest(tmp_path)
    assert manifest.rejected.pop("other-kind") == 1
    assert manifest.rejected == {"not-picture": 1}  # a hidden folder's file is a file all the same


def test_linked_source_folder_is_fine(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "images")
    folder.rmdir()
    png(tmp_path / "archive" / "solid" / "a.png", noise(0, 8, 8))
    (tmp_path / "archive" / "circle").symlink_to(tmp_path / "archive")
    folder.symlink_to(tmp_path / "archive")
    manifest, _ = ingest(tmp_path)
    assert (manifest.count, manifest.rejected) == (1, {})


def test_consent_lies_beside_the_prepared_site(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    png(hospital(tmp_path, "images") / "solid" / "a.png", noise(0, 8, 8))
    ingest(tmp_path)
    assert not read_consent(space.consent(SITE), SITE).pictures, "off where nobody said anything"
    before = digest_folder(space.prepared(SITE))
    hospital(tmp_path, "images", pictures=True)
    ingest(tmp_path)
    assert read_consent(space.consent(SITE), SITE).pictures
    assert digest_folder(space.prepared(SITE)) == before, "teachers need not be trained again"
    assert not read_consent(space.consent("elsewhere"), "elsewhere").pictures
    space.consent(SITE).write_text('{"pictures": "perhaps"}')
    with pytest.raises(PreparedError, match="no readable consent"):
        read_consent(space.consent(SITE), SITE)


def test_same_pixels_twice_and_under_two_labels(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "images")
    png(folder / "solid" / "a.png", noise(0, 8, 8))
    png(folder / "solid" / "b.png", noise(0, 8, 8))
    png(folder / "solid" / "c.png", noise(1, 8, 8))
    png(folder / "cavity" / "d.png", noise(1, 8, 8))
    png(folder / "cavity" / "e.png", noise(1, 8, 8))
    png(folder / "solid" / "f.png", noise(2, 8, 8))
    manifest, site = ingest(tmp_path)
    assert manifest.rejected == {"duplicate": 1, "duplicate-conflict": 3}
    assert manifest.count == 2
    found = {image.tobytes() for image in site.images}
    assert found == {noise(0, 8, 8).tobytes(), noise(2, 8, 8).tobytes()}


def test_without_source_or_usable_image(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "images")
    with pytest.raises(SourceError, match="no file of its kind"):
        ingest(tmp_path)
    png(folder / "strange" / "a.png", noise(0, 8, 8))
    with pytest.raises(SourceError, match="1 label-unknown") as caught:
        ingest(tmp_path)
    assert "label_map" in caught.value.remedy
    assert "strange" not in str(caught.value)
    (folder / "strange" / "a.png").unlink()
    (folder / "strange").rmdir()
    folder.rmdir()
    with pytest.raises(SourceError, match="no source") as caught:
        ingest(tmp_path)
    assert caught.value.where.site == SITE


def test_mixed_depths_become_floats_in_any_order(tmp_path: Path) -> None:
    """An 8-bit image reads the same before and after a 16-bit one."""
    for root, first, second in ((tmp_path / "x", "a", "b"), (tmp_path / "y", "b", "a")):
        folder = hospital(root, "images") / "solid"
        png(folder / f"{first}.png", noise(0, 8, 8))
        png(folder / f"{second}.png", noise(1, 8, 8).astype(np.uint16) * 257)
    one_way, other_way = ingest(tmp_path / "x")[1], ingest(tmp_path / "y")[1]
    assert one_way.images.dtype == np.float32
    np.testing.assert_array_equal(one_way.images[0], other_way.images[1])
    np.testing.assert_allclose(one_way.images[0, 0], noise(0, 8, 8) / 255, atol=1e-6)


# --- labels and patients ----------------------------------------------------------------------------


def test_table_finds_files_by_path_name_and_stem(tmp_path: Path) -> None:
    table = {"from": "csv", "file": "labels.csv", "key": "image"}
    folder = hospital(
        tmp_path,
        "nifti",
        label={**table, "column": "finding"},
        patient={**table, "column": "person"},
        label_map={"Hohlraum": "cavity"},
    )
    for i, name in enumerate(["x/a.nii.gz", "x/b.nii.gz", "x/c.nii", "x/d.nii", "x/e.nii", "x/f.nii"]):
        nifti(folder / name, noise(i, 8, 8, 1))
    (folder / "labels.csv").write_text(
        "\ufeffimage;finding;person\n"
        "x/a.nii.gz;solid;Müller\nb.nii.gz;Hohlraum;Müller\nc;calcified;Žižek\n"
        "d;solid;\ne;solid;P1\ne;cavity;P1\n",
        encoding="utf-8",
    )
    manifest, site = ingest(tmp_path)
    assert site.labels.tolist() == [0, 1, 2]
    assert site.groups[0] == site.groups[1] != site.groups[2]
    assert manifest.rejected == {"patient-missing": 1, "label-conflict": 1, "label-missing": 1}


def test_patients_from_the_inner_folder(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "images", patient={"from": "folder", "level": 1})
    for i, name in enumerate(["solid/p1/a.png", "solid/p1/b.png", "cavity/p2/a.png", "cavity/c.png"]):
        png(folder / name, noise(i, 8, 8))
    manifest, site = ingest(tmp_path)
    assert manifest.count == 3
    assert manifest.rejected == {"patient-missing": 1}
    assert len(set(site.groups)) == 2


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("images", {"label": {"from": "tag", "tag": "PatientID"}}, "DICOM tag"),
        ("dicom", {"label": {"from": "tag", "tag": "PatientIdent"}}, "no DICOM keyword"),
        ("images", {"label": {"from": "npz"}}, "comes from npz"),
        ("npz", {"label": {"from": "folder"}}, "must come from 'npz'"),
        ("images", {"label": {"from": "none"}}, "label needs a source"),
        ("images", {"splits": "given"}, "for npz"),
        ("images", {"label_map": {"a": "tumour"}}, "tumour"),
        ("images", {"label": {"from": "csv", "file": "no.csv", "key": "a", "column": "b"}}, "cannot be read"),
        ("images", {"label": {"from": "csv", "file": "../site.yaml", "key": "a", "column": "b"}}, "outside"),
        ("images", {"label": {"from": "csv", "file": "t.csv", "key": "a", "column": "c"}}, "no column 'c'"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, kind: str, change: dict[str, Any], words: str) -> None:
    folder = hospital(tmp_path, kind, **change)
    (folder / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=words):
        ingest(tmp_path)


# --- npz --------------------------------------------------------------------------------------------


def npz(root: Path, arrays: dict[str, Any] | None = None, **changes: Any) -> Path:
    config = {"label": {"from": "npz"}, "patient": {"from": "none"}, "image": {"size": [8, 8], "channels": 3}}
    folder = hospital(root, "npz", **{**config, **changes})
    np.savez(folder / "images.npz", **(layout() if arrays is None else arrays))
    return folder / "images.npz"


def layout(groups: bool = False) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for i, (part, count) in enumerate((("train", 40), ("val", 6), ("test", 12))):
        arrays[f"{part}_images"] = noise(i, count, 8, 8, 3)
        arrays[f"{part}_labels"] = (np.arange(count) % 3).astype(np.uint8)[:, None]
        if groups:
            arrays[f"{part}_groups"] = np.array([f"{part}-{j // 4}" for j in range(count)])
    return arrays


def test_npz_with_given_splits(tmp_path: Path) -> None:
    npz(tmp_path, layout(groups=True), splits="given", patient={"from": "npz"})
    manifest, site = ingest(tmp_path)
    np.testing.assert_array_equal(site.images[:40], layout()["train_images"].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(site.labels[46:], np.arange(12) % 3)
    assert site.splits["test"].tolist() == list(range(46, 58))
    assert site.splits["val"].tolist() == list(range(40, 46))
    assert 4 <= len(site.splits["calibration"]) <= 12
    assert manifest.counts["val"] == {"solid": 2, "cavity": 2, "calcified": 2}


def test_npz_split_anew_and_relabelled(tmp_path: Path) -> None:
    npz(tmp_path, label_map={"0": "calcified", "1": "solid"})
    manifest, site = ingest(tmp_path)
    assert manifest.count == 39
    assert manifest.rejected == {"label-unknown": 19}
    assert site.labels[:3].tolist() == [2, 0, 2]
    rows = integrity(tmp_path)
    assert [row for row in rows if row["accepted"]] == [row for row in rows if "item" not in row]
    assert {row["item"] for row in rows if "item" in row} >= {"train/2", "test/11"}
    assert len(site.splits["test"]) == pytest.approx(0.2 * 39, abs=2)


def test_npz_grey_volumes_and_fortran_order(tmp_path: Path) -> None:
    volumes = noise(0, 6, 4, 8, 8)
    arrays = {"train_images": np.asfortranarray(volumes), "train_labels": np.zeros(6, dtype=np.int64)}
    npz(tmp_path, arrays, image={"size": [4, 8, 8], "channels": 1})
    np.testing.assert_array_equal(ingest(tmp_path)[1].images[:, 0], volumes)


def test_npz_patient_in_two_given_splits(tmp_path: Path) -> None:
    arrays = layout(groups=True)
    arrays["test_groups"] = np.array(["train-1"] * 12)
    npz(tmp_path, arrays, splits="given", patient={"from": "npz"})
    with pytest.raises(SourceError, match="two of the given splits") as caught:
        ingest(tmp_path)
    assert "train-1" not in str(caught.value)


class Trap:
    """Unpickling this would leave a trace."""

    def __reduce__(self) -> Any:
        return (os.mkdir, (f"{os.environ['PYTEST_TRAP']}",))


def object_array(path: Path) -> None:
    np.savez(path, **{**layout(), "train_labels": np.array([Trap()] * 40, dtype=object)})


def declared_huge(path: Path) -> None:
    np.savez(path, **layout())
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    blob = members["train_images.npy"]
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (900000, 80, 80, 3), }"
    header = header.ljust(117) + b"\n"
    members["train_images.npy"] = (
        b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + blob[128:]
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def declared_more(path: Path) -> None:
    arrays = layout()
    np.savez(path, **arrays)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["train_images.npy"] = members["train_images.npy"][:-100]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def flipped_bit(path: Path) -> None:
    np.savez(path, **layout())
    blob = bytearray(path.read_bytes())
    blob[3000] ^= 1  # within the training images: the checksum of the member no longer fits
    path.write_bytes(blob)


BROKEN_NPZ = {
    "empty": lambda p: p.write_bytes(b""),
    "not-npz": lambda p: p.write_bytes(pickle.dumps([1, 2, 3])),
    "npz-layout": lambda p: np.savez(p, images=noise(0, 4, 8, 8)),
    "object-array": object_array,
    "too-large": declared_huge,
    "truncated": declared_more,
    "pixels-undecodable": flipped_bit,
}


@pytest.mark.parametrize("code", sorted(BROKEN_NPZ))
def test_bad_npz_is_an_error_with_its_code(
    tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_TRAP", str(tmp_path / "sprung"))
    path = npz(tmp_path)
    BROKEN_NPZ[code](path)
    with pytest.raises(FileRejected) as caught:
        check_file(path, max_file_mb=100)
    assert caught.value.code == code
    if code == "pixels-undecodable":  # images before the damage are kept, the damage is on record
        assert ingest(tmp_path)[0].rejected == {code: 1}
    else:
        with pytest.raises(SourceError, match=code):
            ingest(tmp_path, ingest={"max_file_mb": 100})
    assert not (tmp_path / "sprung").exists()


@pytest.mark.slow
@pytest.mark.skipif(not PBC28.is_file(), reason="needs ../shared/data/pbc28.npz")
def test_real_npz(tmp_path: Path) -> None:
    config = {"label": {"from": "npz"}, "splits": "given", "image": {"size": [28, 28], "channels": 3}}
    folder = hospital(tmp_path, "npz", **config)
    (folder / "pbc28.npz").write_bytes(PBC28.read_bytes())
    manifest, site = ingest(tmp_path, classes=BLOOD_CELLS)
    assert (manifest.count, manifest.rejected, manifest.dtype) == (13_685, {"duplicate": 14}, "uint8")
    assert len(site.splits["test"]) == 1_996
    assert len(site.splits["train"]) + len(site.splits["calibration"]) == 10_260
    assert manifest.counts["test"]["monocyte"] == 170


# --- phantom ----------------------------------------------------------------------------------------


def test_phantom_needs_no_files(tmp_path: Path) -> None:
    (tmp_path / "hospitals" / "aster").mkdir(parents=True)
    (tmp_path / "hospitals" / "aster" / "site.yaml").write_text(
        "{name: aster, source: {kind: phantom}, label: {from: npz}, patient: {from: npz},"
        " image: {size: [32, 32]}}"
    )
    options = Params(classes=BLOOD_CELLS, sites=("aster",), queries={})
    manifest = ingest_site(tmp_path, "aster", options)
    site = load_prepared(Workspace(tmp_path).prepared("aster"))
    assert (manifest.dtype, manifest.shape) == ("uint8", (3, 32, 32))
    assert len(site.local_classes()) >= 3


# --- what comes out ---------------------------------------------------------------------------------


def clinic(root: Path, names: list[str]) -> None:
    """A DICOM site whose tags, tables and file names are full of patients."""
    folder = hospital(root, "dicom", patient={"from": "tag", "tag": "PatientID"})
    for name in names:
        i = int(name[1:])
        patient = f"SECRET{i % 5}"
        save(
            dicom(noise(i, 8, 8), patient=patient, InstitutionName="SECRET"),
            folder / CLASSES[i % 3] / f"SECRET_{name}.dcm",
        )
    (folder / "solid" / "SECRET.Smith").write_bytes(b"no image")


def test_no_patient_data_in_any_output(tmp_path: Path) -> None:
    clinic(tmp_path, [f"n{i}" for i in range(20)])
    manifest, _ = ingest(tmp_path)
    assert manifest.rejected == {"not-dicom": 1}
    for path in prepared(tmp_path).iterdir():
        blob = path.read_bytes()
        for spelling in ("SECRET", "Smith", "Doe"):
            for encoding in ("utf-8", "utf-32-le"):
                assert spelling.encode(encoding) not in blob, path.name
    located = locate(tmp_path, SITE)
    bad = [row["file"] for row in integrity(tmp_path) if not row["accepted"]]
    assert [located[name] for name in bad] == ["solid/SECRET.Smith"]  # at the site itself


def test_salt_is_secret_stays_and_decides_ids_alone(tmp_path: Path) -> None:
    clinic(tmp_path, [f"n{i}" for i in range(20)])
    _, first = ingest(tmp_path)
    salt = tmp_path / "hospitals" / SITE / ".salt"
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600
    assert len(salt.read_text().strip()) == 32
    groups, splits = first.groups.copy(), {s: v.tolist() for s, v in first.splits.items()}
    assert all(len(g) == 16 and int(g, 16) >= 0 for g in groups)
    salt.unlink()
    _, second = ingest(tmp_path)
    assert not set(groups) & set(second.groups)
    assert {s: v.tolist() for s, v in second.splits.items()} == splits
    salt.write_text("short")
    with pytest.raises(SourceError, match="shorter"):
        ingest(tmp_path)


def test_same_bytes_again_and_in_any_order_of_writing(tmp_path: Path) -> None:
    names = [f"n{i}" for i in range(20)]
    clinic(tmp_path / "a", names)
    clinic(tmp_path / "b", names[::-1])
    ingest(tmp_path / "a")
    digest = digest_folder(prepared(tmp_path / "a"))
    ingest(tmp_path / "a")
    assert digest_folder(prepared(tmp_path / "a")) == digest
    salt = tmp_path / "a" / "hospitals" / SITE / ".salt"
    (tmp_path / "b" / "hospitals" / SITE / ".salt").write_bytes(salt.read_bytes())
    ingest(tmp_path / "b")
    assert digest_folder(prepared(tmp_path / "b")) == digest
    assert [p.name for p in (tmp_path / "a" / ".qkt").iterdir()] == [f"ingest-{SITE}.sqlite"]
    ingest(tmp_path / "a", seed=1)
    assert digest_folder(prepared(tmp_path / "a")) != digest


def test_patients_are_kept_apart_and_progress_is_told(tmp_path: Path) -> None:
    clinic(tmp_path, [f"n{i}" for i in range(20)])
    steps: list[tuple[int, int]] = []
    ingest_site(tmp_path, SITE, params(), progress=lambda done, total: steps.append((done, total)))
    site = load_prepared(prepared(tmp_path))
    owners = [set(site.groups[site.splits[s]].tolist()) for s in site.splits]
    assert sum(map(len, owners)) == len(set().union(*owners)) == 5
    assert steps[-1] == (21, 21)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_a_failed_run_leaves_the_earlier_result(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "images")
    path = png(folder / "solid" / "a.png", noise(0, 8, 8))
    ingest(tmp_path)
    before = digest_folder(prepared(tmp_path))
    path.write_bytes(b"broken")
    with pytest.raises(SourceError):
        ingest(tmp_path)
    assert digest_folder(prepared(tmp_path)) == before


def test_checking_a_folder_of_everything(tmp_path: Path) -> None:
    png(tmp_path / "a.png", noise(0, 8, 8))
    save(dicom(noise(0, 8, 8)), tmp_path / "x" / "1.2.3")
    nifti(tmp_path / "x" / "b.nii.gz", noise(0, 8, 8, 4))
    np.savez(tmp_path / "c.npz", **layout())
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "odd").write_text("odd")
    assert [(row["file"], row["kind"], row["code"]) for row in check_folder(tmp_path)] == [
        ("a.png", "images", None),
        ("c.npz", "npz", None),
        ("odd", None, "not-dicom"),
        ("table.csv", None, "side-file"),
        ("x/1.2.3", "dicom", None),
        ("x/b.nii.gz", "nifti", None),
    ]
    found = {r["file"]: (r["shape"], r["dtype"], r["spacing_mm"]) for r in check_folder(tmp_path)}
    assert found["a.png"] == ((8, 8), "uint8", None)
    assert found["x/1.2.3"] == ((8, 8), "uint8", (1.0, 1.0))
    assert found["x/b.nii.gz"] == ((8, 8, 4), "uint8", (1.0, 1.0, 1.0))
    assert found["c.npz"][:2] == (layout()["train_images"].shape, str(layout()["train_images"].dtype))
    assert found["odd"] == (None, None, None)


def test_importing_loads_no_reader() -> None:
    code = (
        "import sys, qkt_clinical.ingest; "
        "print([m for m in ('torch', 'monai', 'nibabel', 'pydicom', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_series_and_volumes_share_one_site_shape(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "dicom", image={"size": [8, 8, 8], "channels": 1})
    series(folder / "solid" / "s", noise(0, 4, 8, 8))
    manifest, site = ingest(tmp_path)
    assert manifest.shape == (1, 8, 8, 8)
    assert site.images.dtype == np.uint8
