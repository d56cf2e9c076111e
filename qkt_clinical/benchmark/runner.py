"""Runs a benchmark: trains shared networks once per seed, and answers every query by every method.

Everything finished lies in the output folder, under ``work/``: networks, and one JSON file per seed,
student, query and method. A resumed run computes only what is missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qkt_clinical.benchmark.methods import Case, MethodResult, methods
from qkt_clinical.benchmark.metrics import figures
from qkt_clinical.benchmark.plots import write_plots
from qkt_clinical.benchmark.pool import run_tasks
from qkt_clinical.benchmark.settings import (
    FEDERATED,
    FINETUNED,
    ON_TEACHERS,
    RECALIBRATED,
    SETUPS,
    BenchmarkSettings,
)
from qkt_clinical.benchmark.simulate import SimulatedFederation, SimulatedQuery, read, simulate
from qkt_clinical.benchmark.store import MASKS, ResultStore
from qkt_clinical.benchmark.summary import NOTE, budget_curves, markdown, mask_figures, summarise
from qkt_clinical.common.console import Step
from qkt_clinical.common.files import digest_file, write_json, write_text
from qkt_clinical.common.workers import cores
from qkt_clinical.errors import ConfigError
from qkt_clinical.evaluation.metrics import DIGITS
from qkt_clinical.models.networks import pick_device

RESULT, TABLE, PLOTS = "benchmark.json", "benchmark.md", "plots"
WORK, KEY = "work", "key.json"


@dataclass(frozen=True)
class BenchmarkTask:
    """One network to train, or one question to answer by one method."""

    seed: int
    name: str
    """Of the network, see :mod:`qkt_clinical.benchmark.store`, or of the method."""
    question: SimulatedQuery | None = None


class _Bench:
    """State of a worker process: the data, and the federation of one seed at a time."""

    def __init__(self, data: Path, work: Path, settings: BenchmarkSettings, device: str) -> None:
        self.parts, self.classes = read(data)
        self.work, self.settings, self.device = work, settings, torch.device(device)
        self.store = lru_cache(1)(self._store)
        self.answers = methods(settings)

    def federation(self, seed: int) -> SimulatedFederation:
        s = self.settings
        return simulate(
            self.parts,
            self.classes,
            partition=s.partition,
            hospitals=s.hospitals,
            classes_per_hospital=s.classes_per_hospital,
            beta=s.beta,
            regime=s.regime,
            samples_per_rare_class=s.samples_per_rare_class,
            query_size=s.query_size,
            seed=seed,
            network=s.train.network,
            max_queries=s.max_queries,
        )

    def _store(self, seed: int) -> ResultStore:
        return ResultStore(self.work / f"seed-{seed}", self.federation(seed), self.settings, self.device)


_BENCH: _Bench | None = None


def _prepare(data: Path, work: Path, settings: BenchmarkSettings, device: str) -> None:
    global _BENCH
    _BENCH = _Bench(data, work, settings, device)


def _perform(task: BenchmarkTask) -> None:
    """Train or answer, and write the result."""
    assert _BENCH is not None
    store = _BENCH.store(task.seed)
    if task.question is None:
        store.train(task.name)
        return
    case = Case(store, task.question)
    outcome = _BENCH.answers[task.name](case)
    write_json(row_file(_BENCH.work, task), row_of(case, task.name, outcome))


def row_file(work: Path, task: BenchmarkTask) -> Path:
    """Path of a finished row."""
    assert task.question is not None
    query = "+".join(map(str, task.question.query))
    name = task.name.replace("/", "_")
    return work / f"seed-{task.seed}" / "rows" / task.question.student / query / f"{name}.json"


def row_of(case: Case, method: str, outcome: MethodResult) -> dict[str, Any]:
    """A row of the benchmark, its budget curve among its fields."""
    classes = case.store.federation.classes

    def measure(scores: torch.Tensor) -> dict[str, float]:
        asked = case.relevant, case.question.query
        return figures(scores.numpy(), case.images.labels, *asked, task=case.store.task)

    def measured(scores: torch.Tensor) -> dict[str, float]:
        found = measure(scores)
        return {**found, "forgetting": round(retained - found["retained_accuracy"], DIGITS)}

    retained = measure(case.logits(case.student))["retained_accuracy"]
    curve = None
    if outcome.curve is not None:
        curve = [{"budget": budget, **measured(scores)} for budget, scores in outcome.curve.items()]
    return {
        "seed": case.store.federation.seed,
        "student": case.question.student,
        "query": "+".join(classes[q] for q in case.question.query),
        "method": method,
        **measured(outcome.scores),
        "bytes_moved": outcome.bytes_moved,
        "rounds": int(outcome.bytes_moved > 0) if outcome.rounds is None else outcome.rounds,
        "seconds": round(outcome.seconds, 3),
        "passes_per_prediction": outcome.passes,
        "cost_per_prediction": round(outcome.passes if outcome.cost is None else outcome.cost, 3),
        "curve": curve,
    }


def _networks(
    federation: SimulatedFederation, chosen: Sequence[str], settings: BenchmarkSettings
) -> Iterator[str]:
    """Names of the networks that the chosen methods need, those that take longest first."""
    for algorithm in FEDERATED:
        named = [m for m in chosen if m.removeprefix("ablation/").startswith(algorithm)]
        rounds = {r for r in settings.rounds if f"ablation/{algorithm}-{r}" in named}
        if algorithm in named or (algorithm == "fedavg" and FINETUNED in named):
            rounds |= set(settings.rounds)
        yield from (f"{algorithm}/{r}" for r in sorted(rounds, reverse=True))
    setups = [SETUPS[m] for m in chosen if m in SETUPS]
    students = {q.student for q in federation.questions}
    for hospital in federation.hospitals:
        yield f"full/{hospital.name}"
    for variant in sorted({s.own for s in setups} - {"full"}):
        yield from (f"{variant}/{student}" for student in sorted(students))
    for variant in sorted({s.teachers for s in setups} - {"full"}):
        yield from (f"{variant}/{hospital.name}" for hospital in federation.hospitals)
    for kind in ON_TEACHERS:
        if kind in chosen:
            yield from (f"{kind}/{student}" for student in sorted(students))


def _check_splits(bench: _Bench) -> None:
    """Refuse data for which the figures would be undefined."""
    trained = set(np.unique(bench.parts["train"].labels).tolist())
    for split in ("val", bench.settings.split):
        missing = sorted(trained - set(bench.parts[split].labels.tolist()))
        if missing:
            names = ", ".join(bench.classes[c] for c in missing)
            raise ConfigError(
                f"the {split} split has no image of {names}",
                remedy="Give a file whose val and test splits hold every class of its train split.",
            )


def _claim(out: Path, key: str, resume: bool) -> None:
    """Claim the folder for this run.

    Raises:
        ConfigError: it holds a run already, and either that is not to be resumed or its settings differ.
    """
    mark = out / WORK / KEY
    if mark.exists() or (out / RESULT).exists():
        if not resume:
            raise ConfigError(
                "the folder holds a benchmark",
                remedy="Add --resume to go on with it, or choose another folder with --out.",
                file=out,
                code="benchmark-exists",
            )
        try:
            found = json.loads(mark.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if found != {"key": key}:
            raise ConfigError(
                "the folder holds a benchmark of other data or settings",
                remedy="Give the arguments of that run, or choose another folder with --out.",
                file=out,
                code="benchmark-differs",
            )
    write_json(mark, {"key": key})


def environment(device: torch.device, workers: int, *, federated: bool) -> dict[str, Any]:
    """Software versions behind the figures; nothing that identifies a machine or a date."""
    import platform

    names = ("qkt-clinical", "torch", "monai", "numpy", *(("nvflare",) if federated else ()))
    packages = {name: version(name) for name in names}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "python": platform.python_version(),
        **packages,
        "cpu_count": os.cpu_count(),
        "device": name,
        "workers": workers,
    }


def run(
    data: Path,
    out: Path,
    settings: BenchmarkSettings,
    *,
    workers: int | None = None,
    resume: bool = False,
    progress: Step | None = None,
) -> dict[str, Any]:
    """Run a benchmark, or the rest of one, and write ``benchmark.json``, ``benchmark.md`` and the plots.

    Args:
        data: labelled npz in MedMNIST's layout.
        out: folder to write.
        workers: processes; by default one per core, or one on CUDA. Federations run one after another, each
            with a process for every hospital.
        resume: go on with the run in ``out``; more seeds and methods may be asked for than it had.
        progress: called with (tasks done, tasks in all).

    Returns:
        What ``benchmark.json`` holds.

    Raises:
        SourceError: the file cannot be used.
        ConfigError: unknown method, impossible partition, or a folder that holds another run.
        DeviceError: no such device.
        QktError: a federation is to be run and NVIDIA FLARE is not installed, or failed.
    """
    chosen = settings.chosen
    device = pick_device(settings.device)
    workers = workers or (1 if device.type == "cuda" else cores())
    work = out / WORK
    bench = _Bench(data, work, settings, device.type)
    _check_splits(bench)
    digest = digest_file(data)
    networks: list[BenchmarkTask] = []
    questions: list[tuple[int, SimulatedQuery]] = []
    for seed in settings.seeds:  # one federation at a time: each holds a copy of all images
        federation = bench.federation(seed)
        networks += [BenchmarkTask(seed, name) for name in _networks(federation, chosen, settings)]
        questions += [(seed, question) for question in federation.questions]
    del federation, bench  # every working process reads the data itself
    computed = tuple(dict.fromkeys(RECALIBRATED[m][0] if m in RECALIBRATED else m for m in chosen))
    answers = [BenchmarkTask(seed, name, question) for seed, question in questions for name in computed]

    def missing(task: BenchmarkTask) -> bool:
        if task.question is None:
            return not (work / f"seed-{task.seed}" / task.name).is_dir()
        return not row_file(work, task).is_file()

    federations = [task for task in networks if task.name.split("/")[0] in FEDERATED]
    if any(map(missing, federations)):
        from qkt_clinical.common.extras import require_extra

        require_extra("nvflare")
    _claim(out, settings.key(digest, device.type), resume)
    tell = progress or (lambda done, total: None)
    total = len(networks) + len(answers)
    done = total - sum(map(missing, [*networks, *answers]))
    tell(done, total)
    later = [task for task in networks if task.name.split("/")[0] in ON_TEACHERS]
    first = [task for task in networks if task not in later and task not in federations]
    for stage, processes in ((federations, 1), (first, workers), (later, workers), (answers, workers)):
        for _ in run_tasks(
            _perform,
            [task for task in stage if missing(task)],
            workers=processes,
            prepare=_prepare,
            arguments=(data, work, settings, device.type),
        ):
            done += 1
            tell(done, total)
    rows = _rows(work, questions, chosen)
    teachers = [t for t in networks if t.name.startswith("full/")]
    judged = [_read(work / f"seed-{t.seed}" / t.name / MASKS) for t in teachers]
    result = {
        "format": "qkt-benchmark/1",
        "rows": [{k: v for k, v in row.items() if k != "curve"} for row in rows],
        "summary": summarise(rows),
        "intervals": NOTE,
        "masks": mask_figures(judged, settings),
        "budget_curves": budget_curves(rows),
        "environment": environment(device, workers, federated=bool(federations)),
        "settings": {**settings.model_dump(mode="json"), "methods": list(chosen), "data_sha256": digest},
    }
    write_json(out / RESULT, result)
    write_text(out / TABLE, markdown(result))
    write_plots(out / PLOTS, result)
    return result


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _rows(
    work: Path, questions: Sequence[tuple[int, SimulatedQuery]], chosen: Sequence[str]
) -> list[dict[str, Any]]:
    """All rows asked for; those of another budget are read off the curve of the method's row."""
    rows = []
    for seed, question in questions:
        for method in chosen:
            if method not in RECALIBRATED:
                rows.append(_read(row_file(work, BenchmarkTask(seed, method, question))))
                continue
            base, budget = RECALIBRATED[method]
            row = _read(row_file(work, BenchmarkTask(seed, base, question)))
            point: dict[str, Any] = next((p for p in row["curve"] or () if p["budget"] == budget), {})
            rows.append({**row, **{k: v for k, v in point.items() if k != "budget"}, "method": method})
    return rows
