"""Site and server as NVIDIA FLARE's executor, filter and controller: a thin layer around the library.

A site's machine names its own workspace in ``local/qkt.json`` of its startup kit. What a job says cannot
point anywhere else, since none of these classes takes a path.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.apis.signal import Signal

from qkt_clinical.common.files import read_plain, write_json
from qkt_clinical.config.loading import MAX_CONFIG_BYTES, load_policy, parse
from qkt_clinical.config.workspace import check_name
from qkt_clinical.errors import Boundary, ConfigError, QktError
from qkt_clinical.federation.messages import (
    ANSWER,
    ASK,
    CONTRIBUTE,
    OFFER,
    Answered,
    Asked,
    Contributed,
    Declined,
    Offered,
    Refused,
    Reply,
    TeacherRequest,
    read_reply,
)
from qkt_clinical.federation.policy import check_outbound
from qkt_clinical.federation.server import FederationOutcome, Server
from qkt_clinical.federation.settings import FILE, FederationSettings, NamedInJob
from qkt_clinical.federation.site import Site

SAID = "qkt"
"""Where in a FLARE message, and among a job's results, ours stands."""
ALIVE, PING_S = "qkt.alive", 5.0
"""The server's question whether a site's process for a job is there, and how often it is put, in seconds."""
OUTCOMES = "outcomes"
"""An administrator's question to a running job, and the file in which a finished one answers it."""


def settings_of(fl_ctx: FLContext) -> tuple[FederationSettings, str]:
    """Settings of this machine from ``local/qkt.json``, and its name.

    Raises:
        ConfigError: absent or not such a file.
    """
    # FLARE's simulator calls its server simulator_server.
    name = str(fl_ctx.get_identity_name()).removeprefix("simulator_")
    place = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_site_config_dir()) / FILE
    try:
        settings = parse(FederationSettings, json.loads(read_plain(place, MAX_CONFIG_BYTES)), file=FILE)
    except (OSError, ValueError, RecursionError):
        raise ConfigError(
            "cannot be read", remedy="Name the qkt workspace in it; docs/federation.md shows how.", file=FILE
        ) from None
    if "{site}" in settings.workspace:  # of a server the name is an address, and its workspace is its own
        workspace = settings.workspace.replace("{site}", check_name(name, "site"))
        settings = settings.model_copy(update={"workspace": workspace})
    return settings, name


def workspace_of(fl_ctx: FLContext) -> tuple[Path, str]:
    """This machine's qkt workspace and name. Raises as :func:`settings_of`."""
    settings, name = settings_of(fl_ctx)
    return Path(settings.workspace), name


class SiteExecutor(Executor):  # type: ignore[misc]
    """Executor of a site: performs a task and always replies."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Answer the server's question whether this process is alive."""
        if event_type == EventType.START_RUN:
            engine = fl_ctx.get_engine()
            engine.register_aux_message_handler(
                ALIVE, lambda topic, request, fl_ctx: make_reply(ReturnCode.OK)
            )

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Reply to a task of the server's."""
        try:
            settings, name = settings_of(fl_ctx)
        except QktError as error:
            said = Refused.of(error).model_dump(mode="python")
        else:
            key = None if settings.signing_key is None else Path(settings.signing_key)
            said = Site(Path(settings.workspace), name, key).reply(task_name, shareable.get(SAID, {}))
        reply = make_reply(ReturnCode.OK)
        reply[SAID] = said
        return reply


class OutboundPolicy(Filter):  # type: ignore[misc]
    """The site's filter of what a job sends, named in its ``local/privacy.json``.

    It stands whatever the job is: one that is not ours may send nothing.
    """

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The same message, or FLARE's error that it was filtered out.

        Raises:
            QktError: the policy does not let it pass; FLARE sends nothing of it then.
        """
        root, name = workspace_of(fl_ctx)
        task = str(
            shareable.get_header(ReservedHeaderKey.TASK_NAME) or fl_ctx.get_prop(FLContextKey.TASK_NAME)
        )
        said = shareable.get(SAID)
        clean = make_reply(str(shareable.get_return_code() or ReturnCode.OK))
        for key, value in dict(shareable.get(ReservedHeaderKey.HEADERS, {})).items():
            clean.set_header(key, value)
        if said is None:
            return clean  # FLARE's own errors: a return code and nothing else
        check_outbound(load_policy(root, name), task, said, name)
        clean[SAID] = said
        return clean


def check_job(sites: Sequence[str], queries: Sequence[str]) -> None:
    """Check what a job names: sites, and queries as ``<hospital>/<query>``.

    Raises:
        ConfigError: a name is none, or there are more than a thousand.
    """
    parse(NamedInJob, {"sites": sites, "queries": queries}, file="the job")


class QueryController(Controller):  # type: ignore[misc]
    """Controller on the server: collects teachers, then has queries answered, one hospital's in turn.

    Args:
        sites: whose teachers are collected, and who is asked whether it helps.
        queries: ``<hospital>/<query>``.
        contribute: whether teachers are collected first; else those that the server keeps are used.
        patience_s: seconds after which a site that has not replied is missing.
        silence_s: seconds after which a site that does not say that it is there is missing.
    """

    def __init__(
        self,
        sites: list[str],
        queries: list[str],
        contribute: bool = True,
        patience_s: int = 3600,
        silence_s: int = 60,
    ) -> None:
        super().__init__()
        self.sites, self.queries = sites, queries
        check_job(sites, queries)  # whoever submits a job writes them, and they become paths here
        self.contribute, self.patience_s, self.silence_s = contribute, patience_s, silence_s

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Find the server's workspace, and forget what an earlier job made of what this one is to do."""
        settings, _ = settings_of(fl_ctx)
        self._server = Server(Path(settings.workspace), settings.keys)
        for site in self.sites if self.contribute else ():
            self._server.note(FederationOutcome(state="waiting"), "teachers", site)
        for one in self.queries:
            self._server.note(FederationOutcome(state="waiting"), "queries", *one.split("/"))
        self._engine.register_app_command(OUTCOMES, self._tell_outcomes)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Write outcomes and received students to the job's results."""
        results = Path(self._engine.get_workspace().get_run_dir(fl_ctx.get_job_id())) / SAID
        write_json(results / f"{OUTCOMES}.json", self._outcomes())
        for one in self.queries:
            student = self._server.space.student(*one.split("/"))
            if student.is_dir() and self._server.outcome("queries", *one.split("/")).student_kept:
                shutil.copytree(student, results / "students" / one)

    def _tell_outcomes(self, *_ignored: Any) -> dict[str, Any]:
        return self._outcomes()

    def _outcomes(self) -> dict[str, Any]:
        told = {f"teacher {s}": self._server.outcome("teachers", s) for s in self.sites if self.contribute}
        told |= {q: self._server.outcome("queries", *q.split("/")) for q in self.queries}
        return {name: outcome.model_dump(mode="json") for name, outcome in told.items()}

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """Ignore a reply that came too late; the site keeps its result for the next request."""
        self.log_warning(fl_ctx, f"{client.name} replied to {task_name} too late")

    def _tell(
        self,
        task: str,
        data: Mapping[str, Any],
        sites: Iterable[str],
        abort_signal: Signal,
        take: Callable[[str, Reply], object] = lambda site, reply: None,
    ) -> dict[str, Reply | None]:
        """Send a task to sites and return the reply of each; None if it came too late.

        Args:
            take: called with site and reply as soon as it is there.
        """
        replies: dict[str, Reply | None] = dict.fromkeys(sites)

        def received(client_task: ClientTask, fl_ctx: FLContext) -> None:
            site, result = client_task.client.name, client_task.result
            said: Reply
            with Boundary() as end:
                if result.get_return_code() == ReturnCode.OK:
                    said = read_reply(result.get(SAID), task, site)
                else:
                    code = str(result.get_return_code())[:100]
                    said = Refused(
                        code="flare", message=f"FLARE says {code}", remedy="See the site's log.", site=site
                    )
                take(site, said)
            if end.error is not None:
                said = Refused.of(end.error)
                with Boundary():  # the server's own disk may be what is full
                    take(site, said)
            replies[site] = said
            client_task.result = None  # bundles need not stay in memory

        present = [s for s in replies if s in {client.name for client in self._engine.get_clients()}]
        if not present:
            return replies
        message = Shareable()
        message[SAID] = dict(data)
        with self._engine.new_context() as fl_ctx:
            one = Task(task, message, timeout=self.patience_s, result_received_cb=received)
            self.broadcast(one, fl_ctx, targets=present, min_responses=len(present))
            now = asked = time.monotonic()
            seen = dict.fromkeys(present, now)
            while one.completion_status is None and not abort_signal.triggered:
                time.sleep(0.2)
                now = time.monotonic()
                waiting = [s for s in present if replies[s] is None]
                if waiting and now - asked > PING_S:
                    seen |= dict.fromkeys(self._alive(waiting, fl_ctx), now)
                    asked = now
                if waiting and all(now - seen[s] > self.silence_s for s in waiting):
                    self.cancel_task(one, fl_ctx=fl_ctx)
                    break
        return replies

    def _alive(self, sites: Sequence[str], fl_ctx: FLContext) -> list[str]:
        """Sites whose processes for this job are alive.

        FLARE looks after machines. One that was started again is there, but what it did for the job is not.
        """
        said = self._engine.send_aux_request(list(sites), ALIVE, Shareable(), PING_S, fl_ctx)
        return [site for site, reply in said.items() if reply.get_return_code() == ReturnCode.OK]

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Run all steps in turn; the failure of one site does not end the job."""
        if self.contribute:
            for site in self.sites:
                self._server.note(FederationOutcome(state="running"), "teachers", site)
            replies = self._tell(CONTRIBUTE, {}, self.sites, abort_signal, self._take_teacher)
            for site in (s for s, said in replies.items() if said is None):
                self._server.note(self._missing(), "teachers", site)
        by_hospital: dict[str, list[str]] = {}
        for one in self.queries:
            hospital, _, query = one.partition("/")
            by_hospital.setdefault(hospital, []).append(query)
        with ThreadPoolExecutor(max_workers=max(1, len(by_hospital))) as pool:
            for hospital, named in by_hospital.items():
                pool.submit(self._answer_all, hospital, named, abort_signal)

    def _take_teacher(self, site: str, said: Reply) -> None:
        if isinstance(said, Contributed | Refused):
            self._server.accept_teacher(site, said)

    def _missing(self) -> FederationOutcome:
        return FederationOutcome(state="missing", code="no-reply", reason="the site did not reply in time")

    def _answer_all(self, hospital: str, queries: list[str], abort_signal: Signal) -> None:
        for query in queries:
            if abort_signal.triggered:
                return
            with Boundary() as end:
                outcome = self._answer(hospital, query, abort_signal)
            if end.error is not None:  # the other queries are answered all the same
                outcome = FederationOutcome(state="refused", code=end.error.code, reason=end.error.message)
            self._server.note(outcome, "queries", hospital, query)

    def _answer(self, hospital: str, query: str, abort_signal: Signal) -> FederationOutcome:
        self._server.note(FederationOutcome(state="running"), "queries", hospital, query)
        asked = self._tell(ASK, {"query": query}, [hospital], abort_signal)[hospital]
        if not isinstance(asked, Asked):
            return self._refused(asked)
        question = TeacherRequest(
            hospital=hospital,
            query=query,
            classes=asked.query.classes,
            held=asked.asking.held,
        )
        others = [s for s in self.sites if s != hospital]
        data = {"question": question.model_dump(mode="json"), "hospital": hospital, "query": query}
        offers, shown, declined = {}, {}, {}
        for site, said in self._tell(OFFER, data, others, abort_signal).items():
            try:
                if isinstance(said, Offered):
                    offers[site], shown[site] = self._server.offer(site, said), said
                elif isinstance(said, Declined):
                    declined[site] = said.reason
                else:
                    declined[site] = said.message if isinstance(said, Refused) else "did not reply"
            except QktError as error:
                declined[site] = error.message
        plan = self._server.plan(hospital, query, asked, offers)
        data = {
            "plan": plan.model_dump(mode="json"),
            "teachers": self._server.bundles(plan, shown),
            "signatures": self._server.signatures(plan),
            "query": query,
        }
        answered = self._tell(ANSWER, data, [hospital], abort_signal)[hospital]
        if not isinstance(answered, Answered):
            return self._refused(answered)
        return self._server.accept_answer(plan, answered, declined)

    def _refused(self, said: Reply | None) -> FederationOutcome:
        if isinstance(said, Refused):
            return FederationOutcome(state="refused", code=said.code, reason=said.message)
        return self._missing()
