"""``qkt query``: write a query, preview its cost, have it answered, follow its progress."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkt_clinical.catalog import DEFAULT_BUDGET, DEFAULT_METHOD, Method
from qkt_clinical.cli.options import EPILOG, HERE, Json, OnDevice, Root, group, print_json, say
from qkt_clinical.common.console import progress
from qkt_clinical.errors import QktError, visible

if TYPE_CHECKING:
    from pydantic import BaseModel

    from qkt_clinical.jobs import Job
    from qkt_clinical.jobs.run import Report

MAX_RECORD_BYTES = 64_000_000
"""Bytes of one of the workspace's records."""

query_app = group(
    no_args_is_help=True,
    help="Ask for a class, and have this hospital's machine answer with teachers from the registry.",
)
AskingHospital = Annotated[str, typer.Argument(metavar="HOSPITAL", help="The asking hospital.")]
Named = Annotated[str, typer.Argument(metavar="QUERY", help="Name of the query file without '.yaml'.")]
Only = Annotated[str | None, typer.Argument(metavar="[HOSPITAL]", help="Of one hospital alone.")]


@query_app.command("new", epilog=EPILOG)
def query_new(
    hospital: AskingHospital,
    query: Named,
    classes: Annotated[str, typer.Option("--classes", help="Classes to learn, with commas.")],
    method: Annotated[Method, typer.Option(help="How it is answered.")] = DEFAULT_METHOD,
    budget: Annotated[
        float,
        typer.Option(
            help="Largest false-query rate: share of today's images that may be taken for the query."
        ),
    ] = DEFAULT_BUDGET,
    max_teachers: Annotated[
        int | None, typer.Option(help="Include at most so many teachers.", show_default=False)
    ] = None,
    exclude: Annotated[
        str | None,
        typer.Option(help="Hospitals whose teachers are left out, with commas.", show_default=False),
    ] = None,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Write a query file, hospitals/HOSPITAL/queries/QUERY.yaml; nothing is run."""
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.jobs.new import new_query

    path = new_query(
        root,
        hospital,
        query,
        _words(classes),
        load_params(root),
        method=method,
        budget=budget,
        max_teachers=max_teachers,
        exclude_teachers=_words(exclude or ""),
    )
    if as_json:
        print_json({"hospital": hospital, "query": query, "file": path.as_posix()})
    else:
        say(f"{path}: look it over, then 'qkt query plan {hospital} {query}'")


def _words(text: str) -> list[str]:
    return [word for part in text.split(",") if (word := part.strip())]


@query_app.command("plan", epilog=EPILOG)
def query_plan(
    hospital: AskingHospital, query: Named, root: Root = HERE, device: OnDevice = None, as_json: Json = False
) -> None:
    """Show who would answer, why, and what it costs; nothing is fetched but cards and masks."""
    from qkt_clinical.common.wording import size, words
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.jobs import preview
    from qkt_clinical.jobs.routes import route_json, route_line
    from qkt_clinical.qkt.planning import images_apart

    seen = preview(root, hospital, query, load_params(root), device=device)
    plan = seen.plan
    if as_json:
        print_json(
            plan.model_dump(mode="json")
            | {
                "versions": seen.versions,
                "risks": {asked: list(names) for asked, names in seen.risks},
                "fetched_bytes": seen.fetched_bytes,
                "expected_seconds": round(seen.seconds, 1),
                "routes": [route_json(route) for route in seen.routes],
            }
        )
        return
    say(f"{hospital} asks for {words(plan.classes)}; method {plan.method}, budget {plan.budget:g}")
    for teacher in plan.teachers:
        scores = ", ".join(f"{c} {s:.2f}" for c, s in teacher.scores.items())
        number = f" version {seen.versions[teacher.site]}," if teacher.relevant else ""
        say(
            f"  {'+' if teacher.relevant else '-'} {teacher.site}:{number} {teacher.reason}; mask {scores} "
            f"(known from {teacher.threshold:.2f}), {size(teacher.bytes)}{images_apart(teacher.image_shift)}"
        )
    say(f"to fetch: {size(seen.fetched_bytes)} of {size(plan.bytes_moved)}; about {seen.seconds:.0f} s")
    for asked, names in seen.risks:
        say(f"may be confused with {asked}: {words(names)} (no teacher fetched knows both)")
    say("ways to answer it (* is the query's; 'method' in its file chooses another):")
    for route in seen.routes:
        say(route_line(route, plan.method))


@contextmanager
def _shown(quiet: bool) -> Iterator[Report]:
    """Print the steps of a job, one line each, with progress."""
    last: tuple[str, str | None] | None = None
    with progress("  transfer", quiet=quiet) as step:

        def show(job: Job) -> None:
            nonlocal last
            if quiet or job.state != "running":
                return
            if (job.name, job.step) != last and job.step:
                last = (job.name, job.step)
                print(visible(f"{job.name}: {job.step}"), file=sys.stderr)
            if job.step == "transfer" and job.total:
                step(job.done, job.total)

        yield show


def _say(job: Job) -> None:
    extra = ""
    if job.state in ("running", "failed", "interrupted") and job.step:
        extra = f" at {job.step}" + (f" {job.done}/{job.total}" if job.total else "")
    if job.version:
        extra += f", version {job.version} of student.{job.hospital}.{job.query}"
    say(f"{job.name}: {job.state}{extra}")
    if job.error:
        say(f"  {job.error.message}. {job.error.remedy}")
    if job.note:
        say(f"  {job.note}")


def _as_json(job: Job) -> dict[str, Any]:
    return job.model_dump(mode="json", exclude={"format", "asked", "transferred"})


@query_app.command("run", epilog=EPILOG)
def query_run(
    hospital: AskingHospital, query: Named, root: Root = HERE, device: OnDevice = None, as_json: Json = False
) -> None:
    """Answer a query: fetch the relevant teachers, transfer, register the student.

    Interrupted, it goes on where it was; what has not changed is not done again.
    """
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.jobs import run

    with _shown(as_json) as report:
        job = run(root, hospital, query, load_params(root), device=device, report=report)
    print_json(_as_json(job)) if as_json else _say(job)


@query_app.command("resume", epilog=EPILOG)
def query_resume(
    hospital: AskingHospital, query: Named, root: Root = HERE, device: OnDevice = None, as_json: Json = False
) -> None:
    """Go on with a query that was interrupted, has failed or was cancelled."""
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.jobs import resume

    with _shown(as_json) as report:
        job = resume(root, hospital, query, load_params(root), device=device, report=report)
    print_json(_as_json(job)) if as_json else _say(job)


@query_app.command("work", epilog=EPILOG)
def query_work(
    hospital: Only = None, root: Root = HERE, device: OnDevice = None, as_json: Json = False
) -> None:
    """Answer all waiting and interrupted queries; start one such worker per device.

    Exit code 1 if a query failed.
    """
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.jobs import work

    with _shown(as_json) as report:
        jobs = work(root, load_params(root), hospital=hospital, device=device, report=report)
    if as_json:
        print_json([_as_json(job) for job in jobs])
    else:
        for job in jobs:
            _say(job)
        say(f"{len(jobs)} queries taken up by this worker")
    if any(job.state == "failed" for job in jobs):
        raise typer.Exit(1)


@query_app.command("list", epilog=EPILOG)
def query_list(hospital: Only = None, root: Root = HERE, as_json: Json = False) -> None:
    """Name all queries: what is asked, how, and how far the answer is."""
    from qkt_clinical.config.loading import load_query
    from qkt_clinical.jobs import Board

    jobs = Board(root).jobs(hospital)
    if as_json:
        print_json(
            [
                {"hospital": j.hospital, "query": j.query, "state": j.state}
                | (load_query(root, j.hospital, j.query).model_dump(mode="json") if _readable(j) else {})
                for j in jobs
            ]
        )
        return
    for job in jobs:
        words = ""
        if _readable(job):
            asked = load_query(root, job.hospital, job.query)
            words = f"; {', '.join(asked.classes)} by {asked.method}, budget {asked.budget:g}"
        say(f"{job.name}: {job.state}{words}")
    say(f"{len(jobs)} queries")


def _readable(job: Job) -> bool:
    """Whether the query's file says what is asked."""
    return job.error is None or job.error.code != "config"


@query_app.command("status", epilog=EPILOG)
def query_status(
    hospital: Annotated[str | None, typer.Argument(help="Of one hospital alone.")] = None,
    query: Annotated[str | None, typer.Argument(help="One query alone.")] = None,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Say how far the answers are, and why one failed."""
    from qkt_clinical.jobs import Board

    board = Board(root)
    if hospital and query:
        job = board.read(hospital, query)
        print_json(_as_json(job)) if as_json else _say(job)
        return
    jobs = board.jobs(hospital)
    if as_json:
        print_json([_as_json(job) for job in jobs])
    else:
        for job in jobs:
            _say(job)


@query_app.command("show", epilog=EPILOG)
def query_show(hospital: AskingHospital, query: Named, root: Root = HERE, as_json: Json = False) -> None:
    """Show a query: its job, who answered, its figures, the gate's verdict, as far as there are any."""
    from qkt_clinical.common.files import digest_folder
    from qkt_clinical.config.loading import load_query
    from qkt_clinical.config.workspace import Workspace
    from qkt_clinical.jobs import Board
    from qkt_clinical.records.evaluation import Evaluation
    from qkt_clinical.records.phases import Phases
    from qkt_clinical.records.plan import Plan
    from qkt_clinical.records.verdict import Verdict

    space, asked = Workspace(root), load_query(root, hospital, query)
    folder = space.student(hospital, query)
    measured = _read(space.reports / "evaluation" / hospital / f"{query}.json", Evaluation) or {}
    judged = _read(space.reports / "gate" / hospital / f"{query}.json", Verdict) or {}
    digest = digest_folder(folder)  # what was said of another student is not said of this one
    found = {
        "query": asked.model_dump(mode="json"),
        "job": _as_json(Board(root).read(hospital, query)),
        "plan": _read(folder / "plan.json", Plan),
        "phases": _read(folder / "phases.json", Phases),
        "evaluation": measured if measured.get("student") == digest else None,
        "gate": judged if judged.get("digest") == digest else None,
    }
    if as_json:
        print_json(found)
        return
    say(f"asks for {', '.join(asked.classes)} by {asked.method}, budget {asked.budget:g}")
    _say(Board(root).read(hospital, query))
    if found["plan"]:
        for teacher in (t for t in found["plan"]["teachers"] if t["relevant"]):
            say(f"  {teacher['site']}: {teacher['reason']}")
    if found["phases"]:
        second = found["phases"]["phase2"]
        for teacher in (t for t in found["phases"]["screening"] if not t["included"]):
            say(f"  {teacher['site']} excluded: {teacher['reason']}")
        rate = second["false_query_rate"]
        told = "not told" if rate is None else f"{rate:.0%}"
        say(f"false-query rate on own images: {told}, budget {second['budget']:.1%}")
    if found["evaluation"]:
        for side in ("before", "after"):
            figures = found["evaluation"][side]
            named = ("query_accuracy", "retained_accuracy", "balanced_accuracy")
            say(f"{side}: " + ", ".join(f"{n} {figures[n]['value']:.3f}" for n in named))
    elif found["plan"]:
        say("nobody has measured this student")
    if found["gate"]:
        unmet = [r["rule"] for r in found["gate"]["rules"] if not r["passed"]]
        say(f"gate: {'passed' if found['gate']['passed'] else 'not passed: ' + ', '.join(unmet)}")


def _read(path: Path, kind: type[BaseModel]) -> Any:
    """A JSON file of the workspace in today's format, if it is one of its kind; None where there is none."""
    from qkt_clinical.common.files import read_plain

    try:
        return kind.model_validate_json(read_plain(path, MAX_RECORD_BYTES)).model_dump(mode="json")
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise QktError(
            "cannot be read", remedy="Run 'dvc repro' to make it again.", file=path, code="outputs"
        ) from None


@query_app.command("cancel", epilog=EPILOG)
def query_cancel(hospital: AskingHospital, query: Named, root: Root = HERE, as_json: Json = False) -> None:
    """Take a query back: workers leave it alone, and who answers it now stops; 'run' asks it again."""
    from qkt_clinical.jobs import Board

    job = Board(root).cancel(hospital, query)
    if as_json:
        print_json(_as_json(job))
    else:
        say(f"{job.name}: {'cancelled' if job.state == 'cancelled' else 'will stop soon'}")
