"""What a command is for people: progress, one line per error, and files for their owner alone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qkt_clinical.errors import Boundary, QktError, visible

if TYPE_CHECKING:
    from qkt_clinical.config.query import QueryRef

Step = Callable[[int, int], None]


@contextmanager
def progress(label: str, *, quiet: bool = False) -> Iterator[Step]:
    """Yield a function to call with (done, total). Progress goes to standard error.

    A bar on a terminal, else a plain line at the start of every quarter, both with the time that is left.
    """
    label = visible(label)
    if quiet:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        shown = -1
        start = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal shown
            quarter = 4 * done // max(1, total)
            if quarter != shown:
                shown = quarter
                left = (time.monotonic() - start) / done * (total - done) if done else 0.0
                words = f", about {left:.0f} s left" if left >= 1 else ""
                print(f"{label}: {done}/{total}{words}", file=sys.stderr, flush=True)

        yield line


def tell_skipped(ref: QueryRef, why: QktError) -> None:
    """Report on standard error a query that a stage skips."""
    print(visible(f"{ref.hospital}/{ref.query}: left out [{why.code}]: {why}"), file=sys.stderr)


def tell_warnings(stage: str, site: str, warnings: Sequence[tuple[str, str]]) -> None:
    """Print warnings, pairs of code and message, to standard error."""
    for code, words in warnings:
        print(visible(f"warning [{code}]: {words} (stage {stage}, site {site})"), file=sys.stderr)


def tell_set_aside(what: str, why: str) -> None:
    """Report on standard error an item that is skipped because it cannot be used."""
    print(f"{visible(what)}: set aside: {visible(why)}", file=sys.stderr)


LINES_OF_LOG = 12
"""Of a program that failed."""


def tell_log(label: str, log: Path) -> None:
    """Show on standard error the end of what a program printed, and where all of it is."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = ["(it printed nothing)"]
    for line in [line for line in lines if line.strip()][-LINES_OF_LOG:]:
        print(visible(f"  {label}: {line}"), file=sys.stderr)
    print(visible(f"  all of it: {log}"), file=sys.stderr)


@contextmanager
def errors_as_lines(stage: str | None = None) -> Iterator[None]:
    """End the process with one line on standard error and exit code 1, whatever went wrong."""
    try:
        with Boundary() as end:
            yield
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(1)
    if end.error is not None:
        print(visible(f"error [{end.error.code}]: {end.error.at(stage=stage)}"), file=sys.stderr)
        sys.exit(1)


@contextmanager
def owners_alone() -> Iterator[None]:
    """Files that the process creates within the block can be read by their owner only."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
