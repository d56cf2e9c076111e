"""What ended a job, as a typed error whose words hold nothing of what the job had read."""

from __future__ import annotations

import traceback
from pathlib import Path

import qkt_clinical
from qkt_clinical.errors import QktError, refused_by_system

FULL = ("os error 28", "No space left on device", "disk is full")
"""How libraries word a full disk in errors of their own."""
SHORT = ("out of memory", "not enough memory", "can't allocate memory")
"""How torch words it when memory on CPU or GPU does not suffice."""


def typed(error: Exception) -> QktError:
    """The error itself where it is typed, else what a person can do about it.

    Codes ``disk-full``, ``out-of-memory``, ``system``, ``internal``. The text of an untyped error may hold
    names or contents of files and is left out.
    """
    if isinstance(error, QktError):
        return error
    text = str(error)
    if isinstance(error, OSError) and not any(words in text for words in FULL):
        return refused_by_system(error)
    if any(words in text for words in FULL):
        return QktError(
            "the disk is full", remedy="Make room on it, then run the same command again.", code="disk-full"
        )
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in SHORT)
    ):
        return QktError(
            "memory does not suffice",
            remedy="Close other programs, or use another --device, then run the same command again.",
            code="out-of-memory",
        )
    return QktError(
        f"an unforeseen {type(error).__name__}{_place(error)}",
        remedy="This is a fault of qkt-clinical: report it with this line. 'qkt query resume' tries again.",
        code="internal",
    )


def _place(error: Exception) -> str:
    """The last line of this package that an error passed."""
    package = Path(qkt_clinical.__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).is_relative_to(package):
            return f" in {Path(frame.filename).relative_to(package.parent).as_posix()}, line {frame.lineno}"
    return ""
