"""A site's record of what it was asked and what it decided: append-only, each line sealed by the one before.

A line that is changed, removed or put in between breaks the chain; only the end can be cut off unseen, so
the last digest is shown, to be written down elsewhere. It holds no patient data: names of hospitals, queries,
classes, digests of files.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from qkt_clinical.common.files import digest_bytes
from qkt_clinical.config.base import Strict
from qkt_clinical.errors import OutputsError

RECORD = Path("federation", "audit.jsonl")
"""Where in its workspace a site keeps it."""
FIRST = "0" * 64
Event = Literal["contributed", "offered", "declined", "asked", "answered", "refused", "withheld"]


class Entry(Strict):
    """One line of the record."""

    number: Annotated[int, Field(ge=1)]
    time: float
    """Seconds since 1970, by the site's clock."""
    event: Event
    about: dict[str, str]
    """Hospital, query, classes, digest, reason; as the event needs."""
    previous: str
    """Digest of the line before, zeros for the first."""

    def line(self) -> str:
        """As it stands in the file."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the line."""
        return digest_bytes(self.line().encode())


def _damaged(path: Path, number: int) -> OutputsError:
    return OutputsError(
        f"the record does not follow from line {number - 1} to line {number}",
        remedy="Somebody changed it. Keep the file, look into it, and begin a new one.",
        file=path,
        code="audit-broken",
    )


def read_record(path: Path) -> Iterator[Entry]:
    """Every entry, the oldest first, each held against the one before.

    Raises:
        OutputsError: a line is no entry or does not follow, code ``audit-broken``.
    """
    if not path.is_file():
        return
    previous = FIRST
    with path.open(encoding="utf-8", errors="surrogateescape") as stream:
        for number, line in enumerate(stream, 1):
            try:
                entry = Entry.model_validate_json(line)
            except ValidationError:
                raise _damaged(path, number) from None
            if entry.number != number or entry.previous != previous or entry.line() + "\n" != line:
                raise _damaged(path, number)
            previous = entry.digest
            yield entry


def record(path: Path, event: Event, about: dict[str, str], clock: Callable[[], float] = time.time) -> Entry:
    """Add an entry, on the disk before this returns; one process at a time.

    Raises:
        OutputsError: the record is broken; nothing is added, so nothing is done that it should hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        last = next(iter(deque(read_record(path), maxlen=1)), None)
        entry = Entry(
            number=1 if last is None else last.number + 1,
            time=clock(),
            event=event,
            about=about,
            previous=FIRST if last is None else last.digest,
        )
        stream.write(entry.line() + "\n")
        stream.flush()
        os.fsync(stream.fileno())
        return entry


def count_since(path: Path, event: Event, start: float) -> int:
    """How many entries of an event are not older than ``start``."""
    return sum(entry.event == event and entry.time >= start for entry in read_record(path))
