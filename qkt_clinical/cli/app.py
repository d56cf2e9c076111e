"""``qkt``: the commands, each in its own module, which is imported when it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from qkt_clinical import __version__
from qkt_clinical.cli import data, stages
from qkt_clinical.cli.benchmark import benchmark
from qkt_clinical.cli.encoder import encoder_app
from qkt_clinical.cli.federation import federation_app
from qkt_clinical.cli.ingest import ingest_app
from qkt_clinical.cli.options import EPILOG, group
from qkt_clinical.cli.query import query_app
from qkt_clinical.cli.registry import registry_app
from qkt_clinical.cli.repro import repro

Command = tuple[str, typer.Typer | Callable[..., None]]

COMMANDS: tuple[Command, ...] = (
    ("ingest", ingest_app),
    *(
        (command.__name__, command)
        for command in (
            stages.train,
            stages.mask,
            stages.plan,
            stages.transfer,
            stages.evaluate,
            stages.gate,
            stages.report,
            stages.track,
        )
    ),
    ("query", query_app),
    ("federation", federation_app),
    ("registry", registry_app),
    ("encoder", encoder_app),
    *((c.__name__, c) for c in (repro, stages.summary, data.phantom, data.federate, benchmark, data.fetch)),
)


def app_for(arguments: Sequence[str]) -> typer.Typer:
    """``qkt`` with every command in the list, and the parameters of the one that ``arguments`` name.

    To read the parameters of all commands takes longer than all the rest of ``qkt --help``.
    """
    app = group(
        name="qkt",
        help="Learn to recognise a diagnosis from other hospitals' models, without any image leaving a site.",
        no_args_is_help=True,
        add_completion=False,
    )
    app.callback()(_main)
    called = next((a for a in arguments if not a.startswith("-")), None)
    for name, command in COMMANDS:
        if isinstance(command, typer.Typer):
            app.add_typer(command if name == called else group(help=command.info.help), name=name)
        else:
            app.command(name, epilog=EPILOG)(command if name == called else _outline(command))
    return app


def _outline(command: Callable[..., None]) -> Callable[[], None]:
    """A command that has the other's help and no parameters."""

    def outline() -> None: ...

    outline.__doc__ = command.__doc__
    return outline


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Show one line per error, never a traceback, for what a user can put right."""
