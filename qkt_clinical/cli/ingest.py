"""``qkt ingest``: hospitals' files to arrays, and what speaks against a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qkt_clinical.catalog import STAGES
from qkt_clinical.cli.options import (
    EPILOG,
    HERE,
    Group,
    Json,
    Root,
    Sites,
    Workers,
    group,
    named_sites,
    print_json,
    say,
)
from qkt_clinical.common.console import progress, tell_warnings


class _SiteOrCommand(Group):
    """``qkt ingest [SITE]...`` and ``qkt ingest check``: a first word that is no command is a site."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = [a for a in args if not a.startswith("-")]
        if "--help" not in args and (not words or words[0] not in self.commands):
            args = ["run", *args]
        return super().parse_args(ctx, args)


ingest_app = group(
    cls=_SiteOrCommand,
    help=f"{STAGES['ingest'].capitalize()}.",
)


@ingest_app.command("run", epilog=EPILOG)
def ingest(sites: Sites = None, root: Root = HERE, workers: Workers = None, as_json: Json = False) -> None:
    """Turn hospitals' files into arrays with patient-wise splits ('run' may be left out).

    Interrupted, it goes on where it was; files that were decoded before are not decoded again.
    """
    from qkt_clinical.common.workers import cores
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.ingest import held_back_counts, held_back_warnings, ingest_site, warnings_of

    params = load_params(root)
    done: dict[str, dict[str, Any]] = {}
    for site in named_sites(params, sites):
        with progress(f"ingest {site}", quiet=as_json) as step:
            manifest = ingest_site(root, site, params, workers=workers or cores(), progress=step)
        done[site] = {"images": manifest.count, "rejected": manifest.rejected, "patients": manifest.patients}
        apart = held_back_counts(root, site)
        if apart is not None:
            done[site]["held_back"] = {"images": apart[0], "rejected": apart[1]}
        warnings = [*warnings_of(manifest, params.ingest.splits.model_dump()), *held_back_warnings(apart)]
        tell_warnings("ingest", site, warnings)
        if not as_json:
            rejected = sum(manifest.rejected.values())
            say(f"{site}: {manifest.count} images accepted, {rejected} files rejected")
            if apart is not None:
                say(f"{site}: {apart[0]} images held back for evaluation, {apart[1]} files rejected")
    if as_json:
        print_json(done)


@ingest_app.command("check", epilog=EPILOG)
def ingest_check(
    folder: Annotated[Path, typer.Argument(help="Any folder with files of images.")],
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Say for every file of a folder whether it can be read; exit code 1 if one cannot."""
    from qkt_clinical.common.workers import cores
    from qkt_clinical.ingest import check_folder, reasons

    with progress("check", quiet=as_json) as step:
        rows = check_folder(folder, workers=workers or cores(), progress=step)
    rejected = [r for r in rows if r["code"] is not None]
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            say(f"{row['file']}: {'rejected, ' + row['code'] if row['code'] else 'accepted'}")
        for code in sorted({r["code"] for r in rejected if r["code"]}):
            meaning, remedy = reasons[code]
            say(f"{code}: {meaning} {remedy}")
        say(f"{len(rows) - len(rejected)} accepted, {len(rejected)} rejected")
    if rejected:
        raise typer.Exit(1)


@ingest_app.command("locate", epilog=EPILOG)
def ingest_locate(
    site: Annotated[str, typer.Argument(help="Name of the hospital.")],
    ids: Annotated[list[str], typer.Argument(help="File ids of its integrity page.")],
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Say at the hospital which files some ids stand for; exit code 1 if one is unknown."""
    from qkt_clinical.ingest import locate

    known = locate(root, site)
    found = {name: known.get(name) for name in ids}
    if as_json:
        print_json(found)
    else:
        for name, path in found.items():
            say(f"{name}: {path or 'unknown'}")
    if None in found.values():
        raise typer.Exit(1)


@ingest_app.command("leakage", epilog=EPILOG)
def ingest_leakage(root: Root = HERE, as_json: Json = False) -> None:
    """Say where one hospital trains on what another is tested on, by hashes and salted patient ids.

    Exit code 1 if one trains on the same pixels or patients; images that only look alike are told.
    """
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.ingest import find_crossings

    crossings = find_crossings(root, load_params(root).sites)
    if as_json:
        print_json([c._asdict() for c in crossings])
    else:
        for c in crossings:
            say(f"{c.trains} trains on {c.images} test images of {c.tests}; {c.alike} more look alike")
            if c.patients:
                say(f"  patients at {c.tests}: {', '.join(c.patients)}")
        say(f"{len(crossings)} pairs of hospitals share images or patients between training and test")
    if any(c.images or c.patients for c in crossings):
        raise typer.Exit(1)
