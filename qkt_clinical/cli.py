"""``qkt``: a thin command line over the library. Heavy rooms are imported inside commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from qkt_clinical import __version__
from qkt_clinical.catalog import (
    BENCHMARK_METHODS,
    STAGES,
    Device,
    EvaluationSplit,
    Method,
    Network,
    Partition,
    Regime,
)
from qkt_clinical.cli_federation import federation_app
from qkt_clinical.cli_options import EPILOG, HERE, Json, OnDevice, Root, print_json
from qkt_clinical.cli_query import query_app
from qkt_clinical.config import Params, QueryRef, Workspace, load_params
from qkt_clinical.console import errors_as_lines, progress, tell_skipped, tell_warnings
from qkt_clinical.errors import ConfigError, QktError
from qkt_clinical.locks import hold_query

app = typer.Typer(
    name="qkt",
    help="Learn to recognise a diagnosis from other hospitals' models, without any image leaving a site.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Sites = Annotated[list[str] | None, typer.Argument(help="Hospitals; all of params.yaml where none is named.")]
Hospital = Annotated[str | None, typer.Argument(help="The asking hospital; all queries where none is named.")]
Query = Annotated[str | None, typer.Argument(help="Name of the query file without '.yaml'.")]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Processes that decode; one per core.", show_default=False),
]


def _named_sites(params: Params, sites: list[str] | None) -> list[str]:
    return list(sites) if sites else list(params.sites)


def _named_queries(params: Params, hospital: str | None, query: str | None) -> list[tuple[str, str]]:
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


def _named_refs(params: Params, hospital: str | None, query: str | None) -> list[QueryRef]:
    return [QueryRef(hospital=h, query=q) for h, q in _named_queries(params, hospital, query)]


class _SiteOrCommand(TyperGroup):
    """``qkt ingest [SITE]...`` and ``qkt ingest check``: a first word that is no command is a site."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = [a for a in args if not a.startswith("-")]
        if "--help" not in args and (not words or words[0] not in self.commands):
            args = ["run", *args]
        return super().parse_args(ctx, args)


ingest_app = typer.Typer(
    cls=_SiteOrCommand,
    epilog=EPILOG,
    pretty_exceptions_enable=False,
    help=f"{STAGES['ingest'].capitalize()}.",
)
app.add_typer(ingest_app, name="ingest")


@ingest_app.command("run", epilog=EPILOG)
def ingest(sites: Sites = None, root: Root = HERE, workers: Workers = None, as_json: Json = False) -> None:
    """Turn hospitals' files into arrays with patient-wise splits ('run' may be left out).

    Interrupted, it goes on where it was; files that were decoded before are not decoded again.
    """
    from qkt_clinical.ingest import ingest_site, warnings_of
    from qkt_clinical.workers import cores

    params = load_params(root)
    done = {}
    for site in _named_sites(params, sites):
        with progress(f"ingest {site}", quiet=as_json) as step:
            manifest = ingest_site(root, site, params, workers=workers or cores(), progress=step)
        done[site] = {"images": manifest.count, "rejected": manifest.rejected, "patients": manifest.patients}
        tell_warnings("ingest", site, warnings_of(manifest, params.ingest.splits.model_dump()))
        if not as_json:
            rejected = sum(manifest.rejected.values())
            print(f"{site}: {manifest.count} images accepted, {rejected} files rejected")
    if as_json:
        print_json(done)


@ingest_app.command("check", epilog=EPILOG)
def ingest_check(
    folder: Annotated[Path, typer.Argument(help="Any folder of DICOM, NIfTI, image or npz files.")],
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Say for every file of a folder whether it can be read; exit code 1 if one cannot."""
    from qkt_clinical.ingest import check_folder, reasons
    from qkt_clinical.workers import cores

    with progress("check", quiet=as_json) as step:
        rows = check_folder(folder, workers=workers or cores(), progress=step)
    rejected = [r for r in rows if r["code"] is not None]
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            print(f"{row['file']}: {'rejected, ' + row['code'] if row['code'] else 'accepted'}")
        for code in sorted({r["code"] for r in rejected if r["code"]}):
            meaning, remedy = reasons[code]
            print(f"{code}: {meaning} {remedy}")
        print(f"{len(rows) - len(rejected)} accepted, {len(rejected)} rejected")
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
            print(f"{name}: {path or 'unknown'}")
    if None in found.values():
        raise typer.Exit(1)


@ingest_app.command("leakage", epilog=EPILOG)
def ingest_leakage(root: Root = HERE, as_json: Json = False) -> None:
    """Say where one hospital trains on what another is tested on, by hashes and salted patient ids.

    Exit code 1 if one trains on the same pixels or patients; images that only look alike are told.
    """
    from qkt_clinical.ingest import find_crossings

    crossings = find_crossings(root, load_params(root).sites)
    if as_json:
        print_json([c._asdict() for c in crossings])
    else:
        for c in crossings:
            print(f"{c.trains} trains on {c.images} test images of {c.tests}; {c.alike} more look alike")
            if c.patients:
                print(f"  patients at {c.tests}: {', '.join(c.patients)}")
        print(f"{len(crossings)} pairs of hospitals share images or patients between training and test")
    if any(c.images or c.patients for c in crossings):
        raise typer.Exit(1)


@app.command(epilog=EPILOG)
def train(sites: Sites = None, root: Root = HERE, device: OnDevice = None, as_json: Json = False) -> None:
    """Train each hospital's teacher on its own images."""
    from qkt_clinical.stages.train import train_site

    params = load_params(root)
    done = {}
    for site in _named_sites(params, sites):
        with progress(f"train {site}", quiet=as_json) as step:
            done[site] = train_site(root, site, params, device=device, progress=step)
        if not as_json:
            print(f"{site}: balanced accuracy {done[site]['balanced_accuracy']:.3f} on validation images")
    if as_json:
        print_json(done)


@app.command(epilog=EPILOG)
def mask(sites: Sites = None, root: Root = HERE, as_json: Json = False) -> None:
    """Find out which classes each teacher knows, without any image."""
    from qkt_clinical.stages.mask import mask_site

    params = load_params(root)
    done = {}
    for site in _named_sites(params, sites):
        found = mask_site(root, site, params)
        known = [c for c, k in zip(found.classes, found.known, strict=True) if k]
        done[site] = {
            "known": known,
            "scores": dict(zip(found.classes, found.scores, strict=True)),
            "threshold": found.threshold,
        }
        if not as_json:
            print(f"{site}: knows {', '.join(known)}")
    if as_json:
        print_json(done)


@app.command(epilog=EPILOG)
def plan(hospital: Hospital = None, query: Query = None, root: Root = HERE, as_json: Json = False) -> None:
    """Choose the relevant teachers of a query and fetch their bundles."""
    from qkt_clinical.query import plan_query

    params = load_params(root)
    done = []
    for site, name in _named_queries(params, hospital, query):
        with hold_query(root, site, name):
            made = plan_query(root, site, name, params)
        done.append(made.model_dump(mode="json"))
        if not as_json:
            print(f"{site}/{name}: {', '.join(made.relevant)}; {made.bytes_moved:,} bytes")
            for teacher in made.teachers:
                print(f"  {'+' if teacher.relevant else '-'} {teacher.site}: {teacher.reason}")
    if as_json:
        print_json(done)


@app.command(epilog=EPILOG)
def transfer(
    hospital: Hospital = None,
    query: Query = None,
    root: Root = HERE,
    device: OnDevice = None,
    as_json: Json = False,
) -> None:
    """Answer a query on the asking hospital's images: phase 1 and phase 2.

    Makes the plan first where there is none.
    """
    from qkt_clinical.query import plan_query
    from qkt_clinical.stages.transfer import transfer_query

    params = load_params(root)
    done = []
    for site, name in _named_queries(params, hospital, query):
        with hold_query(root, site, name):
            if not (Workspace(root).fetched(site, name) / "plan.json").is_file():
                plan_query(root, site, name, params)
            with progress(f"transfer {site}/{name}", quiet=as_json) as step:
                phases = transfer_query(root, site, name, params, device=device, progress=step)
        done.append({"hospital": site, "query": name, **phases})
        if not as_json:
            given = phases["phase2"]["given_away"]
            share = "a share" if given is None else f"{given:.1%}"
            print(f"{site}/{name}: answered by {phases['method']}; {share} of own images given away")
    if as_json:
        print_json(done)


@app.command(epilog=EPILOG)
def evaluate(
    hospital: Hospital = None,
    query: Query = None,
    root: Root = HERE,
    device: OnDevice = None,
    as_json: Json = False,
) -> None:
    """Measure every answer on held-out patients, before and after; one query alone where it is named.

    Of several, a query without test images here is left out.
    """
    from qkt_clinical.stages.evaluate import NoTestImages, evaluate_one, evaluate_queries

    params = load_params(root)
    if hospital or query:
        rows = []
        for ref in _named_refs(params, hospital, query):
            try:
                with hold_query(root, ref.hospital, ref.query):
                    rows.append(evaluate_one(root, ref, params, sites=params.sites, device=device))
            except NoTestImages as error:
                if query:
                    raise
                tell_skipped(ref, error)
    else:
        rows = evaluate_queries(root, params, device=device, skipped=tell_skipped)
    if as_json:
        print_json(rows)
    else:
        _table(rows)


@app.command(epilog=EPILOG)
def gate(hospital: Hospital = None, query: Query = None, root: Root = HERE, as_json: Json = False) -> None:
    """Judge every answer by the rules of params.yaml, or one; exit code 1 if one does not pass.

    An answer that nobody has measured is not judged, and does not pass.
    """
    from qkt_clinical.stages.gate import gate_one, gate_queries

    params = load_params(root)
    refs = _named_refs(params, hospital, query)
    if hospital and query:
        with hold_query(root, hospital, query):
            verdicts = [gate_one(root, refs[0], params)]
    else:
        verdicts = gate_queries(root, params, refs, skipped=tell_skipped)
    if as_json:
        print_json([v.model_dump(mode="json") for v in verdicts])
    else:
        for v in verdicts:
            print(f"{v.hospital}/{v.query}: {'passed' if v.passed else 'not passed'}")
            for r in v.rules:
                print(f"  {r.said}: {'met' if r.passed else 'NOT MET'} ({r.meaning})")
    if len(verdicts) < len(refs) or not all(v.passed for v in verdicts):
        raise typer.Exit(1)


@app.command(epilog=EPILOG)
def report(root: Root = HERE, as_json: Json = False) -> None:
    """Write the HTML report, reports/index.html and a page per query."""
    from qkt_clinical.report import write_figure, write_report

    params = load_params(root)
    written = [write_report(root, params), write_figure(root)]
    if as_json:
        print_json({"files": [p.as_posix() for p in written]})
    else:
        print(f"report: {written[0]}")


@app.command(epilog=EPILOG)
def track(root: Root = HERE, as_json: Json = False) -> None:
    """Mirror the outputs to MLflow; running it again changes nothing, and rebuilds an empty database."""
    from qkt_clinical.tracking import track as mirror

    done = mirror(root, load_params(root))
    if as_json:
        print_json(done)
    else:
        print(f"track: {len(done['models'])} registered models")


app.add_typer(federation_app, name="federation")
app.add_typer(query_app, name="query")

registry_app = typer.Typer(
    epilog=EPILOG,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Models registered in MLflow: which is in use, and who decided so.",
)
app.add_typer(registry_app, name="registry")
ModelName = Annotated[str, typer.Argument(help="teacher.<site> or student.<site>.<query>.")]
WhichVersion = Annotated[str, typer.Argument(help="A number or an alias: candidate, champion.")]


@registry_app.command("list", epilog=EPILOG)
def registry_list(root: Root = HERE, as_json: Json = False) -> None:
    """Name all models with their versions, aliases and what the gate said."""
    from qkt_clinical.registry import open_registry

    with open_registry(root, load_params(root)) as registry:
        models = registry.models()
    if as_json:
        print_json(models)
        return
    for model in models:
        aliases = ", ".join(f"{alias} {number}" for alias, number in model["aliases"].items())
        judged = ", ".join(f"{n} {g}" for n, g in zip(model["versions"], model["gate"], strict=True) if g)
        print(f"{model['name']}: {aliases or 'no alias'}{f'; gate: {judged}' if judged else ''}")


@registry_app.command("show", epilog=EPILOG)
def registry_show(
    model: ModelName, version: WhichVersion = "candidate", root: Root = HERE, as_json: Json = False
) -> None:
    """Show a version: description, tags, and every decision about its model."""
    from qkt_clinical.registry import open_registry

    with open_registry(root, load_params(root)) as registry:
        found = registry.show(model, version)
    if as_json:
        print_json(found)
        return
    print(f"{found['name']} version {found['version']} ({', '.join(found['aliases']) or 'no alias'})")
    print(found["description"])
    for tag, value in found["tags"].items():
        print(f"  {tag}: {value}")
    for d in found["decisions"]:
        print(f"{d['decision']} by {d['by']}: {d['reason'] or 'no reason given'}")


@registry_app.command("diff", epilog=EPILOG)
def registry_diff(
    model: ModelName,
    first: WhichVersion = "champion",
    second: WhichVersion = "candidate",
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Say in which tags two versions of a model differ."""
    from qkt_clinical.registry import open_registry

    with open_registry(root, load_params(root)) as registry:
        found = registry.diff(model, first, second)
    if as_json:
        print_json(found)
    else:
        for tag, (one, two) in found.items():
            print(f"{tag}: {one} | {two}")
        print(f"{len(found)} differences between {first} and {second}")


@registry_app.command("promote", epilog=EPILOG)
def registry_promote(
    model: ModelName,
    version: WhichVersion = "candidate",
    reviewer: Annotated[str | None, typer.Option(help="Who overrides what speaks against it.")] = None,
    reason: Annotated[str | None, typer.Option(help="Why; it is kept.")] = None,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Put a version into use (alias champion); exit code 1 if the gate speaks against it."""
    from qkt_clinical.registry import open_registry

    with open_registry(root, load_params(root)) as registry:
        decision = registry.promote(model, version, by=reviewer, reason=reason)
    _say_decision(decision.model_dump(mode="json"), as_json)


@registry_app.command("rollback", epilog=EPILOG)
def registry_rollback(
    model: ModelName,
    reviewer: Annotated[str, typer.Option(help="Who takes it back.")],
    reason: Annotated[str, typer.Option(help="Why; it is kept.")],
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Take the version in use back: the champion before it is the champion again."""
    from qkt_clinical.registry import open_registry

    with open_registry(root, load_params(root)) as registry:
        decision = registry.rollback(model, by=reviewer, reason=reason)
    _say_decision(decision.model_dump(mode="json"), as_json)


def _say_decision(decision: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(decision)
        return
    print(
        f"{decision['model']}: {decision['decision']} by {decision['by']}; now in use: {decision['digest']}"
    )
    for objection in decision["overridden"]:
        print(f"  overridden: {objection}")


@app.command(epilog=EPILOG)
def summary(root: Root = HERE, as_json: Json = False) -> None:
    """Print the table of answered queries, and where report and database are."""
    path = Workspace(root).reports / "queries.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError("no results yet", remedy="Run 'dvc repro' or 'qkt evaluate'.", file=path) from None
    if as_json:
        print_json(rows)
        return
    _table(rows)
    for label, file in (("report", "reports/index.html"), ("MLflow database", "mlflow.db")):
        if (root / file).exists():
            print(f"{label}: {(root / file).resolve()}")


def _table(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    def change(row: dict[str, Any], key: str) -> str:
        return f"{row['before'][key]:.3f} → {row['after'][key]:.3f}"

    table = Table(title="Accuracy on held-out patients: own model → answer")
    for column in ("hospital", "query", "method", "query acc.", "retained acc.", "balanced acc.", "teachers"):
        table.add_column(column, overflow="fold")
    table.add_column("moved", justify="right")
    for row in rows:
        table.add_row(
            row["hospital"],
            row["query"],
            row["method"],
            *(change(row, k) for k in ("query_accuracy", "retained_accuracy", "balanced_accuracy")),
            ", ".join(row["teachers"]),
            f"{row['bytes_moved'] / 1e6:.1f} MB",
        )
    # Without a terminal the width is unknown; a wide table reads better in a log than a folded one.
    console = Console() if sys.stdout.isatty() else Console(width=132)
    console.print(table)


@app.command(epilog=EPILOG)
def phantom(
    dims: Annotated[int, typer.Option(min=2, max=3, help="2: blood smears, 3: small CT volumes.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other patients.")] = 0,
    images_per_site: Annotated[int | None, typer.Option(min=20, help="Images per hospital.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Draw a contact sheet into this PNG and stop.")] = None,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Generate the embedded federation: hospitals with phantom images in real file formats."""
    from qkt_clinical.phantom import render_sheet, write_federation

    three: Literal[2, 3] = 3 if dims == 3 else 2
    if sheet is not None:
        render_sheet(sheet, dims=three, seed=seed)
        print(f"sheet: {sheet}")
        return
    with progress("phantom", quiet=as_json) as step:
        sites = write_federation(root, dims=three, seed=seed, images_per_site=images_per_site, progress=step)
    if as_json:
        print_json({"sites": sites})
    else:
        print(f"hospitals: {', '.join(sites)}")


@app.command(epilog=EPILOG)
def federate(
    source: Annotated[Path, typer.Argument(help="Labelled npz in MedMNIST's layout.", metavar="FILE.npz")],
    out: Annotated[Path, typer.Option(help="The workspace to write.")],
    preset: Annotated[str | None, typer.Option(help="Settings that come with the package: pbc28.")] = None,
    partition: Annotated[
        Literal["pathological", "dirichlet"] | None,
        typer.Option(help="A few classes for each hospital, or skewed proportions."),
    ] = None,
    hospitals: Annotated[int | None, typer.Option(min=2, help="How many.")] = None,
    classes_per_hospital: Annotated[int | None, typer.Option(min=2, help="For pathological.")] = None,
    beta: Annotated[float | None, typer.Option(help="Concentration for dirichlet.")] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="How many absent classes are asked for.")] = None,
    method: Annotated[Method | None, typer.Option(help="With which queries are answered.")] = None,
    budget: Annotated[float | None, typer.Option(help="Budget of every query.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the partition and of the queries.")] = None,
    as_json: Json = False,
) -> None:
    """Turn one labelled npz into simulated hospitals, a workspace for 'dvc repro'."""
    from qkt_clinical.federate import federate as divide
    from qkt_clinical.federate import load_preset
    from qkt_clinical.workspace import write_workspace

    base = load_preset(preset) if preset else None
    if base is None and partition is None:
        raise typer.BadParameter("give --partition or --preset")
    given = {
        "partition": partition,
        "hospitals": hospitals,
        "classes_per_hospital": classes_per_hospital,
        "beta": beta,
        "queries": queries,
        "method": method,
        "budget": budget,
        "seed": seed,
    }
    arguments = (base.federate.model_dump() if base else {}) | {
        k: v for k, v in given.items() if v is not None
    }
    made = divide(source, out, **arguments)
    write_workspace(out, {**(base.params if base else {}), **made.as_params()})
    if as_json:
        print_json(made.as_params())
    else:
        print(f"{out}: {len(made.sites)} hospitals, {len(made.queries)} queries; next: cd {out} && dvc repro")


@app.command(epilog=EPILOG)
def benchmark(
    data: Annotated[Path, typer.Option(help="Labelled npz in MedMNIST's layout.", metavar="FILE.npz")],
    out: Annotated[
        Path, typer.Option(help="Folder for results and for what a resumed run needs.", file_okay=False)
    ],
    partition: Annotated[
        Partition, typer.Option(help="A few classes for each hospital, or skewed proportions.")
    ] = "pathological",
    hospitals: Annotated[int, typer.Option(min=2, help="How many.")] = 6,
    classes_per_hospital: Annotated[int, typer.Option(min=2, help="For pathological.")] = 3,
    beta: Annotated[float, typer.Option(min=0.001, help="Concentration for dirichlet.")] = 0.3,
    regime: Annotated[Regime, typer.Option(help="Ask for classes without, or with a few images.")] = "absent",
    samples_per_rare_class: Annotated[int, typer.Option(min=1, max=50, help="For rare.")] = 20,
    query_size: Annotated[int, typer.Option(min=1, help="Classes per query.")] = 1,
    seeds: Annotated[str, typer.Option(help="Each divides the data and trains anew.")] = "0,1,2",
    methods: Annotated[
        str, typer.Option(help=f"all ({', '.join(BENCHMARK_METHODS)}), ablations, or names with commas.")
    ] = "all",
    rounds: Annotated[
        str, typer.Option(help="Federations are trained for so many each; the best on val counts.")
    ] = "20,50",
    network: Annotated[Network, typer.Option(help="Of every hospital.")] = "resnet-small",
    max_queries: Annotated[int | None, typer.Option(min=1, help="At most so many per seed.")] = None,
    budget: Annotated[
        float, typer.Option(min=0.0001, max=0.9999, help="Share of own images given away at most.")
    ] = 0.02,
    split: Annotated[EvaluationSplit, typer.Option(help="Tune on val, report on test.")] = "test",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; one per core, or one on CUDA.", show_default=False)
    ] = None,
    device: Annotated[Device, typer.Option(help="Where networks run.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Compare all methods on simulated hospitals: every query of every seed, one table."""
    from qkt_clinical.benchmark.runner import run
    from qkt_clinical.benchmark.settings import Settings, parse_list, parse_numbers
    from qkt_clinical.benchmark.summary import methods_table
    from qkt_clinical.config import TrainParams

    settings = Settings(
        partition=partition,
        hospitals=hospitals,
        classes_per_hospital=classes_per_hospital,
        beta=beta,
        regime=regime,
        samples_per_rare_class=samples_per_rare_class,
        query_size=query_size,
        seeds=parse_numbers(seeds, "--seeds"),
        methods=parse_list(methods),
        rounds=parse_numbers(rounds, "--rounds", least=1),
        max_queries=max_queries,
        budget=budget,
        split=split,
        device=device,
        train=TrainParams(network=network),
    )
    try:
        with progress("benchmark", quiet=as_json) as step:
            result = run(data, out, settings, workers=workers, resume=resume, progress=step)
    except KeyboardInterrupt:
        raise QktError(
            "stopped; what was finished is kept", remedy="Add --resume to go on.", code="stopped"
        ) from None
    if as_json:
        print_json(result["summary"])
    else:
        print(f"{methods_table(result['summary'])}\n\nfiles: {out}")


@app.command(epilog=EPILOG)
def fetch(
    name: Annotated[str | None, typer.Argument(help="Data set; without it they are listed.")] = None,
    size: Annotated[int, typer.Option(help="Edge length in pixels: 28, 64, 128 or 224.")] = 28,
    out: Annotated[Path, typer.Option(help="Folder for the file.")] = Path("data/medmnist"),
    base_url: Annotated[str | None, typer.Option(help="A mirror with the same file names.")] = None,
    as_json: Json = False,
) -> None:
    """Download a MedMNIST data set, checked against its MD5 sum."""
    from qkt_clinical.fetch import fetch as download
    from qkt_clinical.fetch import list_datasets

    if name is None:
        known = list_datasets()
        if as_json:
            print_json(sorted(known))
        else:
            print("\n".join(sorted(known)))
        return
    path = download(name, out, size=size, base_url=base_url, progress=not as_json)
    if as_json:
        print_json({"file": path.as_posix()})
    else:
        print(path)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Show one line per error, never a traceback, for what a user can put right."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors that a user can act on end as one line on standard error and exit code 1."""
    with errors_as_lines():
        app(args=None if arguments is None else list(arguments))


if __name__ == "__main__":
    main()
