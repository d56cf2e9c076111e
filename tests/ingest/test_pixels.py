"""DICOM pixels come out as they were meant: bits, sign, colour, and what a header says of them."""

from __future__ import annotations

import io
import time
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from pydicom import dcmread, dcmwrite
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import convert_color_space
from pydicom.sequence import Sequence as Items
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from qkt_clinical.config.site import ImageSpec
from qkt_clinical.errors import FileRejected
from qkt_clinical.ingest.arrays import prepare
from qkt_clinical.ingest.readers import dicom_file as reader
from qkt_clinical.ingest.readers.elements import sixteen_bits
from qkt_clinical.ingest.readers.pixels import Bits, read_stream, stored_values, to_rgb
from tests.ingest_files import dicom, hospital, ingest, noise, save, series, uid, verdict

BASELINE, EXTENDED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
LOSSLESS = "1.2.840.10008.1.2.4.70"
RGB = np.zeros((16, 16, 3), np.uint8)
RGB[:, :8], RGB[:, 8:] = (200, 40, 40), (40, 60, 200)
YBR = np.asarray(PIL.Image.fromarray(RGB).convert("YCbCr"))
JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"


def stored(data: FileDataset, path: Path) -> NDArray[Any]:
    """The pixels of a data set after it was a file."""
    save(data, path / "a.dcm")
    return reader.stored_pixels(reader.open_file(path / "a.dcm", 10**8, pixels=True))


def shown(data: FileDataset, path: Path) -> NDArray[np.float32]:
    """(8, 8) as it would be prepared, of a data set after it was a file."""
    save(data, path / "a.dcm")
    read = reader.open_file(path / "a.dcm", 10**8, pixels=True)
    picture = reader.frame_picture(read, reader.stored_pixels(read), 0, lookup=True)
    return np.asarray(prepare(picture, ImageSpec(size=(8, 8), channels=1))[0])


def write(data: FileDataset, path: Path) -> None:
    """Also as big endian, which ``save_as`` refuses."""
    stream = io.BytesIO()
    dcmwrite(stream, data, enforce_file_format=True)
    path.write_bytes(stream.getvalue())


def encoded(pixels: NDArray[Any], syntax: str, *frames: bytes, **tags: Any) -> FileDataset:
    """A data set that declares ``pixels`` around streams of our own."""
    data = dicom(pixels, syntax=syntax, **tags)
    data.PixelData = encapsulate(list(frames))
    data["PixelData"].VR = "OB"
    return data


# --- bits and sign ----------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("allocated", [8, 16, 32])
def test_every_place_of_a_value_among_its_bits(allocated: int, signed: bool) -> None:
    rng = np.random.default_rng(allocated)
    for used in range(1, allocated + 1):
        low, top = (-(1 << (used - 1)), 1 << (used - 1)) if signed else (0, 1 << used)
        values = np.unique([low, top - 1, 0, *rng.integers(low, top, 20)]).astype(np.int64)
        values = values[(values >= low) & (values < top)]
        for high in range(used - 1, allocated):
            shift = high + 1 - used
            others = rng.integers(0, 1 << allocated, len(values)) & ~(((1 << used) - 1) << shift)
            raw = ((values & ((1 << used) - 1)) << shift) | others
            samples = raw.astype(f"<u{allocated // 8}")
            found = stored_values(samples, Bits(allocated, used, high, signed))
            assert found.dtype == f"{'i' if signed else 'u'}{allocated // 8}"
            assert found.tolist() == values.tolist(), (used, high)


TWELVE = np.array([[-2048, -900], [0, 2047]], np.int16)
JUNK = np.array([[0x5, 0xA], [0xF, 0x8]], np.uint16) << 12


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("shift", [0, 4])
def test_signed_twelve_bits_of_sixteen_uncompressed(
    tmp_path: Path, syntax: str, frames: int, shift: int
) -> None:
    raw = ((TWELVE.astype(np.int32) & 0xFFF) << shift).astype(np.uint16) | (JUNK >> (12 if shift else 0))
    whole = np.stack([raw] * frames) if frames > 1 else raw
    data = dicom(whole, syntax=syntax, BitsStored=12, HighBit=11 + shift, PixelRepresentation=1)
    if syntax == ExplicitVRBigEndian:
        data.PixelData = whole.astype(">u2").tobytes()
        data["PixelData"].VR = "OW"
    write(data, tmp_path / "a.dcm")
    found = reader.stored_pixels(reader.open_file(tmp_path / "a.dcm", 10**8, pixels=True))
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found.reshape(-1, 2, 2), [TWELVE] * frames)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("codec", ["rle", "jpegls", "jpeg2000", "lossless jpeg"])
def test_twelve_bits_of_sixteen_compressed(tmp_path: Path, codec: str, signed: bool) -> None:
    """Encoders are given the bits as a scanner would: 12 of them, or 16 with others above."""
    values = np.random.default_rng(0).integers(-2048, 2048, (16, 24)).astype(np.int16)
    values = values if signed else (values + 2048).astype(np.int16)
    bits = values.astype(np.uint16) & 0xFFF
    junk = (np.arange(values.size).reshape(values.shape) % 16).astype(np.uint16) << 12
    for raw in (bits, bits | junk):
        tags = {"BitsStored": 12, "HighBit": 11, "PixelRepresentation": int(signed)}
        if codec == "rle":
            data = dicom(raw)
            data.compress(RLELossless, encoding_plugin="pydicom")
            for name, value in tags.items():
                setattr(data, name, value)
        elif codec == "jpegls":
            data = encoded(raw, JPEGLSLossless, imagecodecs.jpegls_encode(raw), **tags)
        elif codec == "jpeg2000":
            stream = imagecodecs.jpeg2k_encode(raw, level=0, codecformat="j2k", reversible=True)
            data = encoded(raw, JPEG2000Lossless, stream, **tags)
        else:
            stream = imagecodecs.jpeg8_encode(raw, lossless=True, bitspersample=16)
            data = encoded(raw, LOSSLESS, stream, **tags)
        found = stored(data, tmp_path)
        assert found.dtype == (np.int16 if signed else np.uint16)
        np.testing.assert_array_equal(found, values)


def test_overlays_in_unused_bits_are_no_pixels_of_a_palette_or_a_volume(tmp_path: Path) -> None:
    index = (np.arange(64).reshape(8, 8) % 4).astype(np.uint8)
    data = dicom(index | 0x80, PhotometricInterpretation="PALETTE COLOR", BitsStored=2, HighBit=1)
    paint(data, [0, 255, 0, 7], [0, 0, 255, 8], [9, 0, 0, 255])
    folder = hospital(tmp_path / "p", "dicom", image={"size": [8, 8], "channels": 3})
    save(data, folder / "solid" / "a.dcm")
    image = ingest(tmp_path / "p")[1].images[0]
    assert image[:, 0, :4].T.tolist() == [[0, 0, 9], [255, 0, 0], [0, 255, 0], [7, 8, 255]]

    volume = (np.arange(4 * 64).reshape(4, 8, 8) * 7 % 251).astype(np.uint16)
    wanted = {"size": [4, 8, 8], "channels": 1, "window": {"center": 125, "width": 250}}
    folder = hospital(tmp_path / "v", "dicom", image=wanted)
    series(folder / "solid" / "s", volume | 0x4000, BitsStored=12, HighBit=11)
    np.testing.assert_allclose(ingest(tmp_path / "v")[1].images[0, 0], volume / 250, atol=1e-6)


@pytest.mark.parametrize(("used", "allocated"), [(0, 16), (17, 16), (9, 8)])
def test_bits_that_cannot_be_are_refused(tmp_path: Path, used: int, allocated: int) -> None:
    pixels = noise(0, 8, 8).astype(f"u{allocated // 8}")
    assert verdict(save(dicom(pixels, BitsStored=used), tmp_path / "a.dcm")) == "header-unreadable"


@pytest.mark.parametrize("sign", [None, 2])
def test_pixels_of_unknown_sign_are_refused(tmp_path: Path, sign: int | None) -> None:
    data = dicom(noise(0, 8, 8).astype(np.uint16), PixelRepresentation=sign)
    assert verdict(save(data, tmp_path / "a.dcm")) == "header-unreadable"


def test_a_high_bit_that_cannot_be_is_the_usual_one(tmp_path: Path) -> None:
    pixels = noise(0, 8, 8).astype(np.uint16)
    for high in (3, 16, 200):
        np.testing.assert_array_equal(stored(dicom(pixels, BitsStored=12, HighBit=high), tmp_path), pixels)


# --- colour -----------------------------------------------------------------------------------------


def bare(stream: bytes, marker: bytes = b"", ids: bytes = b"") -> bytes:
    """A JPEG without its APP markers, with one of our own and other component ids."""
    at, kept = 2, [b"\xff\xd8", marker]
    while stream[at + 1] != 0xDA:
        length = int.from_bytes(stream[at + 2 : at + 4], "big")
        segment = bytearray(stream[at : at + 2 + length])
        if segment[1] in (0xC0, 0xC1, 0xC3):
            segment[10:19:3] = ids or segment[10:19:3]
        if not 0xE0 <= segment[1] <= 0xEF:
            kept.append(bytes(segment))
        at += 2 + length
    scan = bytearray(stream[at:])
    scan[5:11:2] = ids or scan[5:11:2]
    return b"".join(kept) + bytes(scan)


def adobe(transform: int) -> bytes:
    return b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])


def jpeg(*, ybr: bool) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(RGB).save(stream, "JPEG", quality=98, subsampling=0, keep_rgb=not ybr)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("ybr", "marker", "ids", "photometric"),
    [
        # as the standard wants it: nothing in the stream, or nothing that contradicts the header
        (True, b"", b"\1\2\3", "YBR_FULL_422"),
        (True, b"", b"\1\2\3", "YBR_FULL"),
        (True, b"", b"\0\1\2", "YBR_FULL_422"),
        (True, JFIF, b"\1\2\3", "YBR_FULL_422"),
        (True, adobe(1), b"\1\2\3", "YBR_FULL_422"),
        (False, b"", b"RGB", "RGB"),
        (False, b"", b"\1\2\3", "RGB"),
        (False, adobe(0), b"RGB", "RGB"),
        (False, adobe(0), b"\1\2\3", "RGB"),
        # the stream says otherwise, and knows better
        (True, JFIF, b"\1\2\3", "RGB"),
        (True, adobe(1), b"\1\2\3", "RGB"),
        (True, adobe(1), b"RGB", "RGB"),
        (False, b"", b"RGB", "YBR_FULL_422"),
        (False, b"", b"rgb", "YBR_FULL"),
        (False, adobe(0), b"\1\2\3", "YBR_FULL_422"),
        (False, JFIF + adobe(0), b"\1\2\3", "YBR_FULL_422"),
        (True, b"", b"\1\2\3", "YBR_RCT"),
        (True, b"", b"\1\2\3", "YBR_ICT"),
    ],
)
@pytest.mark.parametrize("syntax", [BASELINE, EXTENDED])
def test_colour_of_jpeg_is_turned_once(
    tmp_path: Path, ybr: bool, marker: bytes, ids: bytes, photometric: str, syntax: str
) -> None:
    stream = bare(jpeg(ybr=ybr), marker, ids)
    found = stored(encoded(RGB, syntax, stream, PhotometricInterpretation=photometric), tmp_path)
    assert np.abs(found.astype(int) - RGB).max() <= 4


def test_frames_of_different_colour_in_one_file(tmp_path: Path) -> None:
    frames = [bare(jpeg(ybr=True), adobe(1)), bare(jpeg(ybr=False), adobe(0))]
    data = encoded(RGB, BASELINE, *frames, PhotometricInterpretation="YBR_FULL_422", NumberOfFrames=2)
    assert np.abs(stored(data, tmp_path).astype(int) - [RGB, RGB]).max() <= 4


@pytest.mark.parametrize("marker", [b"", JFIF, adobe(0), adobe(1)])
@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_lossless_jpeg_is_as_its_header_says(tmp_path: Path, marker: bytes, photometric: str) -> None:
    samples = RGB if photometric == "RGB" else YBR
    stream = imagecodecs.jpeg8_encode(samples, lossless=True, colorspace="RGB", outcolorspace="RGB")
    data = encoded(RGB, LOSSLESS, bare(stream, marker), PhotometricInterpretation=photometric)
    assert np.abs(stored(data, tmp_path).astype(int) - RGB).max() <= 2


@pytest.mark.parametrize("codec", ["native", "planes", "rle", "jpegls", "jpeg2000"])
def test_ybr_of_other_codecs(tmp_path: Path, codec: str) -> None:
    tags = {"PhotometricInterpretation": "YBR_FULL"}
    if codec == "native":
        data = dicom(YBR, **tags)
    elif codec == "planes":
        data = dicom(YBR, PlanarConfiguration=1, **tags)
        data.PixelData = YBR.transpose(2, 0, 1).tobytes()
    elif codec == "rle":
        data = dicom(YBR, **tags)
        data.compress(RLELossless, encoding_plugin="pydicom")
    elif codec == "jpegls":
        data = encoded(YBR, JPEGLSLossless, imagecodecs.jpegls_encode(YBR), **tags)
    else:
        stream = imagecodecs.jpeg2k_encode(YBR, level=0, codecformat="j2k", reversible=True, mct=False)
        data = encoded(YBR, JPEG2000Lossless, stream, **tags)
    assert np.abs(stored(data, tmp_path).astype(int) - RGB).max() <= 2


@pytest.mark.parametrize("photometric", ["YBR_RCT", "YBR_FULL", "RGB"])
def test_the_component_transform_of_jpeg_2000_is_undone_once(tmp_path: Path, photometric: str) -> None:
    stream = imagecodecs.jpeg2k_encode(RGB, level=0, codecformat="j2k", reversible=True, mct=True)
    header = read_stream(stream)
    assert header is not None
    assert header.rgb
    data = encoded(RGB, JPEG2000Lossless, stream, PhotometricInterpretation=photometric)
    np.testing.assert_array_equal(stored(data, tmp_path), RGB)


def test_ybr_to_rgb_is_pydicoms_and_works_for_twelve_bits() -> None:
    ybr = noise(0, 16, 16, 3)
    expected = convert_color_space(ybr, "YBR_FULL", "RGB").astype(int)
    assert np.abs(to_rgb(ybr, 8).astype(int) - expected).max() <= 1
    wide = np.array([[1000, 2048, 2048], [1000, 2048, 2148]], np.uint16)
    assert to_rgb(wide, 12).tolist() == [[1000, 1000, 1000], [1140, 929, 1000]]


@pytest.mark.parametrize("used", [12, 16])
def test_sixteen_bit_colour_keeps_its_values(tmp_path: Path, used: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 1 << used, (8, 8, 3)).astype(np.uint16)
    wanted = {"size": [8, 8], "channels": 3}
    data = dicom(pixels, BitsStored=used, HighBit=used - 1)
    save(data, hospital(tmp_path, "dicom", image=wanted) / "solid" / "a.dcm")
    image = ingest(tmp_path)[1].images[0]
    np.testing.assert_allclose(image, pixels.transpose(2, 0, 1) / (2**used - 1), atol=1e-6)


def paint(data: FileDataset, *colours: list[int], first: int = 0, scale: int = 257) -> None:
    for name, values in zip(("Red", "Green", "Blue"), colours, strict=True):
        setattr(data, f"{name}PaletteColorLookupTableDescriptor", [len(values), first & 0xFFFF, 16])
        data[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
        words = (np.array(values) * scale).astype("<u2").tobytes()
        setattr(data, f"{name}PaletteColorLookupTableData", words)


def test_palettes_of_sixteen_bits_and_signed_indices(tmp_path: Path) -> None:
    index = (np.arange(64).reshape(8, 8) % 4 - 2).astype(np.int8)
    data = dicom(index, PhotometricInterpretation="PALETTE COLOR")
    paint(data, [0, 1000, 40_000, 65_535], [0, 1, 2, 3], [3, 2, 1, 0], first=-2, scale=1)
    wanted = {"size": [8, 8], "channels": 3}
    save(data, hospital(tmp_path, "dicom", image=wanted) / "solid" / "a.dcm")
    image = ingest(tmp_path)[1].images[0]
    np.testing.assert_allclose(image[0, 0, :4] * 65_535, [0, 1000, 40_000, 65_535], atol=0.1)
    np.testing.assert_allclose(image[2, 0, :4] * 65_535, [3, 2, 1, 0], atol=0.1)


# --- JPEG of twelve bits ----------------------------------------------------------------------------


def smooth(top: int) -> NDArray[np.uint16]:
    rows, columns = np.mgrid[:32, :48]
    return ((rows * 3 + columns * 5) * top // (31 * 3 + 47 * 5)).astype(np.uint16)


@pytest.mark.parametrize("frames", [1, 3])
def test_extended_jpeg_of_twelve_bits(tmp_path: Path, frames: int) -> None:
    pixels = smooth(4095)
    stream = imagecodecs.jpeg8_encode(pixels, level=100, bitspersample=12)
    tags = {"BitsStored": 12, "HighBit": 11, "NumberOfFrames": frames}
    found = stored(encoded(pixels, EXTENDED, *[stream] * frames, **tags), tmp_path)
    assert found.dtype == np.uint16
    assert np.abs(found.reshape(-1, 32, 48).astype(int) - [pixels] * frames).max() <= 3


def test_extended_jpeg_of_eight_bits_and_of_eight_in_sixteen(tmp_path: Path) -> None:
    pixels = smooth(255).astype(np.uint8)
    stream = imagecodecs.jpeg8_encode(pixels, level=100)
    assert np.abs(stored(encoded(pixels, EXTENDED, stream), tmp_path).astype(int) - pixels).max() <= 2
    wide = encoded(pixels.astype(np.uint16), EXTENDED, stream, BitsStored=8, HighBit=7)
    found = stored(wide, tmp_path)
    assert found.dtype == np.uint16
    assert np.abs(found.astype(int) - pixels).max() <= 2


def test_what_lossy_compression_puts_above_the_bits_stored_is_white_not_black(tmp_path: Path) -> None:
    pixels = np.where(np.arange(32)[:, None] % 8 < 4, 1023, 0) * np.ones((32, 48), int)
    stream = imagecodecs.jpeg8_encode(pixels.astype(np.uint16), level=50, bitspersample=12)
    assert imagecodecs.jpeg8_decode(stream).max() > 1023
    data = encoded(pixels.astype(np.uint16), EXTENDED, stream, BitsStored=10, HighBit=9)
    found = stored(data, tmp_path).astype(int)
    assert found.max() == 1023
    assert np.abs(found - pixels).max() < 200


# --- what a header says of pixels -------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("vr", ["US", "SS"])
@pytest.mark.parametrize("signed", [False, True])
def test_sixteen_bits_are_read_by_the_pixel_representation(
    tmp_path: Path, syntax: str, vr: str, signed: bool
) -> None:
    data = dicom(np.zeros((2, 2), np.int16 if signed else np.uint16), syntax=syntax)
    data.add_new("PixelPaddingValue", vr, 63_536 if vr == "US" else -2000)
    data.add_new("SmallestImagePixelValue", vr, 7)
    write(data, tmp_path / "a.dcm")
    read = reader.open_file(tmp_path / "a.dcm", 10**6, pixels=False)
    assert sixteen_bits(read, "PixelPaddingValue", signed=signed) == (-2000 if signed else 63_536,)
    assert sixteen_bits(read, "SmallestImagePixelValue", signed=signed) == (7,)
    assert sixteen_bits(read, "LargestImagePixelValue", signed=signed) == ()
    # once pydicom has looked at it, too
    assert read.PixelPaddingValue in (-2000, 63_536)
    assert sixteen_bits(read, "PixelPaddingValue", signed=signed) == (-2000 if signed else 63_536,)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("vr", ["US", "SS"])
def test_padding_is_left_out_whatever_its_representation(tmp_path: Path, syntax: str, vr: str) -> None:
    pixels = np.tile(np.arange(8, dtype=np.int16) * 100, (8, 1))
    pixels[0] = -2000
    data = dicom(pixels, syntax=syntax)
    data.add_new("PixelPaddingValue", vr, 63_536 if vr == "US" else -2000)
    save(data, hospital(tmp_path, "dicom") / "solid" / "a.dcm")
    image = ingest(tmp_path)[1].images[0]
    np.testing.assert_allclose(image[0, 0], 0.0)
    np.testing.assert_allclose(image[0, 4], np.arange(8) / 7, atol=1e-6)


def table(first: int, entries: list[int], vr: str) -> Dataset:
    held = Dataset()
    held.add_new("LUTDescriptor", vr, [len(entries), first, 16])
    held.add_new("LUTData", "US", entries)
    return held


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("name", ["ModalityLUTSequence", "VOILUTSequence"])
def test_tables_begin_at_a_signed_value(tmp_path: Path, syntax: str, name: str) -> None:
    pixels = (np.arange(64).reshape(8, 8) - 32).astype(np.int16)
    data = dicom(pixels, syntax=syntax)
    setattr(data, name, Items([table(-32 & 0xFFFF, [i * 1000 for i in range(64)], "US")]))
    image = {"size": [8, 8], "channels": 1}
    if name == "ModalityLUTSequence":
        data.WindowCenter, data.WindowWidth = 31_500.5, 63_001
    save(data, hospital(tmp_path, "dicom", image=image) / "solid" / "a.dcm")
    top = 63_000 if name == "ModalityLUTSequence" else 65_535
    found = ingest(tmp_path)[1].images[0, 0].reshape(-1)
    np.testing.assert_allclose(found, np.arange(64) * 1000 / top, atol=1e-5)


def test_a_display_table_after_rescaling_to_negative_units(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8)
    data = dicom(pixels, RescaleSlope=1, RescaleIntercept=-32)
    data.VOILUTSequence = Items([table(-32 & 0xFFFF, [i * 1000 for i in range(64)], "US")])
    save(data, hospital(tmp_path, "dicom") / "solid" / "a.dcm")
    found = ingest(tmp_path)[1].images[0, 0].reshape(-1)
    np.testing.assert_allclose(found, np.arange(64) * 1000 / 65_535, atol=1e-5)


def raw_window(data: Dataset, centre: str, width: str) -> None:
    for tag, text in ((0x00281050, centre), (0x00281051, width)):
        value = text.encode() + b" " * (len(text) % 2)
        data[tag] = RawDataElement(Tag(tag), "DS", len(value), value, 0, False, True)


UNSOUND = [
    ("nan", "400"),
    ("-inf", "400"),
    ("40", "inf"),
    ("40", "nan"),
    ("40", "0"),
    ("40", "0.5"),
    ("40", "-400"),
    ("1e308", "1e309"),
    ("", ""),
]
OTHERS = ("LINEAR_EXACT", "SIGMOID")
"""Display functions whose width may be anything above 0."""


@pytest.mark.parametrize(
    ("centre", "width", "function"),
    [
        *((*window, "LINEAR") for window in UNSOUND),
        *((*window, function) for window in UNSOUND if window[1] != "0.5" for function in OTHERS),
    ],
)
def test_a_window_that_makes_no_sense_counts_as_absent(
    tmp_path: Path, centre: str, width: str, function: str
) -> None:
    pixels = (np.arange(64).reshape(8, 8) * 50).astype(np.uint16)
    plain, odd = dicom(pixels), dicom(pixels, VOILUTFunction=function)
    raw_window(odd, centre, width)
    np.testing.assert_array_equal(shown(plain, tmp_path), shown(odd, tmp_path))


@pytest.mark.parametrize(("centre", "width"), UNSOUND)
def test_such_a_window_of_a_frame_counts_as_absent(tmp_path: Path, centre: str, width: str) -> None:
    volume = (np.arange(4 * 64).reshape(4, 8, 8) * 7 % 251).astype(np.uint16)
    data = dicom(volume, PixelSpacing=None, SeriesInstanceUID=uid("enhanced"))
    shared, measures, turn, window = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, turn.ImageOrientationPatient = [1, 1], [1, 0, 0, 0, 1, 0]
    raw_window(window, centre, width)
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Items([measures]), Items([turn])
    shared.FrameVOILUTSequence = Items([window])
    data.SharedFunctionalGroupsSequence = Items([shared])
    frames = []
    for k in range(4):
        place, frame = Dataset(), Dataset()
        place.ImagePositionPatient = [0, 0, 2.0 * k]
        frame.PlanePositionSequence = Items([place])
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = Items(frames)
    save(data, hospital(tmp_path, "dicom", image={"size": [4, 8, 8], "channels": 1}) / "solid" / "a.dcm")
    image = ingest(tmp_path)[1].images[0]
    assert image.min() == 0
    assert image.max() == 1


def test_the_first_window_that_is_sound_is_taken(tmp_path: Path) -> None:
    pixels = (np.arange(64).reshape(8, 8) * 10).astype(np.uint16)
    data = dicom(pixels)
    raw_window(data, "nan\\315.5", "400\\631")
    np.testing.assert_allclose(shown(data, tmp_path), pixels / 630, atol=1e-6)


def test_a_sigmoid_is_shown_between_black_and_white(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8)
    data = dicom(pixels, WindowCenter=32, WindowWidth=16, VOILUTFunction="SIGMOID")
    np.testing.assert_allclose(shown(data, tmp_path), 1 / (1 + np.exp(-(pixels - 32.0) / 4)), atol=1e-6)


def test_an_empty_slice_with_slope_0_is_taken(tmp_path: Path) -> None:
    volume = (np.arange(4 * 64).reshape(4, 8, 8) * 7 % 251).astype(np.uint16)
    volume[1] = 0
    wanted = {"size": [4, 8, 8], "channels": 1, "window": {"center": 250, "width": 500}}
    paths = series(hospital(tmp_path, "dicom", image=wanted) / "solid" / "s", volume)
    for k, path in enumerate(paths):
        data = dcmread(path)
        data.RescaleSlope, data.RescaleIntercept = (0 if k == 1 else 2), 0
        data.save_as(path)
    np.testing.assert_allclose(ingest(tmp_path)[1].images[0, 0], volume * 2 / 500, atol=1e-6)


@pytest.mark.parametrize(
    ("slope", "intercept"), [("0", "5"), ("nan", "0"), ("inf", "0"), ("1", "-inf"), ("1e-320", "0")]
)
def test_a_slope_that_makes_no_sense_is_refused(tmp_path: Path, slope: str, intercept: str) -> None:
    data = dicom(noise(0, 8, 8))
    for tag, text in ((0x00281053, slope), (0x00281052, intercept)):
        value = text.encode() + b" " * (len(text) % 2)
        data[tag] = RawDataElement(Tag(tag), "DS", len(value), value, 0, False, True)
    folder = hospital(tmp_path, "dicom")
    save(data, folder / "solid" / "a.dcm")
    save(dicom(noise(1, 8, 8)), folder / "solid" / "b.dcm")
    assert ingest(tmp_path)[0].rejected == {"header-unreadable": 1}


# --- limits -----------------------------------------------------------------------------------------


def deflated(path: Path, more: bytes, place: str) -> Path:
    """A deflated file with more bytes before or after its data set."""
    save(dicom(noise(0, 8, 8), syntax=DeflatedExplicitVRLittleEndian), path)
    blob = path.read_bytes()
    start = 132 + 12 + int.from_bytes(blob[140:144], "little")
    machine = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    held = zlib.decompress(blob[start:], -zlib.MAX_WBITS)
    both = more + held if place == "before" else held + more
    path.write_bytes(blob[:start] + machine.compress(both) + machine.flush())
    return path


@pytest.mark.parametrize(
    ("place", "piece"),
    [
        ("before", b"\0" * 8),
        ("after", b"\0" * 8),
        ("before", b"\x08\0\x08\0UN\0\0\xff\xff\xff\xff" + b"\xfe\xff\0\xe0\0\0\0\0" * 16),
    ],
)
def test_deflated_data_sets_are_refused_before_they_are_inflated(
    tmp_path: Path, place: str, piece: bytes
) -> None:
    path = deflated(tmp_path / "a.dcm", piece * (50_000_000 // len(piece)), place)
    assert path.stat().st_size < 300_000
    started = time.process_time()
    with pytest.raises(FileRejected) as caught:
        reader.open_file(path, 10**9, pixels=True)
    assert caught.value.code == "too-large"
    assert time.process_time() - started < 10  # 43 s before


def test_sound_deflated_files_are_read(tmp_path: Path) -> None:
    black = np.zeros((2000, 2000), np.uint16)
    black[1000] = 1  # 8 MB in 8 kB
    data = dicom(black, syntax=DeflatedExplicitVRLittleEndian)
    np.testing.assert_array_equal(stored(data, tmp_path), black)
    assert (tmp_path / "a.dcm").stat().st_size < 20_000


def huge(stream: bytes) -> dict[str, bytes]:
    """JPEG 2000 streams that declare 65,535 x 65,535 pixels, or components without end."""
    at = stream.index(b"\xff\x4f\xff\x51")
    size = stream[: at + 8] + (65_535).to_bytes(4, "big") * 2 + stream[at + 16 :]
    return {"size": size, "components": stream[: at + 40] + b"\x40\x00" + stream[at + 42 :]}


def streams_that_declare_too_much() -> dict[str, tuple[str, bytes]]:
    pixels = noise(0, 8, 8)
    grey = imagecodecs.jpeg8_encode(pixels)
    at = grey.index(b"\xff\xc0")
    large = grey[: at + 5] + b"\xff\xff\xff\xff" + grey[at + 9 :]
    found = {
        "jpeg": (BASELINE, large),
        "jpeg after junk": (BASELINE, large[:at] + b"junk" + large[at:]),
        "jpeg twice": (BASELINE, grey[:at] + grey[at : at + 13] + large[at:]),
        "jpeg without a scan": (BASELINE, grey[: at + 13]),
        "no stream at all": (BASELINE, bytes(100)),
        "rle": (
            RLELossless,
            np.array([1, 64, *[0] * 14], "<u4").tobytes() + b"\x81\0" * 1_000_000,
        ),
        "rle segments": (RLELossless, np.array([15, *[64] * 15], "<u4").tobytes() + b"\x81\0" * 10),
    }
    for kind in ("j2k", "jp2"):
        stream = imagecodecs.jpeg2k_encode(pixels, level=0, codecformat=kind, reversible=True)
        for name, changed in huge(stream).items():
            found[f"{kind} {name}"] = (JPEG2000Lossless, changed)
    return found


DECLARED = streams_that_declare_too_much()


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_streams_that_declare_other_pixels_are_refused_unread(tmp_path: Path, name: str) -> None:
    import tracemalloc

    syntax, stream = DECLARED[name]
    path = save(encoded(noise(0, 8, 8), syntax, stream), tmp_path / "a.dcm")
    tracemalloc.start()
    assert verdict(path) == "pixels-undecodable"
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("missing", [1, 20, 300])
def test_a_jpeg_that_is_cut_is_refused(tmp_path: Path, missing: int) -> None:
    stream = imagecodecs.jpeg8_encode(noise(0, 32, 32))
    data = encoded(noise(0, 32, 32), BASELINE, stream[:-missing])
    assert verdict(save(data, tmp_path / "a.dcm")) == "pixels-undecodable"


@pytest.mark.parametrize("shape", [(5, 7), (6, 8), (5, 7, 3)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_rle_of_every_width(tmp_path: Path, shape: tuple[int, ...], kind: type) -> None:
    info = np.iinfo(kind)
    pixels = np.random.default_rng(0).integers(0, info.max, shape, dtype=kind)
    pixels[2:4] = 7  # runs
    data = dicom(pixels)
    data.compress(RLELossless, encoding_plugin="pydicom")
    np.testing.assert_array_equal(stored(data, tmp_path), pixels)
