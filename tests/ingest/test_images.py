"""PNG, JPEG and TIFF as their standards have them, where Pillow alone would give something else."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from qkt_clinical.config.site import ImageSpec
from qkt_clinical.errors import FileRejected
from qkt_clinical.ingest import check_file
from qkt_clinical.ingest.arrays import Picture
from qkt_clinical.ingest.readers.images import ImageReader
from qkt_clinical.ingest.readers.raster import upright
from qkt_clinical.ingest.source import DecodedImage, Request, SourceFile, Unit
from tests.ingest_files import noise, verdict

GREY, DEEP = noise(1, 6, 8), np.arange(48, dtype=np.uint16).reshape(6, 8) * 1300
RGB, DEEP_RGB = noise(2, 6, 8, 3), noise(3, 6, 8, 3).astype(np.uint16) * 16


def read(path: Path, *size: int) -> Picture:
    request = Request(ImageSpec(size=size or (8, 8), channels=1), (), 10**7, "alder", 0, b"s" * 32, False)
    (found,) = ImageReader().read(Unit((SourceFile(path.name, str(path)),)), request)
    assert isinstance(found, DecodedImage)
    return found.picture


def tiff(path: Path, pixels: NDArray[Any], **options: Any) -> Picture:
    tifffile.imwrite(path, pixels, metadata=None, **options)
    return read(path)


@pytest.mark.parametrize("name", ["uint8", "uint16", "int16", "uint32", "float32", "float64"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white", [False, True])
def test_greys_of_a_tiff_keep_their_values_and_say_their_polarity(
    tmp_path: Path, name: str, order: str, white: bool
) -> None:
    pixels = (DEEP % 250).astype(name)
    kind = "miniswhite" if white else "minisblack"
    picture = tiff(tmp_path / "a.tif", pixels, photometric=kind, byteorder=order)
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert (picture.inverted, picture.colour, picture.eight_bit) == (white, False, name == "uint8")


@pytest.mark.parametrize("white", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 12])
def test_greys_of_other_depths(tmp_path: Path, bits: int, white: bool) -> None:
    """Fewer than 8 bits fill the range of 8, more keep their values."""
    stored = (np.arange(48).reshape(6, 8) % 2**bits).astype(np.uint16)
    packed = "".join(f"{value:0{bits}b}" for row in stored for value in row)
    strip = int(packed, 2).to_bytes(len(packed) // 8, "big")
    tags = {
        256: 8,
        257: 6,
        258: bits,
        259: 1,
        262: 0 if white else 1,
        273: 0,
        277: 1,
        278: 6,
        279: len(strip),
    }
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    (tmp_path / "a.tif").write_bytes(head + body + struct.pack("<I", 0) + strip)
    picture = read(tmp_path / "a.tif")
    expected = stored if bits > 8 else stored * 255 // (2**bits - 1)
    np.testing.assert_array_equal(picture.pixels, expected)
    assert picture.inverted == white


@pytest.mark.parametrize("pixels", [RGB, DEEP_RGB], ids=["8", "16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"planarconfig": "separate"},
        {"tile": (16, 16)},
        {"rowsperstrip": 2},
        {"compression": "lzw", "predictor": True},
        {"compression": "deflate"},
        {"compression": "packbits"},
        {"compression": "zstd"},
        {"compression": "lzma"},
        {"bigtiff": True},
    ],
    ids=str,
)
def test_colours_of_a_tiff_in_every_layout(
    tmp_path: Path, pixels: NDArray[Any], options: dict[str, Any]
) -> None:
    stored = np.moveaxis(pixels, -1, 0) if "planarconfig" in options else pixels
    picture = tiff(tmp_path / "a.tif", stored, photometric="rgb", **options)
    assert picture.colour
    assert picture.pixels.dtype == pixels.dtype
    np.testing.assert_array_equal(picture.pixels, pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["tif", "png", "jpg"])
def test_every_orientation_in_every_format(tmp_path: Path, orientation: int, kind: str) -> None:
    """Against where the standard says that the first row and column are to be seen."""
    edges = {1: "TL", 2: "TR", 3: "BR", 4: "BL", 5: "LT", 6: "RT", 7: "RB", 8: "LB"}[orientation]
    seen = noise(4, 6, 8) if kind != "jpg" else np.kron(noise(4, 2, 3), np.ones((8, 8), np.uint8))
    stored = seen.T if edges[0] in "LR" else seen  # rows are columns
    stored = stored[::-1] if edges[0] in "BR" else stored
    stored = np.ascontiguousarray(stored[:, ::-1] if edges[1] in "BR" else stored)
    np.testing.assert_array_equal(upright(stored, orientation), seen)
    path = tmp_path / f"a.{kind}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "tif":
        deep = stored.astype(np.uint16) * 200
        tifffile.imwrite(path, deep, metadata=None, extratags=[(274, "H", 1, orientation, True)])
        np.testing.assert_array_equal(read(path).pixels, seen.astype(np.uint16) * 200)
    else:
        Image.fromarray(stored).save(path, exif=exif, quality=100)
        np.testing.assert_allclose(read(path).pixels, seen, atol=0 if kind == "png" else 3)


def test_opacity_palette_and_inks_of_a_tiff(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    alpha = np.full((6, 8, 1), 65535, np.uint16)
    alpha[0] = 0
    laid = DEEP_RGB.copy()
    laid[0] = 0
    for extra, expected in (("unassalpha", laid), ("assocalpha", DEEP_RGB), ("unspecified", DEEP_RGB)):
        held = np.concatenate([DEEP_RGB, alpha], axis=-1)
        picture = tiff(path, held, photometric="rgb", extrasamples=[extra])
        np.testing.assert_array_equal(picture.pixels, expected)
    index = (np.arange(48) % 3).reshape(6, 8).astype(np.uint8)
    colours = np.zeros((3, 256), np.uint16)
    colours[:, :3] = np.array([[10, 40, 70], [20, 50, 80], [30, 60, 90]]) * 257
    for scale in (1, 257):  # 16 bits, as the standard has it, and 8 in the low byte
        picture = tiff(path, index, photometric="palette", colormap=colours // scale)
        np.testing.assert_array_equal(picture.pixels, (colours[:, :3] // 257).T[index])
    inks = np.zeros((6, 8, 4), np.uint16)
    inks[..., 1:3] = 65535
    np.testing.assert_array_equal(tiff(path, inks, photometric="separated").pixels[0, 0], [65535, 0, 0])


def test_jpeg_inside_a_tiff(tmp_path: Path) -> None:
    smooth = np.kron(noise(5, 2, 2, 3), np.ones((16, 16, 1), np.uint8))
    Image.fromarray(smooth).save(tmp_path / "a.tif", compression="jpeg", quality=95)  # as RGB
    assert float(np.abs(read(tmp_path / "a.tif").pixels.astype(int) - smooth).mean()) < 3
    picture = tiff(tmp_path / "a.tif", smooth, photometric="rgb", compression="jpeg")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.pages.first.photometric == 6  # as YCbCr
    assert float(np.abs(picture.pixels.astype(int) - smooth).mean()) < 3


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    body = b"".join(more) + chunk(b"IDAT", zlib.compress(b"\0" + rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body


PNGS = {
    "rgb 16": (png(1, 16, 2, bytes([0, 1, 1, 0, 255, 255])), [[1, 256, 65535]]),
    "grey 16 with gamma": (png(2, 16, 0, bytes([0, 9, 9, 0]), chunk(b"gAMA", b"\0\0\xb1\x8f")), [9, 2304]),
    "grey and opacity 16": (png(2, 16, 4, bytes([4, 0, 255, 255, 4, 0, 0, 0])), [1024, 0]),
    "rgba 16": (png(1, 16, 6, bytes([1, 0, 2, 0, 3, 0, 255, 255])), [[256, 512, 768]]),
    "1 bit": (png(3, 1, 0, bytes([0b01000000])), [0, 255, 0]),
    "2 bits": (png(4, 2, 0, bytes([0b00011011])), [0, 85, 170, 255]),
    "4 bits": (png(2, 4, 0, bytes([0x3F])), [51, 255]),
    "4 bits, one see-through": (png(2, 4, 0, bytes([0x3F]), chunk(b"tRNS", b"\0\x0f")), [51, 0]),
    "16 bits, one see-through": (png(2, 16, 0, bytes([1, 0, 2, 0]), chunk(b"tRNS", b"\2\0")), [256, 0]),
    "palette of 2 bits": (
        png(2, 2, 3, bytes([0b00010000]), chunk(b"PLTE", bytes([1, 2, 3, 4, 5, 6])), chunk(b"tRNS", b"\0")),
        [[0, 0, 0], [4, 5, 6]],
    ),
}


@pytest.mark.parametrize("name", PNGS)
def test_samples_of_a_png(tmp_path: Path, name: str) -> None:
    data, expected = PNGS[name]
    (tmp_path / "a.png").write_bytes(data)
    assert read(tmp_path / "a.png").pixels[0].tolist() == expected


def test_inks_of_a_jpeg_are_stored_upside_down(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    np.testing.assert_allclose(read(tmp_path / "a.jpg").pixels[0, 0], [255, 0, 0], atol=3)


def mpo(path: Path) -> None:
    first = Image.fromarray(noise(6, 16, 16, 3))
    first.save(path, "MPO", save_all=True, append_images=[first.resize((8, 8)), first])


def test_a_cameras_jpeg_is_its_first_picture(tmp_path: Path) -> None:
    mpo(tmp_path / "a.jpg")
    assert read(tmp_path / "a.jpg").pixels.shape == (16, 16, 3)
    assert check_file(tmp_path / "a.jpg")[1].shape == (16, 16, 3)
    with pytest.raises(FileRejected) as caught:
        read(tmp_path / "a.jpg", 8, 8, 8)
    assert caught.value.code == "dimensions"


def animated(path: Path) -> None:
    frames = [Image.fromarray(noise(i, 8, 8)) for i in range(2)]
    frames[0].save(path, "PNG", save_all=True, append_images=frames[1:])


def pages(path: Path) -> None:
    tifffile.imwrite(path, noise(1, 2, 8, 8), photometric="minisblack", metadata=None)


def circle(path: Path) -> None:
    """A TIFF whose second page is its first."""
    data = bytearray(written(GREY))
    count = struct.unpack_from("<H", data, 8)[0]
    struct.pack_into("<I", data, 8 + 2 + 12 * count, 8)
    path.write_bytes(data)


def written(pixels: NDArray[Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, metadata=None, **options)
    return stream.getvalue()


def cut(path: Path) -> None:
    path.write_bytes(written(noise(7, 64, 64))[:-100])


def retagged(tag: int, value: int, **options: Any) -> bytes:
    data = bytearray(written(noise(8, 64, 64), **options))
    for at in range(10, 10 + 12 * struct.unpack_from("<H", data, 8)[0], 12):
        if struct.unpack_from("<H", data, at)[0] == tag:
            struct.pack_into("<HII", data, at + 2, 4, 1, value)
    return bytes(data)


def with_huge_jpeg(path: Path) -> None:
    """A tile whose own header declares 65,500 rows and columns."""
    data = written(noise(9, 64, 64), tile=(64, 64), compression="jpeg")
    at = data.index(b"\xff\xc0") + 5
    path.write_bytes(data[:at] + struct.pack(">HH", 65_500, 65_500) + data[at + 4 :])


REFUSED = {
    "apng": (animated, "multi-frame"),
    "pages": (pages, "multi-frame"),
    "circle of pages": (circle, "header-unreadable"),
    "cut short": (cut, "truncated"),
    "no strip": (lambda p: p.write_bytes(retagged(279, 0)), "pixels-undecodable"),
    "wide": (lambda p: p.write_bytes(retagged(256, 2**31)), "too-large"),
    "tile of the size of a town": (lambda p: p.write_bytes(retagged(322, 2**31, tile=(64, 64))), "too-large"),
    "unknown compression": (lambda p: p.write_bytes(retagged(259, 50_000 - 1)), "pixels-undecodable"),
    "of a camera's sensor": (lambda p: p.write_bytes(retagged(262, 32_803)), "colour-unknown"),
    "huge jpeg in a tile": (with_huge_jpeg, "pixels-undecodable"),
    "gif": (lambda p: Image.fromarray(GREY).save(p, "GIF"), "not-picture"),
    "not finite": (lambda p: p.write_bytes(written(np.full((8, 8), np.inf, np.float32))), "no-finite-values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_code(tmp_path: Path, name: str) -> None:
    make, code = REFUSED[name]
    path = tmp_path / "a.png"
    make(path)
    found = verdict(path)
    if code == "multi-frame":  # of the site's wishes: pages may be slices
        with pytest.raises(FileRejected) as caught:
            read(path)
        found = caught.value.code
    assert found == code


def test_a_jpeg_of_endless_scans_is_not_decoded(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(noise(1, 64, 64)).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    start = data.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(data[:start] + data[start:-2] * 300 + data[-2:])
    assert verdict(tmp_path / "a.jpg") == "pixels-undecodable"
