"""``qkt repro``: the pipeline's stages side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkt_clinical.cli.options import HERE, Json, Root, print_json, say
from qkt_clinical.common.console import tell_log
from qkt_clinical.errors import ConfigError, QktError

if TYPE_CHECKING:
    from qkt_clinical.repro.run import Runner, StageResult

MOST_JOBS = 4
"""Stages at once where nobody says how many: each may take some gigabytes."""
GPU = re.compile(r"[A-Za-z0-9-]+")


def repro(
    stages: Annotated[
        list[str] | None,
        typer.Argument(help="Stages, such as train@aster or train, with all they need; else all."),
    ] = None,
    root: Root = HERE,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            max=1000,
            show_default=False,
            help=f"Stages at once; one a GPU named, else one a core, {MOST_JOBS} at most.",
        ),
    ] = None,
    gpus: Annotated[str, typer.Option("--gpus", help="GPUs to share out, such as 0,1; one a stage.")] = "",
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Every stage as a job of a Slurm cluster, by sbatch.")
    ] = False,
    sbatch: Annotated[
        str, typer.Option("--sbatch", help="Options of sbatch, such as '--partition gpu --gres gpu:1'.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Make what has changed, as 'dvc repro' does, with independent stages side by side.

    A stage that fails ends those that need it and no others.
    """
    import shlex
    from dataclasses import asdict

    from qkt_clinical.common.workers import cores
    from qkt_clinical.repro.processes import Process
    from qkt_clinical.repro.run import environments, run_stages
    from qkt_clinical.repro.slurm import ClusterJobs
    from qkt_clinical.repro.with_dvc import stage_graph

    devices = gpus.split(",") if gpus else []
    if not all(GPU.fullmatch(device) for device in devices):
        raise ConfigError(
            "--gpus is no list of devices", remedy="Name them by number or UUID with commas: --gpus 0,1."
        )
    if sbatch and not slurm:
        raise ConfigError("--sbatch without --slurm", remedy="Add --slurm, or leave --sbatch out.")
    try:
        options = shlex.split(sbatch)
    except ValueError as error:
        raise ConfigError(f"--sbatch cannot be read: {error}", remedy="Close its quotes.") from None
    count = jobs or len(devices) or min(MOST_JOBS, cores())
    root = root.resolve()
    graph = stage_graph(root, stages or ())

    def start(environment: Mapping[str, str]) -> Runner:
        return ClusterJobs(root, environment, options) if slurm else Process(root, environment)

    try:
        found = run_stages(root, graph, start, environments(count, devices), _teller(as_json))
    except KeyboardInterrupt:
        raise QktError(
            "stopped; stages that had ended are kept",
            remedy="Run the same command again to go on.",
            code="stopped",
        ) from None
    failed = [r.stage for r in found if r.outcome == "failed"]
    if as_json:
        print_json([asdict(r) for r in found])
    elif all(r.outcome == "unchanged" for r in found):
        say("Nothing has changed.")
    if failed:
        lost = sum(r.outcome == "not run" for r in found)
        raise QktError(
            f"failed: {', '.join(failed)}{f'; {lost} stages that need them were not run' if lost else ''}",
            remedy="What they said stands above; put it right and run the same command again.",
            code="stages-failed",
        )


def _teller(as_json: bool) -> Callable[[StageResult], None]:
    def tell(result: StageResult) -> None:
        if result.outcome == "failed":
            tell_log(result.stage, Path(result.log))
        if not as_json and result.outcome != "unchanged":
            seconds = f"{result.seconds:7.1f} s" if result.log else ""
            say(f"{result.stage:<32} {result.outcome:<8} {seconds}".rstrip())

    return tell
