"""Locks between processes. The system releases them when the process ends, however it ends.

They hold within one machine's file system. A process that takes a lock twice waits for itself, so only the
outermost caller (a command, a stage or a job) takes the lock of a query.
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qkt_clinical.config.workspace import Workspace, check_name
from qkt_clinical.errors import QueryError, refused_by_system

PATIENCE_S = 0.2
"""Whoever only looks whether somebody works on a query holds its lock for a moment, too."""


class Busy(QueryError):
    """Another process is working on the query."""

    code = "job-running"


@contextmanager
def lock(path: Path, *, patience_s: float = math.inf) -> Iterator[None]:
    """Hold a file lock within the block; the lock file stays.

    Raises:
        BlockingIOError: another process held it for ``patience_s`` seconds.
        QktError: the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise refused_by_system(error) from error
    give_up = time.monotonic() + patience_s
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    raise
            except OSError as error:  # a file system without locks
                raise refused_by_system(error) from error
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)  # which gives the lock back


@contextmanager
def hold_query(root: Path, hospital: str, query: str, *, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold a query's lock: only its holder writes the query's plan, student, evaluation and verdict.

    Raises:
        ConfigError: a name that is none.
        Busy: another process works on it.
    """
    folder = Workspace(root).scratch / "jobs"
    name = f"{check_name(hospital, 'site')}.{check_name(query, 'query')}.lock"
    with ExitStack() as held:
        try:
            held.enter_context(lock(folder / name, patience_s=patience_s))
        except BlockingIOError:
            raise Busy(
                "another process works on this query",
                remedy=f"'qkt query status {hospital} {query}' shows how far a job is; when it has ended, "
                "run the same command again.",
                site=hospital,
            ) from None
        yield
