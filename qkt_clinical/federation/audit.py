"""Audit record of a site's requests and decisions: append-only, each line chained to the one before.

A line that is changed, removed or put in between breaks the chain. The number of lines and the digest of the
last one stand in a small file beside it, so a cut end is seen too. Only who changes both files goes unseen:
the last digest is shown, to be written down elsewhere. It holds no patient data: names of hospitals, queries,
classes, digests of files.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator

from qkt_clinical.common.files import digest_bytes, passing_file, read_plain, to_json
from qkt_clinical.common.locks import lock
from qkt_clinical.config.base import NAME, Name, Sha256, Strict
from qkt_clinical.errors import OutputsError
from qkt_clinical.federation.messages import cut

RECORD = Path("federation", "audit.jsonl")
"""Path in the workspace of a site."""
HEAD, TORN, LOCK = ".head.json", ".torn", ".lock"
"""Endings in place of the record's own: how far it goes; halves of lines that a fault left; who writes."""
FIRST = "0" * 64
MAX_WORD, MAX_LINE_BYTES = 500, 65_536
"""Characters of what an entry says of one thing; bytes of a line."""
Event = Literal[
    "contributed", "offered", "declined", "asked", "answered", "refused", "withheld", "repaired", "begun"
]
"""``repaired``: half a line was set aside; ``begun``: an earlier record had been taken away."""


class Entry(Strict):
    """One line of the record."""

    number: Annotated[int, Field(ge=1)]
    time: float
    """Seconds since 1970, by the site's clock."""
    event: Event
    about: Annotated[dict[Name, Annotated[str, Field(max_length=MAX_WORD)]], Field(max_length=16)]
    """Hospital, query, classes, digest, reason; as the event needs."""
    previous: Sha256
    """Digest of the line before, zeros for the first."""

    @model_validator(mode="after")
    def _names(self) -> Entry:
        for what in ("hospital", "query"):
            if what in self.about and not NAME.fullmatch(self.about[what]):
                raise ValueError(f"no {what} name")
        return self

    def line(self) -> str:
        """As it stands in the file."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the line."""
        return digest_bytes(self.line().encode())


class Head(Strict):
    """The head of a record: its number of lines and the last digest."""

    format: Literal["qkt-audit-head/1"] = "qkt-audit-head/1"
    count: Annotated[int, Field(ge=0)] = 0
    digest: Sha256 = FIRST
    """Of the last line."""


class _Read(NamedTuple):
    entry: Entry
    end: int
    """Bytes from the file's begin to the end of the entry's line."""


def _broken(path: Path, what: str) -> OutputsError:
    return OutputsError(
        f"the record {what}",
        remedy="Somebody changed it. Keep it with the files beside it, look into it, and begin a new one.",
        file=path,
        code="audit-broken",
    )


def _read_head(path: Path) -> Head:
    place = path.with_suffix(HEAD)
    try:
        return Head.model_validate_json(read_plain(place, MAX_LINE_BYTES))
    except FileNotFoundError:
        return Head()
    except (OSError, ValidationError):
        raise _broken(place, "has a head that cannot be read") from None


def _write_head(path: Path, head: Head) -> None:
    with passing_file(path.with_suffix(HEAD)) as temporary, temporary.open("wb") as stream:
        stream.write(to_json(head.model_dump(mode="json")).encode())
        stream.flush()
        os.fsync(stream.fileno())


def _entries(stream: BinaryIO, path: Path) -> Iterator[_Read]:
    """Every complete line, checked against the one before, and finally against the head.

    Half a line at the end is what a fault left of one that was never confirmed; it is passed over.
    """
    head, number, end = _read_head(path), 0, 0
    previous = at_head = FIRST
    while (line := stream.readline(MAX_LINE_BYTES + 1)).endswith(b"\n"):
        number += 1
        what = f"does not follow from line {number - 1} to line {number}"
        try:
            entry = Entry.model_validate_json(line)
        except ValidationError:
            raise _broken(path, what) from None
        if entry.number != number or entry.previous != previous or f"{entry.line()}\n".encode() != line:
            raise _broken(path, what)
        previous, end = entry.digest, end + len(line)
        if number == head.count:
            at_head = previous
        yield _Read(entry, end)
    if len(line) > MAX_LINE_BYTES:
        raise _broken(path, f"has a line of more than {MAX_LINE_BYTES} bytes")
    # The head is written after the line: a process that ended in between has left it one behind.
    if at_head != head.digest or number - head.count not in (0, 1):
        raise _broken(
            path, f"has {number} lines, and its head says {head.count}: its end was cut or replaced"
        )


def read_record(path: Path) -> Iterator[Entry]:
    """Every entry, oldest first, each checked against the one before.

    Raises:
        OutputsError: a line is no entry or does not follow, or the end is missing, code ``audit-broken``.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        if _read_head(path).count:
            raise _broken(path, "is gone; its head is there") from None
        return
    with stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        for read in _entries(stream, path):
            yield read.entry


class _Writer:
    """The end of a record that this process holds."""

    def __init__(self, path: Path, descriptor: int, clock: Callable[[], float]) -> None:
        self.path, self.descriptor, self.clock = path, descriptor, clock
        self.last: Entry | None = None
        self.end = 0

    def entries(self) -> list[Entry]:
        """What is there; half a line at the end is set aside, and that it was is recorded."""
        found = []
        self.last, self.end = None, 0
        with os.fdopen(os.dup(self.descriptor), "rb") as stream:
            stream.seek(0)
            for entry, end in _entries(stream, self.path):
                found.append(entry)
                self.last, self.end = entry, end
            stream.seek(self.end)
            torn = stream.read(MAX_LINE_BYTES + 1)
        if torn:
            with self.path.with_suffix(TORN).open("ab") as aside:
                aside.write(torn + b"\n")
            os.ftruncate(self.descriptor, self.end)
            self.add("repaired", {"bytes": str(len(torn)), "digest": digest_bytes(torn)})
        return found

    def add(self, event: Event, about: Mapping[str, str]) -> Entry:
        """Add an entry; where the disk does not take it, or the head, the record is as it was."""
        entry = Entry(
            number=1 if self.last is None else self.last.number + 1,
            time=self.clock(),
            event=event,
            about={key: cut(text, MAX_WORD) for key, text in about.items()},
            previous=FIRST if self.last is None else self.last.digest,
        )
        line = f"{entry.line()}\n".encode()
        try:
            os.lseek(self.descriptor, self.end, os.SEEK_SET)
            left = memoryview(line)
            while left:
                left = left[os.write(self.descriptor, left) :]
            os.fsync(self.descriptor)
            _write_head(self.path, Head(count=entry.number, digest=entry.digest))
        except OSError:
            with suppress(OSError):
                os.ftruncate(self.descriptor, self.end)
            raise
        self.last, self.end = entry, self.end + len(line)
        return entry


@contextmanager
def _writing(path: Path, clock: Callable[[], float]) -> Iterator[_Writer]:
    """Lock the record for this process and thread; create it if there is none."""
    with lock(path.with_suffix(LOCK)):
        taken_away = None if path.exists() else _read_head(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # whoever reads it has come to an end
            writer = _Writer(path, descriptor, clock)
            if taken_away is not None and taken_away.count:
                _write_head(path, Head())
                about = {"entries": str(taken_away.count), "digest": taken_away.digest}
                writer.add("begun", about)
            yield writer
        finally:
            os.close(descriptor)


def record(
    path: Path, event: Event, about: Mapping[str, str], clock: Callable[[], float] = time.time
) -> Entry:
    """Add an entry and flush it to disk; one process at a time.

    Raises:
        OutputsError: the record is broken; nothing is added, so nothing is done that it should hold.
        OSError: the disk does not take it; the record is as it was.
    """
    with _writing(path, clock) as writer:
        writer.entries()
        return writer.add(event, about)


def record_within(
    path: Path,
    event: Event,
    about: Mapping[str, str],
    most: int,
    since: float,
    clock: Callable[[], float] = time.time,
) -> Entry | None:
    """Add an entry unless ``most`` of its event are not older than ``since``, counted at the same moment.

    Raises:
        OutputsError, OSError: as :func:`record`.
    """
    with _writing(path, clock) as writer:
        if sum(entry.event == event and entry.time >= since for entry in writer.entries()) >= most:
            return None
        return writer.add(event, about)


def count_since(path: Path, event: Event, start: float) -> int:
    """Number of entries of an event since ``start``; 0 if the record was removed."""
    if not path.exists():
        return 0
    return sum(entry.event == event and entry.time >= start for entry in read_record(path))
