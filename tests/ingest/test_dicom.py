from __future__ import annotations

import csv
import itertools
import json
import random
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence as Items
from pydicom.tag import Tag

from qkt_clinical.errors import SourceError
from qkt_clinical.ingest import check_folder, reasons
from qkt_clinical.ingest.readers.dicom_file import open_file, stored_pixels
from qkt_clinical.ingest.readers.elements import tag_of
from qkt_clinical.ingest.readers.pixels import read_stream
from tests.ingest_files import (
    CLASSES,
    dicom,
    hospital,
    ingest,
    nifti,
    noise,
    save,
    series,
    uid,
    verdict,
)
from tests.places import SHARED

CONFORMANCE = SHARED / "dicom-conformance"
RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def one(root: Path, data: Any, **changes: Any) -> NDArray[Any]:
    """The prepared array of a site with one file."""
    folder = hospital(root, "dicom", **changes)
    save(data, folder / "solid" / "a.dcm")
    return np.asarray(ingest(root)[1].images[0])


# --- flat images ----------------------------------------------------------------------------------


def test_eight_bit_grey_keeps_its_bytes(tmp_path: Path) -> None:
    image = one(tmp_path, dicom(RAMP))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, RAMP[None])


def test_monochrome1_is_the_inverse_of_monochrome2(tmp_path: Path) -> None:
    plain = one(tmp_path / "a", dicom(RAMP))
    inverse = one(tmp_path / "b", dicom(255 - RAMP, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(plain, inverse)
    deep = RAMP.astype(np.uint16) * 4
    window = {"size": [8, 8], "channels": 1, "window": {"center": 512, "width": 1024}}
    high = one(tmp_path / "c", dicom(deep), image=window)
    low = one(tmp_path / "d", dicom(1024 - deep, PhotometricInterpretation="MONOCHROME1"), image=window)
    np.testing.assert_allclose(high, low, atol=1e-6)


def test_rescale_then_window_gives_hand_computed_values(tmp_path: Path) -> None:
    stored = np.zeros((8, 8), dtype=np.uint16)
    stored[0, :4] = [0, 974, 1024, 1074]  # -1024, -50, 0 and 50 Hounsfield units
    data = dicom(stored, RescaleSlope=1, RescaleIntercept=-1024)
    window = {"size": [8, 8], "channels": 1, "window": {"center": 0, "width": 200}}
    image = one(tmp_path, data, image=window)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[0, 0, :4], [0.0, 0.25, 0.5, 0.75], atol=1e-6)


def test_modality_lut_and_display_window_of_the_file(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor, table.LUTData, table.ModalityLUTType = [64, 0, 16], list(range(0, 640, 10)), "US"
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "US"
    stored = np.arange(64, dtype=np.uint16).reshape(8, 8)
    data = dicom(stored, ModalityLUTSequence=Items([table]), WindowCenter=320.5, WindowWidth=641)
    image = one(tmp_path, data)
    # C.11.2.1.2: black at centre - 0.5 - (width - 1) / 2 = 0, white at 640.
    np.testing.assert_allclose(image[0].reshape(-1), np.arange(64) * 10 / 640, atol=1e-6)


def test_display_window_equal_to_the_type_keeps_eight_bits(tmp_path: Path) -> None:
    image = one(tmp_path, dicom(RAMP, WindowCenter=128, WindowWidth=256))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image[0], RAMP)


def test_padding_does_not_count_in_the_percentiles(tmp_path: Path) -> None:
    stored = np.tile(np.arange(8, dtype=np.int16) * 100, (8, 1))
    stored[0] = -2000
    image = one(tmp_path, dicom(stored, PixelPaddingValue=-2000))
    np.testing.assert_allclose(image[0, 0], 0.0)
    np.testing.assert_allclose(image[0, 4], np.arange(8) / 7, atol=1e-6)


def test_colour_palette_and_ybr_become_rgb(tmp_path: Path) -> None:
    wanted = {"size": [8, 8], "channels": 3}
    rgb = noise(1, 8, 8, 3)
    np.testing.assert_array_equal(one(tmp_path / "rgb", dicom(rgb), image=wanted), rgb.transpose(2, 0, 1))

    planes = dicom(rgb, PlanarConfiguration=1)
    planes.PixelData = rgb.transpose(2, 0, 1).tobytes()
    np.testing.assert_array_equal(one(tmp_path / "planes", planes, image=wanted), rgb.transpose(2, 0, 1))

    index = (np.arange(64).reshape(8, 8) % 4).astype(np.uint8)
    palette = dicom(index, PhotometricInterpretation="PALETTE COLOR")
    for colour, values in (("Red", [0, 255, 0, 7]), ("Green", [0, 0, 255, 8]), ("Blue", [9, 0, 0, 255])):
        setattr(palette, f"{colour}PaletteColorLookupTableDescriptor", [4, 0, 16])
        words = (np.array(values, dtype=np.uint16) * 257).tobytes()
        setattr(palette, f"{colour}PaletteColorLookupTableData", words)
    image = one(tmp_path / "palette", palette, image=wanted)
    assert image[:, 0, :4].T.tolist() == [[0, 0, 9], [255, 0, 0], [0, 255, 0], [7, 8, 255]]

    grey = np.full((8, 8, 3), 128, dtype=np.uint8)
    grey[..., 0] = RAMP
    ybr = one(tmp_path / "ybr", dicom(grey, PhotometricInterpretation="YBR_FULL"), image=wanted)
    np.testing.assert_array_equal(ybr, np.stack([RAMP] * 3))


def test_rgb_to_grey_is_luminance(tmp_path: Path) -> None:
    rgb = np.zeros((8, 8, 3), dtype=np.uint8)
    rgb[0, 0], rgb[0, 1], rgb[0, 2] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    assert one(tmp_path, dicom(rgb))[0, 0, :3].tolist() == [76, 150, 29]


@pytest.mark.parametrize(
    "syntax", ["1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.5"]
)
def test_lossless_compression_changes_nothing(tmp_path: Path, syntax: str) -> None:
    pixels = noise(3, 32, 32)
    data = dicom(pixels)
    data.compress(syntax)
    image = one(tmp_path, data, image={"size": [32, 32], "channels": 1})
    np.testing.assert_array_equal(image[0], pixels)


def test_tags_give_labels_and_patients(tmp_path: Path) -> None:
    folder = hospital(
        tmp_path,
        "dicom",
        label={"from": "tag", "tag": "StudyDescription"},
        patient={"from": "tag", "tag": "PatientID"},
        label_map={"MASS": "solid"},
    )
    for i, word in enumerate(["MASS", "cavity", "unheard-of", None]):
        tags = {} if word is None else {"StudyDescription": word}
        save(dicom(noise(i, 8, 8), patient=f"P-{i}", **tags), folder / f"{i}")  # no ending, as scanners do
    save(dicom(noise(9, 8, 8), patient="", StudyDescription="MASS"), folder / "1.2.840.1")
    manifest, site = ingest(tmp_path)
    assert site.labels.tolist() == [0, 1]
    assert manifest.rejected == {"label-unknown": 1, "label-missing": 1, "patient-missing": 1}


@pytest.mark.slow
def test_five_hundred_small_files_are_quick(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "dicom")
    for i in range(500):
        save(dicom(noise(i, 8, 8)), folder / "solid" / f"{i}.dcm")
    start = time.perf_counter()
    manifest, _ = ingest(tmp_path)
    assert manifest.count == 500
    assert time.perf_counter() - start < 10  # about 1.5 s on an idle core


# --- rejections -------------------------------------------------------------------------------------


def deflated_bomb(path: Path) -> None:
    save(dicom(RAMP, syntax="1.2.840.10008.1.2.1.99"), path)
    blob = path.read_bytes()
    start = 132 + 12 + int.from_bytes(blob[140:144], "little")
    machine = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    path.write_bytes(blob[:start] + machine.compress(b"\0" * 3_000_000) + machine.flush())


def lying_jpeg(path: Path) -> None:
    """Declares 8 x 8 pixels around a JPEG stream of 4096 x 4096."""
    data = dicom(RAMP, syntax="1.2.840.10008.1.2.4.50")
    stream = bytes.fromhex("ffd8ffc0000b0810001000010111 00".replace(" ", "")) + b"\xff\xd9"
    data.PixelData = encapsulate([stream])
    data["PixelData"].VR = "OB"
    save(data, path)


def mpeg(path: Path) -> None:
    data = dicom(RAMP, syntax="1.2.840.10008.1.2.4.100")
    data.PixelData = encapsulate([bytes(64)])
    data["PixelData"].VR = "OB"
    save(data, path)


def cut(path: Path) -> None:
    data = dicom(RAMP)
    data.PixelData = data.PixelData[:-10]
    save(data, path)


def without(path: Path, *names: str) -> None:
    data = dicom(RAMP)
    for name in names:
        delattr(data, name)
    save(data, path)


BROKEN = {
    "empty": lambda p: p.write_bytes(b""),
    "not-dicom": lambda p: p.write_bytes(b"\x1f\x8b" + bytes(300)),
    "header-unreadable": lambda p: save(dicom(RAMP, Rows=0), p),
    "transfer-syntax-missing": lambda p: p.write_bytes(bytes(128) + b"DICM" + b"\xff" * 200),
    "truncated": cut,
    "no-pixel-data": lambda p: without(p, "PixelData"),
    "too-large": lambda p: save(dicom(RAMP, Rows=60_000, Columns=60_000), p),
    "multi-frame": lambda p: save(dicom(noise(0, 2, 8, 8)), p),
    "colour-unknown": lambda p: save(dicom(RAMP, PhotometricInterpretation="HSV"), p),
    "non-image-object": lambda p: save(dicom(RAMP, SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4"), p),
    "transfer-syntax-unsupported": mpeg,
    "pixels-undecodable": lying_jpeg,
}


@pytest.mark.parametrize("code", sorted(BROKEN))
def test_bad_file_gets_its_code_and_the_rest_goes_on(tmp_path: Path, code: str) -> None:
    folder = hospital(tmp_path, "dicom")
    save(dicom(RAMP), folder / "solid" / "good.dcm")
    BROKEN[code](folder / "solid" / "bad.dcm")
    manifest, _ = ingest(tmp_path)
    assert manifest.count == 1
    assert manifest.rejected == {code: 1}
    assert code in reasons


def test_deflated_bomb_is_refused_unread(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "dicom")
    save(dicom(RAMP), folder / "solid" / "good.dcm")
    deflated_bomb(folder / "solid" / "bomb.dcm")
    assert (folder / "solid" / "bomb.dcm").stat().st_size < 10_000
    manifest, _ = ingest(tmp_path, ingest={"max_file_mb": 1})
    assert manifest.rejected == {"too-large": 1}


def test_damage_anywhere_in_the_header_is_never_an_exception(tmp_path: Path) -> None:
    path = save(
        dicom(RAMP, WindowCenter=[1, 2], WindowWidth=[3, 4], RescaleSlope=2, RescaleIntercept=1),
        tmp_path / "a",
    )
    blob = path.read_bytes()
    rng = random.Random(0)
    verdicts = []
    for _ in range(300):
        broken = bytearray(blob)
        for _ in range(3):
            broken[rng.randrange(132, len(blob))] = rng.randrange(256)
        path.write_bytes(broken)
        verdicts.append(verdict(path))
    assert set(verdicts) <= {*reasons, None}
    assert 0 < verdicts.count(None) < 300


def test_size_that_compressed_streams_declare() -> None:
    for syntax in ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.80"):
        data = dicom(noise(0, 32, 40))
        data.compress(syntax)
        (frame,) = generate_frames(data.PixelData, number_of_frames=1)
        stream = read_stream(frame)
        assert stream is not None
        assert stream[:4] == (32, 40, 1, 8)
    assert read_stream(b"\xff\xd8\xff") is None
    assert read_stream(b"RLE") is None


# --- series -----------------------------------------------------------------------------------------

SIZE = (4, 5, 6)
VOLUME = (np.arange(120).reshape(SIZE) * 7 % 251).astype(np.uint16)
"""(D, H, W) to head, back and left; no symmetry of any kind."""
IMAGE = {"size": list(SIZE), "channels": 1, "window": {"center": 125, "width": 250}}
EXPECTED = VOLUME[None] / 250


def volumes(root: Path, **changes: Any) -> Path:
    return hospital(root, "dicom", image=IMAGE, **changes)


def test_series_is_sorted_by_position_not_by_name_or_number(tmp_path: Path) -> None:
    folder = volumes(tmp_path)
    series(folder / "solid" / "s", VOLUME, names=["c", "a", "d", "b"])
    _, site = ingest(tmp_path)
    assert site.images.shape == (1, 1, *SIZE)
    np.testing.assert_allclose(site.images[0], EXPECTED, atol=1e-6)


def test_every_orientation_of_dicom_and_nifti_gives_one_array(tmp_path: Path) -> None:
    """Axial from the feet or the head, coronal, sagittal and NIfTI in three voxel orders."""
    left, back, head = np.eye(3)
    views = {
        "axial": (VOLUME, left, back),
        "axial-reversed": (VOLUME[::-1, ::-1], left, -back),
        "coronal": (VOLUME[::-1].transpose(1, 0, 2), left, -head),
        "sagittal": (VOLUME[::-1].transpose(2, 0, 1), back, -head),
    }
    for name, (stack, row, column) in views.items():
        root = tmp_path / name
        normal = np.cross(row, column)
        # The stack runs along its slices' normal; where that points the other way, store it reversed.
        axis = {"axial": head, "axial-reversed": -head, "coronal": back, "sagittal": left}[name]
        stored = stack if normal @ axis > 0 else stack[::-1]
        series(volumes(root) / "solid" / "s", stored, orientation=(*row, *column), step=1.0)
        np.testing.assert_allclose(ingest(root)[1].images[0], EXPECTED, atol=1e-6, err_msg=name)
    xyz = VOLUME.transpose(2, 1, 0)  # (X, Y, Z) to left, back, head
    orders = {
        "lps": (xyz, np.diag([-1.0, -1, 1, 1])),
        "ras": (xyz[::-1, ::-1], np.diag([1.0, 1, 1, 1])),
        "slp": (
            xyz.transpose(2, 0, 1),
            np.array([[0, -1.0, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]),
        ),
    }
    for name, (voxels, affine) in orders.items():
        root = tmp_path / name
        nifti(
            hospital(root, "nifti", image=IMAGE) / "solid" / "a.nii.gz", np.ascontiguousarray(voxels), affine
        )
        np.testing.assert_allclose(ingest(root)[1].images[0], EXPECTED, atol=1e-6, err_msg=name)


def test_oblique_series_agrees_with_its_nifti(tmp_path: Path) -> None:
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    row, column = turn[:, 0], turn[:, 1]
    series(volumes(tmp_path / "d") / "solid" / "s", VOLUME, orientation=(*row, *column), step=3.0)
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1, -1, 1]) @ turn @ np.diag([1, 1, 3])
    folder = hospital(tmp_path / "n", "nifti", image=IMAGE)
    nifti(folder / "solid" / "a.nii", np.ascontiguousarray(VOLUME.transpose(2, 1, 0)), affine)
    first, second = ingest(tmp_path / "d")[1].images[0], ingest(tmp_path / "n")[1].images[0]
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, EXPECTED, atol=1e-6)


def test_spacing_follows_the_axes(tmp_path: Path) -> None:
    """2 mm slices, 4 mm rows, 1 mm columns, wanted at 1 mm: sizes double and quadruple."""
    image = {**IMAGE, "size": [8, 20, 6], "spacing_mm": [1, 1, 1]}
    folder = hospital(tmp_path, "dicom", image=image)
    constant = np.full(SIZE, 50, dtype=np.uint16)
    series(folder / "solid" / "s", constant, step=2.0, spacing=(4.0, 1.0))
    _, site = ingest(tmp_path)
    np.testing.assert_allclose(site.images[0], 0.2, atol=1e-6)  # nothing padded: the sizes fit


def per_slice(paths: list[Path], change: Any) -> None:
    import pydicom

    for k, path in enumerate(paths):
        data = pydicom.dcmread(path)
        change(k, data)
        data.save_as(path)


def shift(k: int, data: Any) -> None:
    data.ImagePositionPatient = [0, 2.0 * k, 2.0 * k]


def uneven(k: int, data: Any) -> None:
    data.ImagePositionPatient = [0, 0, [0.0, 2.0, 5.1, 7.1, 9.0, 11.0][k]]


def same_place(k: int, data: Any) -> None:
    data.ImagePositionPatient = [0, 0, [0.0, 2.0, 2.0, 4.0, 6.0, 8.0][k]]


def localiser(k: int, data: Any) -> None:
    if k == 0:
        data.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]


def other_spacing(k: int, data: Any) -> None:
    if k == 2:
        data.PixelSpacing = [0.5, 0.5]


def no_position(k: int, data: Any) -> None:
    if k == 1:
        del data.ImagePositionPatient


def skewed(k: int, data: Any) -> None:
    data.ImageOrientationPatient = [1, 0, 0, 1, 0, 0]


def damaged(k: int, data: Any) -> None:
    if k == 2:
        data.PixelData = data.PixelData[:20]


SERIES = {
    "slices-shifted": (shift, {"slices-shifted": 4}),
    "spacing-uneven": (uneven, {"spacing-uneven": 4}),
    "slice-duplicate": (same_place, {"slice-duplicate": 4}),
    "orientation-mixed": (localiser, {"orientation-mixed": 4}),
    "sizes-mixed": (other_spacing, {"sizes-mixed": 4}),
    "geometry-missing": (no_position, {"geometry-missing": 4}),
    "geometry-invalid": (skewed, {"geometry-invalid": 4}),
    "series-incomplete": (damaged, {"truncated": 1, "series-incomplete": 3}),
}


@pytest.mark.parametrize("code", sorted(SERIES))
def test_bad_series_gets_its_code_and_the_rest_goes_on(tmp_path: Path, code: str) -> None:
    folder = volumes(tmp_path)
    series(folder / "solid" / "good", VOLUME)
    change, expected = SERIES[code]
    per_slice(series(folder / "solid" / "bad", VOLUME + 1), change)
    manifest, _ = ingest(tmp_path)
    assert manifest.count == 1
    assert manifest.rejected == expected


@pytest.mark.parametrize(("leave_out", "code"), [((1,), "slice-missing"), ((1, 2, 3), "too-few-slices")])
def test_missing_slices(tmp_path: Path, leave_out: tuple[int, ...], code: str) -> None:
    folder = volumes(tmp_path)
    series(folder / "solid" / "good", VOLUME)
    series(folder / "solid" / "bad", VOLUME + 1, leave_out=leave_out)
    manifest, _ = ingest(tmp_path)
    assert manifest.count == 1
    assert manifest.rejected == {code: 4 - len(leave_out)}


def test_rounded_positions_are_even_enough(tmp_path: Path) -> None:
    folder = volumes(tmp_path)
    paths = series(folder / "solid" / "s", VOLUME, step=0.625)

    def rounded(k: int, data: Any) -> None:
        data.ImagePositionPatient = [0, 0, round(0.625 * k, 1)]

    per_slice(paths, rounded)
    assert ingest(tmp_path)[0].count == 1


def test_copied_slice_file_is_dropped_and_the_series_kept(tmp_path: Path) -> None:
    folder = volumes(tmp_path)
    paths = series(folder / "solid" / "s", VOLUME)
    shutil.copy(paths[1], folder / "solid" / "s" / "copy.dcm")
    manifest, site = ingest(tmp_path)
    assert manifest.rejected == {"duplicate": 1}
    np.testing.assert_allclose(site.images[0], EXPECTED, atol=1e-6)


def test_series_labels_from_a_table_of_folders(tmp_path: Path) -> None:
    folder = volumes(
        tmp_path,
        label={"from": "csv", "file": "series.csv", "key": "series", "column": "finding"},
        patient={"from": "tag", "tag": "PatientID"},
    )
    series(folder / "p1" / "s1", VOLUME)
    series(folder / "p1" / "s2", VOLUME + 1)
    series(folder / "p1" / "s3", VOLUME + 2)
    (folder / "series.csv").write_text(
        f"series,finding\np1/s1,cavity\n{uid(folder / 'p1' / 's2')},calcified\ns3,solid\np1/s3,cavity\n"
    )
    _, site = ingest(tmp_path)
    assert site.labels.tolist() == [CLASSES.index(w) for w in ("cavity", "calcified", "cavity")]
    assert len(set(site.groups)) == 1


def test_two_patients_in_one_series_are_refused(tmp_path: Path) -> None:
    folder = volumes(tmp_path, patient={"from": "tag", "tag": "PatientID"})
    series(folder / "solid" / "good", VOLUME)

    def other(k: int, data: Any) -> None:
        data.PatientID = f"P-{k % 2}"

    per_slice(series(folder / "solid" / "bad", VOLUME + 1), other)
    assert ingest(tmp_path)[0].rejected == {"patient-conflict": 4}


def enhanced() -> Any:
    """Enhanced multi-frame: frames out of order, spacing and rescale shared, positions per frame."""
    order = [2, 0, 3, 1]
    data = dicom(VOLUME[order], PixelSpacing=None, SeriesInstanceUID=uid("enhanced"))
    shared = Dataset()
    measures, turn, units = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [1, 1]
    turn.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    units.RescaleSlope, units.RescaleIntercept = 2, -10
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Items([measures]), Items([turn])
    shared.PixelValueTransformationSequence = Items([units])
    data.SharedFunctionalGroupsSequence = Items([shared])
    frames = []
    for k in order:
        place, frame = Dataset(), Dataset()
        place.ImagePositionPatient = [0, 0, 2.0 * k]
        frame.PlanePositionSequence = Items([place])
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = Items(frames)
    return data


def test_enhanced_multi_frame_is_placed_by_its_frames(tmp_path: Path) -> None:
    image = {**IMAGE, "window": {"center": 240, "width": 500}}  # 2 x - 10 from -10 to 490
    save(enhanced(), hospital(tmp_path, "dicom", image=image) / "solid" / "e.dcm")
    np.testing.assert_allclose(ingest(tmp_path)[1].images[0], EXPECTED, atol=1e-6)


def part(start: int, stop: int, **tags: Any) -> FileDataset:
    """Slices of the volume as one file of a concatenation, each frame at its place."""
    data = dicom(VOLUME[start:stop], PixelSpacing=None, SeriesInstanceUID=uid("parts"), **tags)
    if stop - start == 1:
        data.NumberOfFrames = 1
    shared, measures, turn = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, turn.ImageOrientationPatient = [1, 1], [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Items([measures]), Items([turn])
    data.SharedFunctionalGroupsSequence = Items([shared])
    frames = []
    for k in range(start, stop):
        place, frame = Dataset(), Dataset()
        place.ImagePositionPatient = [0, 0, 2.0 * k]
        frame.PlanePositionSequence = Items([place])
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = Items(frames)
    return data


def parts(folder: Path, *ends: int, total: bool = True, leave_out: Sequence[int] = ()) -> None:
    """The volume cut at ``ends``."""
    cuts = [0, *ends, SIZE[0]]
    said = {"InConcatenationTotalNumber": len(cuts) - 1} if total else {}
    for number, (start, stop) in enumerate(itertools.pairwise(cuts), start=1):
        if number not in leave_out:
            data = part(start, stop, ConcatenationUID=uid("whole"), InConcatenationNumber=number, **said)
            save(data, folder / f"{9 - number}.dcm")


@pytest.mark.parametrize("total", [True, False])
@pytest.mark.parametrize("ends", [(2,), (1, 3), (1, 2, 3)])
def test_parts_of_a_concatenation_are_one_volume(tmp_path: Path, ends: tuple[int, ...], total: bool) -> None:
    parts(volumes(tmp_path) / "solid", *ends, total=total)
    manifest, site = ingest(tmp_path)
    assert manifest.rejected == {}
    np.testing.assert_allclose(site.images, EXPECTED[None], atol=1e-6)


@pytest.mark.parametrize(
    ("ends", "total", "leave_out"),
    [((2,), True, (1,)), ((2,), True, (2,)), ((2,), False, (1,)), ((2,), False, (2,)), ((1, 3), False, (2,))],
)
def test_a_concatenation_of_which_a_part_is_missing_is_refused_whole(
    tmp_path: Path, ends: tuple[int, ...], total: bool, leave_out: tuple[int, ...]
) -> None:
    folder = volumes(tmp_path)
    series(folder / "solid" / "good", VOLUME + 1)
    parts(folder / "solid", *ends, total=total, leave_out=leave_out)
    manifest, _ = ingest(tmp_path)
    assert manifest.count == 1
    assert manifest.rejected == {"slice-missing": len(ends)}


def test_a_concatenation_of_one_file_is_whole(tmp_path: Path) -> None:
    parts(volumes(tmp_path) / "solid")
    np.testing.assert_allclose(ingest(tmp_path)[1].images[0], EXPECTED, atol=1e-6)


def csa(tiles: int | None) -> bytes:
    """A Siemens CSA2 header with one element."""
    items = [] if tiles is None else [str(tiles).encode()]
    block = b"SV10\x04\x03\x02\x01" + struct.pack("<II", 1, 77)
    block += b"NumberOfImagesInMosaic".ljust(64, b"\0") + struct.pack("<i4siii", 1, b"US", 6, 6, 77)
    for n in range(6):
        text = items[n] + b"\0" if n < len(items) else b""
        block += struct.pack("<iiii", len(text), len(text), 77, len(text)) + text + bytes(-len(text) % 4)
    return block


def mosaic_by_type(data: FileDataset) -> None:
    data.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "NORM", "MOSAIC"]


def mosaic_of_asl(data: FileDataset) -> None:
    data.ImageType = ["DERIVED", "PRIMARY", "ASL", "PERFUSION", "ASL_MOSAIC"]


def mosaic_by_private_number(data: FileDataset) -> None:
    data.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", 9)


def mosaic_by_unknown_number(data: FileDataset) -> None:
    data.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "UN", b"\x09\0")


def mosaic_by_csa(data: FileDataset) -> None:
    data.private_block(0x0029, "SIEMENS CSA HEADER", create=True).add_new(0x10, "OB", csa(9))


def mosaic_by_frame_type(data: FileDataset) -> None:
    shared, kind = Dataset(), Dataset()
    kind.FrameType = ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]
    shared.MRImageFrameTypeSequence = Items([kind])
    data.SharedFunctionalGroupsSequence = Items([shared])


@pytest.mark.parametrize("volume", [False, True])
@pytest.mark.parametrize(
    "tell",
    [
        mosaic_by_type,
        mosaic_of_asl,
        mosaic_by_private_number,
        mosaic_by_unknown_number,
        mosaic_by_csa,
        mosaic_by_frame_type,
    ],
)
def test_a_mosaic_is_neither_a_picture_nor_a_slice(
    tmp_path: Path, tell: Callable[[FileDataset], None], volume: bool
) -> None:
    folder = volumes(tmp_path) if volume else hospital(tmp_path, "dicom")
    for k in range(3):
        data = dicom(noise(k, 24, 24), Modality="MR", ImagePositionPatient=[0, 0, 2.0 * k])
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        tell(data)
        save(data, folder / "solid" / f"{k}.dcm")
    with pytest.raises(SourceError, match="3 mosaic"):
        ingest(tmp_path)


@pytest.mark.parametrize("header", [csa(None), csa(1), b"SV10", b"no CSA header", b""])
def test_a_single_slice_of_siemens_is_taken(tmp_path: Path, header: bytes) -> None:
    data = dicom(RAMP, Modality="MR", ImageType=["ORIGINAL", "PRIMARY", "M", "ND"])
    data.private_block(0x0029, "SIEMENS CSA HEADER", create=True).add_new(0x10, "OB", header)
    np.testing.assert_array_equal(one(tmp_path, data), RAMP[None])


@pytest.mark.parametrize("kind", [["ORIGINAL", "PRIMARY", "LOCALIZER"], ["DERIVED", "PRIMARY", "SCOUT"]])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_a_scout_is_no_part_of_the_volume_of_its_series(
    tmp_path: Path, kind: list[str], modality: str
) -> None:
    folder = volumes(tmp_path)
    series(folder / "solid" / "s", VOLUME, Modality=modality)
    for k in range(2):
        scout = dicom(
            VOLUME[k] + 1, Modality=modality, ImageType=kind, ImageOrientationPatient=[1, 0, 0, 0, 1, 0]
        )
        scout.SeriesInstanceUID, scout.ImagePositionPatient = uid(folder / "solid" / "s"), [0, 0, 8.0 + 2 * k]
        save(scout, folder / "solid" / "s" / f"scout{k}.dcm")
    manifest, site = ingest(tmp_path)
    assert manifest.rejected == {"localiser": 2}
    np.testing.assert_allclose(site.images, EXPECTED[None], atol=1e-6)


@pytest.mark.parametrize("frames", [2, 3])
@pytest.mark.parametrize("coded", [False, True])
def test_more_frames_than_the_header_counts_are_no_picture(tmp_path: Path, frames: int, coded: bool) -> None:
    folder = hospital(tmp_path, "dicom", image={"size": [8, 8], "channels": 3})
    save(dicom(RAMP), folder / "solid" / "good.dcm")
    data = dicom(noise(1, frames, 8, 8))
    if coded:
        data.compress("1.2.840.10008.1.2.5")
    for name, said in (("missing", None), ("one", 1)):
        if said is None:
            del data.NumberOfFrames
        else:
            data.NumberOfFrames = said
        save(data, folder / "solid" / f"{name}.dcm")
    manifest, _ = ingest(tmp_path)
    assert (manifest.count, manifest.rejected) == (1, {"multi-frame": 2})


def test_three_grey_frames_are_no_colour_picture(tmp_path: Path) -> None:
    save(
        dicom(noise(1, 3, 8, 8)),
        hospital(tmp_path, "dicom", image={"size": [8, 8], "channels": 3}) / "solid" / "a",
    )
    with pytest.raises(SourceError, match="multi-frame"):
        ingest(tmp_path)


def test_an_empty_slice_with_a_slope_of_zero_is_its_intercept(tmp_path: Path) -> None:
    """Scanners scale PET slice by slice by its highest value, which is 0 in an empty one."""
    folder = volumes(tmp_path)
    volume = VOLUME.copy()
    volume[3] = 0

    def scaled(k: int, data: Any) -> None:
        data.RescaleSlope, data.RescaleIntercept = (0 if k == 3 else 1), 0

    per_slice(series(folder / "solid" / "s", volume), scaled)
    np.testing.assert_allclose(ingest(tmp_path)[1].images[0], volume[None] / 250, atol=1e-6)


def test_a_slope_of_zero_over_a_picture_is_damage(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "dicom")
    save(dicom(RAMP), folder / "solid" / "good.dcm")
    save(dicom(RAMP, RescaleSlope=0, RescaleIntercept=5), folder / "solid" / "bad.dcm")
    assert ingest(tmp_path)[0].rejected == {"header-unreadable": 1}


@pytest.mark.parametrize("keyword", ["PatientWeight", "KVP", "SliceThickness", "EchoTime", "WindowCenter"])
@pytest.mark.parametrize("text", ["NaN", "-inf", "1e999"])
def test_a_header_number_that_is_none_ends_no_site(tmp_path: Path, keyword: str, text: str) -> None:
    folder = hospital(tmp_path, "dicom")
    for k in range(2):
        data = dicom(noise(k, 8, 8))
        raw = text.encode()
        raw += b" " * (len(raw) % 2)
        tag = tag_of(keyword)[0]
        data[tag] = RawDataElement(Tag(tag), "DS", len(raw), raw, 0, False, True)
        save(data, folder / "solid" / f"{k}.dcm")
    assert ingest(tmp_path)[0].count == 2

    def strict(word: str) -> None:
        raise AssertionError(word)

    for path in (tmp_path / "data").rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=strict)


@pytest.mark.parametrize("spacing", [[1e5, 1e5], [9e5, 9e5], [9e5, 1e-4], [1e-5, 1e-5], [1e-5, 1.0]])
@pytest.mark.parametrize("volume", [False, True])
def test_an_absurd_spacing_is_refused_before_anything_is_allocated(
    tmp_path: Path, spacing: list[float], volume: bool
) -> None:
    image = {
        "size": [4, 8, 8] if volume else [8, 8],
        "channels": 1,
        "spacing_mm": [1.0] * (3 if volume else 2),
    }
    folder = hospital(tmp_path, "dicom", image=image)
    for name, mm in (("good", [1.0, 1.0]), ("bad", spacing)):
        if volume:
            series(folder / "solid" / name, noise(len(name), 4, 8, 8), spacing=mm)
        else:
            save(dicom(noise(len(name), 8, 8), PixelSpacing=mm), folder / "solid" / f"{name}.dcm")
    manifest, _ = ingest(tmp_path)
    assert manifest.count == 1
    assert set(manifest.rejected) <= {"resampled-too-large", "geometry-invalid"}
    assert sum(manifest.rejected.values()) == (4 if volume else 1)


@pytest.mark.parametrize("step", [1e5, 1e7])
def test_an_absurd_distance_of_slices_is_refused(tmp_path: Path, step: float) -> None:
    folder = hospital(tmp_path, "dicom", image={"size": [4, 8, 8], "channels": 1, "spacing_mm": [1, 1, 1]})
    series(folder / "solid" / "good", noise(1, 4, 8, 8))
    series(folder / "solid" / "bad", noise(2, 4, 64, 64), step=step)
    assert ingest(tmp_path)[0].rejected == {"resampled-too-large": 4}


def test_multi_frame_without_positions_is_no_volume(tmp_path: Path) -> None:
    save(dicom(VOLUME), volumes(tmp_path) / "solid" / "cine.dcm")
    with pytest.raises(SourceError, match="multi-frame"):
        ingest(tmp_path)
    assert not (tmp_path / "data").exists()  # nothing was written


# --- real files -------------------------------------------------------------------------------------


@pytest.mark.skipif(not CONFORMANCE.is_dir(), reason="needs ../shared/data/dicom-conformance")
def test_conformance_files_get_the_right_verdict() -> None:
    got = {row["file"]: row for row in check_folder(CONFORMANCE)}
    with (CONFORMANCE / "manifest.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 59
    for row in rows:
        verdict = got[row["file"]]
        assert verdict["accepted"] == (verdict["code"] is None)
        assert verdict["accepted"] or verdict["code"] in reasons
        if row["expected"] == "broken":
            assert not verdict["accepted"], row["file"]
        elif row["kind"] != "image" or "SEG" in row["special"]:
            assert verdict["code"] == "non-image-object", row["file"]
        else:
            assert verdict["accepted"], (row["file"], verdict["code"])
            assert "x".join(map(str, verdict["shape"] or ())) == row["shape"], row["file"]


@pytest.mark.skipif(not CONFORMANCE.is_dir(), reason="needs ../shared/data/dicom-conformance")
def test_same_pixels_in_every_encoding(tmp_path: Path) -> None:
    """MR_small in six encodings: one picture, of which ingest keeps one copy."""
    folder = hospital(tmp_path, "dicom", image={"size": [64, 64], "channels": 1})
    (folder / "solid").mkdir()
    for path in sorted((CONFORMANCE / "pydicom").glob("MR_small*.dcm")):
        shutil.copy(path, folder / "solid" / path.name)
    manifest, _ = ingest(tmp_path)
    assert (manifest.count, manifest.rejected) == (1, {"duplicate": 5})


@pytest.mark.skipif(not CONFORMANCE.is_dir(), reason="needs ../shared/data/dicom-conformance")
def test_a_real_bone_scan_of_twelve_bits(tmp_path: Path) -> None:
    """JPEG Extended, whose scan must say that it holds all coefficients, 0 to 63, and in this file does not.

    LargestImagePixelValue, of before it was compressed, is 278.
    """
    blob = (CONFORMANCE / "pydicom" / "JPEG-lossy.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(blob)
    assert verdict(tmp_path / "a.dcm") == "pixels-undecodable"
    scan = bytes.fromhex("ffda0008 0101 00 00")
    assert blob.count(scan + b"\0\0") == 1
    (tmp_path / "b.dcm").write_bytes(blob.replace(scan + b"\0\0", scan + b"\x3f\0"))
    pixels = stored_pixels(open_file(tmp_path / "b.dcm", 10**7, pixels=True))
    assert (pixels.shape, pixels.dtype) == ((1024, 256), np.uint16)
    assert 250 < pixels.max() <= 278
