"""The command line ``qkt``: thin, one module per group of commands."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors that a user can act on end as one line on standard error and exit code 1."""
    from qkt_clinical.cli.app import app_for
    from qkt_clinical.common.console import errors_as_lines, owners_alone

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal's encoding lacks is escaped, no error
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if arguments is None else list(arguments)
    with errors_as_lines(), owners_alone():
        app_for(words)(args=words)
