"""Options and helpers shared by the commands of ``qkt``."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from qkt_clinical.catalog import Device
from qkt_clinical.errors import ConfigError, visible

if TYPE_CHECKING:
    from qkt_clinical.config.params import Params
    from qkt_clinical.config.query import QueryRef

Sites = Annotated[list[str] | None, typer.Argument(help="Hospitals; all of params.yaml where none is named.")]

HospitalArgument = Annotated[
    str | None, typer.Argument(help="The asking hospital; all queries where none is named.")
]

QueryArgument = Annotated[str | None, typer.Argument(help="Name of the query file without '.yaml'.")]

Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Processes that decode; one per core.", show_default=False),
]


def named_sites(params: Params, sites: list[str] | None) -> list[str]:
    """The hospitals named on the command line, or all of them."""
    return list(sites) if sites else list(params.sites)


def named_queries(params: Params, hospital: str | None, query: str | None) -> list[tuple[str, str]]:
    """The queries meant: one, all of a hospital, or all."""
    if hospital and query:
        return [(hospital, query)]
    chosen = [(r.hospital, r.query) for _, r in sorted(params.queries.items())]
    if hospital:
        chosen = [c for c in chosen if c[0] == hospital]
    if not chosen:
        raise ConfigError(
            f"no query of {hospital or 'any hospital'} in params.yaml",
            remedy="Name hospital and query, or add the query to params.yaml.",
        )
    return chosen


def named_refs(params: Params, hospital: str | None, query: str | None) -> list[QueryRef]:
    """:func:`named_queries` as references."""
    from qkt_clinical.config.query import QueryRef

    return [QueryRef(hospital=h, query=q) for h, q in named_queries(params, hospital, query)]


class Group(TyperGroup):
    """A command group whose help option has a Boolean default.

    Typer checks ``None`` with pydantic, which loads longer than all the rest of ``qkt COMMAND --help``.
    """

    def get_help_option(self, ctx: Any) -> Any:
        """Typer's own, with a default of its type."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option


def group(cls: type[Group] = Group, **settings: Any) -> typer.Typer:
    """A group of commands, with what all of them have in common.

    Help is plain: to load Rich costs half of what ``qkt --help`` may cost in all.
    """
    return typer.Typer(
        cls=cls, epilog=EPILOG, pretty_exceptions_enable=False, rich_markup_mode=None, **settings
    )


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
    """Print a command's result as JSON; unprintable characters are escaped.

    Strict JSON in any locale: numbers that are not finite are null, and of names that are no text in UTF-8
    the bytes that are none stand as their escapes.
    """
    text = json.dumps(_strict(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    plain = (sys.stdout.encoding or "utf-8").lower().replace("-", "") != "utf8"

    def shows(character: str) -> bool:
        return character == "\n" or (character.isprintable() and (character.isascii() or not plain))

    print("".join(c if shows(c) else json.dumps(c)[1:-1] for c in text))


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {_strict(key): _strict(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(held) for held in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return "".join(visible(c) if "\ud800" <= c <= "\udfff" else c for c in value)
    return value


def say(line: str) -> None:
    """Print a line on standard output; unprintable characters are escaped."""
    print(visible(line))
