"""The stages of the pipeline as commands: ``qkt train``, ``qkt mask`` and so on."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from qkt_clinical.cli.options import (
    HERE,
    HospitalArgument,
    Json,
    OnDevice,
    QueryArgument,
    Root,
    Sites,
    named_queries,
    named_refs,
    named_sites,
    print_json,
    say,
)
from qkt_clinical.common.console import progress, tell_skipped
from qkt_clinical.errors import ConfigError, visible

if TYPE_CHECKING:
    from qkt_clinical.records.summary import OthersSummary, QuerySummary

IMAGES = (
    "images of the query: own = the hospital's own; "
    "others = other hospitals' too, whose scanner and stain may give them away"
)


def train(sites: Sites = None, root: Root = HERE, device: OnDevice = None, as_json: Json = False) -> None:
    """Train each hospital's teacher on its own images."""
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.stages.train import train_site
    from qkt_clinical.training.processes import begin_processes, processes

    params = load_params(root)
    done = {}
    named = named_sites(params, sites)
    words = [*named, "--root", os.fspath(root), *(("--device", device) if device else ())]
    program = ("qkt_clinical.cli", "train", *words, *(("--json",) if as_json else ()))
    with begin_processes(params.train.processes, program, device or params.device):
        first = processes().first
        for site in named:
            with progress(f"train {site}", quiet=as_json or not first) as step:
                done[site] = train_site(root, site, params, device=device, progress=step)
            if first and not as_json:
                say(f"{site}: balanced accuracy {done[site]['balanced_accuracy']:.3f} on validation images")
    if first and as_json:
        print_json(done)


def mask(sites: Sites = None, root: Root = HERE, as_json: Json = False) -> None:
    """Find out which classes each teacher knows, without any image."""
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.stages.mask import mask_site

    params = load_params(root)
    done = {}
    for site in named_sites(params, sites):
        found = mask_site(root, site, params)
        known = [c for c, k in zip(found.classes, found.known, strict=True) if k]
        done[site] = {
            "known": known,
            "scores": dict(zip(found.classes, found.scores, strict=True)),
            "threshold": found.threshold,
        }
        if not as_json:
            say(f"{site}: knows {', '.join(known)}")
    if as_json:
        print_json(done)


def plan(
    hospital: HospitalArgument = None, query: QueryArgument = None, root: Root = HERE, as_json: Json = False
) -> None:
    """Choose the relevant teachers of a query and fetch their bundles."""
    from qkt_clinical.common.locks import hold_query
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.qkt.planning import images_apart
    from qkt_clinical.stages.plan import plan_query

    params = load_params(root)
    done = []
    for site, name in named_queries(params, hospital, query):
        with hold_query(root, site, name):
            made = plan_query(root, site, name, params)
        done.append(made.model_dump(mode="json"))
        if not as_json:
            say(f"{site}/{name}: {', '.join(made.relevant)}; {made.bytes_moved:,} bytes")
            for teacher in made.teachers:
                apart = images_apart(teacher.image_shift)
                say(f"  {'+' if teacher.relevant else '-'} {teacher.site}: {teacher.reason}{apart}")
    if as_json:
        print_json(done)


def transfer(
    hospital: HospitalArgument = None,
    query: QueryArgument = None,
    root: Root = HERE,
    device: OnDevice = None,
    as_json: Json = False,
) -> None:
    """Answer a query on the asking hospital's images: phase 1 and phase 2.

    Makes the plan first where there is none.
    """
    from qkt_clinical.common.locks import hold_query
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.config.workspace import Workspace
    from qkt_clinical.stages.plan import plan_query
    from qkt_clinical.stages.transfer import transfer_query

    params = load_params(root)
    done = []
    for site, name in named_queries(params, hospital, query):
        with hold_query(root, site, name):
            if not (Workspace(root).fetched(site, name) / "plan.json").is_file():
                plan_query(root, site, name, params)
            with progress(f"transfer {site}/{name}", quiet=as_json) as step:
                phases = transfer_query(root, site, name, params, device=device, progress=step)
        done.append({"hospital": site, "query": name, **phases.model_dump(mode="json")})
        if not as_json:
            rate = phases.phase2.false_query_rate
            told = "not told" if rate is None else f"{rate:.0%}"
            say(f"{site}/{name}: answered by {phases.method}; false-query rate on own images {told}")
            if phases.unanswered:
                say("  not answered: by what class means say, own classes would cost more than the budget")
            elif not phases.phase2.within_budget:
                say("  the teachers confuse the hospital's own classes by more than the budget")
            for teacher in (t for t in phases.screening if not t.included):
                say(f"  {teacher.site} excluded: {teacher.reason}")
    if as_json:
        print_json(done)


def evaluate(
    hospital: HospitalArgument = None,
    query: QueryArgument = None,
    root: Root = HERE,
    device: OnDevice = None,
    as_json: Json = False,
) -> None:
    """Measure every answer on held-out patients, before and after; one query alone where it is named.

    Of several, a query without test images here is left out.
    """
    from qkt_clinical.common.locks import hold_query
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.stages.evaluate import NoTestImages, evaluate_one, evaluate_queries

    params = load_params(root)
    if hospital or query:
        rows: tuple[QuerySummary, ...] = ()
        for ref in named_refs(params, hospital, query):
            try:
                with hold_query(root, ref.hospital, ref.query):
                    rows += (evaluate_one(root, ref, params, sites=params.sites, device=device),)
            except NoTestImages as error:
                if query:
                    raise
                tell_skipped(ref, error)
    else:
        rows = evaluate_queries(root, params, device=device, skipped=tell_skipped)
    if as_json:
        print_json([row.model_dump(mode="json") for row in rows])
    else:
        _table(rows)


def gate(
    hospital: HospitalArgument = None, query: QueryArgument = None, root: Root = HERE, as_json: Json = False
) -> None:
    """Judge every answer by the rules of params.yaml, or one; exit code 1 if one does not pass.

    An answer that nobody has measured is not judged, and does not pass.
    """
    from qkt_clinical.common.locks import hold_query
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.stages.gate import gate_one, gate_queries

    params = load_params(root)
    refs = named_refs(params, hospital, query)
    if hospital and query:
        with hold_query(root, hospital, query):
            verdicts = [gate_one(root, refs[0], params)]
    else:
        verdicts = gate_queries(root, params, refs, skipped=tell_skipped)
    if as_json:
        print_json([v.model_dump(mode="json") for v in verdicts])
    else:
        for v in verdicts:
            say(f"{v.hospital}/{v.query}: {'passed' if v.passed else 'not passed'}")
            for r in v.rules:
                say(f"  {r.said}: {'met' if r.passed else 'NOT MET'} ({r.meaning})")
    if len(verdicts) < len(refs) or not all(v.passed for v in verdicts):
        raise typer.Exit(1)


def report(root: Root = HERE, as_json: Json = False) -> None:
    """Write the HTML report, reports/index.html and a page per query."""
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.report import write_figure, write_report

    params = load_params(root)
    written = [write_report(root, params), write_figure(root)]
    if as_json:
        print_json({"files": [p.as_posix() for p in written]})
    else:
        say(f"report: {written[0]}")


def track(root: Root = HERE, as_json: Json = False) -> None:
    """Mirror the outputs to MLflow; running it again changes nothing, and rebuilds an empty database."""
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.tracking.mirror import track as mirror

    done = mirror(root, load_params(root))
    if as_json:
        print_json(done)
    else:
        say(f"track: {len(done['models'])} registered models")


def summary(root: Root = HERE, as_json: Json = False) -> None:
    """Print the table of answered queries, and where report and database are."""
    from qkt_clinical.config.workspace import Workspace
    from qkt_clinical.records.reading import read_record
    from qkt_clinical.records.summary import QuerySummaries

    path = Workspace(root).reports / "queries.json"
    if not path.exists():
        raise ConfigError("no results yet", remedy="Run 'dvc repro' or 'qkt evaluate'.", file=path)
    rows = read_record(QuerySummaries, path).root
    if as_json:
        print_json([row.model_dump(mode="json") for row in rows])
        return
    _table(rows)
    for label, file in (("report", "reports/index.html"), ("MLflow database", "mlflow.db")):
        if (root / file).exists():
            say(f"{label}: {(root / file).resolve()}")


def _table(rows: Sequence[QuerySummary]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def change(row: QuerySummary | OthersSummary, key: str) -> str:
        return f"{getattr(row.before, key):.3f} → {getattr(row.after, key):.3f}"

    keys = ("query_accuracy", "retained_accuracy", "balanced_accuracy")

    table = Table(title="Accuracy on held-out patients: own model → answer")
    for column in (
        *("hospital", "query", "method", "images"),
        *("query acc.", "retained acc.", "balanced acc.", "teachers"),
    ):
        table.add_column(column, overflow="fold")
    table.add_column("moved", justify="right")
    for row in rows:
        cells = (
            row.hospital,
            row.query,
            row.method,
            row.test_images,
            *(change(row, k) for k in keys),
            ", ".join(row.teachers),
            f"{row.bytes_moved / 1e6:.1f} MB",
        )
        table.add_row(*(Text(visible(cell)) for cell in cells))
        if row.others is not None:
            beside = ("", "", "", "others", *(change(row.others, k) for k in keys), "", "")
            table.add_row(*(Text(cell) for cell in beside), style="dim")
    # Without a terminal the width is unknown; a wide table reads better in a log than a folded one.
    console = Console() if sys.stdout.isatty() else Console(width=132)
    console.print(table)
    if rows:
        console.print(Text(IMAGES))
