"""Files to images as they will be stored, through worker processes and the store of earlier results."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import xxhash

from qkt_clinical.common.workers import in_order
from qkt_clinical.errors import FileRejected
from qkt_clinical.ingest import dicom
from qkt_clinical.ingest.arrays import Picture, prepare
from qkt_clinical.ingest.codes import quiet
from qkt_clinical.ingest.leakage import hashes_of
from qkt_clinical.ingest.source import Decoded, Outcome, Ready, Refusal, Request, SourceFile
from qkt_clinical.ingest.store import FORGOTTEN, Result, Store, as_text

Unit = TypeVar("Unit")
Numbered = tuple[int, Decoded]
"""A result and its number in the store."""
PASSING = frozenset({"decoder-crashed", "too-large", "unreadable"})
"""Codes that may be due to the machine, such as a want of memory: the file is tried again the next time."""
Written = tuple[Result, str]
"""A result and what the store keeps of it."""


def finished(outcome: Outcome, request: Request, unit: Sequence[SourceFile]) -> tuple[Decoded, str]:
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


def _file(unit: tuple[SourceFile, ...], *, kind: str, request: Request) -> list[Written]:
    """A flat image, or a volume that is one file."""
    reader = importlib.import_module(f"qkt_clinical.ingest.{kind}")
    outcome: Outcome
    with quiet():
        try:
            outcome = reader.read(unit[0], request)
        except FileRejected as rejected:
            outcome = Refusal(unit[:1], rejected.code)
        return [finished(outcome, request, unit)]


def _scan(unit: tuple[SourceFile, ...], *, request: Request) -> list[Written]:
    result: Result
    with quiet():
        try:
            result = dicom.scan(unit[0], request)
        except FileRejected as rejected:
            result = Refusal(unit, rejected.code)
    return [(result, as_text(result, unit))]


def _series(unit: tuple[dicom.Scan, ...], *, request: Request) -> list[Written]:
    with quiet():
        return [finished(o, request, _files_of(unit)) for o in dicom.read_series(unit, request)]


# --- what the stage calls -----------------------------------------------------------------------------


def _remembered(
    store: Store,
    step: str,
    work: Callable[[Unit], list[Written]],
    units: Sequence[Unit],
    files_of: Callable[[Unit], tuple[SourceFile, ...]],
    workers: int,
) -> Iterator[tuple[Unit, list[tuple[int, Result]]]]:
    """Every unit with its numbered results, in order: from the store, or worked out and put there."""
    keys = [store.key(step, files_of(unit)) for unit in units]
    fresh = [unit for unit, key in zip(units, keys, strict=True) if key not in store.known]

    def lost(unit: Unit) -> list[Written]:
        refusal = Refusal(files_of(unit), "decoder-crashed")
        return [(refusal, as_text(refusal, refusal.files))]

    results = in_order(work, fresh, len(fresh), workers=workers, lost=lost)
    for unit, key in zip(units, keys, strict=True):
        if key in store.known:
            yield unit, store.get(key, files_of(unit))
        else:
            found = next(results)
            codes = {result.code for result, _ in found if isinstance(result, Refusal)}
            numbers = store.put(FORGOTTEN if codes & PASSING else key, found)
            yield unit, list(zip(numbers, (result for result, _ in found), strict=True))


def decoded(
    kind: str,
    files: Sequence[SourceFile],
    request: Request,
    store: Store,
    *,
    workers: int,
    step: Callable[[int, int], Any],
) -> Iterator[Numbered]:
    """Everything that DICOM, NIfTI or image files of a site hold, in the order of their names.

    Args:
        kind: ``dicom``, ``nifti`` or ``images``.
        files: sorted.
        request: what is wanted.
        store: results are kept in it, and taken from it where they are known.
        workers: processes at most.
        step: called with files done and files in all; each counts twice where headers are read first.
    """
    if kind == "dicom" and request.volumes:
        yield from _volumes(files, request, store, workers=workers, step=step)
        return
    if kind == "nifti":
        from qkt_clinical.ingest.nifti import pairs

        units = pairs(files)
    else:
        units = [(file,) for file in files]
    work = partial(_file, kind=kind, request=request)
    for done, (_, found) in enumerate(_remembered(store, "file", work, units, tuple, workers), start=1):
        yield from _images(found)
        step(done, len(units))


def _volumes(
    files: Sequence[SourceFile],
    request: Request,
    store: Store,
    *,
    workers: int,
    step: Callable[[int, int], Any],
) -> Iterator[Numbered]:
    total = 2 * len(files)
    done = 0
    scans: list[dicom.Scan] = []
    heads = _remembered(store, "scan", partial(_scan, request=request), [(f,) for f in files], tuple, workers)
    for _, found in heads:
        done += 1
        for number, result in found:
            if isinstance(result, dicom.Scan):
                scans.append(result)
            elif isinstance(result, Refusal):
                done += 1
                yield number, result
        step(done, total)
    groups = dicom.series(scans)
    for group, found in _remembered(
        store, "series", partial(_series, request=request), groups, _files_of, workers
    ):
        yield from _images(found)
        done += len(group)
        step(done, total)


def _files_of(scans: tuple[dicom.Scan, ...]) -> tuple[SourceFile, ...]:
    return tuple(s.file for s in scans)


def _images(found: Sequence[tuple[int, Result]]) -> Iterator[Numbered]:
    for number, result in found:
        if not isinstance(result, dicom.Scan):
            yield number, result
