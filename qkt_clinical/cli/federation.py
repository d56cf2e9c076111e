"""``qkt federation``: hospitals' own machines as one federation, on NVIDIA FLARE."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkt_clinical.cli.options import EPILOG, HERE, Json, Root, group, print_json, say
from qkt_clinical.errors import ConfigError, visible

if TYPE_CHECKING:
    from qkt_clinical.config.params import Params
    from qkt_clinical.federation.server import FederationOutcome

federation_app = group(
    no_args_is_help=True,
    help="Hospitals' own machines as one federation, on NVIDIA FLARE (extra 'federation').",
)
Out = Annotated[Path, typer.Option("--out", help="Folder for everything that is made.", file_okay=False)]
Kit = Annotated[
    Path, typer.Option("--kit", help="An administrator's startup kit.", file_okay=False, exists=True)
]
Patience = Annotated[int, typer.Option("--patience", min=1, help="Seconds to wait at most.")]
Queries = Annotated[
    list[str] | None,
    typer.Argument(metavar="[HOSPITAL/QUERY]...", help="All of params.yaml where none is named."),
]


def _show(outcomes: Mapping[str, FederationOutcome], as_json: bool) -> None:
    """Print all outcomes; exit code 1 if a query has no answer and no refusal."""
    if as_json:
        print_json({name: outcome.model_dump(mode="json") for name, outcome in outcomes.items()})
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("what", "state", "teachers", "fetched", "reason", box=None)
        for name, one in outcomes.items():
            moved = f"{one.bytes_moved / 1e6:.1f} MB" if one.bytes_moved else ""
            row = (name, one.state, ", ".join(one.teachers), moved, one.reason or "")
            table.add_row(*(Text(visible(cell)) for cell in row))
        Console().print(table)
    if any(o.state not in ("answered", "refused") for o in outcomes.values()):
        raise typer.Exit(1)


def _asked(params: Params, queries: list[str] | None) -> list[str]:
    from qkt_clinical.config.workspace import check_name
    from qkt_clinical.federation.run import named_queries

    if queries is None or not queries:
        return named_queries(params)
    for one in queries:
        if one.count("/") != 1:
            raise ConfigError(f"{one!r} is no query", remedy="Write HOSPITAL/QUERY.")
        hospital, _, query = one.partition("/")
        check_name(hospital, "site")
        check_name(query, "query")
    return queries


def _say(line: str) -> None:
    print(visible(line), file=sys.stderr, flush=True)


@federation_app.command("simulate", epilog=EPILOG)
def simulate(
    out: Out,
    root: Root = HERE,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Sites at work at once; all of them.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Every site and the server in FLARE's simulator: teachers are trained, all queries answered."""
    from qkt_clinical.common.extras import require_extra
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.federation import run

    params = load_params(root)
    require_extra("nvflare")
    _show(run.simulate(root, out, params, threads=threads or len(params.sites), say=_say), as_json)


@federation_app.command("poc", epilog=EPILOG)
def poc(
    out: Out,
    root: Root = HERE,
    sites: Annotated[
        str | None, typer.Option(help="With commas; all of params.yaml.", show_default=False)
    ] = None,
    port: Annotated[int, typer.Option(help="Of the server; administrators use the next one.")] = 8002,
    patience: Patience = 3600,
    as_json: Json = False,
) -> None:
    """The same with real processes on this machine: server, sites and an administrator, over TLS."""
    from qkt_clinical.common.extras import require_extra
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.federation import run

    params = load_params(root)
    require_extra("nvflare")
    named = [s.strip() for s in sites.split(",")] if sites else list(params.sites)
    _show(run.play(root, out, params, sites=named, port=port, patience_s=patience, say=_say), as_json)


@federation_app.command("kits", epilog=EPILOG)
def kits(
    out: Out,
    server: Annotated[str, typer.Option(help="Name by which the sites reach the server.")],
    admin: Annotated[str, typer.Option(help="Address of who submits jobs.")],
    port: Annotated[int, typer.Option(help="Of the server; administrators use the next one.")] = 8002,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Write startup kits for production: one folder each to hand to server, sites and administrator."""
    from qkt_clinical.common.extras import require_extra
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.federation import run

    require_extra("nvflare")
    params = load_params(root)
    made = run.provision(out, params.sites, server=server, port=port, admin=admin)
    for name in (server, *params.sites):
        run.write_local(made / name / "local", ".")
    run.serve(made / server, Path("storage"))
    found = {"kits": sorted(str(p) for p in made.iterdir() if p.is_dir())}
    if as_json:
        print_json(found)
    else:
        for kit in found["kits"]:
            say(kit)


@federation_app.command("submit", epilog=EPILOG)
def submit(
    kit: Kit,
    queries: Queries = None,
    contribute: Annotated[
        bool, typer.Option(help="Collect the sites' teachers first, or use those that the server keeps.")
    ] = True,
    wait: Annotated[
        bool, typer.Option(help="Wait for the answers, and submit again what a fault has stopped.")
    ] = False,
    patience: Patience = 3600,
    silence: Annotated[int, typer.Option(min=10, help="Seconds after which a silent site is missing.")] = 60,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Hand queries to a running server; each hospital answers those that lie in its own folder."""
    from qkt_clinical.common.extras import require_extra
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.federation import run

    require_extra("nvflare")
    params = load_params(root)
    asked = _asked(params, queries)
    if wait:
        done = run.attend(
            kit,
            params.sites,
            asked,
            contribute=contribute,
            patience_s=patience,
            silence_s=silence,
            say=_say,
        )
        _show({q: done[q] for q in asked}, as_json)
        return
    job = run.submit(kit, params.sites, asked, contribute=contribute, patience_s=patience, silence_s=silence)
    if as_json:
        print_json({"job": job})
    else:
        say(f"{job}: 'qkt federation status --kit {kit} {job}' shows how far it is")


@federation_app.command("status", epilog=EPILOG)
def status(
    kit: Kit,
    job: Annotated[str | None, typer.Argument(help="A running job; all jobs where none is named.")] = None,
    as_json: Json = False,
) -> None:
    """All jobs of a server, or how far the queries of a running one are."""
    from qkt_clinical.common.extras import require_extra
    from qkt_clinical.federation import run

    require_extra("nvflare")
    if job is not None:
        outcomes = run.ask_outcomes(kit, job)
        if as_json:
            print_json({name: one.model_dump(mode="json") for name, one in outcomes.items()})
            return
        for name, outcome in outcomes.items():
            say(outcome.line(name))
        return
    listed = run.list_jobs(kit)
    if as_json:
        print_json(listed)
    for one in () if as_json else listed:
        say(f"{one['job']}  {one['submitted']}  {one['state']}")


@federation_app.command("fetch", epilog=EPILOG)
def fetch(
    job: Annotated[str, typer.Argument(help="A finished job.")], kit: Kit, out: Out, as_json: Json = False
) -> None:
    """Fetch a finished job's outcomes, and the students that hospitals sent."""
    from qkt_clinical.common.extras import require_extra
    from qkt_clinical.federation import run

    require_extra("nvflare")
    _show(run.fetch(kit, job, out), as_json)


@federation_app.command("audit", epilog=EPILOG)
def audit(root: Root = HERE, as_json: Json = False) -> None:
    """This site's record of what it was asked and decided; exit code 1 if it was changed or its end cut."""
    from qkt_clinical.federation.audit import RECORD, read_record

    entries = list(read_record(root / RECORD))
    if as_json:
        print_json([entry.model_dump(mode="json") | {"digest": entry.digest} for entry in entries])
        return
    import datetime

    for entry in entries:
        when = datetime.datetime.fromtimestamp(entry.time, datetime.UTC).isoformat(timespec="seconds")
        about = ", ".join(f"{k} {v}" for k, v in sorted(entry.about.items()))
        say(f"{entry.number:5} {when} {entry.event}: {about}")
    say(f"{len(entries)} entries, unbroken; the last digest is {entries[-1].digest if entries else 'none'}")
