"""What the commands of ``qkt`` have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from qkt_clinical.catalog import Device

EPILOG = "Exit codes: 0 ok, 1 failed (the message says what to do), 2 wrong use."
HERE = Path()

Root = Annotated[
    Path, typer.Option("--root", "-C", help="Workspace: the folder with params.yaml.", file_okay=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
OnDevice = Annotated[
    Device | None, typer.Option("--device", help="Overrides 'device' in params.yaml.", show_default=False)
]


def print_json(value: Any) -> None:
    """A command's result on standard output."""
    print(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))
