"""One DICOM file, read by pydicom 3: it is opened, its header is judged, its pixels become a picture."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.ingest.arrays import Picture, eight_bit_limits
from qkt_clinical.ingest.codes import DAMAGE, reading, reject
from qkt_clinical.ingest.deidentify import deidentify, may_show_face, salted, suspects_text
from qkt_clinical.ingest.identity import normal_patient
from qkt_clinical.ingest.readers.elements import has, number, sixteen_bits, tag_of, values, whole, word
from qkt_clinical.ingest.readers.pixels import (
    Bits,
    Stream,
    decode_jpeg,
    decode_rle,
    is_ybr,
    read_stream,
    stored_values,
    to_rgb,
)
from qkt_clinical.ingest.source import (
    DecodedImage,
    Found,
    Header,
    Request,
    SourceFile,
    bounded_pixels,
    bounded_size,
)
from qkt_clinical.ingest.subgroups import header_groups

if TYPE_CHECKING:
    from pydicom.dataset import Dataset, FileDataset

Limits = tuple[float, float]

HEAD = 4096
"""Bytes at a file's start, among which its transfer syntax stands as a rule."""
DEFLATED = "1.2.840.10008.1.2.1.99"
PIECE = 1 << 20
"""Bytes that are inflated at once."""
HEADER_BYTES, HEADER_RATIO = 1 << 18, 8
"""Bytes that a deflated data set may have beside its pixels, and how many more for each byte of its file."""
ITEM, MOST_ITEMS = b"\xfe\xff\x00\xe0", 50_000
"""Start of an item of a sequence, and how many a deflated data set may have: each takes pydicom 0.1 ms."""
RLE = "packbits"
DECODERS: dict[str, str] = {
    "1.2.840.10008.1.2": "",
    "1.2.840.10008.1.2.1": "",
    "1.2.840.10008.1.2.2": "",
    DEFLATED: "",
    "1.2.840.10008.1.2.4.50": "imagecodecs",
    "1.2.840.10008.1.2.4.51": "imagecodecs",
    "1.2.840.10008.1.2.4.57": "imagecodecs",
    "1.2.840.10008.1.2.4.70": "imagecodecs",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
    "1.2.840.10008.1.2.4.201": "pylibjpeg",
    "1.2.840.10008.1.2.4.202": "pylibjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg",
    "1.2.840.10008.1.2.5": RLE,
}
"""Transfer syntax to the one decoder used for it ("": uncompressed), so that the same file gives the same
pixels whatever else is installed."""

NON_IMAGES = frozenset(
    {
        "1.2.840.10008.1.3.10",  # DICOMDIR
        "1.2.840.10008.5.1.4.1.1.66.4",  # segmentation
        "1.2.840.10008.5.1.4.1.1.66.7",  # label map segmentation
    }
)
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
LITTLE_ENDIAN = frozenset({"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", DEFLATED})
COLOURS = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"})
GREYS = frozenset({"MONOCHROME1", "MONOCHROME2"})
PALETTE = "PALETTE COLOR"


# --- reading one file -----------------------------------------------------------------------------


def reading_dicom(code: str) -> AbstractContextManager[None]:
    """The edge to pydicom: it converts values as they are looked at, so every look may raise."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return reading(code, BytesLengthException, InvalidDicomError)


def open_file(path: Path, max_bytes: int, *, pixels: bool) -> FileDataset:
    """Read a file's elements, with or without its pixels, after checking that it is bounded.

    Raises:
        FileRejected: any code of one file.
    """
    from pydicom import dcmread

    bounded_size(path, max_bytes)
    with reading("unreadable"), path.open("rb") as stream:
        head = stream.read(HEAD)
    if head[128:132] != b"DICM":
        raise reject("not-dicom")
    with reading_dicom("header-unreadable"):
        if may_be_deflated(head):
            _bounded_inflation(path, max_bytes)
        data = dcmread(path, stop_before_pixels=not pixels)
        if word(data.file_meta, "MediaStorageSOPClassUID") in NON_IMAGES:
            raise reject("non-image-object")
        syntax = uid_of(data.file_meta, "TransferSyntaxUID")
        if not syntax:
            raise reject("transfer-syntax-missing")
        _check_header(data, max_bytes)
    if syntax not in DECODERS:
        raise reject("transfer-syntax-unsupported")
    if pixels and not any(has(data, name) for name in PIXELS):
        raise reject("no-pixel-data")
    return data


def may_be_deflated(head: bytes) -> bool:
    """Whether a file's transfer syntax is the deflated one, or cannot be told at a glance.

    Walks over the elements of the file meta information, which are explicit little endian, since pydicom
    inflates a data set before it can be asked; asking it for the meta information alone, then for the
    file, would read the former twice and take a fifth longer.
    """
    at = 132
    while at + 8 <= len(head):
        group, element = int.from_bytes(head[at : at + 2], "little"), head[at + 2 : at + 4]
        if group != 2:
            return False
        vr, length = head[at + 4 : at + 6], int.from_bytes(head[at + 6 : at + 8], "little")
        if vr in (b"OB", b"UN"):
            length = 4 + int.from_bytes(head[at + 8 : at + 12], "little")
        elif vr not in (b"UI", b"UL", b"SH", b"AE"):
            return True
        if element == b"\x10\0" and head[at + 8 : at + 8 + length].strip(b"\0 ") == DEFLATED.encode():
            return True
        at += 8 + length
    return True


def _bounded_inflation(path: Path, max_bytes: int) -> None:
    """Refuse a deflated data set that is larger than the pixels that it declares and a header.

    It is inflated piece by piece: pydicom inflates all at once, and takes minutes over a few kilobytes that
    become millions of empty elements.

    Raises:
        FileRejected: ``too-large``, ``header-unreadable``.
    """
    from pydicom.filereader import read_dataset

    with path.open("rb") as stream:
        stream.seek(132)
        meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        if str(meta.get("TransferSyntaxUID", "")) != DEFLATED:
            return
        header = min(max_bytes, HEADER_BYTES + HEADER_RATIO * path.stat().st_size)
        pieces = _inflated(stream)
        head = b""
        while len(head) < header and (piece := next(pieces, b"")):
            head += piece
        at_pixels = False

        def reached(tag: int, vr: str | None, length: int) -> bool:
            nonlocal at_pixels
            at_pixels = tag >> 16 >= 0x7FE0
            return at_pixels

        if head.count(ITEM) > MOST_ITEMS:
            raise reject("too-large")
        whole_set = len(head) < header
        with reading_dicom("header-unreadable" if whole_set else "too-large"):
            data = read_dataset(io.BytesIO(head), False, True, stop_when=reached)
        if whole_set:
            return
        if not at_pixels:
            raise reject("too-large")
        _check_header(data, max_bytes)
        samples = frames_of(data) * math.prod(matrix_of(data)) * samples_of(data)
        limit = min(max_bytes, header + samples * whole(data, "BitsAllocated", 0) // 8)
        total = len(head)
        for piece in pieces:
            total += len(piece)
            if total > limit:
                raise reject("too-large")


def _inflated(stream: BinaryIO) -> Iterator[bytes]:
    """What a deflated stream holds, in pieces of a megabyte at most."""
    machine = zlib.decompressobj(-zlib.MAX_WBITS)
    while piece := stream.read(PIECE):
        while piece:
            if found := machine.decompress(piece, PIECE):
                yield found
            piece = machine.unconsumed_tail


def _check_header(data: Dataset, max_bytes: int) -> None:
    if word(data, "SOPClassUID") in NON_IMAGES:
        raise reject("non-image-object")
    if not has(data, "Rows") or not has(data, "Columns"):
        raise reject("no-pixel-data")
    bounded_pixels(
        (frames_of(data), *matrix_of(data), samples_of(data)), whole(data, "BitsAllocated", 0), max_bytes
    )


def types_of(data: Dataset) -> str:
    """The image type, and that of the first frame where there are frames, as one line in capitals."""
    found = [*values(data, "ImageType")]
    for macro in ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence"):
        frame = functional_group(data, 0, macro)
        found += () if frame is None else values(frame, "FrameType")
    return "\\".join(str(value).upper() for value in found)


def refuse_mosaic(data: Dataset) -> None:
    """Refuse a matrix in which Siemens tiled the slices of a volume, by image type or private elements.

    Exports sometimes write the image type anew; how many tiles there are stands in the private group 0019
    and in the CSA header as well.

    Raises:
        FileRejected: ``mosaic``.
    """
    tags = data.keys()  # to go over the data set itself converts every element
    siemens = any(tag >> 16 in (0x0019, 0x0029) for tag in tags)
    if "MOSAIC" in types_of(data) or (siemens and _tiles(data) > 1):
        raise reject("mosaic")


def _tiles(data: Dataset) -> int:
    """Slices in a Siemens mosaic, 0 where no private element says so."""
    from nibabel.nicom.csareader import CSAError, get_csa_header, get_n_mosaic

    damage: tuple[type[Exception], ...] = (*DAMAGE, CSAError)
    try:
        said = data.private_block(0x0019, "SIEMENS MR HEADER")[0x0A].value
        return int.from_bytes(said, "little") if isinstance(said, bytes) else int(said)
    except damage:
        pass  # absent, or no number
    try:
        csa = get_csa_header(data, "image")  # type: ignore[no-untyped-call]
        return 0 if csa is None else int(get_n_mosaic(csa) or 0)  # type: ignore[no-untyped-call]
    except damage:
        return 0


def frames_of(data: Dataset) -> int:
    """How many frames it declares; 1 where it does not say."""
    return whole(data, "NumberOfFrames", 1)


def matrix_of(data: Dataset) -> tuple[int, int]:
    """Rows and columns."""
    return whole(data, "Rows", 0), whole(data, "Columns", 0)


def samples_of(data: Dataset) -> int:
    """Samples of a pixel: 3 of colour."""
    return whole(data, "SamplesPerPixel", 1)


def photometric_of(data: Dataset) -> str:
    """What the samples mean, in capitals."""
    return word(data, "PhotometricInterpretation")


def stored_pixels(data: FileDataset) -> NDArray[Any]:
    """Decoded pixels as stored, colour as RGB: (H, W), (F, H, W), each with a last axis of 3 if colour.

    Raises:
        FileRejected: ``truncated``, ``pixels-undecodable``, ``transfer-syntax-unsupported``,
            ``colour-unknown``, ``header-unreadable``.
    """
    kind = photometric_of(data)
    if kind not in COLOURS | GREYS | {PALETTE}:
        raise reject("colour-unknown")
    with reading_dicom("pixels-undecodable"):
        plugin = DECODERS[str(data.file_meta.TransferSyntaxUID)]
        _refuse_more_frames(data, coded=bool(plugin))
        pixels = _decompressed(data, plugin) if plugin else _uncompressed(data)
    colour = samples_of(data) == 3
    if colour != (kind in COLOURS):
        raise reject("colour-unknown")
    shape = (*matrix_of(data), 3) if colour else matrix_of(data)
    if pixels.shape not in (shape, (frames_of(data), *shape)):
        raise reject("pixels-undecodable")
    return pixels


def _bits(data: Dataset) -> Bits:
    """Where the value of a sample stands; a HighBit that cannot be is taken as BitsStored - 1.

    Raises:
        FileRejected: ``header-unreadable`` where the number of bits or the sign is not told.
    """
    allocated, stored = whole(data, "BitsAllocated", 0), whole(data, "BitsStored", 0)
    sign = values(data, "PixelRepresentation")
    if not 1 <= stored <= allocated or sign not in ((0,), (1,)):
        raise reject("header-unreadable")
    high = whole(data, "HighBit", 0)
    if not stored <= high + 1 <= allocated:
        high = stored - 1
    return Bits(allocated, stored, high, signed=sign == (1,) and allocated > 1)


def _plain_samples(data: Dataset, plugin: str) -> NDArray[Any]:
    """What pydicom and its decoder give: samples in the machine's byte order, nothing corrected or turned."""
    from pydicom.pixels.utils import pixel_array

    samples = pixel_array(
        data,
        raw=True,
        decoding_plugin=plugin,
        correct_unused_bits=False,
        apply_j2k_sign_correction=False,
        apply_jls_sign_correction=False,
    )
    return samples.astype(samples.dtype.newbyteorder("="), copy=False)


def _uncompressed(data: FileDataset) -> NDArray[Any]:
    from pydicom.pixels.utils import get_expected_length

    samples = _native(data)
    if samples is None:
        if "PixelData" in data and len(data.PixelData) < get_expected_length(data):
            raise reject("truncated")
        samples = _plain_samples(data, "")
    if samples.dtype.kind == "f":
        return samples
    bits = _bits(data)
    pixels = stored_values(samples, bits)
    return to_rgb(pixels, bits.stored) if is_ybr(None, photometric_of(data)) else pixels


def _native(data: FileDataset) -> NDArray[Any] | None:
    """Uncompressed grey samples as they lie in the file, not copied; None for what pydicom should decode.

    This is what scanners write as a rule; pydicom's way to the same array takes as long as reading the file.

    Raises:
        FileRejected: ``truncated``.
    """
    bits = whole(data, "BitsAllocated", 0)
    plain = bits in (8, 16, 32) and samples_of(data) == 1
    if not plain or str(data.file_meta.TransferSyntaxUID) not in LITTLE_ENDIAN or not has(data, "PixelData"):
        return None
    held = data.get_item(tag_of("PixelData")[0])
    if held is None or not isinstance(held.value, bytes):
        return None
    shape = matrix_of(data) if frames_of(data) == 1 else (frames_of(data), *matrix_of(data))
    count = math.prod(shape)
    if len(held.value) < count * bits // 8:
        raise reject("truncated")
    return np.frombuffer(held.value, f"<u{bits // 8}", count).reshape(shape)


def _refuse_more_frames(data: Dataset, *, coded: bool) -> None:
    """Refuse pixels of more frames than the header says: the first would be taken for the whole.

    Args:
        data: the elements.
        coded: whether the pixels are compressed; then the table of offsets tells.

    Raises:
        FileRejected: ``multi-frame``.
    """
    from pydicom.encaps import parse_basic_offsets
    from pydicom.pixels.utils import get_expected_length

    held = data.get_item(tag_of("PixelData")[0])
    raw = None if held is None else held.value
    if not isinstance(raw, bytes):
        return
    frames = frames_of(data)
    if coded:
        more = len(parse_basic_offsets(raw)) > frames
    else:
        wanted = get_expected_length(data)
        # Room for one more; a byte may be padding.
        more = len(raw) * frames >= wanted * (frames + 1) and len(raw) > wanted + 1
    if more:
        raise reject("multi-frame")


def _decompressed(data: FileDataset, plugin: str) -> NDArray[Any]:
    """Pixels of compressed frames, each by what its own header declares."""
    from pydicom.pixels.decoders.base import get_decoder

    own = {"imagecodecs": _jpeg_samples, RLE: _rle_samples}.get(plugin)
    if own is None and plugin not in get_decoder(data.file_meta.TransferSyntaxUID).available_plugins:
        raise reject("transfer-syntax-unsupported")
    bits, kind = _bits(data), photometric_of(data)
    frames = _coded_frames(data)
    streams = [None if plugin == RLE else _checked_stream(frame, data, bits) for frame in frames]
    if own is not None:
        samples = np.stack([own(data, *pair) for pair in zip(frames, streams, strict=True)])
    else:
        samples = _plain_samples(data, plugin)
        samples = samples.reshape(-1, *samples.shape[samples.ndim - (2 if samples_of(data) == 1 else 3) :])

    def finished(pixels: NDArray[Any], stream: Stream | None) -> NDArray[Any]:
        pixels = stored_values(pixels, bits, stream)
        turned = plugin == "imagecodecs" and stream is not None and stream.lossy
        return to_rgb(pixels, bits.stored) if is_ybr(stream, kind) and not turned else pixels

    if len(set(streams)) == 1:
        pixels = finished(samples, streams[0])
    else:
        pixels = np.stack([finished(*pair) for pair in zip(samples, streams, strict=True)])
    return pixels[0] if len(frames) == 1 else pixels


def _coded_frames(data: Dataset) -> list[bytes]:
    """The compressed frames.

    Raises:
        FileRejected: ``pixels-undecodable`` where there are not as many as NumberOfFrames.
    """
    from pydicom.encaps import generate_frames

    offsets = (
        (data.ExtendedOffsetTable, data.ExtendedOffsetTableLengths)
        if has(data, "ExtendedOffsetTable")
        else None
    )
    count = frames_of(data)
    frames = list(generate_frames(data.PixelData, number_of_frames=count, extended_offsets=offsets))
    if len(frames) != count:
        raise reject("pixels-undecodable")
    return frames


def _checked_stream(frame: bytes, data: Dataset, bits: Bits) -> Stream:
    """The header of a compressed frame, unless it declares other pixels than the data set.

    Decoders allocate by that inner header, which :func:`_check_header` has not seen.
    """
    stream = read_stream(frame)
    wanted = (*matrix_of(data), samples_of(data))
    if stream is None or stream[:3] != wanted or stream.precision > bits.allocated:
        raise reject("pixels-undecodable")
    return stream


def _jpeg_samples(data: Dataset, frame: bytes, stream: Stream | None) -> NDArray[Any]:
    assert stream is not None  # of RLE alone
    samples = decode_jpeg(frame, stream, photometric_of(data))
    return samples.astype(f"u{whole(data, 'BitsAllocated', 8) // 8}", copy=False)


def _rle_samples(data: Dataset, frame: bytes, _stream: Stream | None) -> NDArray[Any]:
    return decode_rle(frame, (*matrix_of(data), samples_of(data)), whole(data, "BitsAllocated", 8))


# --- from stored values to the modality's units ---------------------------------------------------


def functional_group(data: Dataset, frame: int, macro: str) -> Dataset | None:
    """A functional group of a frame, its own or the shared one; the data set itself holds older tags."""
    if not has(data, "PerFrameFunctionalGroupsSequence") and not has(data, "SharedFunctionalGroupsSequence"):
        return None
    groups = [
        sequence[index]
        for name, index in (
            ("PerFrameFunctionalGroupsSequence", frame),
            ("SharedFunctionalGroupsSequence", 0),
        )
        if (sequence := data.get(name)) and len(sequence) > index
    ]
    return next((group.get(macro)[0] for group in groups if group.get(macro)), None)


def _window(data: Dataset) -> Limits | None:
    """The file's first linear display window that is sound, as (black, white); None where it has none.

    It is sound if it is finite and as wide as the standard asks: above 1 (PS3.3 section C.11.2.1.2.1; one of
    width 1 shows a threshold, not an image), or above 0 where it is exact (C.11.2.1.3.2).
    """
    function = word(data, "VOILUTFunction") or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT"):
        return None
    trim = 1.0 if function == "LINEAR" else 0.0
    centres, widths = values(data, "WindowCenter"), values(data, "WindowWidth")
    for centre, width in zip(map(float, centres), map(float, widths), strict=False):
        middle, half = centre - trim / 2, (width - trim) / 2
        black, white = middle - half, middle + half
        if width > trim and black < white and math.isfinite(black) and math.isfinite(white):
            return black, white
    return None


def _signed(data: Dataset) -> bool:
    return whole(data, "PixelRepresentation", 0) == 1


def _padding(data: Dataset, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Where the scanner filled up what lies outside its field of view."""
    if stored.dtype.kind not in "iu" or not has(data, "PixelPaddingValue"):
        return None
    names = ("PixelPaddingValue", "PixelPaddingRangeLimit")
    ends = [end for name in names for end in sixteen_bits(data, name, signed=_signed(data))[:1]]
    if not ends or not sixteen_bits(data, names[0], signed=False):
        return None
    mask = (stored >= min(ends)) & (stored <= max(ends))
    return mask if mask.any() and not mask.all() else None


def _rescale(data: Dataset, frame: int, stored: NDArray[Any]) -> tuple[float, float]:
    """Slope and intercept from stored values of one frame to the modality's units.

    An empty slice of PET often has a slope of 0: where all stored values are alike, that loses nothing.

    Raises:
        FileRejected: ``header-unreadable`` for a slope of 0 else, or a value that is no number.
    """
    source = functional_group(data, frame, "PixelValueTransformationSequence") or data
    slope, intercept = number(source, "RescaleSlope"), number(source, "RescaleIntercept")
    if slope is None or intercept is None:
        return 1.0, 0.0
    if slope == 0 and np.isfinite(intercept) and stored.min() == stored.max():
        return 1.0, intercept - float(stored.flat[0])
    if not np.isfinite(intercept) or not 0 < abs(slope) < np.inf or not np.isfinite(1 / slope):
        raise reject("header-unreadable")
    return slope, intercept


def _looked_up(values: NDArray[Any], table: Dataset, *, signed: bool) -> tuple[NDArray[Any], int]:
    """Values through a look-up table of the file (PS3.3 section C.11.1.1), and the bits of its entries.

    Args:
        values: of any real type and shape.
        table: an item of ModalityLUTSequence or VOILUTSequence.
        signed: whether the first value that it maps is.

    Raises:
        FileRejected: ``header-unreadable`` for a table that is cut or has no entries.
    """
    count, _, bits = sixteen_bits(table, "LUTDescriptor", signed=False)
    first = sixteen_bits(table, "LUTDescriptor", signed=signed)[1]
    count = count or 1 << 16
    entries = _entries(table, count, bits)
    if len(entries) < count or not 1 <= bits <= 16:
        raise reject("header-unreadable")
    whole_numbers = np.rint(np.nan_to_num(values)) if values.dtype.kind == "f" else values.astype(np.int64)
    place = np.clip(whole_numbers, first, first + count - 1).astype(np.int64)
    return entries[place - first], bits


def _entries(table: Dataset, count: int, bits: int) -> NDArray[np.uint16]:
    """Of a look-up table: 16 bits each, or 8 where two stand in each word."""
    held: Any = table.get_item(tag_of("LUTData")[0])
    raw = held.value if held is not None else None
    if bits <= 8 and isinstance(raw, bytes) and len(raw) in (count, count + count % 2):
        return np.frombuffer(raw, np.uint8).astype(np.uint16)
    return np.array(sixteen_bits(table, "LUTData", signed=False)[:count], dtype=np.uint16)


def _coloured(data: Dataset, stored: NDArray[Any]) -> tuple[NDArray[Any], Limits | None]:
    """RGB of a colour or palette image, and the range of its stored type."""
    if photometric_of(data) == PALETTE:
        painted = _painted(data, stored)
        return painted, (0.0, float(np.iinfo(painted.dtype).max))
    bits = whole(data, "BitsStored", 8)
    integer = stored.dtype.kind == "u"
    return stored, eight_bit_limits(stored.dtype, bits) or ((0.0, 2.0**bits - 1) if integer else None)


def _painted(data: Dataset, stored: NDArray[Any]) -> NDArray[Any]:
    """(..., 3) of 8 or 16 bits: each index as the palette colours it."""
    from pydicom.dataelem import DataElement
    from pydicom.pixels.processing import apply_color_lut

    signed = _signed(data)
    for name in ("Red", "Green", "Blue"):
        keyword = f"{name}PaletteColorLookupTableDescriptor"
        count, first, bits = sixteen_bits(data, keyword, signed=False)
        if signed and first >= 1 << 15:
            first -= 1 << 16
        # As a representation that holds 60,000 entries and a first index of -5 alike.
        data[keyword] = DataElement(tag_of(keyword)[0], "SL", [count, first, bits])
    wide = stored.astype(np.int32, copy=False)  # an index less the first one may not fit its own type
    painted = np.asarray(apply_color_lut(wide, data))[..., :3]
    if painted.dtype != np.uint16:
        return painted
    # 8-bit colours stand in the high byte of 16, alone or in both; some writers left them in the low one.
    low, high = painted & 0xFF, painted >> 8
    if not high.any():
        return low.astype(np.uint8)
    eight = not low.any() or bool((low == high).all())
    return high.astype(np.uint8) if eight else painted


def frame_picture(data: Dataset, stored: NDArray[Any], frame: int, *, lookup: bool) -> Picture:
    """One frame with its map to the modality's units, without its spacing.

    Args:
        data: the elements.
        stored: (H, W) or (H, W, 3) as decoded.
        frame: its number, from 0.
        lookup: whether a display look-up table or sigmoid of the file may be applied (not where
            site.yaml sets a window, nor for slices of a volume).
    """
    if photometric_of(data) not in GREYS:
        values, limits = _coloured(data, stored)
        return Picture(values, colour=True, limits=limits, eight_bit=values.dtype == np.uint8)
    inverted = photometric_of(data) == "MONOCHROME1"
    padding = _padding(data, stored)
    limits = eight_bit_limits(stored.dtype, whole(data, "BitsStored", 8))
    slope, intercept = 1.0, 0.0
    if has(data, "ModalityLUTSequence") and data.ModalityLUTSequence:
        stored, _ = _looked_up(stored, data.ModalityLUTSequence[0], signed=_signed(data))
        limits = None
    else:
        slope, intercept = _rescale(data, frame, stored)
    if limits is not None:
        ends = sorted(x * slope + intercept for x in limits)
        limits = ends[0], ends[1]
    if padding is not None:
        valid = stored[~padding]
        stored = np.where(padding, valid.max() if inverted == (slope > 0) else valid.min(), stored)
    source = functional_group(data, frame, "FrameVOILUTSequence") or data
    window = _window(source)
    if window is not None:
        eight = limits is not None and bool(np.allclose(window, limits))
        return Picture(
            stored,
            limits=limits if eight else window,
            eight_bit=eight,
            inverted=inverted,
            slope=slope,
            intercept=intercept,
        )
    if lookup and source is data:
        shown = _displayed(data, stored, slope, intercept)
        if shown is not None:
            return Picture(shown[0], limits=shown[1], inverted=inverted)
    return Picture(
        stored,
        limits=limits,
        eight_bit=limits is not None,
        inverted=inverted,
        slope=slope,
        intercept=intercept,
    )


def _displayed(
    data: Dataset, stored: NDArray[Any], slope: float, intercept: float
) -> tuple[NDArray[Any], Limits] | None:
    """What the file's own display makes of a frame, and its black and white, where it is not linear."""
    from scipy.special import expit

    table = has(data, "VOILUTSequence") and bool(data.VOILUTSequence)
    if not table and word(data, "VOILUTFunction") != "SIGMOID":
        return None
    units = stored if (slope, intercept) == (1.0, 0.0) else stored * slope + intercept
    if table:
        negative = _signed(data) or bool(units.min() < 0)
        shown, bits = _looked_up(units, data.VOILUTSequence[0], signed=negative)
        return shown, (0.0, 2.0**bits - 1)
    centre, width = number(data, "WindowCenter"), number(data, "WindowWidth")
    if centre is None or width is None or not math.isfinite(centre) or not 0 < width < math.inf:
        return None
    return np.asarray(expit(4 * (units - centre) / width)), (0.0, 1.0)  # PS3.3 section C.11.2.1.3.1


def pixel_spacing(data: Dataset, frame: int = 0) -> tuple[float, float] | None:
    """Distance between rows and between columns in millimetres."""
    measures = functional_group(data, frame, "PixelMeasuresSequence")
    for source, names in (
        (measures, ("PixelSpacing",)),
        (data, ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")),
    ):
        for name in names if source is not None else ():
            value = values(source, name) if source is not None else ()
            if len(value) == 2:
                rows, columns = float(value[0]), float(value[1])
                if 0 < rows < 1e6 and 0 < columns < 1e6:
                    return rows, columns
    return None


def tags_of(data: Dataset, names: Sequence[str]) -> dict[str, str]:
    """The values of tags as text, without the padding of their representation; a sequence has none."""
    found = {}
    for name in names:
        value = data.get(name)
        if value is None or data[name].VR == "SQ":
            continue
        several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        parts = [normal_patient(str(part), tag_of(name)[1]) for part in (value if several else [value])]
        found[name] = "\\".join(parts)
    return {name: text for name, text in found.items() if text}


def uid_of(data: Dataset, keyword: str) -> str:
    """First value of an element that holds UIDs; empty where it is absent."""
    return str(next(iter(values(data, keyword)), "")).strip()


def as_sets(values: Sequence[dict[str, str]]) -> dict[str, frozenset[str]]:
    """Keyword to all the values that several files hold."""
    names = sorted(set().union(*values)) if values else []
    return {name: frozenset(v[name] for v in values if name in v) for name in names}


def refuse_text(data: Dataset, request: Request) -> None:
    """Hold back what may show writing, unless the site says otherwise."""
    if not request.burned_in and suspects_text(data):
        raise reject("burned-in-suspected")


def kept_header(data: Dataset, request: Request) -> Header:
    """What is kept of the header."""
    return Header(deidentify(data, request.salt), may_show_face(data))


# --- flat images ----------------------------------------------------------------------------------


def read(file: SourceFile, request: Request) -> DecodedImage:
    """Read a flat image.

    Raises:
        FileRejected: any code of one file.
    """
    with reading_dicom("header-unreadable"):
        data = open_file(file.path, request.max_bytes, pixels=True)
        if frames_of(data) > 1:
            raise reject("multi-frame")
        refuse_mosaic(data)
        refuse_text(data, request)
        header = kept_header(data, request)
        stored = stored_pixels(data)
        stored = stored[0] if stored.ndim > (3 if photometric_of(data) in COLOURS else 2) else stored
        picture = frame_picture(data, stored, 0, lookup=request.spec.window is None)
        tags = {n: salted(request.salt, "value", v) for n, v in tags_of(data, request.tags).items()}
        groups = header_groups(data, request)
        spacing = pixel_spacing(data)
        uid = uid_of(data, "SOPInstanceUID")
    picture = replace(picture, spacing_mm=spacing)
    keys = (salted(request.salt, "value", uid),) if uid else ()
    return DecodedImage((file,), picture, tags=as_sets([tags]), keys=keys, header=header, subgroups=groups)


def check(path: Path, max_bytes: int, judge: Callable[[Picture], None]) -> Found:
    """Decode every frame of a file by itself, whatever site it may belong to.

    Raises:
        FileRejected: with the reason.
    """
    with reading_dicom("header-unreadable"):
        data = open_file(path, max_bytes, pixels=True)
        stored = stored_pixels(data)
        colour = photometric_of(data) in COLOURS
        frames = stored.reshape(-1, *stored.shape[-3 if colour else -2 :])
        for i, frame in enumerate(frames):
            judge(frame_picture(data, frame, i, lookup=True))
        return Found(stored.shape, str(stored.dtype), pixel_spacing(data))
