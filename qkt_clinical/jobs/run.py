"""Answer queries in the hospital's own environment: one at once, or a queue of them.

A job opens the asking hospital's prepared images and no other's. It fetches the relevant bundles from the
registry, answers, measures where the hospital has test images of all that was asked, and registers the
student. Interrupted at any moment, it goes on where it was; the student's bytes are those of a job that was
not interrupted.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qkt_clinical.common.files import digest_file, digest_folder, new_folder, sweep
from qkt_clinical.common.locks import Busy
from qkt_clinical.config.loading import load_query
from qkt_clinical.config.params import Params
from qkt_clinical.config.query import QueryConfig, QueryRef
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import Manifest, read_manifest
from qkt_clinical.errors import ConfigError, QktError, QueryError, typed
from qkt_clinical.jobs.fetch import RegistryTeachers, open_teachers
from qkt_clinical.jobs.new import tell_pipeline
from qkt_clinical.jobs.state import (
    MAX_INTERRUPTIONS,
    PAUSE_S,
    Board,
    Cancelled,
    Failure,
    Job,
    asked,
)
from qkt_clinical.qkt.planning import at_risk, make_plan
from qkt_clinical.records.card import CARD, Card, read_card
from qkt_clinical.records.plan import Asking, Plan
from qkt_clinical.stages.plan import write_fetched
from qkt_clinical.stages.recipe import transfer_recipe

if TYPE_CHECKING:
    from qkt_clinical.jobs.routes import Route

Report = Callable[[Job], None]
"""Called whenever a job's record changes."""


class Preview(NamedTuple):
    """Preview of a query: its cost and the teachers that would answer it."""

    plan: Plan
    versions: dict[str, str]
    """Site to version of its registered teacher."""
    risks: list[tuple[str, tuple[str, ...]]]
    """See :func:`qkt_clinical.qkt.planning.at_risk`."""
    seconds: float
    """Approximate duration of the transfer on this machine."""
    fetched_bytes: int
    """Bytes of the bundles that are not cached."""
    routes: list[Route]
    """By every method, the query's own among them."""


def _calibrated(manifest: Manifest, query: QueryConfig) -> None:
    """Refuse early, before anything is fetched, a query that the transfer would refuse."""
    own = Asking.of(manifest).local(query)
    if own and not sum(manifest.counts["calibration"].get(c, 0) for c in own):
        raise QueryError(
            "no calibration image of a local class, so the budget cannot be kept",
            remedy="Raise ingest.splits.calibration in params.yaml or add patients.",
            code="no-calibration",
            site=manifest.site,
            stage="plan",
        )


def _plan(
    teachers: RegistryTeachers, name: str, query: QueryConfig, manifest: Manifest, own: Card, params: Params
) -> Plan:
    asking = Asking.of(manifest, params.shared_encoder, params.train.encoder)
    plan = make_plan(manifest.site, name, query, asking, teachers.offers.values(), own.image_statistics)
    _calibrated(manifest, query)
    return plan


def preview(root: Path, hospital: str, name: str, params: Params, *, device: str | None = None) -> Preview:
    """Plan a query from the registry's cards and masks; nothing is kept.

    Raises:
        ConfigError, QueryError, BundleError, PreparedError: the query cannot be answered.
        QktError: the registry cannot be reached.
    """
    from qkt_clinical.jobs.routes import routes
    from qkt_clinical.models.networks import begin_computing

    query = load_query(root, hospital, name)
    where = begin_computing(device or params.device, params.threads)
    manifest = read_manifest(Workspace(root).prepared(hospital))
    own = read_card(Workspace(root).own(hospital))
    with open_teachers(root, params, hospital, query) as teachers:
        plan = _plan(teachers, name, query, manifest, own, params)
        ways = routes(name, query, teachers.offers, own, manifest, params, where)
        return Preview(
            plan,
            {site: teachers.versions[site].version for site in plan.relevant},
            at_risk(plan),
            next(way.seconds for way in ways if way.method == plan.method),
            sum(teachers.to_fetch(site, plan.method) for site in plan.relevant),
            ways,
        )


# --- one job ------------------------------------------------------------------------------------------


class _Worker:
    """A process that holds a job."""

    def __init__(
        self, board: Board, job: Job, params: Params, device: str | None, report: Report | None
    ) -> None:
        self.board, self.job, self.params = board, job, params
        self.device, self.report = device, report
        self.space = Workspace(board.root)
        self._written = 0.0

    def _say(self, **changes: Any) -> None:
        self.job = self.job.model_copy(update=changes)
        self.board.write(self.job)
        self._written = time.monotonic()
        if self.report:
            self.report(self.job)

    def _begin(self, step: str) -> None:
        self._look_up()
        self._say(step=step, done=0, total=0)

    def _progress(self, done: int, total: int) -> None:
        self._look_up()
        if done == total or time.monotonic() - self._written > PAUSE_S:
            self._say(done=done, total=total)

    def _look_up(self) -> None:
        if self.board.is_cancelled(self.job.hospital, self.job.query):
            raise Cancelled(
                "cancelled",
                remedy="'qkt query run' asks it again.",
                site=self.job.hospital,
                stage=self.job.step,
            )

    def answer(self) -> Job:
        """Run every step that is not finished yet.

        Raises:
            QktError: whatever went wrong; the job has failed. An end of the process interrupts it.
        """
        job, board = self.job, self.board
        try:
            board.clear_cancel(job.hospital, job.query)
            self._say(
                state="running",
                asked=asked(load_query(board.root, job.hospital, job.query)),
                interruptions=job.interruptions + (job.state == "interrupted"),
                error=None,
                note=None,
            )
            self._fetch()
            self._transfer()
            self._put_back()
            self._evaluate()
            self._put_back()
            self._register()
            self._say(state="answered", interruptions=0)
            shutil.rmtree(self._own, ignore_errors=True)
        except Cancelled:
            self._end(state="cancelled")
            shutil.rmtree(self._own, ignore_errors=True)
            board.clear_cancel(job.hospital, job.query)
            raise
        except Exception as error:
            failure = typed(error).at(stage=self.job.step, site=job.hospital)
            self._end(state="failed", error=Failure.model_validate(failure.as_dict()))
            if failure is error:
                raise
            raise failure from error
        return self.job

    def _end(self, **changes: Any) -> None:
        """As :meth:`_say`; where the disk is too full for it, others read that the job was interrupted."""
        self.job = self.job.model_copy(update=changes)
        with suppress(OSError):
            self._say()

    @property
    def _own(self) -> Path:
        """What the job needs until it ends: the pipeline removes what is under ``models/`` when it likes."""
        return self.board.folder / f"{self.job.hospital}.{self.job.query}"

    @property
    def _fetched(self) -> Path:
        return self._own / "fetched"

    @property
    def _kept(self) -> Path:
        return self._own / "student"

    @property
    def _student(self) -> Path:
        return self.space.student(self.job.hospital, self.job.query)

    def _fetch(self) -> None:
        self._begin("plan")
        sweep(self._fetched)
        sweep(self._student)
        hospital, name = self.job.hospital, self.job.query
        query = load_query(self.board.root, hospital, name)
        manifest = read_manifest(self.space.prepared(hospital))
        own = read_card(self.space.teacher(hospital))  # missing, nothing need be fetched
        with open_teachers(self.board.root, self.params, hospital, query) as teachers:
            plan = _plan(teachers, name, query, manifest, own, self.params)
            count = 0

            def provide(site: str, folder: Path) -> None:
                nonlocal count
                teachers.provide(site, folder, plan.method)
                count += 1
                self._progress(count, len(plan.relevant))

            write_fetched(self._fetched, plan, provide)

    def _transfer(self) -> None:
        self._begin("transfer")
        space, hospital, name = self.space, self.job.hospital, self.job.query
        from qkt_clinical.models.networks import pick_device

        made_of = transfer_recipe(
            self.params,
            name,
            load_query(self.board.root, hospital, name),
            read_manifest(space.prepared(hospital)),
            own=digest_file(space.own(hospital) / CARD),
            fetched=digest_folder(self._fetched),
            device=pick_device(self.device or self.params.device).type,
        )
        before = digest_folder(self._student) if self._student.is_dir() else None
        if before is None or self.job.transferred != (made_of.digest, before):
            from qkt_clinical.stages.transfer import transfer_query

            transfer_query(
                self.board.root,
                hospital,
                name,
                self.params,
                device=self.device,
                progress=self._progress,
                fetched=self._fetched,
            )
            self._say(transferred=(made_of.digest, digest_folder(self._student)))
        with new_folder(self._kept) as kept:
            shutil.copytree(self._student, kept, dirs_exist_ok=True)

    def _put_back(self) -> None:
        """The student as the transfer left it, should somebody have removed or replaced it meanwhile."""
        _, made = self.job.transferred or ("", "")
        if digest_folder(self._student) != made and digest_folder(self._kept) == made:
            with new_folder(self._student) as student:
                shutil.copytree(self._kept, student, dirs_exist_ok=True)

    def _evaluate(self) -> None:
        """On the hospital's own images; what it has none of, only the federation can measure."""
        self._begin("evaluate")
        hospital, name = self.job.hospital, self.job.query
        from qkt_clinical.stages.gate import NotMeasured, gate_one

        ref = QueryRef(hospital=hospital, query=name)
        with suppress(NotMeasured):  # this student, by nobody yet
            gate_one(self.board.root, ref, self.params)
            return
        from qkt_clinical.stages.evaluate import NoTestImages, evaluate_one

        try:
            evaluate_one(self.board.root, ref, self.params, sites=(hospital,), device=self.device)
        except NoTestImages:
            manifest, query = (
                read_manifest(self.space.prepared(hospital)),
                load_query(self.board.root, hospital, name),
            )
            relevant = (*query.classes, *Asking.of(manifest).local(query))
            without = [c for c in relevant if not manifest.counts["test"].get(c)]
            self._say(
                note=f"not measured: no test images of {', '.join(without)} here; "
                "'qkt evaluate' measures where the hospitals' test images are"
            )
            return
        gate_one(self.board.root, ref, self.params)

    def _register(self) -> None:
        self._begin("register")
        from qkt_clinical.records.plan import read_plan
        from qkt_clinical.tracking.mirror import track_answer

        version = track_answer(self.board.root, self.params, self.job.hospital, self.job.query)
        self._say(version=version)
        root, hospital, name = self.board.root, self.job.hospital, self.job.query
        try:
            tell_pipeline(root, hospital, name, read_plan(self._fetched).relevant)
        except ConfigError as error:  # the answer is there and registered all the same
            self._say(note=f"{self.job.note or 'registered'}. The pipeline does not know of it: {error}")


def run(
    root: Path,
    hospital: str,
    name: str,
    params: Params,
    *,
    device: str | None = None,
    report: Report | None = None,
) -> Job:
    """Answer a query now, or continue it; finished steps are not repeated.

    Raises:
        Busy: another process works on it.
        Cancelled: somebody took it back.
        QktError: it cannot be answered; the job's record says why, too.
    """
    board = Board(root)
    with board.hold(hospital, name) as job:
        return _Worker(board, job, params, device, report).answer()


def resume(
    root: Path,
    hospital: str,
    name: str,
    params: Params,
    *,
    device: str | None = None,
    report: Report | None = None,
) -> Job:
    """Continue a job that was interrupted, has failed or was cancelled.

    Raises:
        QueryError: there is nothing to go on with, code ``job-not-begun``; else as :func:`run`.
    """
    job = Board(root).read(hospital, name)
    if job.state == "waiting":
        raise QueryError(
            "nobody has begun with this query",
            remedy=f"Begin with 'qkt query run {hospital} {name}'.",
            site=hospital,
            code="job-not-begun",
        )
    return run(root, hospital, name, params, device=device, report=report)


# --- the queue ----------------------------------------------------------------------------------------


def _open(job: Job) -> bool:
    """Whether a worker may start the job by itself."""
    ended = job.interruptions + 1  # the last one is counted when somebody takes the job up
    return job.state == "waiting" or (job.state == "interrupted" and ended < MAX_INTERRUPTIONS)


def work(
    root: Path,
    params: Params,
    *,
    hospital: str | None = None,
    device: str | None = None,
    report: Report | None = None,
) -> list[Job]:
    """Answer waiting and interrupted queries until none is left, and return their jobs.

    Any number of workers may do so at once. One that ends leaves its job to the others, who wait for
    running jobs before they end.
    """
    board = Board(root)
    taken: dict[str, Job] = {}
    given_up: set[str] = set()  # a full disk may have kept the record of a failure from being written
    while True:
        jobs = board.jobs(hospital)
        waiting = [j for j in jobs if _open(j) and j.name not in given_up]
        if not waiting and not any(j.state == "running" for j in jobs):
            return list(taken.values())
        begun = False
        for seen in waiting:
            try:
                with board.hold(seen.hospital, seen.query) as job:
                    if not _open(job):  # another worker was faster
                        continue
                    begun = True
                    worker = _Worker(board, job, params, device, report)
                    try:
                        worker.answer()
                    finally:
                        taken[job.name] = worker.job
            except Busy:
                continue
            except QktError as error:  # the next query is another question
                given_up.add(seen.name)
                said = Failure.model_validate(error.as_dict())
                taken.setdefault(seen.name, seen.model_copy(update={"state": "failed", "error": said}))
        if not begun:
            time.sleep(PAUSE_S)
