from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from qkt_clinical.catalog import BLOOD_CELLS, LESIONS
from qkt_clinical.common.files import digest_file, digest_folder
from qkt_clinical.config.loading import load_query, load_site
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import load_held_back
from qkt_clinical.datasets.phantom import (
    delivery,
    phantom_params,
    render_images,
    render_sheet,
    write_federation,
)
from qkt_clinical.datasets.phantom.federation import CHESTS, SMEARS, STAMP, VERSION, render_held_back
from qkt_clinical.errors import ConfigError
from qkt_clinical.ingest import ingest_site
from tests.places import ROOT

pytestmark = pytest.mark.slow

N2, N3 = 40, 20


@pytest.fixture(scope="module")
def smears(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("smears")
    assert write_federation(root, dims=2, images_per_site=N2) == sorted(SMEARS)
    return root


@pytest.fixture(scope="module")
def chests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chests")
    assert write_federation(root, dims=3, images_per_site=N3) == sorted(CHESTS)
    return root


def data(root: Path, site: str) -> Path:
    return root / "hospitals" / site / "data"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


# --- determinism ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_same_bytes_again_and_other_bytes_for_another_seed(
    dims: int, smears: Path, chests: Path, tmp_path: Path
) -> None:
    first = smears if dims == 2 else chests
    count = N2 if dims == 2 else N3
    write_federation(tmp_path / "again", dims=dims, images_per_site=count)
    assert digest_folder(tmp_path / "again") == digest_folder(first)
    write_federation(tmp_path / "other", dims=dims, seed=1, images_per_site=count)
    for site in SMEARS if dims == 2 else CHESTS:
        assert digest_folder(data(tmp_path / "other", site)) != digest_folder(data(first, site))


def test_a_hospital_does_not_depend_on_the_others(smears: Path) -> None:
    images, labels, patients = render_images("fern", images=N2)
    with np.load(data(smears, "fern") / "images.npz", allow_pickle=False) as file:
        stored = np.concatenate([file[f"{s}_images"] for s in ("train", "val", "test")])
    assert sorted(i.tobytes() for i in stored) == sorted(i.tobytes() for i in images)
    again = render_images("fern", images=N2)
    np.testing.assert_array_equal(images, again[0])
    np.testing.assert_array_equal(labels, again[1])
    assert patients == again[2]


def test_complete_hospitals_are_left_alone_and_the_rest_is_made_good(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_federation(
        tmp_path, dims=3, images_per_site=N3, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]
    first = digest_folder(tmp_path)
    kept = data(tmp_path, "east") / "labels.csv"
    before = kept.stat().st_mtime_ns
    # North was cut short: its stamp does not say complete, and a file is missing.
    stamp = tmp_path / "hospitals" / "north" / STAMP
    stamp.write_text(stamp.read_text().replace("true", "false"))
    (data(tmp_path, "north") / "patients.csv").unlink()
    write_federation(tmp_path, dims=3, images_per_site=N3)
    assert digest_folder(tmp_path) == first
    assert kept.stat().st_mtime_ns == before
    write_federation(tmp_path, dims=3, images_per_site=N3 + 2)
    assert len(rows(kept)) == N3 + 2


def test_a_real_hospitals_data_is_never_replaced(tmp_path: Path) -> None:
    mine = data(tmp_path, "east") / "mine.nii"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="will not replace"):
        write_federation(tmp_path, dims=3, images_per_site=N3)
    assert mine.read_bytes() == b"precious"


def test_edited_text_files_stay(tmp_path: Path) -> None:
    query = tmp_path / "hospitals" / "north" / "queries" / "calcified.yaml"
    query.parent.mkdir(parents=True)
    query.write_text("classes: [calcified]\nbudget: 0.02\n")
    write_federation(tmp_path, dims=3, images_per_site=N3)
    assert load_query(tmp_path, "north", "calcified").budget == 0.02


def test_wrong_use_ends_in_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Known ones: aster"):
        render_images("oak")
    with pytest.raises(ConfigError, match="at least 20"):
        write_federation(tmp_path, images_per_site=3)


# --- held back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["aster", "cedar", "dahlia", "elm", "fern", "north", "south"])
def test_who_asks_holds_images_back_each_of_a_patient_of_its_own(site: str) -> None:
    hospital = (SMEARS | CHESTS)[site]
    count = N2 if site in SMEARS else N3
    images, labels, patients = render_held_back(site, images=count)
    names = BLOOD_CELLS if site in SMEARS else LESIONS
    asked = {c for text in hospital.queries.values() for c in yaml.safe_load(text)["classes"]}
    each = Counter(names[i] for i in labels)
    assert set(each) == asked
    assert set(each.values()) == {max(8, round(60 * count / hospital.images))}
    assert len(set(patients)) == len(images)
    main = render_images(site, images=count)
    assert not set(patients) & set(main[2])
    assert not {i.tobytes() for i in images} & {i.tobytes() for i in main[0]}
    again = render_held_back(site, images=count)
    np.testing.assert_array_equal(images, again[0])


def test_a_hospital_of_the_default_size_holds_sixty_images_of_a_class_back() -> None:
    assert len(render_held_back("elm")[0]) == 60


def test_who_asks_for_nothing_holds_nothing_back(smears: Path, chests: Path) -> None:
    for root, hospitals in ((smears, SMEARS), (chests, CHESTS)):
        for site, hospital in hospitals.items():
            assert (data(root, site) / "held-back").is_dir() == bool(hospital.queries), site
            assert load_site(root, site).held_back == ("held-back" if hospital.queries else None)


@pytest.mark.parametrize("site", ["cedar", "dahlia", "fern"])
def test_held_back_images_have_the_hospitals_own_stain(site: str) -> None:
    """The background of a smear is the stain's: nearer to the hospital's own than to anybody else's."""

    def glass(images: np.ndarray) -> np.ndarray:
        brightest: np.ndarray = np.quantile(images.reshape(-1, 3).astype(np.float64), 0.95, axis=0)
        return brightest

    held = glass(render_held_back(site, images=N2)[0])
    away = {s: float(np.abs(glass(render_images(s, images=N2)[0]) - held).sum()) for s in SMEARS}
    assert min(away, key=lambda s: away[s]) == site


def test_prepared_held_back_images_are_of_the_classes_asked_for(smears: Path, tmp_path: Path) -> None:
    params = Params.model_validate(phantom_params(2))
    shutil.copytree(smears, tmp_path, dirs_exist_ok=True)
    for site in ("aster", "dahlia", "elm", "fern"):
        main = ingest_site(tmp_path, site, params)
        apart = load_held_back(Workspace(tmp_path).held_back(site))
        assert apart is not None
        asked = {c for text in SMEARS[site].queries.values() for c in yaml.safe_load(text)["classes"]}
        assert set(apart.manifest.counts["held_back"]) == asked
        assert apart.manifest.rejected == {}
        assert set(main.counts["train"]) == set(SMEARS[site].words)
        assert main.count == N2
    folder = Workspace(tmp_path).held_back("aster")
    assert (folder / "headers.json").is_file(), "read like all other files of the hospital"


def test_an_edited_site_that_names_no_held_back_folder_gets_none(tmp_path: Path) -> None:
    text = SMEARS["elm"].site_yaml.replace("held_back: held-back\n", "")
    folder = tmp_path / "hospitals" / "elm"
    folder.mkdir(parents=True)
    (folder / "site.yaml").write_text(text)
    write_federation(tmp_path, images_per_site=N2)
    assert not (folder / "data" / "held-back").exists()
    assert (tmp_path / "hospitals" / "fern" / "data" / "held-back" / "images.npz").is_file()


# --- configuration -------------------------------------------------------------------------------


def test_committed_text_files_are_what_the_phantom_writes(smears: Path) -> None:
    for site in SMEARS:
        ours = smears / "hospitals" / site
        theirs = ROOT / "hospitals" / site
        names = [Path("site.yaml"), *sorted(p.relative_to(ours) for p in ours.glob("queries/*.yaml"))]
        assert len(names) == 1 + len(SMEARS[site].queries)
        for name in names:
            assert (theirs / name).read_bytes() == (ours / name).read_bytes(), (site, name)


@pytest.mark.parametrize("dims", [2, 3])
def test_configuration_is_valid_and_every_query_has_two_teachers(
    dims: int, smears: Path, chests: Path
) -> None:
    root, hospitals, classes = (smears, SMEARS, BLOOD_CELLS) if dims == 2 else (chests, CHESTS, LESIONS)
    params = Params.model_validate(phantom_params(dims))
    assert params.classes == classes
    assert params.sites == tuple(sorted(hospitals))
    for site in params.sites:
        config = load_site(root, site)
        assert len(config.image.size) == dims
        assert {config.label_map.get(w, w) for w in hospitals[site].words.values()} == set(
            hospitals[site].words
        )
    known = {s: {c for c in h.words if c != h.rare} for s, h in hospitals.items()}
    assert len(params.queries) == sum(len(h.queries) for h in hospitals.values())
    for key, ref in params.queries.items():
        assert key == f"{ref.hospital}-{ref.query}"
        query = load_query(root, ref.hospital, ref.query)
        assert query.budget == 0.03
        for name in query.classes:
            assert name not in known[ref.hospital]
            assert sum(name in k for k in known.values()) >= 2
        first_line = (root / "hospitals" / ref.hospital / "queries" / f"{ref.query}.yaml").read_text()
        assert first_line.startswith("# ")


def test_all_three_methods_are_asked_for(smears: Path) -> None:
    methods = {
        load_query(smears, r["hospital"], r["query"]).method for r in phantom_params(2)["queries"].values()
    }
    assert methods == {"qkt", "qkt-light", "routed"}


# --- what the hospitals hold ---------------------------------------------------------------------


@pytest.mark.parametrize("site", sorted(SMEARS))
def test_smears_are_skewed_and_patients_hold_several_images(site: str) -> None:
    images, labels, patients = render_images(site)
    hospital = SMEARS[site]
    assert images.shape == (500, hospital.size, hospital.size, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    counts = Counter(BLOOD_CELLS[i] for i in labels)
    assert set(counts) == set(hospital.words)
    common = [n for c, n in counts.items() if c != hospital.rare]
    assert min(common) >= 90
    assert max(common) >= 1.2 * min(common)
    owners = Counter(patients)
    assert len(owners) == hospital.patients
    assert 40 <= len(owners) <= 70
    mixed = {p for p in owners if len({int(c) for c, q in zip(labels, patients, strict=True) if q == p}) > 1}
    assert len(mixed) > 0.7 * len(owners)


def test_elm_has_a_rare_class_in_at_least_eight_patients() -> None:
    _, labels, patients = render_images("elm")
    rare = [p for c, p in zip(labels, patients, strict=True) if BLOOD_CELLS[c] == "ig"]
    assert len(rare) == 10
    assert len(set(rare)) >= 8


@pytest.mark.parametrize("site", sorted(CHESTS))
def test_chest_patients_have_one_scan_or_two(site: str) -> None:
    images, labels, patients = render_images(site)
    assert 90 <= len(images) <= 120
    assert images.dtype == np.int16
    assert images.min() >= -1024
    assert {LESIONS[i] for i in labels} == set(CHESTS[site].words)
    assert set(Counter(patients).values()) == {1, 2}


def test_hospitals_look_different_and_images_of_one_vary() -> None:
    means = np.array([render_images(s, images=N2)[0].mean(axis=(0, 1, 2)) for s in sorted(SMEARS)])
    apart = np.abs(means[:, None] - means[None]).max(axis=-1)[np.triu_indices(len(means), 1)]
    assert apart.min() > 3.0
    assert apart.max() > 15.0
    images = render_images("aster", images=N2)[0]
    assert len({i.tobytes() for i in images}) == N2


# --- delivery ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "syntax"), [("aster", "1.2.840.10008.1.2.1"), ("birch", "1.2.840.10008.1.2.4.90")]
)
def test_dicom_smears(site: str, syntax: str, smears: Path) -> None:
    import pydicom

    images, labels, patients = render_images(site, images=N2)
    folder = data(smears, site)
    files = sorted((p for p in folder.rglob("*.dcm") if "held-back" not in p.parts), key=lambda p: p.name)
    words = {r["file"]: r["diagnosis"] for r in rows(folder / "labels.csv")} if site == "birch" else {}
    assert len(files) == N2
    seen = set()
    for path, image, label, patient in zip(files, images, labels, patients, strict=True):
        file = pydicom.dcmread(path)
        assert file.file_meta.TransferSyntaxUID == syntax
        assert file.SOPInstanceUID == file.file_meta.MediaStorageSOPInstanceUID
        assert file.SOPInstanceUID.is_valid
        seen.add(file.SOPInstanceUID)
        np.testing.assert_array_equal(file.pixel_array, image)
        assert file.PatientID == patient
        assert str(file.PatientName).startswith("PHANTOM^")
        word = words[path.name] if words else file.AdmittingDiagnosesDescription
        assert word == SMEARS[site].words[BLOOD_CELLS[label]]
        assert words or path.parent.name == patient
        for element in file.iterall():
            assert not element.tag.is_private
    assert len(seen) == N2


@pytest.mark.parametrize(("site", "codes"), [("cedar", ("L", "P", "S")), ("dahlia", ("R", "P", "S"))])
def test_nifti_smears(site: str, codes: tuple[str, str, str], smears: Path) -> None:
    import nibabel

    images, labels, patients = render_images(site, images=N2)
    folder = data(smears, site)
    listing = rows(folder / ("labels.csv" if site == "cedar" else "cells.csv"))
    names = [r["file"] if site == "cedar" else f"images/{r['name']}.nii.gz" for r in listing]
    found = [p.relative_to(folder).as_posix() for p in folder.rglob("*.nii.gz")]
    assert sorted(p for p in found if not p.startswith("held-back/")) == sorted(names)
    for name, row, image, label, patient in zip(names, listing, images, labels, patients, strict=True):
        raw = (folder / name).read_bytes()
        # gzip: no flags (so no file name) and a time of 0.
        assert raw[3:8] == b"\0" * 5
        file = nibabel.load(folder / name)
        assert int(file.header["datatype"]) == 128
        assert nibabel.aff2axcodes(file.affine) == codes
        np.testing.assert_allclose(file.header.get_zooms(), (0.6, 0.6, 1.0), rtol=1e-6)
        pixels = np.asarray(file.dataobj)
        colours = np.stack([pixels[c] for c in "RGB"], axis=-1)[:, :, 0].transpose(1, 0, 2)
        np.testing.assert_array_equal(colours if site == "cedar" else colours[:, ::-1], image)
        assert row["diagnosis"] == BLOOD_CELLS[label]
        assert row["patient"] == patient


def test_class_folders(smears: Path) -> None:
    from PIL import Image

    images, labels, patients = render_images("elm", images=N2)
    folder = data(smears, "elm")
    listing = rows(folder / "patients.csv")
    folders = {p.name for p in folder.iterdir() if p.is_dir()}
    assert folders - {"held-back"} == set(SMEARS["elm"].words.values())
    for row, image, label, patient in zip(listing, images, labels, patients, strict=True):
        assert row["patient"] == patient
        assert row["file"].split("/")[0] == SMEARS["elm"].words[BLOOD_CELLS[label]]
        with Image.open(folder / row["file"]) as file:
            assert file.size == (40, 40)
            np.testing.assert_array_equal(np.asarray(file), image)


def test_npz_keeps_patients_in_one_part(smears: Path) -> None:
    with np.load(data(smears, "fern") / "images.npz", allow_pickle=False) as file:
        arrays = {k: file[k] for k in file.files}
    assert sorted(arrays) == sorted(
        f"{s}_{w}" for s in ("train", "val", "test") for w in ("images", "labels", "groups")
    )
    groups = [set(arrays[f"{s}_groups"].tolist()) for s in ("train", "val", "test")]
    assert all(groups)
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert arrays["train_groups"].dtype.kind == "U"
    assert arrays["train_labels"].shape == (len(arrays["train_images"]), 1)
    words = yaml.safe_load(SMEARS["fern"].site_yaml)["label_map"]
    _, labels, patients = render_images("fern", images=N2)
    expected = Counter(zip(patients, (BLOOD_CELLS[i] for i in labels), strict=True))
    got = Counter(
        (str(g), words[int(c)])
        for s in ("train", "val", "test")
        for g, c in zip(arrays[f"{s}_groups"], arrays[f"{s}_labels"][:, 0], strict=True)
    )
    assert got == expected


def test_dicom_series_by_position_give_the_volume_and_by_number_do_not(chests: Path) -> None:
    import pydicom

    volumes, labels, patients = render_images("south", images=N3)
    spacing = CHESTS["south"].look.spacing
    folder = data(chests, "south")
    disordered = 0
    listing = rows(folder / "series.csv")
    for row, volume, label, patient in zip(listing, volumes, labels, patients, strict=True):
        assert row["series"].startswith(f"{patient}/")
        assert row["diagnosis"] == CHESTS["south"].words[LESIONS[label]]
        slices = [pydicom.dcmread(p) for p in sorted((folder / row["series"]).iterdir())]
        assert len({s.SeriesInstanceUID for s in slices}) == 1
        assert len({s.SOPInstanceUID for s in slices}) == len(slices) == len(volume)
        assert [s.InstanceNumber for s in slices] == list(range(1, len(slices) + 1))
        heights = np.array([float(s.ImagePositionPatient[2]) for s in slices])
        np.testing.assert_allclose(np.diff(np.sort(heights)), spacing[0], atol=1e-5)
        assert slices[0].SliceThickness == spacing[0]
        np.testing.assert_allclose(np.asarray(slices[0].PixelSpacing, dtype=float), spacing[1:])
        stack = np.stack([s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in slices])
        np.testing.assert_array_equal(stack[np.argsort(heights)], volume)
        disordered += not np.array_equal(stack, volume)
    assert disordered == 2 * N3 // 3


@pytest.mark.parametrize("flip", [(False, False, False), (True, True, True), (True, False, False)])
def test_nifti_and_dicom_agree_about_space(flip: tuple[bool, bool, bool], tmp_path: Path) -> None:
    import nibabel
    import pydicom

    volume = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    spacing = (3.0, 2.0, 1.5)
    path = tmp_path / "volume.nii.gz"
    path.write_bytes(delivery.nifti_bytes(volume, spacing, flip=flip))
    file = nibabel.load(path)
    stored = np.asarray(file.dataobj)
    assert stored.dtype == np.int16
    delivery.write_series(
        tmp_path / "series",
        volume,
        [1, 2, 3, 4],
        spacing=spacing,
        site="south",
        seed=0,
        patient="P1",
        series="1",
    )
    # The voxel that DICOM puts at a place is the voxel that NIfTI puts there (x and y change sign).
    to_index = np.linalg.inv(file.affine)
    for k, name in enumerate(sorted((tmp_path / "series").iterdir())):
        image = pydicom.dcmread(name)
        across, down = np.array(image.ImageOrientationPatient, dtype=float).reshape(2, 3)
        for row, column in ((0, 0), (4, 1), (2, 5)):
            place = (
                np.array(image.ImagePositionPatient, dtype=float)
                + across * column * float(image.PixelSpacing[1])
                + down * row * float(image.PixelSpacing[0])
            )
            index = to_index @ [-place[0], -place[1], place[2], 1.0]
            i, j, n = np.rint(index[:3]).astype(int)
            np.testing.assert_allclose(index[:3], (i, j, n), atol=1e-4)
            value = int(image.pixel_array[row, column]) * int(image.RescaleSlope) + int(
                image.RescaleIntercept
            )
            assert stored[i, j, n] == value == volume[k, row, column]


@pytest.mark.parametrize("site", ["north", "east"])
def test_nifti_volumes(site: str, chests: Path) -> None:
    import nibabel

    volumes, labels, patients = render_images(site, images=N3)
    folder = data(chests, site)
    listing = rows(folder / ("patients.csv" if site == "north" else "labels.csv"))
    for row, volume, label, patient in zip(listing, volumes, labels, patients, strict=True):
        file = nibabel.load(folder / row["file"])
        # Brought to one orientation (left, back, head) both sites store the volume that was drawn.
        turned = file.as_reoriented(
            nibabel.orientations.ornt_transform(
                nibabel.io_orientation(file.affine), nibabel.orientations.axcodes2ornt(("L", "P", "S"))
            )
        )
        np.testing.assert_array_equal(np.asarray(turned.dataobj).transpose(2, 1, 0), volume)
        middle = file.affine @ [*((np.array(file.shape) - 1) / 2), 1.0]
        np.testing.assert_allclose(middle[:3], 0.0, atol=1e-4)
        np.testing.assert_allclose(file.header.get_zooms(), CHESTS[site].look.spacing[::-1], rtol=1e-6)
        assert row["patient"] == patient
        word = row["diagnosis"] if site == "east" else row["file"].split("/")[0]
        assert word == LESIONS[label]


def test_lesions_differ_in_density() -> None:
    """The core of a lesion tells calcified from cavity, solid and ground-glass, even in one voxel's mean."""
    from qkt_clinical.datasets.phantom import ct

    labels = np.repeat(np.arange(4), 20)
    look = CHESTS["north"].look
    volumes, centres = ct.render_chests(labels, look, rng=np.random.default_rng(3))
    index = np.rint(centres / np.array(look.spacing) + (np.array(look.shape) - 1) / 2).astype(int)
    core = np.array([v[z, y, x] for v, (z, y, x) in zip(volumes, index, strict=True)])
    middle = {name: np.median(core[labels == i]) for i, name in enumerate(LESIONS)}
    assert (
        middle["cavity"] < -600 < middle["ground-glass"] < -200 < middle["solid"] < 150 < middle["calcified"]
    )


# --- contact sheet, stamp, salt ------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_sheet_shows_every_class(dims: int, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "sheet.png"
    render_sheet(path, dims=dims)
    with Image.open(path) as file:
        sheet = np.asarray(file.convert("RGB")).astype(float)
    tall = len(BLOOD_CELLS if dims == 2 else LESIONS)
    assert sheet.shape[0] > 90 * tall
    for row in range(tall):
        assert sheet[28 + row * 100 : 124 + row * 100, 130:].std() > 20
    first = digest_file(path)
    render_sheet(path, dims=dims)
    assert digest_file(path) == first


def test_stamp_and_salt_lie_outside_data(smears: Path) -> None:
    salts = set()
    for site in SMEARS:
        folder = smears / "hospitals" / site
        stamp = json.loads((folder / STAMP).read_text())
        assert stamp == {"version": VERSION, "dims": 2, "seed": 0, "images": N2, "complete": True}
        salts.add((folder / ".salt").read_text())
        assert not list(data(smears, site).rglob(".*"))
    assert len(salts) == len(SMEARS)
    assert all(len(s.strip()) == 64 for s in salts)
