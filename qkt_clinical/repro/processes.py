"""Stages in processes of this machine: each has loaded DVC once and makes one stage after the other."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path

from qkt_clinical.errors import Boundary, visible
from qkt_clinical.repro.with_dvc import reproduce_stage

PATIENCE_S = 10.0
"""From the request to stop to the end by force."""


def _end_with_parent() -> None:
    """End this process and what it has started when its parent has ended, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)


def serve(requests: Connection, root: Path, environment: Mapping[str, str]) -> None:
    """Make stages until there is none left: name and log file in, ``made``, ``unchanged`` or ``failed`` out.

    What DVC and the stage print goes to the log file.
    """
    os.setsid()  # a group of its own: Ctrl-C reaches the caller alone, who ends all of it
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    os.chdir(root)
    with contextlib.suppress(EOFError):
        while True:
            name, log = requests.recv()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            os.close(descriptor)
            made = False
            with Boundary() as end:
                made = reproduce_stage(Path(), name)
            if end.error is not None:
                print(visible(f"error [{end.error.code}]: {end.error}"), file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            requests.send("failed" if end.error is not None else "made" if made else "unchanged")


class Process:
    """A process that makes stages."""

    def __init__(self, root: Path, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")  # nothing of this process' locks and threads
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, root, dict(environment)))
        self._process.start()
        self._lost = False
        theirs.close()

    def run(self, name: str, log: Path) -> str:
        """Make a stage: ``made``, ``unchanged`` or ``failed``; also ``failed`` where the process died."""
        try:
            self._ours.send((name, os.fspath(log)))
            outcome: str = self._ours.recv()
        except (EOFError, OSError):
            self._lost = True
            self._send(signal.SIGKILL)  # what it had started would go on writing
            return "failed"
        return outcome

    @property
    def alive(self) -> bool:
        """Whether it can make another stage."""
        return not self._lost and self._process.is_alive()

    def stop(self) -> None:
        """End it and what it has started: by request, after some seconds by force."""
        self._send(signal.SIGTERM)
        self._process.join(PATIENCE_S)
        self._send(signal.SIGKILL)
        self._process.join()

    def _send(self, number: signal.Signals) -> None:
        """To the process and all that it has started, which are one group, also when it has ended."""
        pid = self._process.pid
        assert pid is not None
        try:
            os.killpg(pid, number)
        except (ProcessLookupError, PermissionError):  # all have ended, or it has no group yet
            if self._process.is_alive():
                os.kill(pid, number)
