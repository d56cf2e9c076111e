"""Run the pipeline's stages side by side, each when those that it reads of are done."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, Protocol, cast

from qkt_clinical.common.locks import lock
from qkt_clinical.config.workspace import keep_private
from qkt_clinical.errors import ConfigError
from qkt_clinical.repro.agenda import Agenda
from qkt_clinical.repro.with_dvc import StageGraph, locked_stages, sort_lock_file, unchanged_stages

Outcome = Literal["made", "unchanged", "failed", "not run"]
LOGS = Path(".qkt") / "repro"
"""What stages printed, below a workspace."""


@dataclass(frozen=True)
class StageResult:
    """What became of a stage."""

    stage: str
    outcome: Outcome
    seconds: float
    log: str = ""
    """File with what it printed; empty where it did not run."""


class Runner(Protocol):
    """Makes stages, one after the other."""

    @property
    def alive(self) -> bool:
        """Whether it can make another stage."""

    def run(self, name: str, log: Path) -> str:
        """Make a stage: ``made``, ``unchanged`` or ``failed``."""

    def stop(self) -> None:
        """End what it does."""


def environments(jobs: int, gpus: Sequence[str] = ()) -> list[dict[str, str]]:
    """Environment of each of ``jobs`` runners: a GPU of its own where there are any.

    A stage has the threads that params.yaml says, as without this: networks have other bytes with another
    number. So that several do not take each other's cores, a thread that waits sleeps.
    """
    python = os.fspath(Path(sys.executable).parent)
    path = os.pathsep.join([python, os.environ.get("PATH", os.defpath)])
    common = {"PATH": path, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    if not gpus:
        return [common] * jobs
    return [{**common, "CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} for number in range(jobs)]


def log_file(root: Path, stage: str) -> Path:
    """Where what a stage prints is kept."""
    return root / LOGS / f"{stage.replace('/', '_').replace(':', '_')}.log"


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One at a time in a workspace.

    Raises:
        ConfigError: another is running.
    """
    try:
        with lock(root / ".qkt" / "repro.lock", patience_s=1.0):
            yield
    except BlockingIOError:
        raise ConfigError(
            "'qkt repro' is running in this workspace",
            remedy="Wait until it has ended.",
            code="repro-running",
        ) from None


def run_stages(
    root: Path,
    graph: StageGraph,
    start: Callable[[Mapping[str, str]], Runner],
    settings: Sequence[Mapping[str, str]],
    tell: Callable[[StageResult], None],
) -> list[StageResult]:
    """Run every stage of a graph once those that it reads of are done; a failed one ends its dependants only.

    Outputs and ``dvc.lock`` are those of ``dvc repro``. What is interrupted goes on with the next call.

    Args:
        start: environment to what makes stages in it.
        settings: one environment for each stage that may run at once.
        tell: called with the result of each stage when it has ended.

    Returns:
        One result a stage, in the graph's order.

    Raises:
        ConfigError: another is running in the workspace.
    """
    root = root.resolve()
    keep_private(root)
    with _alone(root):
        (root / LOGS).mkdir(parents=True, exist_ok=True)
        done = unchanged_stages(root, graph)
        found = {name: StageResult(name, "unchanged", 0.0) for name in done}
        for result in found.values():
            tell(result)
        if len(done) < len(graph.order):
            before = locked_stages(root)
            try:
                found |= _run(root, graph, done, start, settings, tell)
            finally:
                sort_lock_file(root, before, graph.order)
    return [found[name] for name in graph.order]


def _run(
    root: Path,
    graph: StageGraph,
    unchanged: Sequence[str],
    start: Callable[[Mapping[str, str]], Runner],
    settings: Sequence[Mapping[str, str]],
    tell: Callable[[StageResult], None],
) -> dict[str, StageResult]:
    agenda, found = Agenda(graph.order, graph.needs, unchanged), dict[str, StageResult]()
    free: SimpleQueue[int] = SimpleQueue()
    for number in range(len(settings)):
        free.put(number)
    runners: dict[int, Runner] = {}
    held, stopped = threading.Lock(), threading.Event()

    def make(name: str) -> StageResult:
        log, began = log_file(root, name), time.monotonic()
        number = free.get()
        try:
            with held:
                if stopped.is_set():  # submitted, and not begun when it all was stopped
                    return StageResult(name, "not run", 0.0)
                runner = runners.get(number)
                if runner is None or not runner.alive:
                    runner = runners[number] = start(settings[number])
            outcome = runner.run(name, log)
        finally:
            free.put(number)
        return StageResult(name, cast(Outcome, outcome), time.monotonic() - began, os.fspath(log))

    def note(result: StageResult) -> None:
        found[result.stage] = result
        tell(result)

    with ThreadPoolExecutor(len(settings)) as threads:
        running: set[Future[StageResult]] = set()
        try:
            while not agenda.over:
                while len(running) < len(settings) and (name := agenda.next()) is not None:
                    running.add(threads.submit(make, name))
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for result in sorted((f.result() for f in ended), key=lambda r: graph.order.index(r.stage)):
                    note(result)
                    if result.outcome == "failed":
                        for dropped in agenda.failed(result.stage):
                            note(StageResult(dropped, "not run", 0.0))
                    else:
                        agenda.done(result.stage)
        finally:
            with held:
                stopped.set()
                for runner in runners.values():
                    runner.stop()
    return found
