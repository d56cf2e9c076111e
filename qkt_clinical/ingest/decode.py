"""Files to images as they will be stored, through worker processes and the store of earlier results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import xxhash

from qkt_clinical.common.workers import in_order
from qkt_clinical.errors import FileRejected
from qkt_clinical.ingest.arrays import Picture, prepare
from qkt_clinical.ingest.codes import quiet
from qkt_clinical.ingest.leakage import hashes_of
from qkt_clinical.ingest.readers import reader_of
from qkt_clinical.ingest.readers.base import DecodeResults, Reader, SeriesReader
from qkt_clinical.ingest.source import (
    Decoded,
    DecodeResult,
    HeaderFacts,
    Ready,
    Refusal,
    Request,
    SourceFile,
    Unit,
)
from qkt_clinical.ingest.store import FORGOTTEN, Result, ScratchStore, as_text

Numbered = tuple[int, Decoded]
"""A result and its number in the store."""
PASSING = frozenset({"decoder-crashed", "too-large", "unreadable"})
"""Codes that may be due to the machine, such as a want of memory: the file is tried again the next time."""
Written = tuple[Result, str]
"""A result and what the store keeps of it."""


def finished(outcome: DecodeResult, request: Request, unit: Sequence[SourceFile]) -> tuple[Decoded, str]:
    """Bring a decoded image of a unit of files to what the site wants."""
    if isinstance(outcome, Refusal):
        return outcome, as_text(outcome, unit)
    try:
        image = prepare(outcome.picture, request.spec)
    except FileRejected as rejected:
        refusal = Refusal(outcome.files, rejected.code, outcome.item)
        return refusal, as_text(refusal, unit)
    ready = Ready(
        files=outcome.files,
        image=image,
        fingerprint=_fingerprint(outcome.picture),
        hashes=hashes_of(image),
        spacing_mm=outcome.picture.spacing_mm,
        tags=outcome.tags,
        keys=outcome.keys,
        label=outcome.label,
        patient=outcome.patient,
        split=outcome.split,
        item=outcome.item,
        face=outcome.header is not None and outcome.header.face,
        subgroups=outcome.subgroups,
    )
    return ready, as_text(ready, unit, outcome.header)


def _fingerprint(picture: Picture) -> str:
    """128 bits of the pixels and what they mean; a fast hash, since nobody gains by a collision."""
    pixels = picture.pixels
    pixels = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))
    meaning = (pixels.shape, str(pixels.dtype), picture.inverted, picture.slope, picture.intercept)
    total = xxhash.xxh3_128(repr(meaning).encode())
    total.update(pixels.data)
    return total.hexdigest()


# --- what worker processes do: functions of a module, one unit at a time ----------------------------


def _results(unit: Unit, reader: Reader, request: Request) -> DecodeResults:
    try:
        return reader.read(unit, request)
    except FileRejected as rejected:
        return [Refusal(unit.files[:1], rejected.code)]


def _read(unit: Unit, *, reader: Reader, request: Request) -> list[Written]:
    with quiet():
        return [finished(outcome, request, unit.files) for outcome in _results(unit, reader, request)]


def _header(unit: Unit, *, reader: SeriesReader, request: Request) -> list[Written]:
    (file,) = unit.files
    result: Result
    with quiet():
        try:
            result = HeaderFacts(file, reader.facts(file, request))
        except FileRejected as rejected:
            result = Refusal(unit.files, rejected.code)
    return [(result, as_text(result, unit.files))]


# --- what the stage calls -----------------------------------------------------------------------------


def _remembered(
    store: ScratchStore,
    step: str,
    work: Callable[[Unit], list[Written]],
    units: Sequence[Unit],
    workers: int,
) -> Iterator[tuple[Unit, list[tuple[int, Result]]]]:
    """Every unit with its numbered results, in order: from the store, or worked out and put there."""
    keys = [store.key(step, unit.files) for unit in units]
    fresh = [unit for unit, key in zip(units, keys, strict=True) if key not in store.known]

    def lost(unit: Unit) -> list[Written]:
        refusal = Refusal(unit.files, "decoder-crashed")
        return [(refusal, as_text(refusal, refusal.files))]

    results = in_order(work, fresh, len(fresh), workers=workers, lost=lost)
    for unit, key in zip(units, keys, strict=True):
        if key in store.known:
            yield unit, store.get(key, unit.files)
        else:
            found = next(results)
            codes = {result.code for result, _ in found if isinstance(result, Refusal)}
            numbers = store.put(FORGOTTEN if codes & PASSING else key, found)
            yield unit, list(zip(numbers, (result for result, _ in found), strict=True))


def decoded(
    kind: str,
    files: Sequence[SourceFile],
    request: Request,
    store: ScratchStore,
    *,
    workers: int,
    step: Callable[[int, int], Any],
) -> Iterator[Numbered]:
    """Everything that the files of a site hold, in the order of their names.

    Args:
        kind: of the source.
        files: sorted; none for a source that has none.
        request: what is wanted.
        store: results are kept in it, and taken from it where they are known.
        workers: processes at most; sources that are not remembered are read by this one.
        step: called with units done and units in all; each file counts twice where headers are read first,
            each image of a source that is not remembered.
    """
    reader = reader_of(kind)
    if not reader.remembered:
        yield from _passing(reader, files, request, store, step=step)
    elif isinstance(reader, SeriesReader) and reader.reads_headers(request):
        yield from _series(reader, files, request, store, workers=workers, step=step)
    else:
        units = reader.units(files)
        work = partial(_read, reader=reader, request=request)
        for done, (_, found) in enumerate(_remembered(store, "file", work, units, workers), start=1):
            yield from _images(found)
            step(done, len(units))


def _passing(
    reader: Reader,
    files: Sequence[SourceFile],
    request: Request,
    store: ScratchStore,
    *,
    step: Callable[[int, int], Any],
) -> Iterator[Numbered]:
    units = reader.units(files)
    done, total = 0, len(units)
    for unit in units:
        results = _results(unit, reader, request)
        total += len(results) - 1
        for outcome in results:
            found = finished(outcome, request, outcome.files)
            (number,) = store.put(FORGOTTEN, [found])
            yield number, found[0]
            done += 1
            step(min(done, total), total)


def _series(
    reader: SeriesReader,
    files: Sequence[SourceFile],
    request: Request,
    store: ScratchStore,
    *,
    workers: int,
    step: Callable[[int, int], Any],
) -> Iterator[Numbered]:
    total = 2 * len(files)
    done = 0
    headers: list[HeaderFacts] = []
    look = partial(_header, reader=reader, request=request)
    for _, found in _remembered(store, "scan", look, [Unit((file,)) for file in files], workers):
        done += 1
        headers += [result for _, result in found if isinstance(result, HeaderFacts)]
        for image in _images(found):
            done += 1
            yield image
        step(done, total)
    work = partial(_read, reader=reader, request=request)
    for unit, found in _remembered(store, "series", work, reader.grouped(headers), workers):
        yield from _images(found)
        done += len(unit.files)
        step(done, total)


def _images(found: Sequence[tuple[int, Result]]) -> Iterator[Numbered]:
    for number, result in found:
        if not isinstance(result, HeaderFacts):
            yield number, result
