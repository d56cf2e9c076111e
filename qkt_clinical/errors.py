"""One small hierarchy of errors: each has a stable code and a remedy, and ends a command with one line."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType


@dataclass(frozen=True)
class Where:
    """The place an error belongs to. Paths are shown as given; never put patient data into any field."""

    stage: str | None = None
    site: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        parts = [
            f"{k} {v}" for k, v in (("stage", self.stage), ("site", self.site), ("file", self.file)) if v
        ]
        return ", ".join(parts)


class QktError(Exception):
    """Base of every error a user can meet.

    Args:
        message: what is wrong, in one sentence, expected against got.
        remedy: what to do next.
        code: stable identifier, lower case with hyphens; the class default where not given.
        stage, site, file: where it happened.
    """

    code = "error"

    def __init__(
        self,
        message: str,
        *,
        remedy: str,
        code: str | None = None,
        stage: str | None = None,
        site: str | None = None,
        file: str | Path | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.code = code or type(self).code
        self.where = Where(stage=stage, site=site, file=None if file is None else str(file))

    def at(self, *, stage: str | None = None, site: str | None = None) -> QktError:
        """Return the same error with the stage and site filled in where they were unknown."""
        self.where = Where(
            stage=self.where.stage or stage, site=self.where.site or site, file=self.where.file
        )
        return self

    def __str__(self) -> str:
        where = str(self.where)
        return f"{self.message}{f' ({where})' if where else ''}. {self.remedy}"

    def as_dict(self) -> dict[str, str | None]:
        """JSON form: code, message, remedy, stage, site, file."""
        return {
            "code": self.code,
            "message": self.message,
            "remedy": self.remedy,
            "stage": self.where.stage,
            "site": self.where.site,
            "file": self.where.file,
        }


class ConfigError(QktError):
    """params.yaml, site.yaml or a query file is not valid."""

    code = "config"


class SourceError(QktError):
    """A site's source as a whole cannot be used: absent, empty, or without one usable image."""

    code = "source"


class FileRejected(QktError):
    """One input file cannot be used; ingest records ``code`` and goes on with the rest."""

    code = "unreadable"


class BundleError(QktError):
    """A teacher or student bundle fails validation and is not used."""

    code = "bundle"


class EncoderError(QktError):
    """The weights of a pretrained encoder cannot be used, or it cannot take the images."""

    code = "encoder"


class PreparedError(QktError):
    """A prepared site is missing, incomplete or does not match its manifest."""

    code = "prepared"


class QueryError(QktError):
    """A query cannot be answered as asked."""

    code = "query"


class DeviceError(QktError):
    """The device asked for is not there."""

    code = "device"


class FetchError(QktError):
    """A download failed or its checksum is wrong."""

    code = "fetch"


class InputError(QktError):
    """Images handed to a model for prediction cannot be used."""

    code = "input"


class OutputsError(QktError):
    """An output of an earlier stage that report or track reads is missing or malformed."""

    code = "outputs"


class PolicyError(QktError):
    """A site's policy does not let something leave, or cannot be read, which is the same."""

    code = "policy"


DISK_FULL, NOT_ALLOWED = (errno.ENOSPC, errno.EDQUOT), (errno.EROFS, errno.EACCES, errno.EPERM)
FULL = ("os error 28", "No space left on device", "disk is full", "Disk quota exceeded")
"""How libraries word a full disk in errors of their own."""
REFUSED = ("os error 13", "os error 30", "readonly database")
"""How they word what may not be written."""
SHORT = ("out of memory", "not enough memory", "can't allocate memory")
"""How torch words it when memory on CPU or GPU does not suffice."""


def _disk_full() -> QktError:
    return QktError(
        "the disk is full", remedy="Make room on it, then run the same command again.", code="disk-full"
    )


def _refused(reason: str) -> QktError:
    return QktError(
        f"the operating system refused: {reason}",
        remedy="Check disk and permissions of the workspace, then run the same command again.",
        code="system",
    )


def refused_by_system(error: OSError) -> QktError:
    """A refusal by the operating system, such as a write to a full disk; no file is named.

    Codes ``disk-full`` and ``system``.
    """
    if error.errno in DISK_FULL:
        return _disk_full()
    return _refused(os.strerror(error.errno) if error.errno else type(error).__name__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes, each once."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__cause__, one.__context__]


def by_disk(error: BaseException) -> QktError | None:
    """The refusal by the disk among an error and its causes, or None.

    Libraries wrap the system's errors in their own. Codes ``disk-full`` and ``system``.
    """
    chain = list(_chain(error))
    numbers = {one.errno for one in chain if isinstance(one, OSError)}
    texts = [str(one) for one in chain if not isinstance(one, QktError)]
    if numbers & set(DISK_FULL) or any(word in text for text in texts for word in FULL):
        return _disk_full()
    if numbers & set(NOT_ALLOWED) or any(word in text for text in texts for word in REFUSED):
        return _refused("it may not be read or written")
    return None


def typed(error: Exception) -> QktError:
    """The error itself if it is typed, else a typed error with a remedy.

    Codes ``disk-full``, ``out-of-memory``, ``system``, ``internal``. The text of an untyped error may hold
    names or contents of files and is left out.
    """
    if isinstance(error, QktError):
        return error
    if (refused := by_disk(error)) is not None:
        return refused
    if isinstance(error, OSError):
        return refused_by_system(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in SHORT)
    ):
        return QktError(
            "memory does not suffice",
            remedy="Close other programs, or use another --device, then run the same command again.",
            code="out-of-memory",
        )
    return QktError(
        f"an unforeseen {type(error).__name__}{_place(error)}",
        remedy="This is a fault of qkt-clinical: report it with this line.",
        code="internal",
    )


def _place(error: Exception) -> str:
    """The last line of this package in the traceback of an error."""
    package = Path(__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).is_relative_to(package):
            return f" in {Path(frame.filename).relative_to(package.parent).as_posix()}, line {frame.lineno}"
    return ""


class Boundary(AbstractContextManager["Boundary"]):
    """A block that no error leaves: ``error`` is the typed error that ended it, or None.

    Only where something ends, a command or a reply, since it hides what went wrong from the code around it.
    What ends the process, such as KeyboardInterrupt, passes.
    """

    error: QktError | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = typed(error) if isinstance(error, Exception) else None
        return self.error is not None


def visible(text: str) -> str:
    """Text for a terminal, a log or a record: characters that are not printable are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
