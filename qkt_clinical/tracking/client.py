"""A client for the workspace's MLflow, with typed errors."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkt_clinical.config.params import Params
from qkt_clinical.errors import OutputsError, refused_by_system
from qkt_clinical.records.registered import UnsoundVersion
from qkt_clinical.tracking.faults import no_driver, refused_by_store
from qkt_clinical.tracking.runs import DIGEST
from qkt_clinical.tracking.version_files import VersionFiles

if TYPE_CHECKING:
    from mlflow import MlflowClient


DATABASE = "mlflow.db"
"""The workspace's own, which may be removed: it is rebuilt from the workspace."""
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

NEWEST = 200
"""Versions of one digest that are looked into; there are more only where somebody forges them."""
LISTED = VERSIONS = 1000
"""Models and versions a page."""


# --- MLflow -----------------------------------------------------------------------------------------


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


def check_database(uri: str) -> None:
    """Refuse a file that is no SQLite database at once; MLflow would retry for minutes."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or not path.is_file():
        return
    try:
        with path.open("rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise refused_by_system(error) from error
    if head not in (b"", b"SQLite format 3\0"):
        own = path.name == DATABASE and not path.is_symlink()
        raise OutputsError(
            "not a database",
            remedy="Move it away and run 'qkt track', which makes it again from the workspace."
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
def unsynced() -> Iterator[None]:
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


@contextmanager
def connect(uri: str) -> Iterator[MlflowClient]:
    """A client of ``uri``; the process's MLflow settings are restored afterwards.

    The registry of an SQL store looks models up through the process-wide address, so that is set too.

    Raises:
        QktError: MLflow could not do what was asked, see
            :func:`qkt_clinical.tracking.faults.refused_by_store`; a driver is missing, code ``no-driver``;
            the disk refused, see :func:`qkt_clinical.errors.refused_by_system`.
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
                raise refused_by_store(error) from error
            yield client
        except ModuleNotFoundError as error:
            if (error.name or "qkt_clinical").startswith("qkt_clinical"):
                raise
            raise no_driver(error) from error
        except (MlflowException, SQLAlchemyError, RequestException, ConnectionError, TimeoutError) as error:
            raise refused_by_store(error) from error
        except OSError as error:
            raise refused_by_system(error) from error
        finally:
            mlflow.set_tracking_uri(before)
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)


def ensure_experiment(client: MlflowClient, root: Path, params: Params, uri: str) -> str:
    """Id of the experiment, created if needed; with a database as store, artifacts lie in the workspace.

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


def pages(search: Callable[..., Any], wanted: str, size: int) -> Iterator[Any]:
    """All results of one of the client's searches, page by page."""
    token: str | None = None
    while True:
        page = search(wanted, max_results=size, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def find_version(client: MlflowClient, name: str, digest: str) -> str | None:
    """Number of the newest version of a model that holds a bundle, by its files and not by its tag alone.

    Whoever may write to the registry can put the tag on files of their own; a version whose files are others,
    or gone, is passed over. Of many with the tag only the newest few are looked at.
    """
    wanted = f"name = '{name}' and tags.`{DIGEST}` = '{digest}'"
    numbers = sorted(
        (int(v.version) for v in pages(client.search_model_versions, wanted, VERSIONS)), reverse=True
    )
    return next((str(n) for n in numbers[:NEWEST] if _sound(client, name, str(n), digest)), None)


def _sound(client: MlflowClient, name: str, number: str, digest: str) -> bool:
    try:
        VersionFiles(client, name, number).check(digest)
    except UnsoundVersion:
        return False
    return True


def ensure_model(client: MlflowClient, name: str) -> None:
    """Register a model of this name where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name)


@contextmanager
def registry_client(root: Path, params: Params) -> Iterator[MlflowClient]:
    """A client of the workspace's MLflow.

    Raises:
        OutputsError: the database is damaged.
        QktError: MLflow cannot be reached or refuses, code ``mlflow``.
    """
    uri = tracking_uri(root, params)
    check_database(uri)
    with connect(uri) as client:
        yield client


def set_alias(client: MlflowClient, name: str, alias: str, number: str) -> None:
    """Set an alias of a version, unless it is set already."""
    if client.get_registered_model(name).aliases.get(alias) != number:
        client.set_registered_model_alias(name, alias, number)
