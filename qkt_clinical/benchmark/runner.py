"""Runs a benchmark: trains shared networks once per seed, and answers every query by every method.

Everything finished lies in the output folder, under ``work/``: networks, and one JSON file per seed,
student, query and method. A resumed run computes only what is missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qkt_clinical.benchmark.case import Case, MethodResult
from qkt_clinical.benchmark.features import FeatureBank, pieces, write_piece
from qkt_clinical.benchmark.methods import methods
from qkt_clinical.benchmark.metrics import figures
from qkt_clinical.benchmark.plots import write_plots
from qkt_clinical.benchmark.pool import run_tasks
from qkt_clinical.benchmark.settings import (
    FEDERATED,
    FINETUNED,
    OF_STATISTICS,
    ON_TEACHERS,
    PARTITION,
    RECALIBRATED,
    SETUPS,
    SITES,
    BenchmarkSettings,
    EncoderUse,
)
from qkt_clinical.benchmark.simulate import SimulatedFederation, SimulatedQuery, read, simulate
from qkt_clinical.benchmark.site_intervals import judged, resample, right_digits
from qkt_clinical.benchmark.sites import federation_of_sites, read_sites, site_files
from qkt_clinical.benchmark.store import MASKS, ResultStore, global_name, pooled_name
from qkt_clinical.benchmark.summary import NOTE, SITES_NOTE, budget_curves, markdown, mask_figures, summarise
from qkt_clinical.catalog import POOLED, WITH_ENCODER
from qkt_clinical.common.console import Step
from qkt_clinical.common.files import digest_bytes, digest_file, write_json, write_text
from qkt_clinical.common.workers import cores
from qkt_clinical.config.encoder_specs import ENCODERS
from qkt_clinical.datasets.medmnist_file import SplitArrays
from qkt_clinical.errors import ConfigError
from qkt_clinical.evaluation.metrics import DIGITS
from qkt_clinical.models.encoders import Encoder, load_encoder, shared_extractor
from qkt_clinical.models.networks import pick_device

RESULT, TABLE, PLOTS = "benchmark.json", "benchmark.md", "plots"
WORK, KEY, FEATURES = "work", "key.json", "features"
KEPT = ("curve", "judged", "right")
"""Fields of a row that stay in the work folder: they are for the summary."""


@dataclass(frozen=True)
class BenchmarkTask:
    """One network to train, or one question to answer by one method."""

    seed: int | None
    """None: the features of an encoder, which are the same for all seeds."""
    name: str
    """Of the network, see :mod:`qkt_clinical.benchmark.store`, of the method, or of a piece of features."""
    question: SimulatedQuery | None = None


def federations_of(
    files: Sequence[Path], settings: BenchmarkSettings
) -> Callable[[int], SimulatedFederation]:
    """What makes the hospitals of a seed: real ones with a file each, or simulated ones of a single file.

    Raises:
        SourceError: a file cannot be used.
        ConfigError: figures would be undefined.
    """
    if settings.sites:
        sites, names = read_sites(files)
        return lambda seed: federation_of_sites(sites, names, settings, seed)
    parts, classes = read(files[0])
    _check_splits(parts, classes, settings)
    s = settings
    return lambda seed: simulate(
        parts,
        classes,
        partition=s.partition,
        hospitals=s.hospitals,
        classes_per_hospital=s.classes_per_hospital,
        beta=s.beta,
        regime=s.regime,
        samples_per_rare_class=s.samples_per_rare_class,
        query_size=s.query_size,
        seed=seed,
        training=s.train,
        max_queries=s.max_queries,
    )


class _Bench:
    """State of a worker process: the data, and the federation of one seed at a time."""

    def __init__(
        self,
        files: Sequence[Path],
        work: Path,
        settings: BenchmarkSettings,
        device: str,
        weights: Path | None = None,
    ) -> None:
        self.federation = federations_of(files, settings)
        self.files, self.weights = files, weights
        self.work, self.settings, self.device = work, settings, torch.device(device)
        self.store = lru_cache(1)(self._store)
        self.encoder = lru_cache(1)(self._encoder)
        self.answers = methods(settings)

    def _store(self, seed: int) -> ResultStore:
        folder, features = self.work / f"seed-{seed}", None
        if self.settings.encoder and (self.work / FEATURES).is_dir():
            features = FeatureBank(self.work / FEATURES)
        used = self.settings.encoder
        return ResultStore(
            folder,
            self.federation(seed),
            self.settings,
            self.device,
            features,
            pretrained=self.encoder() if self.settings.train.encoder else None,
            encoder=shared_extractor(self.encoder(), used.side) if used and features else None,
        )

    def _encoder(self) -> Encoder:
        used = self.settings.encoder
        assert used is not None
        assert self.weights is not None
        return load_encoder(used.name, self.weights, used.digest)

    def encode(self, piece: str) -> None:
        """Compute a piece of the encoder's features."""
        assert self.settings.encoder is not None
        side = self.settings.encoder.side
        write_piece(self.work / FEATURES, piece, self.files, self.encoder(), side, self.device)


_BENCH: _Bench | None = None


def _prepare(
    files: Sequence[Path], work: Path, settings: BenchmarkSettings, device: str, weights: Path | None
) -> None:
    global _BENCH
    _BENCH = _Bench(files, work, settings, device, weights)


def _perform(task: BenchmarkTask) -> None:
    """Train, encode or answer, and write the result."""
    assert _BENCH is not None
    if task.seed is None:
        _BENCH.encode(task.name)
        return
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
    """A row of the benchmark, with the fields that are ``KEPT``."""
    classes, judges = case.store.federation.classes, case.question.judges

    def measure(scores: torch.Tensor) -> dict[str, float]:
        asked = case.relevant, case.question.query
        return figures(scores.numpy(), case.images.labels, *asked, task=case.store.task)

    def measured(scores: torch.Tensor) -> dict[str, Any]:
        found = measure(scores)
        forgotten = {"forgetting": round(retained - found["retained_accuracy"], DIGITS)}
        kept = {} if judges == "all" else {"right": right_digits(case, scores)}
        return {**found, **forgotten, **kept}

    retained = measure(case.logits(case.student))["retained_accuracy"]
    curve = None
    if outcome.curve is not None:
        curve = [{"budget": budget, **measured(scores)} for budget, scores in outcome.curve.items()]
    return {
        "seed": case.store.federation.seed,
        "student": case.question.student,
        "query": "+".join(classes[q] for q in case.question.query),
        "method": method,
        **({} if judges == "all" else {"test_images": judges, **_images_of(case), "judged": judged(case)}),
        **measured(outcome.scores),
        "bytes_moved": outcome.bytes_moved,
        "rounds": int(outcome.bytes_moved > 0) if outcome.rounds is None else outcome.rounds,
        "seconds": round(outcome.seconds, 3),
        "passes_per_prediction": outcome.passes,
        "cost_per_prediction": round(outcome.passes if outcome.cost is None else outcome.cost, 3),
        "curve": curve,
    }


def _images_of(case: Case) -> dict[str, int]:
    """On how many images the figures of a question rest, each class of them on five or more."""
    asked = int(np.isin(case.images.labels, case.question.query).sum())
    return {"query_images": asked, "local_images": len(case.images) - asked}


def _networks(
    federation: SimulatedFederation, chosen: Sequence[str], settings: BenchmarkSettings
) -> Iterator[str]:
    """Names of the networks that the chosen methods need, those that take longest first."""
    hidden = sorted({q.asks_as for q in federation.questions})
    for algorithm in FEDERATED:
        named = [m for m in chosen if m.removeprefix("ablation/").startswith(algorithm)]
        rounds = {r for r in settings.rounds if f"ablation/{algorithm}-{r}" in named}
        if algorithm in named or (algorithm == "fedavg" and FINETUNED in named):
            rounds |= set(settings.rounds)
        each = ((r, name) for r in sorted(rounds, reverse=True) for name in hidden)
        yield from (global_name(algorithm, r, name) for r, name in each)
    if POOLED in chosen:
        yield from map(pooled_name, hidden)
    setups = [SETUPS[m] for m in chosen if m in SETUPS]
    students = {q.asking for q in federation.questions}
    for hospital in (*federation.hospitals, *federation.asking):
        yield f"full/{hospital.name}"
    for variant in sorted({s.own for s in setups} - {"full"}):
        yield from (f"{variant}/{student}" for student in sorted(students))
    sent = {settings.trained_as(v) for v in ("sent", *(s.teachers for s in setups))}
    for variant in sorted(sent - {"full"}):
        yield from (f"{variant}/{hospital.name}" for hospital in federation.hospitals)
    for kind in ON_TEACHERS:
        if kind in chosen:
            yield from (f"{kind}/{student}" for student in sorted(students))


def _check_splits(
    parts: Mapping[str, SplitArrays], classes: Sequence[str], settings: BenchmarkSettings
) -> None:
    """Refuse data for which the figures would be undefined."""
    trained = set(np.unique(parts["train"].labels).tolist())
    for split in ("val", settings.split):
        missing = sorted(trained - set(parts[split].labels.tolist()))
        if missing:
            names = ", ".join(classes[c] for c in missing)
            raise ConfigError(
                f"the {split} split has no image of {names}",
                remedy="Give a file whose val and test splits hold every class of its train split.",
            )


def _claim(out: Path, key: str, resume: bool, encoder: EncoderUse | None) -> None:
    """Claim the folder for this run; a run without an encoder can go on with one.

    Raises:
        ConfigError: it holds a run already, and either that is not to be resumed or its settings differ.
    """
    mark, used = out / WORK / KEY, encoder and encoder.model_dump(mode="json")
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
        kept = found.get("encoder") if isinstance(found, dict) else None
        if not isinstance(found, dict) or found.get("key") != key or (kept and used and kept != used):
            raise ConfigError(
                "the folder holds a benchmark of other data or settings",
                remedy="Give the arguments of that run, or choose another folder with --out.",
                file=out,
                code="benchmark-differs",
            )
        used = used or kept
    write_json(mark, {"key": key, "encoder": used} if used else {"key": key})


def environment(
    device: torch.device, workers: int, *, federated: bool, encoder: EncoderUse | None = None
) -> dict[str, Any]:
    """Software versions behind the figures; nothing that identifies a machine or a date."""
    import platform

    timm = encoder is not None and ENCODERS[encoder.name].library == "timm"
    extra = (("nvflare", federated), ("timm", timm))
    names = ("qkt-clinical", "torch", "monai", "numpy", *(name for name, used in extra if used))
    packages = {name: version(name) for name in names}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "python": platform.python_version(),
        **packages,
        "cpu_count": os.cpu_count(),
        "device": name,
        "workers": workers,
    }


def _digest(files: Sequence[Path], settings: BenchmarkSettings) -> str:
    """Digest of the data: of the file, or of all sites' names and files."""
    if not settings.sites:
        return digest_file(files[0])
    return digest_bytes(json.dumps({f.stem: digest_file(f) for f in files}, sort_keys=True).encode())


def _shown_settings(settings: BenchmarkSettings, files: Sequence[Path]) -> dict[str, Any]:
    """The settings that have an effect, and the names of the sites."""
    if not settings.sites:
        return settings.model_dump(mode="json", exclude=set(SITES))
    return {
        **settings.model_dump(mode="json", exclude=set(PARTITION)),
        "sites": [f.stem for f in files],
    }


def run(
    data: Path | Sequence[Path],
    out: Path,
    settings: BenchmarkSettings,
    *,
    encoder_weights: Path | None = None,
    workers: int | None = None,
    resume: bool = False,
    progress: Step | None = None,
) -> dict[str, Any]:
    """Run a benchmark, or the rest of one, and write ``benchmark.json``, ``benchmark.md`` and the plots.

    Args:
        data: labelled npz in MedMNIST's layout; with ``settings.sites`` one for each site, or their folder.
        out: folder to write.
        encoder_weights: safetensors file of ``settings.encoder``.
        workers: processes; by default one per core, or one on CUDA. Federations run one after another, each
            with a process for every hospital.
        resume: go on with the run in ``out``; more seeds and methods may be asked for than it had.
        progress: called with (tasks done, tasks in all).

    Returns:
        What ``benchmark.json`` holds.

    Raises:
        SourceError: the file cannot be used.
        ConfigError: unknown method, impossible partition, or a folder that holds another run.
        EncoderError: the weights of the encoder cannot be used, or it cannot take the images.
        DeviceError: no such device.
        QktError: a federation is to be run and NVIDIA FLARE is not installed, or failed.
    """
    chosen = settings.chosen
    device = pick_device(settings.device)
    workers = workers or (1 if device.type == "cuda" else cores())
    work = out / WORK
    paths = [data] if isinstance(data, Path) else list(data)
    files = site_files(paths) if settings.sites else tuple(paths)
    federation_of = federations_of(files, settings)
    digest = _digest(files, settings)
    networks: list[BenchmarkTask] = []
    questions: list[tuple[int, SimulatedQuery]] = []
    for seed in settings.seeds:  # one federation at a time: each holds a copy of all images
        federation = federation_of(seed)
        networks += [BenchmarkTask(seed, name) for name in _networks(federation, chosen, settings)]
        questions += [(seed, question) for question in federation.questions]
    labels = (federation.test if settings.split == "test" else federation.val).labels
    origins = federation.origins.get(settings.split)
    del federation, federation_of  # every working process reads the data itself
    computed = tuple(dict.fromkeys(RECALIBRATED[m][0] if m in RECALIBRATED else m for m in chosen))
    answers = [BenchmarkTask(seed, name, question) for seed, question in questions for name in computed]

    encoded = [m for m in chosen if m in (*WITH_ENCODER, *OF_STATISTICS)]
    features = [BenchmarkTask(None, name) for name in pieces(files)] if encoded else []

    def missing(task: BenchmarkTask) -> bool:
        if task.seed is None:
            return not (work / FEATURES / task.name).is_dir()
        if task.question is None:
            return not (work / f"seed-{task.seed}" / task.name).is_dir()
        return not row_file(work, task).is_file()

    federations = [task for task in networks if task.name.split("/")[0] in FEDERATED]
    if any(map(missing, federations)):
        from qkt_clinical.common.extras import require_extra

        require_extra("nvflare")
    _claim(out, settings.key(digest, device.type), resume, settings.encoder)
    tell = progress or (lambda done, total: None)
    total = len(features) + len(networks) + len(answers)
    done = total - sum(map(missing, [*features, *networks, *answers]))
    tell(done, total)
    later = [task for task in networks if task.name.split("/")[0] in ON_TEACHERS]
    first = [task for task in networks if task not in later and task not in federations]
    stages = ((federations, 1), *((s, workers) for s in (features, first, later, answers)))
    for stage, processes in stages:
        for _ in run_tasks(
            _perform,
            [task for task in stage if missing(task)],
            workers=processes,
            prepare=_prepare,
            arguments=(files, work, settings, device.type, encoder_weights),
        ):
            done += 1
            tell(done, total)
    rows = _rows(work, questions, chosen)
    kind = settings.trained_as("sent")
    teachers = [t for t in networks if t.name.startswith(f"{kind}/")]
    masks = [_read(work / f"seed-{t.seed}" / t.name / MASKS) for t in teachers]
    result = {
        "format": "qkt-benchmark/1",
        "rows": [{k: v for k, v in row.items() if k not in KEPT} for row in rows],
        "summary": summarise(rows, resample(rows, labels, origins) if origins else None),
        "intervals": SITES_NOTE if settings.sites else NOTE,
        "masks": mask_figures(masks, settings),
        "budget_curves": budget_curves(rows),
        "environment": environment(device, workers, federated=bool(federations), encoder=settings.encoder),
        "settings": {**_shown_settings(settings, files), "methods": list(chosen), "data_sha256": digest},
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
