"""The gate against damaged and malicious bytes: every input ends accepted or as one typed rejection."""

from __future__ import annotations

import io
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import nibabel
import numpy as np
import PIL.Image
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from qkt_clinical.config.site import ImageSpec
from qkt_clinical.errors import FileRejected
from qkt_clinical.ingest import check_file, reasons
from qkt_clinical.ingest.codes import quiet
from qkt_clinical.ingest.decode import decoded
from qkt_clinical.ingest.source import Refusal, Request, SourceFile
from qkt_clinical.ingest.store import ScratchStore
from tests.ingest_files import dicom as data_set
from tests.ingest_files import noise

KNOWN = {None, *reasons}
LIMIT_MB = 8
ROOM = 1_500_000_000
"""Bytes of address space beyond those in use that a test may take: far more than the gate may decode."""
SECONDS = 10
"""Of the processor, for one file."""
GREY, DEEP, COLOUR = noise(1, 24, 24), noise(2, 24, 24).astype(np.uint16) * 200, noise(3, 24, 24, 3)
TWELVE = DEEP & 0xFFF
PLACE = {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}


def saved(data: FileDataset) -> bytes:
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def compressed(pixels: np.ndarray, syntax: str) -> bytes:
    data = data_set(pixels, **PLACE)
    data.compress(syntax, generate_instance_uid=False)
    return saved(data)


def jpeg_dicom(pixels: np.ndarray, syntax: str, stream: bytes, **tags: Any) -> bytes:
    data = data_set(pixels, syntax=syntax, **tags)
    data.PixelData = encapsulate([stream])
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = True
    return saved(data)


def picture(kind: str, pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, metadata=None, **options)
    return stream.getvalue()


def paletted() -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(COLOUR).quantize(16).save(stream, "PNG", transparency=3)
    return stream.getvalue()


def volume(kind: type[nibabel.Nifti1Image]) -> bytes:
    return bytes(kind(noise(4, 6, 7, 8).astype(np.int16), np.diag([-1.0, 1.0, 2.0, 1.0])).to_bytes())


def archive(save: Callable[..., None]) -> bytes:
    stream = io.BytesIO()
    save(
        stream,
        **{f"{p}_images": noise(5, 3, 12, 12) for p in ("train", "val")},
        **{f"{p}_labels": np.array([[0], [1], [2]]) for p in ("train", "val")},
        train_groups=np.array(["a", "b", "c"]),
    )
    return stream.getvalue()


def gzipped(data: bytes) -> bytes:
    machine = zlib.compressobj(6, zlib.DEFLATED, 31)
    return machine.compress(data) + machine.flush()


SAMPLES: dict[str, bytes] = {
    "grey.dcm": saved(data_set(GREY, **PLACE)),
    "deep.dcm": saved(
        data_set(DEEP, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    ),
    "colour.dcm": saved(data_set(COLOUR)),
    "frames.dcm": saved(data_set(noise(6, 3, 24, 24))),
    "deflated.dcm": saved(data_set(GREY, syntax=DeflatedExplicitVRLittleEndian)),
    "rle.dcm": compressed(DEEP, RLELossless),
    "jpeg2000.dcm": compressed(noise(7, 64, 64), JPEG2000Lossless),
    "jpegls.dcm": compressed(GREY, JPEGLSLossless),
    "jpeg.dcm": jpeg_dicom(GREY, JPEGBaseline8Bit, picture("JPEG", GREY)),
    "colour-jpeg.dcm": jpeg_dicom(
        COLOUR, JPEGBaseline8Bit, picture("JPEG", COLOUR), PhotometricInterpretation="YBR_FULL_422"
    ),
    "extended.dcm": jpeg_dicom(
        DEEP & 0xFFF,
        JPEGExtended12Bit,
        imagecodecs.jpeg8_encode(DEEP & 0xFFF, bitspersample=12),
        BitsStored=12,
    ),
    "lossless.dcm": jpeg_dicom(DEEP, JPEGLosslessSV1, imagecodecs.jpeg8_encode(DEEP, lossless=True)),
    "one.nii": volume(nibabel.Nifti1Image),
    "two.nii": volume(nibabel.Nifti2Image),
    "one.nii.gz": gzipped(volume(nibabel.Nifti1Image)),
    "grey.png": picture("PNG", GREY),
    "deep.png": picture("PNG", DEEP),
    "colour.png": picture("PNG", COLOUR),
    "palette.png": paletted(),
    "colour.jpg": picture("JPEG", COLOUR),
    "grey.tif": picture("TIFF", GREY),
    "deep.tif": tiff(DEEP, photometric="miniswhite", rowsperstrip=5),
    "colour.tif": tiff(COLOUR.astype(np.uint16) * 9, photometric="rgb", compression="lzw", predictor=True),
    "tiles.tif": tiff(noise(8, 40, 40, 3), photometric="rgb", compression="jpeg", tile=(16, 16)),
    "pages.tif": tiff(noise(9, 3, 24, 24), photometric="minisblack", compression="deflate"),
    "stored.npz": archive(np.savez),
    "deflated.npz": archive(np.savez_compressed),
}
KINDS = {"dcm": "dicom", "nii": "nifti", "gz": "nifti", "npz": "npz"}
EXTREME = (
    b"\xff",
    b"\x00",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x00",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
)


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    """A sound file's name and its bytes after one to six changes, more of them near the start."""
    name = draw(st.sampled_from(sorted(SAMPLES)))
    data = bytearray(SAMPLES[name])
    for _ in range(draw(st.integers(1, 6))):
        end = max(1, len(data) if draw(st.booleans()) else min(len(data), 700))
        at = draw(st.integers(0, end - 1))
        match draw(
            st.sampled_from(("byte", "bit", "extreme", "number", "cut", "drop", "repeat", "insert", "swap"))
        ):
            case "byte":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "bit":
                data[at : at + 1] = bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) if data else b""
            case "extreme":
                value = draw(st.sampled_from(EXTREME))
                data[at : at + len(value)] = value
            case "number":
                form = draw(st.sampled_from(("<H", ">H", "<I", ">I", "<f", "<d")))
                bits = draw(st.integers(0, 2 ** (8 * struct.calcsize(form)) - 1))
                data[at : at + struct.calcsize(form)] = bits.to_bytes(struct.calcsize(form), "little")
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + draw(st.integers(1, 64))]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))] * draw(st.integers(1, 8))
            case "insert":
                data[at:at] = draw(st.binary(max_size=32))
            case "swap":
                other = SAMPLES[draw(st.sampled_from(sorted(SAMPLES)))]
                data[at : at + 64] = other[at : at + 64]
        if not data:
            break
    return name, bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the file under test, and a bound on memory while the module runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    yield tmp_path_factory.mktemp("fuzz")
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def rejection(act: Callable[[], object]) -> str | None:
    """Code of the typed rejection that an act ends in; None where it ends well."""
    try:
        act()
    except FileRejected as rejected:
        return rejected.code
    return None


def judge(path: Path) -> None:
    """Show a file to both doors of the gate; anything but an image or a typed rejection escapes."""
    assert rejection(lambda: check_file(path, max_file_mb=LIMIT_MB)) in KNOWN
    kind = KINDS.get(path.name.rsplit(".", 1)[-1], "images")
    files = [SourceFile(path.name, str(path))]
    for size in ((8, 8), (8, 8, 8)):
        spec = ImageSpec(size=size, channels=1)
        request = Request(spec, ("PatientID",), LIMIT_MB * 1_000_000, "alder", 0, b"s" * 32, True)
        with ScratchStore(path.with_suffix(".sqlite"), site="alder", salt=request.salt, recipe=None) as store:
            results = decoded(kind, files, request, store, workers=1, step=lambda *_: None)
            found = [result for _, result in results]
        for result in found:
            if isinstance(result, Refusal):
                assert result.code in reasons
            else:
                assert result.image.shape == (1, *spec.size)
                assert np.isfinite(result.image).all()


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_the_sound_files_are_accepted(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(SAMPLES[name])
    assert check_file(path, max_file_mb=LIMIT_MB) is not None
    judge(path)


def fuzz(folder: Path, file: tuple[str, bytes]) -> None:
    name, data = file
    path = folder / name
    path.write_bytes(data)
    start = time.process_time()
    with quiet():
        judge(path)
    assert time.process_time() - start < SECONDS


LASTING = settings(suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.slow
@settings(LASTING, max_examples=500)
@given(file=mutated())
def test_mutated_files(folder: Path, file: tuple[str, bytes]) -> None:
    fuzz(folder, file)


@pytest.mark.nightly
@settings(LASTING, max_examples=20_000)
@given(file=mutated())
def test_mutated_files_at_length(folder: Path, file: tuple[str, bytes]) -> None:
    fuzz(folder, file)
