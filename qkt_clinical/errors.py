"""One small hierarchy of errors: each has a stable code and a remedy, and ends a command with one line."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path


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
    """params.yaml, site.yaml or a query file says something that cannot be used."""

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


def refused_by_system(error: OSError) -> QktError:
    """What the operating system refused, such as to write to a full disk; no file is named.

    Codes ``disk-full`` and ``system``.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return QktError(
            "the disk is full", remedy="Make room on it, then run the same command again.", code="disk-full"
        )
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    return QktError(
        f"the operating system refused: {reason}",
        remedy="Check disk and permissions of the workspace, then run the same command again.",
        code="system",
    )


def visible(text: str) -> str:
    """Text for a terminal, a log or a record: what is no character that shows stands as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
