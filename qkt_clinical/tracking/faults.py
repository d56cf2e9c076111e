"""Typed errors for failures of MLflow, its store or its server."""

from __future__ import annotations

import re

from qkt_clinical.errors import QktError, by_disk, visible

MAX_TEXT = 200
LOGIN = re.compile(r"//[^/@\s]*@")
"""Name and password in an address."""
DENIED = {"UNAUTHENTICATED", "PERMISSION_DENIED"}
UNREACHABLE = ("Max retries exceeded", "Connection refused", "Failed to establish", "timed out")
FAILING = re.compile(r"too many 5\d\d error responses|error code 5\d\d|\b5\d\d Server Error")
BUSY = ("database is locked", "database table is locked")
DAMAGED = ("disk image is malformed", "file is not a database")

SERVER = "Check track.uri in params.yaml and that the server or database is there."


def no_driver(error: ModuleNotFoundError) -> QktError:
    """A package that the address of the store needs is not installed, code ``no-driver``."""
    name = str(error.name or "").split(".")[0]
    wanted = "psycopg2-binary" if name.startswith("psycopg") else name
    hint = " and write postgresql+psycopg2:// in it" if wanted != name else ""
    return QktError(
        f"track.uri needs the Python package {name!r}, which is not installed",
        remedy=f"Run 'pip install {wanted}'{hint}, or set another track.uri in params.yaml.",
        code="no-driver",
        stage="track",
    )


def refused_by_store(error: Exception) -> QktError:
    """The typed error for a refusal by MLflow, its database or its server.

    Codes ``disk-full`` and ``system`` where the disk did, ``database-busy``, ``damaged-database``,
    ``mlflow-login``, else ``mlflow``. Passwords in addresses are left out.
    """
    if (refused := by_disk(error)) is not None:
        return refused
    text = LOGIN.sub("//", str(error).strip())
    said = visible(next(iter(text.splitlines()), type(error).__name__)[:MAX_TEXT])
    status = getattr(getattr(error, "response", None), "status_code", None)
    if any(words in text for words in BUSY):
        what, remedy, code = (
            "its database is locked by another program",
            "Wait until that has ended, then run the same command again.",
            "database-busy",
        )
    elif any(words in text for words in DAMAGED):
        what, remedy, code = (
            "its database is damaged",
            "Restore it from a backup, or move it away and run 'qkt track', which makes it again from the "
            "workspace.",
            "damaged-database",
        )
    elif status in (401, 403) or getattr(error, "error_code", None) in DENIED:
        what, remedy, code = (
            "the server wants another login, or does not let this one do that",
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ask whoever runs the server.",
            "mlflow-login",
        )
    elif FAILING.search(text):
        what, remedy, code = (
            f"the server failed: {said}",
            "Look into the server's log, or run the same command again later.",
            "mlflow",
        )
    elif any(words in text for words in UNREACHABLE):
        what, remedy, code = f"the server cannot be reached: {said}", SERVER, "mlflow"
    else:
        what, remedy, code = said, SERVER, "mlflow"
    return QktError(f"MLflow: {what}", remedy=remedy, code=code, stage="track")
