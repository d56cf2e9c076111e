"""``qkt``: the commands, each in its own module, which is imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from qkt_clinical import __version__
from qkt_clinical.cli import data, stages
from qkt_clinical.cli.benchmark import benchmark
from qkt_clinical.cli.federation import federation_app
from qkt_clinical.cli.ingest import ingest_app
from qkt_clinical.cli.options import EPILOG, group
from qkt_clinical.cli.query import query_app
from qkt_clinical.cli.registry import registry_app

app = group(
    name="qkt",
    help="Learn to recognise a diagnosis from other hospitals' models, without any image leaving a site.",
    no_args_is_help=True,
    add_completion=False,
)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


app.add_typer(ingest_app, name="ingest")
for command in (
    stages.train,
    stages.mask,
    stages.plan,
    stages.transfer,
    stages.evaluate,
    stages.gate,
    stages.report,
    stages.track,
):
    app.command(epilog=EPILOG)(command)
app.add_typer(query_app, name="query")
app.add_typer(federation_app, name="federation")
app.add_typer(registry_app, name="registry")
for other in (stages.summary, data.phantom, data.federate, benchmark, data.fetch):
    app.command(epilog=EPILOG)(other)


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Show one line per error, never a traceback, for what a user can put right."""
