"""What is hand-written for speed gives what the library would."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import dcmread, dcmwrite
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from qkt_clinical.config.site import ImageSpec
from qkt_clinical.errors import FileRejected
from qkt_clinical.ingest.arrays import PERCENTILES, Picture, _percentiles, prepare, resample
from qkt_clinical.ingest.readers.dicom_file import (
    HEAD,
    _native,
    _uncompressed,
    may_be_deflated,
    open_file,
)
from qkt_clinical.ingest.readers.elements import number, values, whole, word
from tests.ingest_files import dicom, noise
from tests.places import SHARED

CONFORMANCE = SHARED / "dicom-conformance"


@pytest.mark.parametrize("shape", [(31, 40), (8, 9, 25)])
@pytest.mark.parametrize("factor", [0.27, 0.5, 1.0, 1.3, 3.0])
def test_sizes_change_as_monai_changes_them(shape: tuple[int, ...], factor: float) -> None:
    from monai.transforms import Resize

    image = noise(1, 2, *shape).astype(np.float32) / 255
    size = tuple(max(4, round(n * factor)) for n in shape)
    linear = "bilinear" if len(shape) == 2 else "trilinear"
    mode = "area" if factor < 1 else linear
    expected = np.asarray(Resize(size, mode=mode)(image))
    found = resample(image, None, ImageSpec(size=size))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_one_axis_shrinks_while_another_grows() -> None:
    image = np.array([[[0.0, 1, 2, 3], [4, 5, 6, 7]]], dtype=np.float32)
    found = resample(image, None, ImageSpec.model_construct(size=(4, 2), spacing_mm=None))
    np.testing.assert_allclose(found[0], [[0.5, 2.5], [1.5, 3.5], [3.5, 5.5], [4.5, 6.5]])


@given(
    st.sampled_from(["u1", "i1", "u2", "i2"]),
    st.integers(1, 300),
    st.integers(0, 2**32 - 1),
    st.integers(1, 2**16),
)
def test_percentiles_by_counting(kind: str, size: int, seed: int, spread: int) -> None:
    info = np.iinfo(kind)
    low = max(info.min, -spread)
    pixels = np.random.default_rng(seed).integers(low, min(info.max, spread), size, dtype=kind, endpoint=True)
    np.testing.assert_allclose(_percentiles(pixels), np.percentile(pixels, PERCENTILES), atol=1e-9)


@pytest.mark.parametrize("slope", [1.0, 2.5, -0.7])
def test_an_inverted_twin_is_the_same_to_the_last_bit(slope: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (32, 32)).astype(np.uint16)
    spec = ImageSpec(size=(16, 16), channels=1)
    limits = tuple(sorted(slope * x + 7 for x in (500.0, 3000.0)))
    mirrored = tuple(sorted(slope * (4095 - x) + 7 for x in (500.0, 3000.0)))
    plain = Picture(pixels, limits=limits, slope=slope, intercept=7)
    twin = Picture(4095 - pixels, limits=mirrored, inverted=True, slope=slope, intercept=7)
    np.testing.assert_array_equal(prepare(plain, spec), prepare(twin, spec))
    alone = prepare(Picture(pixels, slope=slope, intercept=7), spec)
    other = prepare(Picture(4095 - pixels, inverted=True, slope=slope, intercept=7), spec)
    np.testing.assert_allclose(alone, other, atol=1e-6)


FLAT = ImageSpec(size=(64, 64), channels=1)


def spots(kind: str, background: float, *others: float) -> NDArray[Any]:
    """(64, 64) of one value but for 4 pixels of each of the others: less than 0.5 % in all."""
    pixels = np.full((64, 64), background, dtype=kind)
    for i, value in enumerate(others):
        pixels[10 + i, 20:24] = value
    return pixels


@pytest.mark.parametrize("kind", ["u2", "i2", "i4", "f4", "f8"])
@pytest.mark.parametrize("inverted", [False, True])
def test_the_few_pixels_that_stand_out_are_kept(kind: str, inverted: bool) -> None:
    bright = prepare(Picture(spots(kind, 0, 1000, 3000), inverted=inverted), FLAT)[0]
    np.testing.assert_allclose(bright[:, 30], float(inverted))
    np.testing.assert_allclose(bright[10, 20], abs(inverted - 1 / 3), atol=0.01)
    np.testing.assert_allclose(bright[11, 20], float(not inverted), atol=0.01)
    dark = prepare(Picture(spots(kind, 3000, 2000, 0), inverted=inverted), FLAT)[0]
    np.testing.assert_allclose(dark[10, 20], abs(inverted - 2 / 3), atol=0.01)
    np.testing.assert_allclose(dark[11, 20], float(inverted), atol=0.01)
    both = prepare(Picture(spots(kind, 2000, 0, 3000), inverted=inverted), FLAT)[0]
    np.testing.assert_allclose(both[:, 30], abs(inverted - 2 / 3), atol=1e-6)
    assert {0.0, 1.0} < set(np.unique(both).tolist())


def test_outliers_of_a_picture_are_still_cut_off() -> None:
    pixels = np.random.default_rng(0).integers(0, 1000, (64, 64)).astype(np.uint16)
    pixels[0, 0] = 60_000
    image = prepare(Picture(pixels), FLAT)
    assert np.median(image) > 0.45


GREY = {"size": (64, 64), "channels": 1}
RANDOM = noise(3, 64, 64)
LOST = {
    "window far below": (Picture(RANDOM.astype(np.int16)), {"window": {"center": -9000, "width": 10}}),
    "window far above": (Picture(RANDOM.astype(np.float32)), {"window": {"center": 9000, "width": 10}}),
    "window of the file": (Picture(RANDOM.astype(np.uint16), limits=(900.0, 901.0)), {}),
    "window without end": (Picture(RANDOM.astype(np.uint16), limits=(0.0, 1e300)), {}),
    "window too narrow to tell": (Picture(RANDOM.astype(np.uint16), limits=(0.0, 5e-324)), {}),
    "values beyond what can be told": (Picture((RANDOM - 127.5) * 1.2e306), {}),
    "rounded to 8 bits": (Picture(spots("u1", 7, 8), limits=(0.0, 255.0), eight_bit=True), {"size": (8, 8)}),
    "averaged away": (
        Picture(np.indices((64, 64)).sum(axis=0).astype(np.uint8) % 2 * 255, limits=(0.0, 255.0)),
        {"size": (8, 8)},
    ),
    "colours of one brightness": (
        Picture(
            np.where(RANDOM[..., None] > 127, [255, 0, 0], [0, 130, 0]).astype(np.uint8),
            colour=True,
            limits=(0.0, 255.0),
            eight_bit=True,
        ),
        {},
    ),
    "zero mean, unit spread": (
        Picture(RANDOM.astype(np.uint16), limits=(900.0, 901.0)),
        {"normalisation": "zscore"},
    ),
}


@pytest.mark.parametrize("name", sorted(LOST))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_image_that_would_become_constant_is_refused(name: str) -> None:
    picture, changes = LOST[name]
    with pytest.raises(FileRejected) as caught:
        prepare(picture, ImageSpec.model_validate({**GREY, **changes}))
    assert caught.value.code == "contrast-lost"


@pytest.mark.parametrize("normalisation", ["unit", "zscore"])
@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
def test_a_constant_image_stays_one(kind: str, normalisation: str) -> None:
    limits = (0.0, 255.0) if kind == "u1" else None
    spec = ImageSpec.model_validate({**GREY, "size": (8, 8), "normalisation": normalisation})
    image = prepare(Picture(np.full((64, 64), 51, kind), limits=limits, eight_bit=kind == "u1"), spec)
    assert len(np.unique(image)) == 1
    one_colour = np.broadcast_to(np.array([9, 99, 200], np.uint8), (64, 64, 3))
    red = Picture(np.ascontiguousarray(one_colour), colour=True, limits=(0.0, 255.0), eight_bit=True)
    assert prepare(red, ImageSpec(size=(64, 64), channels=3))[:, 0, 0].tolist() == [9, 99, 200]


@pytest.mark.parametrize("limits", [(float("nan"), 1.0), (0.0, float("inf")), (float("-inf"), 5.0)])
def test_limits_that_are_not_finite_count_as_absent(limits: tuple[float, float]) -> None:
    pixels = RANDOM.astype(np.uint16)
    expected = prepare(Picture(pixels), FLAT)
    np.testing.assert_array_equal(prepare(Picture(pixels, limits=limits), FLAT), expected)


def plain_values(data: Dataset, keyword: str) -> tuple[Any, ...]:
    """By pydicom's own conversion."""
    value = data.get(keyword)
    if value is None or value == "":
        return ()
    several = isinstance(value, MultiValue | list | tuple)
    return tuple(
        v if isinstance(v, str) else float(v) for v in (value if several else (value,)) if v not in (None, "")
    )


KEYWORDS = (
    *("Rows", "BitsStored", "PixelRepresentation", "NumberOfFrames", "InstanceNumber", "RescaleSlope"),
    *("WindowCenter", "PixelSpacing", "ImagePositionPatient", "ImageType", "Modality", "SOPInstanceUID"),
    *("StudyDate", "PatientAge", "PatientID", "PhotometricInterpretation", "SmallestImagePixelValue"),
)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_elements_are_what_pydicom_makes_of_them(syntax: str) -> None:
    data = dicom(
        noise(0, 6, 8).astype(np.uint16),
        syntax=syntax,
        RescaleSlope="1.5 ",
        WindowCenter=[40, -600.25],
        PixelSpacing=["0.70", "0.7"],
        ImageType=["ORIGINAL", "PRIMARY", ""],
        PatientAge="042Y",
        InstanceNumber="  -7",
        StudyDate="",
    )
    stream = io.BytesIO()
    dcmwrite(stream, data, enforce_file_format=True)
    read = dcmread(io.BytesIO(stream.getvalue()))
    for keyword in KEYWORDS:
        found = values(dcmread(io.BytesIO(stream.getvalue())), keyword)
        assert tuple(v for v in found if v != "") == plain_values(read, keyword), keyword
    assert number(read, "WindowCenter") == 40
    assert number(read, "WindowWidth") is None
    assert (whole(read, "Rows", 1), whole(read, "NumberOfFrames", 1)) == (6, 1)
    assert (word(read, "Modality"), word(read, "StudyDate")) == ("CT", "")


@pytest.mark.skipif(not CONFORMANCE.is_dir(), reason="needs ../shared/data/dicom-conformance")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_real_files_give_the_same_elements_and_pixels_as_pydicom() -> None:
    native = 0
    for path in sorted(CONFORMANCE.rglob("*")):
        try:
            data = open_file(path, 10**8, pixels=True)
            pixels = None if _native(data) is None else _uncompressed(data)
        except (FileRejected, IsADirectoryError):
            continue
        read = dcmread(path)
        for keyword in KEYWORDS:
            if dictionary_VR(read[keyword].tag) == read[keyword].VR if keyword in read else True:
                expected = plain_values(read, keyword)
                assert tuple(v for v in values(data, keyword) if v != "") == expected, (path.name, keyword)
        if pixels is not None:
            native += 1
            expected_pixels = pixel_array(read)
            assert pixels.dtype == expected_pixels.dtype
            np.testing.assert_array_equal(pixels, expected_pixels, err_msg=path.name)
    assert native >= 5


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("sign", ["u", "i"])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_uncompressed_integers_as_they_lie(tmp_path: Path, bits: int, sign: str, syntax: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 127, (3, 5, 7)).astype(f"<{sign}{bits // 8}")
    if sign == "i":
        pixels = -pixels
    for stored in (pixels, pixels[0]):
        data = dicom(stored, syntax=syntax)
        data.PixelRepresentation = int(sign == "i")
        data.save_as(tmp_path / "a.dcm", enforce_file_format=True)
        read = open_file(tmp_path / "a.dcm", 10**6, pixels=True)
        assert _native(read) is not None
        found = _uncompressed(read)
        np.testing.assert_array_equal(found, stored)
        np.testing.assert_array_equal(found, pixel_array(dcmread(tmp_path / "a.dcm")))


def test_a_deflated_file_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    def head(syntax: str, **meta: Any) -> bytes:
        data = dicom(noise(0, 4, 4), syntax=syntax)
        for name, value in meta.items():
            setattr(data.file_meta, name, value)
        data.save_as(tmp_path / "a.dcm", enforce_file_format=True)
        return (tmp_path / "a.dcm").read_bytes()[:HEAD]

    assert not may_be_deflated(head(ExplicitVRLittleEndian))
    assert may_be_deflated(head(DeflatedExplicitVRLittleEndian))
    # What cannot be told from the first bytes is looked at: a long element first, or one of a strange kind.
    assert may_be_deflated(head(ExplicitVRLittleEndian, FileMetaInformationVersion=bytes(HEAD)))
    assert may_be_deflated(head(ExplicitVRLittleEndian).replace(b"UI", b"QQ", 1))
    assert may_be_deflated(head(ExplicitVRLittleEndian)[:200])
    twice = head(ExplicitVRLittleEndian)
    uid = DeflatedExplicitVRLittleEndian.encode()
    second = b"\x02\x00\x10\x00UI" + len(uid).to_bytes(2, "little") + uid
    at = twice.index(b"\x02\x00\x12\x00")
    assert may_be_deflated(twice[:at] + second + twice[at:]), "the later of two counts, as for pydicom"
