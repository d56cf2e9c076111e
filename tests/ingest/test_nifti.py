from __future__ import annotations

import gzip
import json
import random
import struct
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from qkt_clinical.config.workspace import Workspace
from qkt_clinical.errors import SourceError
from qkt_clinical.ingest import check_folder, reasons
from tests.ingest_files import SITE, hospital, ingest, nifti, noise, verdict
from tests.places import SHARED

CONFORMANCE = SHARED / "dicom-conformance"
RGB24 = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
PICTURE = noise(5, 8, 6)
"""(H, W): rows and columns as they are to be seen."""
FLAT = {"size": [8, 6], "channels": 1}


def one(root: Path, voxels: NDArray[Any], affine: Any = (-1, -1, 1), **image: Any) -> NDArray[Any]:
    """The prepared array of a site with one file."""
    folder = hospital(root, "nifti", image={**FLAT, **image})
    nifti(folder / "solid" / "a.nii.gz", np.ascontiguousarray(voxels), affine)
    return np.asarray(ingest(root)[1].images[0])


def test_flat_image_shows_its_rows_whatever_the_voxel_order(tmp_path: Path) -> None:
    """Axial: columns run to the patient's left, rows to the back."""
    columns_first = PICTURE.T[:, :, None]
    for name, (voxels, affine) in {
        "lps": (columns_first, (-1, -1, 1)),
        "ras": (columns_first[::-1, ::-1], (1, 1, 1)),
        "two-dimensional": (PICTURE.T, (-1, -1, 1)),
        "rows first": (
            PICTURE[:, :, None],
            np.array([[0, -1.0, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        ),
    }.items():
        image = one(tmp_path / name, voxels, affine)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image[0], PICTURE, err_msg=name)


def test_coronal_and_sagittal_planes_have_the_head_at_the_top(tmp_path: Path) -> None:
    # coronal: (X, 1, Z); seen with z falling from the top and x running to the left of the patient
    np.testing.assert_array_equal(one(tmp_path / "c", PICTURE.T[:, None, ::-1])[0], PICTURE)
    # sagittal: (1, Y, Z); seen with the front at the left
    np.testing.assert_array_equal(one(tmp_path / "s", PICTURE.T[None, :, ::-1])[0], PICTURE)


def test_colour_as_rgb24_or_as_vectors(tmp_path: Path) -> None:
    picture = noise(6, 8, 6, 3)
    columns_first = np.ascontiguousarray(picture.transpose(1, 0, 2))
    for name, voxels in {
        "rgb24": columns_first.view(RGB24)[..., 0][:, :, None],
        "rgb24-flat": columns_first.view(RGB24)[..., 0],
        "vector": columns_first[:, :, None, None, :],
    }.items():
        image = one(tmp_path / name, voxels, channels=3)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, picture.transpose(2, 0, 1), err_msg=name)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_spacing_that_is_no_number_is_not_told_beside_a_sound_one(tmp_path: Path, number: float) -> None:
    path = nifti(tmp_path / "a.nii", noise(1, 6, 8, 4))
    head = bytearray(path.read_bytes())
    head[80:84] = struct.pack("<f", number)
    path.write_bytes(head)
    (row,) = check_folder(tmp_path)
    json.dumps(row, allow_nan=False)
    assert row["spacing_mm"] == (1.0, 1.0, 1.0), "that of the sform"


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize(
    ("shape", "code"), [((6, 8, 3), "dimensions"), ((8, 8, 3), "dimensions"), ((6, 8, 1, 3), "time-series")]
)
def test_three_slices_are_no_colour_picture(
    tmp_path: Path, shape: tuple[int, ...], code: str, dtype: type[np.generic]
) -> None:
    folder = hospital(tmp_path, "nifti", image={**FLAT, "channels": 3})
    nifti(folder / "solid" / "good.nii", PICTURE.T[:, :, None])
    nifti(folder / "solid" / "bad.nii", noise(2, *shape).astype(dtype))
    assert ingest(tmp_path)[0].rejected == {code: 1}


@pytest.mark.parametrize("intent", ["vector", "displacement vector"])
def test_vectors_that_are_no_colours_are_refused(tmp_path: Path, intent: str) -> None:
    folder = hospital(tmp_path, "nifti", image={**FLAT, "channels": 3})
    nifti(folder / "solid" / "good.nii", PICTURE.T[:, :, None])
    image = nibabel.Nifti1Image(noise(2, 6, 8, 1, 1, 3), np.eye(4))
    image.header.set_intent(intent)
    nibabel.save(image, folder / "solid" / "bad.nii")
    assert ingest(tmp_path)[0].rejected == {"colour-unknown": 1}


def test_scaled_voxels_and_units(tmp_path: Path) -> None:
    """Slope and intercept give the modality's units; metres become millimetres."""
    folder = hospital(
        tmp_path, "nifti", image={**FLAT, "window": {"center": 0, "width": 200}, "spacing_mm": [1, 1]}
    )
    voxels = np.zeros((6, 8, 1), dtype=np.int16)
    voxels[:4, 0, 0] = [-60, 0, 10, 35]
    image = nibabel.Nifti1Image(voxels, np.diag([-0.001, -0.001, 0.001, 1]))
    image.header.set_xyzt_units("meter")
    image.header.set_slope_inter(2, 20)
    (folder / "solid").mkdir()
    nibabel.save(image, folder / "solid" / "a.nii")
    raw = bytearray((folder / "solid" / "a.nii").read_bytes())
    raw[112:120] = np.array([2, 20], dtype="<f4").tobytes()
    raw[352:] = voxels.tobytes(order="F")
    (folder / "solid" / "a.nii").write_bytes(raw)
    _, site = ingest(tmp_path)
    np.testing.assert_allclose(site.images[0, 0, 0, :4], [0.0, 0.6, 0.7, 0.95], atol=1e-6)


def test_percentiles_where_there_is_no_window(tmp_path: Path) -> None:
    voxels = np.arange(48, dtype=np.int16).reshape(8, 6).T * 100
    image = one(tmp_path, voxels)
    low, high = np.percentile(voxels, [0.5, 99.5])
    expected = np.clip((np.arange(48).reshape(8, 6) * 100 - low) / (high - low), 0, 1)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[0], expected, atol=1e-6)


def test_values_outside_the_field_of_view_become_the_lowest(tmp_path: Path) -> None:
    voxels = np.tile(np.arange(6, dtype=np.float32)[:, None], (1, 8))
    voxels[:, 0] = np.nan
    image = one(tmp_path, voxels, window={"center": 2.5, "width": 5})
    np.testing.assert_allclose(image[0, 0], 0.0)
    np.testing.assert_allclose(image[0, 1], np.arange(6) / 5, atol=1e-6)


def test_pair_of_header_and_voxels(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "nifti", image=FLAT) / "solid"
    folder.mkdir()
    nibabel.save(nibabel.Nifti1Pair(PICTURE.T[:, :, None], np.diag([-1, -1, 1, 1])), folder / "a.hdr")
    assert sorted(p.name for p in folder.iterdir()) == ["a.hdr", "a.img"]
    manifest, site = ingest(tmp_path)
    assert (manifest.count, manifest.rejected) == (1, {})
    np.testing.assert_array_equal(site.images[0, 0], PICTURE)
    rows = json.loads((Workspace(tmp_path).prepared(SITE) / "integrity.json").read_text())
    assert sorted((Path(r["file"]).suffix, r["accepted"]) for r in rows) == [(".hdr", True), (".img", True)]


def good() -> bytes:
    image = nibabel.Nifti1Image(noise(0, 6, 8, 1), np.diag([-1, -1, 1, 1]))
    return image.to_bytes()


def changed(start: int, values: Any, dtype: str) -> bytes:
    blob = bytearray(good())
    data = np.array(values, dtype=dtype).tobytes()
    blob[start : start + len(data)] = data
    return bytes(blob)


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "not-nifti": b"hello" * 200,
    "truncated": good()[:-10],
    "too-large": changed(40, [3, 30_000, 30_000, 100], "<i2"),
    "header-unreadable": changed(40, [3, -5, 8, 1], "<i2"),
    "pair-missing": changed(344, list(b"ni1\0"), "u1"),
    "non-image-object": changed(68, 3001, "<i2"),
    "geometry-invalid": changed(280, [np.nan] * 12, "<f4"),
    "time-series": nibabel.Nifti1Image(noise(1, 6, 8, 1, 4), np.eye(4)).to_bytes(),
    "dimensions": nibabel.Nifti1Image(noise(2, 6, 8, 5), np.eye(4)).to_bytes(),
    "colour-unknown": b"",
    "no-finite-values": nibabel.Nifti1Image(np.full((6, 8, 1), np.nan, np.float32), np.eye(4)).to_bytes(),
    "pixels-undecodable": nibabel.Nifti1Image(np.zeros((6, 8, 1), np.complex64), np.eye(4)).to_bytes(),
}
del BROKEN["colour-unknown"]


@pytest.mark.parametrize("code", sorted(BROKEN))
def test_bad_file_gets_its_code_and_the_rest_goes_on(tmp_path: Path, code: str) -> None:
    folder = hospital(tmp_path, "nifti", image=FLAT) / "solid"
    nifti(folder / "good.nii.gz", PICTURE.T[:, :, None])
    (folder / "bad.nii").write_bytes(BROKEN[code])
    manifest, _ = ingest(tmp_path, ingest={"max_file_mb": 10})
    assert (manifest.count, manifest.rejected) == (1, {code: 1})
    assert code in reasons


VOLUME = noise(7, 6, 8, 5)
DEEP = {"size": [5, 8, 6], "channels": 1}


def coded(sform: tuple[float, ...] | None, qform: tuple[float, ...] | None) -> nibabel.Nifti1Image:
    """A volume with diagonal forms; None leaves the code at 0."""
    image = nibabel.Nifti1Image(VOLUME, np.eye(4))
    image.set_sform(None if sform is None else np.diag([*sform, 1.0]), code=0 if sform is None else 1)
    image.set_qform(None if qform is None else np.diag([*qform, 1.0]), code=0 if qform is None else 1)
    return image


@pytest.mark.parametrize(
    ("sform", "qform", "code"),
    [
        ((-1, -1, 1), (-1, -1, 1), None),
        ((-1, -1, 1), None, None),
        (None, (-1, -1, 1), None),
        ((-1, -1, 1.02), (-1, -1, 1), None),
        ((1, -1, 1), (-1, -1, 1), "affine-conflict"),
        ((-1, -1, 2), (-1, -1, 1), "affine-conflict"),
        ((0, 0, 0), (-1, -1, 1), None),
        ((0, 0, 0), None, "geometry-invalid"),
        (None, None, "geometry-missing"),
    ],
)
def test_forms_of_a_header(
    tmp_path: Path,
    sform: tuple[float, ...] | None,
    qform: tuple[float, ...] | None,
    code: str | None,
) -> None:
    folder = hospital(tmp_path, "nifti", image=DEEP) / "solid"
    nifti(folder / "good.nii", VOLUME // 2)
    nibabel.save(coded(sform, qform), folder / "other.nii")
    manifest, site = ingest(tmp_path)
    assert manifest.rejected == ({} if code is None else {code: 1})
    if code is None:
        np.testing.assert_array_equal(site.images[1, 0], VOLUME.transpose(2, 1, 0))


def test_one_of_several_volumes_by_configuration(tmp_path: Path) -> None:
    several = np.stack([VOLUME, VOLUME // 2, VOLUME // 3], axis=-1)
    for volume, expected in ((0, VOLUME), (2, VOLUME // 3)):
        root = tmp_path / str(volume)
        folder = hospital(root, "nifti", image={**DEEP, "volume": volume}) / "solid"
        nifti(folder / "one.nii.gz", VOLUME // 4)
        nifti(folder / "three.nii.gz", several, np.diag([-1.0, -1, 1, 1]))
        manifest, site = ingest(root)
        assert manifest.rejected == {}
        np.testing.assert_array_equal(site.images[1, 0], expected.transpose(2, 1, 0))
    hospital(root, "nifti", image={**DEEP, "volume": 3})
    assert ingest(root)[0].rejected == {"volume-missing": 1}
    hospital(root, "nifti", image=DEEP)
    assert ingest(root)[0].rejected == {"time-series": 1}


def test_gzip_that_is_none_and_gzip_cut_short(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "nifti", image=FLAT) / "solid"
    nifti(folder / "good.nii.gz", PICTURE.T[:, :, None])
    (folder / "plain.nii.gz").write_bytes(good())
    (folder / "short.nii.gz").write_bytes(gzip.compress(good())[:-30])
    assert ingest(tmp_path)[0].rejected == {"not-nifti": 1, "truncated": 1}


def test_site_of_volumes_refuses_a_slice(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "nifti", image={"size": [4, 8, 6], "channels": 1})
    nifti(folder / "solid" / "a.nii", PICTURE.T[:, :, None])
    with pytest.raises(SourceError, match="dimensions"):
        ingest(tmp_path)


@pytest.mark.slow
def test_damage_anywhere_in_the_header_is_never_an_exception(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "a.nii"
    verdicts = []
    for _ in range(300):
        blob = bytearray(good())
        for _ in range(3):
            blob[rng.randrange(0, 352)] = rng.randrange(256)
        path.write_bytes(blob)
        verdicts.append(verdict(path))
    assert set(verdicts) <= {*reasons, None}
    assert 0 < verdicts.count(None) < 300


@pytest.mark.skipif(not CONFORMANCE.is_dir(), reason="needs ../shared/data/dicom-conformance")
def test_real_files() -> None:
    verdicts = {
        row["file"]: row["code"]
        for row in check_folder(CONFORMANCE / "nibabel")
        if row["kind"] or row["code"]
    }
    assert verdicts["anatomical.nii"] is None
    assert verdicts["functional.nii"] is None
    assert verdicts["nifti2.hdr"] == "pair-missing"
    assert verdicts["row_major.dconn.nii"] == "non-image-object"


def quaternion(parts: tuple[float, float, float], sform: bool) -> bytes:
    """A volume with this quaternion in its qform."""
    image = coded((-1, -1, 1) if sform else None, (-1, -1, 1))
    blob = bytearray(image.to_bytes())
    blob[256:268] = np.array(parts, "<f4").tobytes()
    return bytes(blob)


@pytest.mark.parametrize(
    ("parts", "sform", "code"),
    [
        ((0, 0, 1), False, None),
        ((0, 0, 1.0000002), False, None),
        ((0, 0, 1.0000002), True, None),
        ((0, 0, 1.0004), False, None),
        ((0, 0, 3), False, "geometry-invalid"),
        ((0, 0, 3), True, None),
        ((0, 0, np.nan), False, "geometry-invalid"),
        ((0, 0, np.nan), True, None),
        ((0, np.inf, 0), True, None),
        ((0, 1.0000002, 0), True, "affine-conflict"),
    ],
)
def test_rounding_in_a_quaternion(
    tmp_path: Path, parts: tuple[float, float, float], sform: bool, code: str | None
) -> None:
    folder = hospital(tmp_path, "nifti", image=DEEP) / "solid"
    nifti(folder / "good.nii", VOLUME // 2)
    (folder / "other.nii").write_bytes(quaternion(parts, sform))
    manifest, site = ingest(tmp_path)
    assert manifest.rejected == ({} if code is None else {code: 1})
    assert verdict(folder / "other.nii") == code
    if code is None:
        np.testing.assert_array_equal(site.images[1, 0], VOLUME.transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("slope", "intercept", "code"),
    [
        (np.nan, np.nan, None),
        (np.inf, 0, None),
        (0, 5, None),
        (2, np.nan, "header-unreadable"),
        (2, np.inf, "header-unreadable"),
    ],
)
def test_slopes_that_are_no_numbers(tmp_path: Path, slope: float, intercept: float, code: str | None) -> None:
    """A slope that is none means that nothing is scaled, as the format's own library has it."""
    blob = bytearray(good())
    blob[112:120] = np.array([slope, intercept], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(blob)
    assert verdict(tmp_path / "a.nii") == code


TAILS = [b"", b"\0" * 40, b"garbage", b"\x1f\x8b", gzip.compress(b"more", mtime=0)[:12]]


@pytest.mark.parametrize("size", [4, 64])
@pytest.mark.parametrize("tail", TAILS)
def test_what_stands_behind_a_gzip_file(tmp_path: Path, size: int, tail: bytes) -> None:
    """Left out as gzip does; but the checksum of what it holds is read."""
    image = nibabel.Nifti1Image(noise(0, size, size, 4), np.eye(4))
    packed = gzip.compress(image.to_bytes())
    (tmp_path / "a.nii.gz").write_bytes(packed + tail)
    broken = tail.startswith(b"\x1f\x8b")  # another member that is none
    assert verdict(tmp_path / "a.nii.gz") == ("truncated" if broken else None)
    (tmp_path / "b.nii.gz").write_bytes(packed[:-8] + bytes(4) + packed[-4:] + tail)
    assert verdict(tmp_path / "b.nii.gz") == "pixels-undecodable"


def test_several_members_are_one_file_and_bombs_are_bounded(tmp_path: Path) -> None:
    data = nibabel.Nifti1Image(noise(0, 16, 16, 4), np.eye(4)).to_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(data[:500]) + gzip.compress(data[500:]))
    assert verdict(tmp_path / "a.nii.gz") is None
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(data + bytes(40_000_000)))
    assert verdict(tmp_path / "b.nii.gz") == "too-large"
