"""Mirror a run's outputs to MLflow: runs, data sets, registered models. The only module that imports it.

Everything is keyed by a digest of what it mirrors, so that a second call changes nothing, a changed output
makes a new run and a new model version, and an empty MLflow is rebuilt from the workspace. A run of the
pipeline holds the runs of its sites, and those the runs of their queries; results that did not change stay
where they were made, and the pipeline's ``contents.json`` names the digests of all.

Models are logged through MLflow's client rather than ``log_model``: the same files, but no active run, no
absolute path in ``MLmodel`` and no name of a user or script.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkt_clinical import __version__
from qkt_clinical.common.files import digest_file
from qkt_clinical.common.locks import lock
from qkt_clinical.config.params import Params
from qkt_clinical.config.query import QueryRef
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.errors import OutputsError, refused_by_system
from qkt_clinical.records.decisions import CHAMPION, champions, read_decisions, site_of
from qkt_clinical.records.outputs import read_outputs
from qkt_clinical.records.reading import write_record
from qkt_clinical.records.tracked import Tracked
from qkt_clinical.tracking.client import (
    check_database,
    connect,
    ensure_experiment,
    ensure_model,
    find_version,
    set_alias,
    tracking_uri,
    unsynced,
)
from qkt_clinical.tracking.model_files import NEUTRAL, register_version
from qkt_clinical.tracking.runs import (
    DIGEST,
    KIND,
    MAX_PARAM,
    MAX_TAG,
    Item,
    Model,
    answer_item,
    pipeline_item,
    query_item,
    site_item,
    with_system_metrics,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient


ALIAS = "candidate"


@dataclass(frozen=True)
class _Runs:
    """Ids of runs by (kind, digest): complete ones, and ones that were interrupted."""

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
            known = tags[KIND], tags.get(DIGEST, "")  # others may write to the experiment, too
            if run.info.status == "FINISHED":
                runs.finished[known] = number
            elif known[1] in wanted:
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
    """The run of an item; it is created, or continued if it was interrupted."""
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
    """Number of the version that holds the model, created if needed; it becomes the candidate."""
    ensure_model(client, model.name)
    number = find_version(client, model.name, model.digest)
    if number is None:
        number = register_version(client, experiment, run, model, state)
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


def _restore_champion(client: MlflowClient, root: Path, name: str) -> None:
    """Set the decided champion where the registry lacks it, such as after a rebuild.

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
    """Lock for one process per workspace: each takes unfinished runs for interrupted ones.

    What the disk refuses within the block is a typed error.
    """
    try:
        with lock(Workspace(root).scratch / "mlflow.lock"):
            yield
    except OSError as error:
        raise refused_by_system(error) from error


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
    items = [with_system_metrics(item, Workspace(root).scratch) for item in items]
    whole = pipeline_item(outputs, items)
    uri = tracking_uri(root, params)
    check_database(uri)
    models: dict[str, dict[str, str]] = {}
    with _alone(root), unsynced(), connect(uri) as client:
        experiment = ensure_experiment(client, root, params, uri)
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
        tracked = Tracked(
            runs={f"{i.kind} {i.name}": i.digest for i in (whole, *items)},
            models={name: entry["digest"] for name, entry in models.items()},
        )
        write_record(Workspace(root).reports / "track.json", tracked)
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
    item, model = with_system_metrics(items[0], Workspace(root).scratch), items[0].model
    above = [teacher for site in outputs.sites if (teacher := site_item(site, params))]
    uri = tracking_uri(root, params)
    check_database(uri)
    with _alone(root), unsynced(), connect(uri) as client:
        experiment = ensure_experiment(client, root, params, uri)
        runs = _existing(client, experiment, uri, narrow, {item.digest})
        parent = next((runs.finished.get((a.kind, a.digest)) for a in above), None)
        state = _state(root)
        with _run(client, experiment, item, parent, runs, state) as run:
            number = _mirror_model(client, experiment, run, model, state)
            _restore_champion(client, root, model.name)
    return number
