"""State of query jobs: one small file and one lock each, below ``.qkt/jobs/``.

The lock belongs to the process that works on a job, and the system takes it back when that process ends,
however it ends. So a job that is *running* and not locked was interrupted, and anyone may go on with it;
nobody has to guess from the age of a heartbeat.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator

from qkt_clinical.common.files import digest_bytes, read_plain, to_json, write_json
from qkt_clinical.common.locks import Busy, hold_query
from qkt_clinical.config.base import NAME, Name, Sha256, Strict
from qkt_clinical.config.loading import load_query
from qkt_clinical.config.query import QueryConfig
from qkt_clinical.config.workspace import Workspace, query_file, site_folder
from qkt_clinical.errors import OutputsError, QktError, QueryError, visible
from qkt_clinical.records.card import MAX_JSON_BYTES
from qkt_clinical.records.plan import Count
from qkt_clinical.records.query import AskedQuery
from qkt_clinical.records.reading import read_record

State = Literal["waiting", "running", "interrupted", "answered", "failed", "cancelled"]
STEPS = ("plan", "transfer", "evaluate", "register")
"""Steps of a job, in this order; ``plan`` fetches the bundles too, ``evaluate`` asks the gate."""
MAX_INTERRUPTIONS = 3
"""Maximum number of processes that may end during a job before workers skip it."""
PAUSE_S = 0.5
"""Minimum interval in seconds between two writes of the progress."""


VisibleText = Annotated[str, BeforeValidator(lambda text: visible(text) if isinstance(text, str) else text)]
"""In words, for a terminal: what is no character that shows stands as its escape."""


class Failure(Strict):
    """Why a job failed, as :meth:`QktError.as_dict` says it."""

    code: VisibleText
    message: VisibleText
    remedy: VisibleText
    stage: VisibleText | None = None
    site: VisibleText | None = None
    file: VisibleText | None = None


class Job(Strict):
    """A query job and its progress."""

    format: Literal["qkt-job/1"] = "qkt-job/1"
    hospital: Name
    query: Name
    state: State = "waiting"
    asked: Sha256 | Literal[""] = ""
    """Digest of the query file's content when work on it began: a changed query is another question."""
    step: Literal["plan", "transfer", "evaluate", "register"] | None = None
    """The one under way or, where the job has ended, the last."""
    done: Count = 0
    total: Count = 0
    """Progress within the step."""
    interruptions: Count = 0
    error: Failure | None = None
    version: VisibleText | None = None
    """Of the registered student."""
    note: VisibleText | None = None
    """What a person should know of an answer, such as why there are no figures."""
    transferred: tuple[Sha256, Sha256] | None = None
    """Digests of all that the transfer read and of the student that came of it: it is not done twice."""

    @property
    def name(self) -> str:
        """``<hospital>/<query>``."""
        return f"{self.hospital}/{self.query}"


class Cancelled(QueryError):
    """The job was cancelled while it ran."""

    code = "job-cancelled"


def asked(query: QueryConfig) -> str:
    """Digest of the content of a query file."""
    return digest_bytes(to_json(query.model_dump(mode="json")).encode())


class Board:
    """All jobs of a workspace."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = Workspace(root).scratch / "jobs"

    def _path(self, hospital: str, query: str, ending: str) -> Path:
        return self.folder / f"{hospital}.{query}.{ending}"

    def queries(self, hospital: str | None = None) -> list[tuple[str, str]]:
        """(hospital, query) of every query file of the workspace, or of one hospital, sorted.

        Raises:
            ConfigError: no such hospital.
        """
        if hospital is not None:
            site_folder(self.root, hospital)
        files = sorted((self.root / "hospitals").glob("*/queries/*.yaml"))
        pairs = [(f.parent.parent.name, f.stem) for f in files]
        named = [p for p in pairs if all(NAME.fullmatch(name) for name in p)]
        return [p for p in named if hospital in (None, p[0])]

    def read(self, hospital: str, query: str, *, held: bool = False) -> Job:
        """The job of a query; of one that was never worked on, whether the pipeline has answered it.

        Args:
            held: whether this process holds the job's lock.

        Raises:
            ConfigError: no such hospital or query.
            QueryError: the job's file cannot be read, code ``job-damaged``.
        """
        config = load_query(self.root, hospital, query)
        path = self._path(hospital, query, "json")
        try:
            job = Job.model_validate_json(read_plain(path, MAX_JSON_BYTES))
            if (job.hospital, job.query) != (hospital, query):
                raise ValueError("another job's record")
        except FileNotFoundError:
            return Job(hospital=hospital, query=query, state=self._by_pipeline(hospital, query, config))
        except (OSError, ValueError):
            raise QueryError(
                "the job's record cannot be read",
                remedy="Remove the file; the query is answered anew.",
                file=path,
                site=hospital,
                code="job-damaged",
            ) from None
        if job.state == "running" and (held or not self._locked(hospital, query)):
            job = job.model_copy(update={"state": "interrupted"})
        if job.state != "running" and job.asked not in ("", asked(config)):
            return Job(hospital=hospital, query=query)  # the file says something else now
        return job

    def _by_pipeline(self, hospital: str, query: str, config: QueryConfig) -> State:
        """``answered`` where ``dvc repro`` has left the student of this very question."""
        try:
            found = read_record(AskedQuery, Workspace(self.root).student(hospital, query) / "query.json")
        except OutputsError:
            return "waiting"
        return "answered" if found.config == config else "waiting"

    def jobs(self, hospital: str | None = None) -> list[Job]:
        """Every query of the workspace, or of one hospital, with its state.

        One whose file or record cannot be used has failed; the others are not held up by it.

        Raises:
            ConfigError: no such hospital.
        """
        found = []
        for pair in self.queries(hospital):
            try:
                found.append(self.read(*pair))
            except QktError as error:
                failure = Failure.model_validate(error.at(site=pair[0]).as_dict())
                found.append(Job(hospital=pair[0], query=pair[1], state="failed", error=failure))
        return found

    def write(self, job: Job) -> None:
        """Keep a job's record; only who holds its lock may."""
        write_json(self._path(job.hospital, job.query, "json"), job.model_dump(mode="json"))

    def _locked(self, hospital: str, query: str) -> bool:
        try:
            with hold_query(self.root, hospital, query, patience_s=0.0):
                return False
        except Busy:
            return True

    @contextmanager
    def hold(self, hospital: str, query: str) -> Iterator[Job]:
        """The job, for this process alone.

        Raises:
            ConfigError: no such hospital.
            Busy: another process has it.
        """
        query_file(self.root, hospital, query)  # no lock is made for a hospital that is not there
        with hold_query(self.root, hospital, query):
            yield self.read(hospital, query, held=True)

    def cancel(self, hospital: str, query: str) -> Job:
        """Cancel a job: at once if nobody works on it, else at the next check of its worker.

        Raises:
            QueryError: it is answered already, code ``job-answered``.
            Busy: it is no job that works on the query, but a command or a stage of the pipeline.
        """
        try:
            with self.hold(hospital, query) as job:
                if job.state == "answered":
                    raise QueryError(
                        "the query is answered already",
                        remedy="'qkt registry rollback' takes an answer out of use.",
                        site=hospital,
                        code="job-answered",
                    )
                job = job.model_copy(
                    update={"state": "cancelled", "asked": asked(load_query(self.root, hospital, query))}
                )
                self.write(job)
                return job
        except Busy:
            job = self.read(hospital, query)
            if job.state != "running":
                raise
            write_json(self._path(hospital, query, "cancel"), {})
            return job

    def is_cancelled(self, hospital: str, query: str) -> bool:
        """Whether the running job has been cancelled."""
        return self._path(hospital, query, "cancel").exists()

    def clear_cancel(self, hospital: str, query: str) -> None:
        """Remove the mark of cancellation, when the job starts again or has ended."""
        self._path(hospital, query, "cancel").unlink(missing_ok=True)
