"""DICOM pixels as numbers: their bits, their sign, and colour that is turned into RGB exactly once.

The bits of a sample that carry its value stand in BitsStored, HighBit and PixelRepresentation; the others may
hold anything (PS3.5 section 8.1.1), as a rule a retired overlay plane, and are never looked at.

Whether three samples are RGB or YBR is decided in this order:

1. JPEG 2000 whose stream says that a component transform was applied: decoders undo it, so RGB comes out
   whatever the header says (ISO/IEC 15444-1 annex G; PS3.5 section 8.2.4).
2. Lossy JPEG (DCT) that says it itself: Adobe's APP14 transform (0: RGB, 1: YCbCr; ITU-T T.872), else the
   component ids R, G and B, else a JFIF marker (YCbCr; ITU-T T.871), which is what libjpeg goes by.
3. PhotometricInterpretation. Here DCMTK and GDCM agree: a stream that is silent, as DICOM's should be, is as
   its header says, and lossless JPEG and JPEG-LS transform nothing. YBR_RCT and YBR_ICT without a component
   transform in the stream are RGB.

DCMTK leaves rule 2 out unless it is asked to guess (``dcmdjpeg +cg``) and GDCM leaves it to whoever shows the
image; a file whose stream and header contradict each other has the stream's colours, as pydicom gives them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.ingest.codes import reject

CODESTREAM = b"\xff\x4f\xff\x51"
"""Start of a JPEG 2000 codestream; in a JP2 file, boxes stand before it."""
FRAME_HEADERS = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
LOSSLESS = frozenset({0xC3, 0xC7, 0xCB, 0xCF})
EXTENDED, JPEG_LS = 0xC1, 0xF7
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
RLE_PADDING = 16
"""Bytes that a segment of RLE may be too long."""
YBR = frozenset({"YBR_FULL", "YBR_FULL_422"})
YBR_OF_JPEG = YBR | {"YBR_RCT", "YBR_ICT"}


class Bits(NamedTuple):
    """Where the value of a sample stands."""

    allocated: int
    stored: int
    high: int
    signed: bool


class Stream(NamedTuple):
    """What the header of a compressed frame declares."""

    rows: int
    columns: int
    components: int
    precision: int
    """Bits of a sample."""
    lossy: bool
    """Whether decoded values may lie beyond those that were compressed."""
    rgb: bool | None
    """Whether it says of itself that RGB (True) or YCbCr (False) comes out; None where it is silent."""


def read_stream(frame: bytes) -> Stream | None:
    """The header of a JPEG, JPEG-LS or JPEG 2000 stream; None where it is none or makes no sense.

    An extended sequential JPEG makes none if its scan says that it holds other coefficients than 0 to 63
    (ITU-T T.81 table B.3): some decoders refuse it, others go on as if it had not said so.
    """
    if frame[:2] == b"\xff\xd8":
        return _jpeg(frame)
    start = frame.find(CODESTREAM)
    return None if start < 0 else _jpeg2000(frame, start)


def _segments(frame: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and content of each segment of a JPEG up to its first scan, found as decoders find them."""
    at = 2
    while 0 <= (at := frame.find(b"\xff", at)) <= len(frame) - 4:
        marker = frame[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker <= 1 or 0xD0 <= marker <= 0xD8:  # without content
            at += 2
        else:
            length = max(2, int.from_bytes(frame[at + 2 : at + 4], "big"))
            yield marker, frame[at + 4 : at + 2 + length]
            if marker in (START_OF_SCAN, END_OF_IMAGE):
                return
            at += 2 + length


def _jpeg(frame: bytes) -> Stream | None:
    headers: list[tuple[int, bytes]] = []
    scan, jfif, adobe = b"", False, None
    for marker, content in _segments(frame):
        if marker in FRAME_HEADERS:
            headers.append((marker, content))
        elif marker == START_OF_SCAN:
            scan = content
        elif marker == 0xE0:
            jfif |= content[:5] == b"JFIF\0"
        elif marker == 0xEE and content[:5] == b"Adobe":
            adobe = content[11:12]
    if len(headers) != 1 or len(headers[0][1]) < 6 or not scan:
        return None
    process, content = headers[0]
    if process == EXTENDED and scan[2 + 2 * scan[0] :][:1] != b"\x3f":
        return None
    count = content[5]
    transforms = process not in LOSSLESS and process != JPEG_LS
    return Stream(
        rows=int.from_bytes(content[1:3], "big"),
        columns=int.from_bytes(content[3:5], "big"),
        components=count,
        precision=content[0],
        lossy=transforms or (process == JPEG_LS and scan[1 + 2 * scan[0] :][:1] not in (b"", b"\0")),
        rgb=_jpeg_colour(content[6 : 6 + 3 * count : 3], adobe, jfif) if transforms and count == 3 else None,
    )


def _jpeg_colour(ids: bytes, adobe: bytes | None, jfif: bool) -> bool | None:
    if adobe in (b"\0", b"\1"):
        return adobe == b"\0"
    if ids in (b"RGB", b"rgb"):
        return True
    return False if jfif else None


def _jpeg2000(frame: bytes, start: int) -> Stream | None:
    def number(place: int, length: int) -> int:
        return int.from_bytes(frame[start + place : start + place + length], "big")

    style = b""
    at = 2
    while frame[start + at : start + at + 1] == b"\xff" and number(at, 2) != 0xFF90:  # up to the first tile
        length = max(2, number(at + 2, 2))
        if number(at, 2) == 0xFF52:
            style = frame[start + at + 4 : start + at + 2 + length]
        at += 2 + length
    if len(style) < 10:
        return None
    return Stream(
        rows=number(12, 4) - number(20, 4),
        columns=number(8, 4) - number(16, 4),
        components=number(40, 2),
        precision=(number(42, 1) & 0x7F) + 1,
        lossy=style[9] == 0,
        rgb=True if style[4] == 1 and number(40, 2) == 3 else None,
    )


def decode_jpeg(frame: bytes, stream: Stream, photometric: str) -> NDArray[Any]:
    """Decode one frame of JPEG: lossy of 8 or 12 bits, or lossless of 2 to 16.

    Args:
        frame: the whole stream.
        stream: its header.
        photometric: PhotometricInterpretation.

    Returns:
        (H, W) or (H, W, 3); uint8 or uint16. Of lossy JPEG in RGB, of lossless as it was compressed.

    Raises:
        FileRejected: ``pixels-undecodable`` where the stream has no end; what imagecodecs raises is a
            RuntimeError.
    """
    import imagecodecs

    if frame.rfind(b"\xff\xd9") < 0:  # libjpeg makes up what is missing
        raise reject("pixels-undecodable")
    if stream.components == 1:
        return np.asarray(imagecodecs.jpeg8_decode(frame))
    rgb = photometric not in YBR_OF_JPEG if stream.rgb is None else stream.rgb
    colours = "RGB" if rgb or not stream.lossy else "YCBCR"
    return np.asarray(imagecodecs.jpeg8_decode(frame, colorspace=colours, outcolorspace="RGB"))


def decode_rle(frame: bytes, shape: tuple[int, int, int], allocated: int) -> NDArray[Any]:
    """Decode one frame of RLE (PS3.5 annex G): a run of bytes for each byte of each sample, highest first.

    Args:
        frame: with its header of 64 bytes.
        shape: rows, columns and samples per pixel.
        allocated: bits of a sample in the file.

    Returns:
        (H, W), or (H, W, S) for several samples; unsigned.

    Raises:
        FileRejected: ``pixels-undecodable`` for other numbers of segments and bytes than these.
    """
    rows, columns, samples = shape
    width = allocated // 8
    header = np.frombuffer(frame[:64], "<u4")
    count = samples * width
    if allocated % 8 or not 0 < count < len(header) or header[0] != count:
        raise reject("pixels-undecodable")
    ends = [*header[2 : count + 1], len(frame)]
    planes = np.zeros((samples, rows * columns, width), dtype=np.uint8)
    for i, (start, end) in enumerate(zip(header[1 : count + 1], ends, strict=True)):
        planes[i // width, :, width - 1 - i % width] = _unpacked(frame[start:end], rows * columns)
    pixels = planes.view(f"<u{width}").reshape(samples, rows, columns)
    return np.moveaxis(pixels, 0, -1) if samples > 1 else pixels[0]


def _unpacked(run: bytes, count: int) -> NDArray[np.uint8]:
    """The ``count`` bytes of a segment; only some bytes of padding more are unpacked, whatever it holds."""
    import imagecodecs

    try:
        found = imagecodecs.packbits_decode(run, out=count + RLE_PADDING)
    except imagecodecs.PackbitsError:
        if run[-1:] != b"\0":
            raise
        found = imagecodecs.packbits_decode(run[:-1], out=count + RLE_PADDING)  # padded to even length
    if len(found) < count:
        raise reject("pixels-undecodable")
    return np.frombuffer(found, np.uint8, count)


def stored_values(samples: NDArray[Any], bits: Bits, stream: Stream | None = None) -> NDArray[Any]:
    """The values of samples: bits that carry none left out, the sign extended.

    Args:
        samples: integers of any shape, of BitsAllocated bits, or of 8 if that is 1; not changed.
        bits: where the value of a sample stands.
        stream: where the samples come from, unless they are uncompressed. Its samples start at bit 0; those
            above BitsStored are lost in compression that is lossy, where they come of rounding.

    Returns:
        As many values in as many bits, signed or unsigned.
    """
    width = 8 * samples.dtype.itemsize
    _, stored, high, signed = bits
    if stream is not None and stream.precision <= high:
        stored = min(stored, stream.precision)
        high = stored - 1
    values: NDArray[Any] = samples.view(f"{'i' if signed else 'u'}{width // 8}")
    if stored == width:
        return values
    if high == stored - 1 and not signed:
        top = values.dtype.type((1 << stored) - 1)
        lossy = stream is not None and stream.lossy
        return np.asarray(np.minimum(values, top) if lossy else np.bitwise_and(values, top))
    return np.asarray(np.right_shift(np.left_shift(values, width - 1 - high), width - stored))


def is_ybr(stream: Stream | None, photometric: str) -> bool:
    """Whether what a decoder gave is YBR, which :func:`to_rgb` is left to turn."""
    return photometric in YBR and not (stream is not None and stream.rgb)


def to_rgb(ybr: NDArray[Any], stored: int) -> NDArray[Any]:
    """YBR_FULL to RGB (PS3.3 section C.7.6.3.1.2), for any number of bits.

    Args:
        ybr: (..., 3) unsigned.
        stored: bits that are used.
    """
    top, middle = 2**stored - 1, 2 ** (stored - 1)
    exact: NDArray[Any] = ybr.astype(np.float32 if stored <= 16 else np.float64)
    y, blue, red = exact[..., 0], exact[..., 1] - middle, exact[..., 2] - middle
    rgb = np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], axis=-1)
    return np.asarray(np.clip(np.rint(rgb), 0, top).astype(ybr.dtype))
