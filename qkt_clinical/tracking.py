"""Mirror a run's outputs to MLflow: runs, data sets, registered models. The only module that imports it.

Everything is keyed by a digest of what it mirrors, so that a second call changes nothing, a changed output
makes a new run and a new model version, and an empty MLflow is rebuilt from the workspace. A run of the
pipeline holds the runs of its sites, and those the runs of their queries; results that did not change stay
where they were made, and the pipeline's ``contents.json`` names the digests of all.

Models are logged through MLflow's client rather than ``log_model``: the same files, but no active run, no
absolute path in ``MLmodel`` and no name of a user or script.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from qkt_clinical import __version__
from qkt_clinical.card import CARD, MASK, REFERENCE, Card
from qkt_clinical.config import NAME, Params, QueryRef, Workspace
from qkt_clinical.decisions import CHAMPION, NONE, champions, read_decisions, site_of
from qkt_clinical.errors import BundleError, OutputsError, QktError, refused_by_system
from qkt_clinical.files import digest_bytes, digest_file, digest_folder, to_json, write_json
from qkt_clinical.model_card import (
    ModelCard,
    student_model_card,
    teacher_model_card,
    to_markdown,
    to_summary,
    unmeasured_model_card,
)
from qkt_clinical.query import SHARED
from qkt_clinical.report.charts import points, size, words
from qkt_clinical.report.outputs import (
    AnswerOutputs,
    Outputs,
    QueryOutputs,
    Scores,
    SiteOutputs,
    flat,
    published,
    read_outputs,
)
from qkt_clinical.report.page import gain_bars, recall_bars, render_chart, render_reliability
from qkt_clinical.usage import read_usage

if TYPE_CHECKING:
    from mlflow import MlflowClient as MlflowClient
    from mlflow.entities.model_registry import ModelVersion as ModelVersion

DIGEST, KIND, GATE, VERDICT = "qkt.digest", "qkt.kind", "qkt.gate", "qkt.verdict"
ALIAS = "candidate"
NEUTRAL = {"mlflow.user": "qkt-clinical", "mlflow.source.name": "qkt track", "mlflow.source.type": "LOCAL"}
"""In place of the names of a user and a script, which say nothing about a result."""

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

REQUIREMENTS = ("monai", "numpy", "pandas", "pydantic", "safetensors", "torch")
"""What serving imports. This package itself is not listed: where it is not published, a package index may
hold another project of its name."""

LARGEST_EXAMPLE = 200_000
"""Input examples are JSON; one with more numbers would outweigh the network."""

MAX_PARAM, MAX_TAG, MAX_NOTE = 6000, 5000, 5000


@dataclass(frozen=True)
class Item:
    """One run to mirror."""

    kind: str
    name: str
    digest: str
    note: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    dataset: Mapping[str, Any] | None = None
    below: str | None = None
    """The site below whose run this one hangs, where there is one; else it hangs below the pipeline's."""
    model: Model | None = None


@dataclass(frozen=True)
class Model:
    """One version of a registered model."""

    name: str
    folder: Path
    card: Card
    digest: str
    model_card: ModelCard
    tags: Mapping[str, str]
    files: tuple[str, ...] | None = None
    """Those of the folder's files that go to the registry; None for all."""

    @property
    def note(self) -> str:
        """Description of a version."""
        return to_summary(self.model_card)[:MAX_NOTE]


def key(name: str) -> str:
    """A part of a metric's name, at most 200 characters.

    Letters, digits, ``-`` and blanks stay, others become their code point, so that two names never meet.
    """
    text = "".join(c if c.isalnum() or c in "- " else f"_{ord(c):x}_" for c in name) or "_"
    return text if len(text) <= 200 else f"{text[:180]}_{digest_bytes(name.encode())[:16]}"


def curves_of(prefix: str, rows: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[int, float]]]:
    """Rows per epoch, or per layer, as series of (epoch or layer, value)."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        axis = next((name for name in ("layer number", "epoch") if name in row), None)
        for name, value in row.items():
            if axis is not None and name != axis:
                series.setdefault(f"{prefix}/{key(name)}", []).append((int(row[axis]), value))
    return series


# --- what is mirrored ----------------------------------------------------------------------------


def _digest(value: Any) -> str:
    return digest_bytes(to_json(value).encode())


def _dataset(site: SiteOutputs | None) -> dict[str, Any] | None:
    """A hospital's data by digest; counts stay with the site, shape and type are on the card anyway."""
    if site is None or site.manifest is None:
        return None
    return {
        "name": site.name,
        "digest": site.data_digest,
        "profile": {"shape": site.manifest.shape, "dtype": site.manifest.dtype},
    }


def _texts(card: ModelCard) -> dict[str, str]:
    return {"model_card.json": to_json(card.model_dump(mode="json")), "model_card.md": to_markdown(card)}


def site_item(site: SiteOutputs, params: Params) -> Item | None:
    """The run of a site and its teacher; None where there is no teacher here."""
    if site.teacher is None or site.card is None:
        return None
    used = {
        "seed": params.seed,
        **flat("train", params.train.model_dump(mode="json")),
        **flat("mask", params.mask.model_dump(mode="json")),
    }
    files = {n: site.teacher / n for n in (*SHARED, REFERENCE) if (site.teacher / n).is_file()}
    # The figures of training are the run's; whoever fetches the teacher has no use for them.
    registered = digest_folder(site.teacher, files)
    known = [] if site.mask is None else [c for c in site.card.classes if site.mask.knows(c)]
    metrics: dict[str, float] = {}
    if site.metrics is not None:
        metrics = {f"recall/{key(c)}": v for c, v in site.metrics.recall.items() if v is not None}
        metrics |= {"epochs": site.metrics.epochs, "best_epoch": site.metrics.best_epoch}
        if site.metrics.balanced_accuracy is not None:
            metrics["balanced_accuracy"] = site.metrics.balanced_accuracy
    note = f"Teacher of {site.name}: {site.card.network.name}, knows {words(known) or 'nothing by its mask'}."
    bundle = str(site.card_digest)
    tags = {"qkt.site": site.name, "qkt.bundle": bundle, "qkt.data": site.data_digest or "not here"}
    card = teacher_model_card(site, params)
    return Item(
        kind="site",
        name=site.name,
        digest=_digest(
            {
                "folder": digest_folder(site.teacher),
                "card": card.model_dump(mode="json"),
                "params": used,
            }
        ),
        note=note,
        params=used | {"network_bytes": site.card.weights.bytes},
        metrics=metrics,
        curves=curves_of("curve", site.curves),
        tags=tags,
        files={name: path for name, path in files.items() if name in (CARD, MASK)},
        texts=_texts(card),
        dataset=_dataset(site),
        model=Model(card.name, site.teacher, site.card, registered, card, tags, tuple(sorted(files))),
    )


def _answer_params(answer: AnswerOutputs, params: Params) -> dict[str, Any]:
    plan = answer.plan
    return {
        "seed": params.seed,
        "hospital": plan.hospital,
        "query": plan.query,
        "classes": ", ".join(plan.classes),
        "method": plan.method,
        "budget": plan.budget,
        "teachers": ", ".join(plan.relevant),
        **flat("transfer", params.transfer.model_dump(mode="json")),
    }


def _answer_metrics(answer: AnswerOutputs) -> dict[str, float]:
    second, decision = answer.phases.phase2, answer.card.decision
    return {
        "bytes_moved": answer.plan.bytes_moved,
        "passes_per_prediction": 1 if decision is None else decision.passes,
        **({} if second.given_away is None else {"given_away": second.given_away}),
        **{f"offset/{key(c)}": v for c, v in second.offsets.items()},
    }


def _answer_curves(answer: AnswerOutputs) -> dict[str, list[tuple[int, float]]]:
    first, second = answer.phases.phase1, answer.phases.phase2
    return curves_of("phase2", second.curves) | ({} if first is None else curves_of("phase1", first.curves))


def _answer_tags(answer: AnswerOutputs, site: SiteOutputs | None) -> dict[str, str]:
    return {
        "qkt.site": answer.plan.hospital,
        "qkt.query": answer.plan.query,
        "qkt.method": answer.plan.method,
        "qkt.bundle": answer.card_digest,
        "qkt.data": (site.data_digest if site else None) or "not here",
    }


def _answer_files(answer: AnswerOutputs) -> dict[str, Path]:
    return {name: answer.student / name for name in ("plan.json", "phases.json")}


def answer_item(answer: AnswerOutputs, outputs: Outputs) -> Item:
    """The run of a student that nobody has measured."""
    plan, site = answer.plan, outputs.site(answer.plan.hospital)
    used, tags = _answer_params(answer, outputs.params), _answer_tags(answer, site)
    tags |= {GATE: "not judged", f"{GATE}_unmet": NONE, VERDICT: NONE}
    card = unmeasured_model_card(answer, outputs)
    folder = answer.folder_digest
    return Item(
        kind="query",
        name=answer.name,
        digest=_digest({"folder": folder, "card": card.model_dump(mode="json"), "params": used}),
        note=f"{plan.hospital} asks for {words(plan.classes)}; method {plan.method}, teachers "
        f"{words(plan.relevant) or 'none'}, {size(plan.bytes_moved)} moved. Not measured.",
        params=used,
        metrics=_answer_metrics(answer),
        curves=_answer_curves(answer),
        tags=tags,
        files=_answer_files(answer),
        texts=_texts(card),
        dataset=_dataset(site),
        below=plan.hospital,
        model=Model(card.name, answer.student, answer.card, folder, card, tags),
    )


def _score_metrics(prefix: str, scores: Scores) -> dict[str, float]:
    names = ("query_accuracy", "retained_accuracy", "balanced_accuracy", "auroc", "ece")
    named = {n: getattr(scores, n) for n in names}
    named |= {f"recall/{key(c)}": interval for c, interval in scores.recall.items()}
    return {f"{prefix}/{n}": i.value for n, i in named.items() if i is not None}


def _unmet(query: QueryOutputs) -> str:
    """Rules of the gate that an answer does not meet."""
    rules = () if query.verdict is None else query.verdict.rules
    return ", ".join(rule.rule for rule in rules if not rule.passed) or NONE


def query_item(query: QueryOutputs, outputs: Outputs) -> Item:
    """The run of an answered query and its student."""
    e, params, verdict = query.evaluation, outputs.params, query.verdict
    site = outputs.site(e.hospital)
    used = _answer_params(query, params) | flat("evaluate", params.evaluate.model_dump(mode="json"))
    metrics = _answer_metrics(query) | _score_metrics("before", e.before) | _score_metrics("after", e.after)
    for name, interval in (("gain", e.gain), ("forgetting", e.forgetting), ("query_gain", e.query_gain)):
        metrics |= {name: interval.value, f"{name}/low": interval.low, f"{name}/high": interval.high}
    note = (
        f"{e.hospital} asks for {words(e.classes)}; method {e.method}, teachers "
        f"{words(e.teachers) or 'none'}, {size(e.bytes_moved)} moved. "
        f"Balanced accuracy {points(e.gain.value)} points "
        f"({points(e.gain.low)} to {points(e.gain.high)}), forgetting {points(e.forgetting.value)} points."
    )
    tags = _answer_tags(query, site) | {
        GATE: "not judged" if verdict is None else ("passed" if verdict.passed else "failed"),
        f"{GATE}_unmet": _unmet(query),
        VERDICT: NONE if verdict is None else verdict.model_dump_json(),
        "qkt.balanced_accuracy": f"{e.after.balanced_accuracy.value:.6f}",
        "qkt.forgetting": f"{e.forgetting.value:.6f}",
    }
    card = student_model_card(query, outputs)
    folder = query.folder_digest
    return Item(
        kind="query",
        name=query.name,
        digest=_digest(
            {
                "folder": folder,
                "card": card.model_dump(mode="json"),
                "gate": None if verdict is None else verdict.model_dump(mode="json"),
                "params": used,
            }
        ),
        note=note,
        params=used,
        metrics=metrics,
        curves=_answer_curves(query),
        tags=tags,
        files={
            **_answer_files(query),
            **({} if verdict is None else {"gate.json": query.verdict_file}),
        },
        texts={
            **_texts(card),
            "evaluation.json": to_json(published(query.evaluation)),
            "reliability.svg": render_reliability(query),
            "recall.svg": render_chart("bars", f"Recall per class: {query.name}", recall_bars(query)),
        },
        dataset=_dataset(site),
        below=e.hospital,
        model=Model(card.name, query.student, query.card, folder, card, tags),
    )


def with_usage(item: Item, scratch: Path) -> Item:
    """With what making the model took of the machine, where somebody asked: MLflow's "system metrics"."""
    series: dict[str, list[tuple[int, float]]] = {}
    for step, sample in enumerate(read_usage(scratch, item.tags.get("qkt.bundle", ""))):
        for name, value in sample.items():
            series.setdefault(f"system/{name}", []).append((step, value))
    return replace(item, curves={**item.curves, **series})


def pipeline_item(outputs: Outputs, items: Sequence[Item]) -> Item:
    """The run that holds the others."""
    contents = {f"{i.kind} {i.name}": i.digest for i in items}
    gains = [q.evaluation.gain.value for q in outputs.queries]
    metrics: dict[str, float] = {"queries": len(gains), "sites": len(outputs.sites)}
    if gains:
        metrics |= {
            "gain": sum(gains) / len(gains),
            "forgetting": sum(q.evaluation.forgetting.value for q in outputs.queries) / len(gains),
            "balanced_accuracy": sum(q.evaluation.after.balanced_accuracy.value for q in outputs.queries)
            / len(gains),
            "bytes_moved": sum(q.evaluation.bytes_moved for q in outputs.queries),
            "queries_below_own_model": sum(g < 0 for g in gains),
        }
    chart = render_chart("dumbbells", "Balanced accuracy before and after, per query", gain_bars(outputs))
    return Item(
        kind="pipeline",
        name="pipeline",
        digest=_digest({"contents": contents, "params": outputs.params_digest}),
        note=f"{len(outputs.queries)} queries answered among {len(outputs.sites)} hospitals.",
        params={
            "seed": outputs.params.seed,
            "classes": ", ".join(outputs.params.classes),
            "sites": ", ".join(outputs.params.sites),
            "version": __version__,
        },
        metrics=metrics,
        tags={"qkt.params": outputs.params_digest},
        texts={"contents.json": to_json(contents), "gain.svg": chart},
    )


# --- MLflow -----------------------------------------------------------------------------------------

DATABASE = "mlflow.db"
"""The workspace's own, which may be removed: it is rebuilt from the workspace."""


@contextmanager
def _environ(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that are not set already, within the block."""
    new = {k: v for k, v in values.items() if k not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def _check_database(uri: str) -> None:
    """Refuse a file that is no SQLite database at once; MLflow would try it again for minutes."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or not path.is_file():
        return
    with path.open("rb") as stream:
        head = stream.read(16)
    if head not in (b"", b"SQLite format 3\0"):
        own = path.name == DATABASE and not path.is_symlink()
        raise OutputsError(
            "not a database",
            remedy="Remove it and run 'qkt track', which rebuilds it from the workspace."
            if own
            else "Leave it as it is: name a database of MLflow, or none, in track.uri of params.yaml.",
            file=path,
            stage="track",
            code="damaged-database",
        )


def tracking_uri(root: Path, params: Params) -> str:
    """``track.uri`` of params.yaml, or the workspace's own database."""
    return params.track.uri or f"sqlite:///{root.resolve().as_posix()}/{DATABASE}"


@contextmanager
def _unsynced() -> Iterator[None]:
    """SQLite connections made within the block do not wait for the disk.

    That halves the time; a database torn by a power failure is rebuilt from the workspace.
    """
    from sqlalchemy import Engine, event

    def relax(connection: Any, _record: Any) -> None:
        if type(connection).__module__.startswith("sqlite3"):
            connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", relax)
    try:
        yield
    finally:
        event.remove(Engine, "connect", relax)


def _refused(error: Exception) -> QktError:
    return QktError(
        f"MLflow: {str(error).strip().splitlines()[0][:200]}",
        remedy="Check track.uri in params.yaml and that the server or database is there.",
        code="mlflow",
        stage="track",
    )


@contextmanager
def _client(uri: str) -> Iterator[MlflowClient]:
    """A client of ``uri``; the process's own MLflow settings are as before afterwards.

    The registry of an SQL store looks models up through the process-wide address, so that is set too.

    Raises:
        QktError: MLflow could not do what was asked, code ``mlflow``, or the disk did not, as
            :func:`qkt_clinical.errors.refused_by_system`.
    """
    with _environ(ENVIRONMENT):
        import mlflow
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        loggers = [logging.getLogger(n) for n in ("mlflow", "alembic")]
        levels = [one.level for one in loggers]
        # MLflow mirrors the address it was given to this variable; None takes it back.
        before: Any = os.environ.get("MLFLOW_TRACKING_URI")
        try:
            for one in loggers:
                one.setLevel(logging.WARNING)
            mlflow.set_tracking_uri(uri)
            try:
                client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
                client.search_experiments(max_results=1)  # a store may be opened by its first use alone
            except OSError as error:
                raise _refused(error) from error
            yield client
        except (MlflowException, SQLAlchemyError, RequestException, ConnectionError, TimeoutError) as error:
            raise _refused(error) from error
        except OSError as error:
            raise refused_by_system(error) from error
        finally:
            mlflow.set_tracking_uri(before)
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)


def _experiment(client: MlflowClient, root: Path, params: Params, uri: str) -> str:
    """Id of the experiment; made once, with its artifacts in the workspace where the store is a database.

    Raises:
        OutputsError: the database came here from another folder and would write its artifacts there.
    """
    wanted = (root.resolve() / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
    found = client.get_experiment_by_name(params.track.experiment)
    if found is None:
        # Without this tag the pages begin with chats and prompts, and hide the runs.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(params.track.experiment, artifact_location=wanted, tags=tags))
    if found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    if wanted is not None and found.artifact_location != wanted:
        raise OutputsError(
            "the MLflow database keeps its artifacts in another folder",
            remedy="Remove mlflow.db and mlartifacts and run 'qkt track', which rebuilds both.",
            stage="track",
            code="moved-database",
        )
    return str(found.experiment_id)


@dataclass(frozen=True)
class _Runs:
    """Ids of runs by (kind, digest): those that are complete, and those whose process ended too early."""

    finished: dict[tuple[str, str], str]
    begun: dict[tuple[str, str], str]


def _existing(client: MlflowClient, experiment: str, uri: str, params: Params, wanted: set[str]) -> _Runs:
    """Every run of this experiment.

    What an interrupted call left behind is gone on with if its digest is ``wanted``, else it ends as failed.
    On a server only this workspace's own: another hospital's process may be at work on the rest.
    """
    runs = _Runs({}, {})
    token: str | None = None
    while True:
        page = client.search_runs([experiment], filter_string=f"tags.`{KIND}` != ''", page_token=token)
        for run in page:
            tags, number = run.data.tags, str(run.info.run_id)
            known = tags[KIND], tags[DIGEST]
            if run.info.status == "FINISHED":
                runs.finished[known] = number
            elif tags[DIGEST] in wanted:
                runs.begun[known] = number
            elif run.info.status == "RUNNING" and (
                uri.startswith("sqlite:") or tags.get("qkt.site") in params.sites
            ):
                client.set_terminated(number, "FAILED")
        token = page.token
        if not token:
            return runs


def _log(client: MlflowClient, run: str, item: Item) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    client.log_batch(
        run,
        metrics=[Metric(n, float(v), 0, 0) for n, v in item.metrics.items()],
        params=[Param(n, str(v)[:MAX_PARAM]) for n, v in item.params.items()],
        tags=[RunTag(n, v[:MAX_TAG]) for n, v in item.tags.items()],
    )
    points_ = [Metric(n, float(v), 0, step) for n, series in item.curves.items() for step, v in series]
    for start in range(0, len(points_), 1000):  # MLflow's limit per batch
        client.log_batch(run, metrics=points_[start : start + 1000])
    if item.dataset is not None:
        digest = str(item.dataset["digest"])
        dataset = Dataset(
            name=str(item.dataset["name"]),
            digest=digest[:32],  # MLflow holds 36 characters; the whole digest is in the source
            source_type="qkt-prepared",
            source=json.dumps({"sha256": digest}),
            profile=json.dumps(item.dataset["profile"]),
        )
        client.log_inputs(run, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
    with tempfile.TemporaryDirectory() as folder:
        for name, text in item.texts.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        for name, path in item.files.items():
            (Path(folder) / name).write_bytes(path.read_bytes())
        client.log_artifacts(run, folder)


def _lost(client: MlflowClient, name: str, number: str) -> bool:
    """Whether a version's files have been removed from this machine's disk."""
    parts = urlsplit(client.get_model_version_download_uri(name, number))
    return parts.scheme in ("", "file") and not (Path(unquote(parts.path)) / "MLmodel").is_file()


def find_version(client: MlflowClient, name: str, digest: str) -> str | None:
    """Number of the newest version of a model that holds a bundle, and still has its files."""
    found = client.search_model_versions(f"name = '{name}' and tags.`{DIGEST}` = '{digest}'")
    numbers = sorted((int(v.version) for v in found), reverse=True)
    return next((str(n) for n in numbers if not _lost(client, name, str(n))), None)


def _save_model(model: Model, run: str, model_id: str, folder: Path) -> None:
    """Write the pyfunc model: bundle, loader module, signature, requirements; no pickle."""
    import mlflow.models
    import mlflow.pyfunc
    import numpy as np
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    bundle = model.folder
    if model.files is not None:
        bundle = folder.parent / model.folder.name  # the name is part of the place within the version
        bundle.mkdir()
        for name in model.files:
            shutil.copyfile(model.folder / name, bundle / name)
    shape = model.card.input.shape
    answers: list[ColSpec | TensorSpec] = [ColSpec(DataType.string, "label")]
    # The names are those of serving, which is not imported here: it would load torch.
    answers += [ColSpec(DataType.double, f"probability_{c}") for c in model.card.classes]
    if (decision := model.card.decision) is not None:
        answers.append(ColSpec(DataType.double, "budget"))
        answers += [ColSpec(DataType.double, f"offset_{model.card.classes[q]}") for q in decision.query]
    answers.append(ColSpec(DataType.boolean, "unlike_training", required=False))
    for name in ("unlike_training_score", "unlike_training_threshold"):
        answers.append(ColSpec(DataType.double, name, required=False))
    signature = mlflow.models.ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *shape))]), outputs=Schema(answers)
    )
    example = np.zeros((1, *shape), dtype=np.float32)
    mlflow.pyfunc.save_model(
        path=str(folder),
        loader_module="qkt_clinical.serving",
        data_path=str(bundle),
        mlflow_model=mlflow.models.Model(run_id=run, model_id=model_id, model_uuid=model_id),
        signature=signature,
        input_example=example if example.size <= LARGEST_EXAMPLE else None,
        pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in REQUIREMENTS],
        metadata={"model_card": model.model_card.model_dump(mode="json")},
    )


def _register(client: MlflowClient, experiment: str, run: str, model: Model, extra: Mapping[str, str]) -> str:
    """Make a new version of a model and return its number."""
    from mlflow.exceptions import MlflowException

    tags = {DIGEST: model.digest, **model.tags, **extra}
    logged = client.create_logged_model(
        experiment, name=model.name.replace(".", "-"), source_run_id=run, tags={**NEUTRAL, **tags}
    )
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            _save_model(model, run, logged.model_id, folder)
            client.log_model_artifacts(logged.model_id, str(folder))
    except (MlflowException, OSError):
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    made = client.create_model_version(
        model.name,
        source=f"models:/{logged.model_id}",
        run_id=run,
        model_id=logged.model_id,
        tags=tags,
        description=model.note,
    )
    return str(made.version)


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name)


def _state(root: Path) -> dict[str, str]:
    """Tags of the code and pipeline that made a result, where they are known."""
    state = {"qkt.version": __version__}
    lock = root / "dvc.lock"
    if lock.is_file():
        state["qkt.dvc_lock"] = digest_file(lock)
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return state
    if done.returncode == 0:
        state["mlflow.source.git.commit"] = done.stdout.strip()
    return state


@contextmanager
def _run(
    client: MlflowClient,
    experiment: str,
    item: Item,
    parent: str | None,
    runs: _Runs,
    state: Mapping[str, str],
) -> Iterator[str]:
    """The run of an item, made and ended where it does not exist yet, gone on with where it was begun."""
    if (known := runs.finished.get((item.kind, item.digest))) is not None:
        yield known
        return
    tags = {**NEUTRAL, **state, KIND: item.kind, DIGEST: item.digest, "mlflow.note.content": item.note}
    if parent is not None:
        tags["mlflow.parentRunId"] = parent
    if site := item.tags.get("qkt.site"):
        tags["qkt.site"] = site  # from the first moment, so that one can tell whose it is
    begun = runs.begun.get((item.kind, item.digest))
    run = begun or str(client.create_run(experiment, tags=tags, run_name=item.name).info.run_id)
    status = "FAILED"
    try:
        _log(client, run, item)
        yield run
        status = "FINISHED"
    finally:
        client.set_terminated(run, status)


def _mirror_model(
    client: MlflowClient, experiment: str, run: str, model: Model, state: Mapping[str, str]
) -> str:
    """Number of the version that holds the model, made where it does not exist; it becomes the candidate."""
    _ensure_model(client, model.name)
    number = find_version(client, model.name, model.digest)
    if number is None:
        number = _register(client, experiment, run, model, state)
    else:
        # Judged by other rules, or on other images, than before.
        known = client.get_model_version(model.name, number)
        for name, value in model.tags.items():
            if known.tags.get(name) != value:
                client.set_model_version_tag(model.name, number, name, value)
        if known.description != model.note:
            client.update_model_version(model.name, number, model.note)
    set_alias(client, model.name, ALIAS, number)
    return number


@contextmanager
def registry_client(root: Path, params: Params) -> Iterator[MlflowClient]:
    """A client of the workspace's MLflow.

    Raises:
        OutputsError: the database is damaged.
        QktError: MLflow cannot be reached or refuses, code ``mlflow``.
    """
    uri = tracking_uri(root, params)
    _check_database(uri)
    with _client(uri) as client:
        yield client


def set_alias(client: MlflowClient, name: str, alias: str, number: str) -> None:
    """Put an alias on a version, unless it is there."""
    if client.get_registered_model(name).aliases.get(alias) != number:
        client.set_registered_model_alias(name, alias, number)


def _restore_champion(client: MlflowClient, root: Path, name: str) -> None:
    """The champion that was decided on, where the registry does not know it, such as after a rebuild.

    One that somebody decided on elsewhere stays: the decisions here are behind.
    """
    decisions = [d for d in read_decisions(root, site_of(name)) if d.model == name]
    standing = champions(decisions, name)
    number = find_version(client, name, standing[-1]) if standing else None
    if number is None:
        return
    present = client.get_registered_model(name).aliases.get(CHAMPION)
    known = {d.digest for d in decisions}
    if present is None or client.get_model_version(name, present).tags.get(DIGEST) in known:
        set_alias(client, name, CHAMPION, number)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One process of this workspace at a time: each takes what has not ended for what another left behind."""
    scratch = Workspace(root).scratch
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / "mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, however this process ends
        yield


def track(root: Path, params: Params) -> dict[str, Any]:
    """Mirror a workspace's outputs to MLflow and write ``reports/track.json``.

    Models are registered as ``teacher.<site>`` and ``student.<site>.<query>``; the alias ``candidate`` stands
    on the version that the workspace holds now, and ``champion`` on the one decided on.

    Returns:
        ``{"runs": number of runs of this workspace's state, "models": {name: {"version", "digest"}}}``.

    Raises:
        OutputsError: outputs are missing or malformed, or the database is damaged or another folder's.
        BundleError, PreparedError: a card, mask or manifest is malformed.
        QktError: MLflow cannot be reached or refuses, code ``mlflow``.
    """
    outputs = read_outputs(root, params)
    teachers = [item for site in outputs.sites if (item := site_item(site, params))]
    measured = [query_item(query, outputs) for query in outputs.queries]
    items = [*teachers, *measured, *(answer_item(answer, outputs) for answer in outputs.unmeasured)]
    items = [with_usage(item, Workspace(root).scratch) for item in items]
    whole = pipeline_item(outputs, items)
    uri = tracking_uri(root, params)
    _check_database(uri)
    models: dict[str, dict[str, str]] = {}
    with _alone(root), _unsynced(), _client(uri) as client:
        experiment = _experiment(client, root, params, uri)
        runs = _existing(client, experiment, uri, params, {i.digest for i in (whole, *items)})
        state = _state(root)
        made: dict[str, str] = {}
        with _run(client, experiment, whole, None, runs, state) as parent:
            for item in items:
                above = made.get(item.below or "", parent)
                with _run(client, experiment, item, above, runs, state) as run:
                    if item.kind == "site":
                        made[item.name] = run
                    if item.model is not None:
                        number = _mirror_model(client, experiment, run, item.model, state)
                        models[item.model.name] = {"version": number, "digest": item.model.digest}
                        _restore_champion(client, root, item.model.name)
    write_json(
        Workspace(root).reports / "track.json",
        {
            "format": "qkt-track/1",
            "runs": {f"{i.kind} {i.name}": i.digest for i in (whole, *items)},
            "models": {name: entry["digest"] for name, entry in models.items()},
        },
    )
    return {"runs": len(items) + 1, "models": models}


def track_answer(root: Path, params: Params, hospital: str, query: str) -> str:
    """Register the student of one query, and return the number of its version.

    Its run hangs below that of the hospital's teacher, where MLflow holds it.

    Raises:
        OutputsError: there is no such student, or a file of it is malformed.
        QktError: MLflow cannot be reached or refuses, code ``mlflow``.
    """
    ref = QueryRef(hospital=hospital, query=query)
    narrow = params.model_copy(update={"sites": (hospital,), "queries": {f"{hospital}-{query}": ref}})
    outputs = read_outputs(root, narrow)
    items = [query_item(q, outputs) for q in outputs.queries]
    items += [answer_item(a, outputs) for a in outputs.unmeasured]
    if not items or items[0].model is None:
        raise OutputsError(
            "no student",
            remedy=f"Run 'qkt query run {hospital} {query}'.",
            file=Workspace(root).student(hospital, query),
            site=hospital,
        )
    item, model = with_usage(items[0], Workspace(root).scratch), items[0].model
    above = [teacher for site in outputs.sites if (teacher := site_item(site, params))]
    uri = tracking_uri(root, params)
    _check_database(uri)
    with _alone(root), _unsynced(), _client(uri) as client:
        experiment = _experiment(client, root, params, uri)
        runs = _existing(client, experiment, uri, narrow, {item.digest})
        parent = next((runs.finished.get((a.kind, a.digest)) for a in above), None)
        state = _state(root)
        with _run(client, experiment, item, parent, runs, state) as run:
            number = _mirror_model(client, experiment, run, model, state)
            _restore_champion(client, root, model.name)
    return number


# --- what a query job takes from the registry ------------------------------------------------------


class Registered(NamedTuple):
    """The version of a teacher that a query hears: the champion or, where there is none, the candidate."""

    site: str
    version: str

    @property
    def model(self) -> str:
        """Its registered name."""
        return f"teacher.{self.site}"


def registered_teachers(client: MlflowClient) -> list[Registered]:
    """Every teacher in the registry, by site."""
    found = []
    for model in client.search_registered_models("name LIKE 'teacher.%'", max_results=1000):
        number = model.aliases.get(CHAMPION, model.aliases.get(ALIAS))
        site = model.name.removeprefix("teacher.")
        if number is not None and NAME.fullmatch(site):  # a shared registry holds other people's models, too
            found.append(Registered(site, str(number)))
    return sorted(found)


def fetch_file(teacher: Registered, name: str, target: Path, most: int) -> None:
    """Fetch one file of a registered teacher's bundle, within :func:`registry_client`.

    Args:
        name: of the file within the bundle.
        target: where to put it, in one step.
        most: bytes at most; what the registry declares is looked at before anything is moved.

    Raises:
        BundleError: there is no such file, or it is larger.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    def refuse(what: str, code: str) -> BundleError:
        return BundleError(
            f"{name} in version {teacher.version} of {teacher.model} {what}",
            remedy="Ask the site to register its teacher again; nothing of it was used.",
            site=teacher.site,
            code=code,
        )

    store = get_artifact_repository(f"models:/{teacher.model}/{teacher.version}")
    place = f"data/{teacher.site}/{name}"
    listed = {f.path: f.file_size for f in store.list_artifacts(f"data/{teacher.site}")}
    if place not in listed:
        raise refuse("is missing", "bundle-missing")
    if int(listed[place] or 0) > most:
        raise refuse(f"has {listed[place]} bytes, more than {most}", "bundle-size")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        got = Path(store.download_artifacts(place, folder))  # type: ignore[no-untyped-call]
        if got.stat().st_size > most:
            raise refuse("is larger than the registry says", "bundle-size")
        got.replace(target)
