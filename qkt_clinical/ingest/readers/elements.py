"""Values of DICOM elements as plain Python.

pydicom turns an element into an object of its own when it is looked at, which takes some fifteen
microseconds. The gate looks at forty in every file: as much time as decoding 512 x 512 pixels takes. So the
common value representations are read here from the bytes; what is out of the ordinary is left to pydicom.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Value = str | int | float
ASCII = frozenset({"AS", "CS", "DA", "UI"})
"""Value representations of the default character repertoire."""
CODES = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}


@cache
def tag_of(keyword: str) -> tuple[int, str]:
    """Tag and value representation of a keyword of the standard."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword
    from pydicom.tag import Tag

    tag = tag_for_keyword(keyword)
    if tag is None:
        raise KeyError(keyword)
    return Tag(tag), dictionary_VR(tag)  # pydicom need not make one of a number then


def values(data: Dataset, keyword: str) -> tuple[Value, ...]:
    """All values of an element that is no sequence; none where it is absent or empty.

    Raises:
        Exception: of :data:`~qkt_clinical.ingest.codes.DAMAGE`, where the bytes are no such value.
    """
    tag, vr = tag_of(keyword)
    item: Any = data.get_item(tag)
    if item is None:
        return ()
    raw = item.value
    if isinstance(raw, bytes) and item.VR in (vr, None):
        found = _plain(raw, vr, little=getattr(item, "is_little_endian", True))
        if found is not None:
            return found
    return tuple(_converted(data[tag].value))


def _plain(raw: bytes, vr: str, *, little: bool) -> tuple[Value, ...] | None:
    """The values in the bytes of an element as it was read; None for what pydicom should judge."""
    if vr in CODES:
        size = struct.calcsize(CODES[vr])
        if len(raw) % size:
            return None
        return struct.unpack(f"{'<' if little else '>'}{len(raw) // size}{CODES[vr]}", raw)
    parts = raw.strip(b" \0").split(b"\\")
    if parts == [b""]:
        return ()
    try:
        if vr == "DS":
            return tuple(map(float, parts))
        if vr == "IS":
            return tuple(map(int, parts))
        if vr in ASCII:
            return tuple(part.decode("ascii").strip(" \0") for part in parts)
    except ValueError:
        pass
    return None


def _converted(value: Any) -> Iterator[Value]:
    several = not isinstance(value, str | bytes) and hasattr(value, "__iter__")
    for part in value if several else (value,):
        if part is None or part == "":
            continue
        yield int(part) if isinstance(part, int) else float(part) if isinstance(part, float) else str(part)


def sixteen_bits(data: Dataset, keyword: str, *, signed: bool) -> tuple[int, ...]:
    """All values of an element that is US or SS, by what it is compared with.

    PS3.6 leaves its representation to PixelRepresentation. Implicit VR does not say it at all, explicit VR
    often wrongly: a padding of -2000 is written as 63536.

    Raises:
        Exception: of :data:`~qkt_clinical.ingest.codes.DAMAGE`, where the bytes are no such value.
    """
    item: Any = data.get_item(tag_of(keyword)[0])
    if item is None or item.value is None:
        return ()
    raw = item.value
    if isinstance(raw, bytes) and item.VR in ("US", "SS", "OW", "UN", "US or SS", None):
        order = "<" if getattr(item, "is_little_endian", True) else ">"
        found: Iterator[int] = iter(struct.unpack(f"{order}{len(raw) // 2}H", raw))
    else:
        found = (int(value) for value in _converted(data[tag_of(keyword)[0]].value))
    return tuple(_as_signed(value & 0xFFFF) if signed else value & 0xFFFF for value in found)


def _as_signed(word: int) -> int:
    return word - 0x10000 if word >= 0x8000 else word


def number(data: Dataset, keyword: str) -> float | None:
    """First value of a numeric element."""
    found = values(data, keyword)
    return float(found[0]) if found else None


def whole(data: Dataset, keyword: str, default: int) -> int:
    """First value of an element that counts; ``default`` where it is absent, empty or 0."""
    found = values(data, keyword)
    return (int(found[0]) if found else 0) or default


def word(data: Dataset, keyword: str) -> str:
    """First value of a coded element, in capitals; empty where it is absent."""
    found = values(data, keyword)
    return str(found[0]).strip(" \0").upper() if found else ""


def has(data: Dataset, keyword: str) -> bool:
    """Whether an element stands there, empty or not."""
    return tag_of(keyword)[0] in data
