"""Start federations: in FLARE's simulator on one machine, or on separate machines with FLARE's kits."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from qkt_clinical.common.extras import require_extra
from qkt_clinical.common.files import copy_folder, new_folder, read_plain, write_json, write_text
from qkt_clinical.config.base import NAME
from qkt_clinical.config.params import Params
from qkt_clinical.errors import ConfigError, QktError
from qkt_clinical.federation.messages import TASKS
from qkt_clinical.federation.server import FederationOutcome, Server
from qkt_clinical.federation.settings import FILE
from qkt_clinical.records.card import MAX_JSON_BYTES

if TYPE_CHECKING:
    from nvflare.job_config.api import FedJob

SERVER = "server"
HOST, ADMIN = "localhost", "admin@qkt.example"
"""Names in a federation on one machine."""
PATIENCE_S = 3600
SILENCE_S = 60
"""Seconds without a sign of life from a site's process after which it is missing from the job."""
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait give their core to the other sites on the machine; how many there are stays, and with it
the last digits of a network."""
OURS = "qkt_clinical.federation.flare."
"""Prefix of the only classes that a job may name at a site."""
NOBODY = dict.fromkeys(("clone_job", "shell_commands", "byoc", "server-predeployed-flwr"), "none")
"""Rights that a site gives to nobody: custom code and shells would be a way around its policy."""


def make_job(
    sites: Sequence[str],
    queries: Sequence[str],
    *,
    contribute: bool = True,
    patience_s: int = PATIENCE_S,
    silence_s: int = SILENCE_S,
) -> FedJob:
    """Make the FLARE job that collects teachers and has queries answered.

    Args:
        queries: ``<hospital>/<query>``.
    """
    from nvflare.job_config.api import FedJob

    from qkt_clinical.federation.flare import QueryController, SiteExecutor

    job = FedJob(name="qkt", min_clients=1)
    job.set_app_packages(["qkt_clinical"])  # installed everywhere: code that travels would be refused
    job.to_server(QueryController(list(sites), list(queries), contribute, patience_s, silence_s))
    job.to_clients(SiteExecutor(), tasks=list(TASKS))
    return job


def write_local(folder: Path, workspace: str) -> None:
    """What qkt adds to ``local/`` of a FLARE machine.

    Its workspace; its policy as a filter on everything that leaves it; of classes that a job may name, ours
    alone; nobody's code and no shells; no log lines to the server.
    """
    write_json(folder / FILE, {"workspace": workspace})
    policy = {"path": f"{OURS}OutboundPolicy", "direction": "out"}
    scope = {"name": "qkt", "task_result_filters": [policy]}
    write_json(folder / "privacy.json", {"scopes": [scope], "default_scope": "qkt"})
    found: dict[str, Any] = {"format_version": 2}
    for name in ("resources.json", "resources.json.default"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_bytes())
            break
    found |= {
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": [OURS],
        "allow_log_streaming": False,
    }
    write_json(folder / "resources.json", found)
    rights = folder / "authorization.json.default"
    if rights.is_file():
        known = json.loads(rights.read_bytes())
        everything = dict.fromkeys((*known["permissions"]["lead"], "app_command"), "any")
        for role, given in known["permissions"].items():
            known["permissions"][role] = (everything if given == "any" else given) | NOBODY
        write_json(folder / "authorization.json", known)


def lay_out(root: Path, out: Path, params: Params) -> None:
    """A workspace for the server and for every site below ``out/sites``, each with its own data alone."""
    for name in (SERVER, *params.sites):
        place = out / "sites" / name
        own = {k: r.model_dump() for k, r in params.queries.items() if r.hospital == name}
        held = params.model_dump(mode="json") | {"queries": own}
        write_text(place / "params.yaml", yaml.safe_dump(held, sort_keys=False, allow_unicode=True))
        if name == SERVER:
            continue
        for part in (Path("hospitals") / name, Path("data") / "prepared" / name):
            source, link = root.resolve() / part, place / part
            if source.is_dir() and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(source, target_is_directory=True)


def named_queries(params: Params) -> list[str]:
    """``<hospital>/<query>`` of every query of params.yaml.

    Raises:
        ConfigError: there is none.
    """
    queries = [f"{r.hospital}/{r.query}" for _, r in sorted(params.queries.items())]
    if not queries:
        raise ConfigError("no query in params.yaml", remedy="Ask one with 'qkt query new'.")
    return queries


def gather(out: Path, queries: Sequence[str]) -> dict[str, FederationOutcome]:
    """Outcome of each query; students of all sites are collected in ``out/students``.

    Only who runs every machine of a federation can do that: a simulation.
    """
    server = Server(out / "sites" / SERVER)
    outcomes = {}
    for one in queries:
        hospital, query = one.split("/")
        outcomes[one] = server.outcome("queries", hospital, query)
        target = out / "students" / hospital / query
        shutil.rmtree(target, ignore_errors=True)
        if outcomes[one].state == "answered":
            made = out / "sites" / hospital / "models" / "students" / hospital / query
            shutil.copytree(made, target)
    return outcomes


def simulate(
    root: Path, out: Path, params: Params, *, threads: int, say: Say
) -> dict[str, FederationOutcome]:
    """The whole federation in FLARE's simulator: teachers of all sites, then every query of params.yaml.

    FLARE's logs lie in ``out/flare``, a workspace for every site and the server in ``out/sites``, and the
    students in ``out/students/<site>/<query>/``.

    Args:
        threads: sites at work at the same time.

    Returns:
        ``<hospital>/<query>`` to what became of it.

    Raises:
        QktError: FLARE's simulator ended with an error, code ``flare``.
    """
    require_extra("nvflare")
    queries = named_queries(params)
    lay_out(root, out, params)
    work = out / "flare"
    shutil.rmtree(work, ignore_errors=True)
    write_local(work / "local", str((out / "sites").resolve() / "{site}"))
    write_json(work / "job.json", {"sites": list(params.sites), "queries": queries, "threads": threads})
    server, told = Server(out / "sites" / SERVER), dict[str, str]()
    # In a process of its own, which may say what it likes: FLARE writes on both streams and changes folders.
    # It splits its own command lines at blanks, so it finds the folder by a link without one; and it does not
    # take our package from a workspace, where that is a link.
    with tempfile.TemporaryDirectory(prefix="qkt-") as short, (work / "simulator.log").open("wb") as log:
        link = Path(short) / "out"
        link.symlink_to(out.resolve(), target_is_directory=True)
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(link / work.name)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=short,
            env={**os.environ, **PATIENT, "TMPDIR": short},
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                for name, outcome in server.outcomes().items():
                    if told.get(name) != outcome.state:
                        told[name] = outcome.state
                        say(outcome.line(name))
        finally:
            kill(process)
    if process.returncode:
        raise QktError(
            f"the simulator ended with {process.returncode}",
            remedy=f"See {work / 'simulator.log'}.",
            code="flare",
        )
    return gather(out, queries)


def _simulate(work: Path) -> int:
    """Run the simulator in this process; the process's exit code."""
    asked = json.loads((work / "job.json").read_bytes())
    job = make_job(asked["sites"], asked["queries"])
    done = job.simulator_run(str(work), clients=asked["sites"], threads=asked["threads"])
    return int(done or 0)


# --- machines of their own ---------------------------------------------------------------------------


def provision(out: Path, sites: Sequence[str], *, server: str, port: int, admin: str) -> Path:
    """Startup kits of a server, sites and an administrator, as FLARE makes them, each with its certificate.

    Args:
        server: name by which the sites reach the server.
        port: of the server for sites; administrators use the next one.

    Returns:
        The folder with the kits.
    """
    require_extra("nvflare")
    from nvflare.lighter.impl.cert import CertBuilder
    from nvflare.lighter.impl.signature import SignatureBuilder
    from nvflare.lighter.impl.static_file import StaticFileBuilder
    from nvflare.lighter.impl.workspace import WorkspaceBuilder
    from nvflare.lighter.provision import prepare_project
    from nvflare.lighter.provisioner import Provisioner

    project = {
        "api_version": 3,
        "name": "qkt",
        "participants": [
            {"name": server, "type": "server", "org": "qkt", "fed_learn_port": port, "admin_port": port + 1},
            *({"name": site, "type": "client", "org": site} for site in sites),
            {"name": admin, "type": "admin", "org": "qkt", "role": "project_admin"},
        ],
    }
    builders = [
        WorkspaceBuilder(template_file=["master_template.yml"]),
        StaticFileBuilder(config_folder="config"),
        CertBuilder(),
        SignatureBuilder(),
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        Provisioner(str(out), builders, None).provision(prepare_project(project))
    return max((out / "qkt").glob("prod_*"))


def serve(kit: Path, storage: Path) -> None:
    """Additions to a server's kit: jobs and snapshots are kept in ``storage``, not in /tmp."""
    path = kit / "local" / "resources.json"
    found = json.loads(path.read_bytes())
    found["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(storage / "snapshots")
    for component in found["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(storage / "jobs")
    write_json(path, found)


def start(kit: Path, log: Path) -> subprocess.Popen[bytes]:
    """A server or site as a process of its own, with whatever it starts in its process group."""
    environment = {
        **os.environ,
        **PATIENT,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with log.open("ab") as stream:
        return subprocess.Popen(
            [str(kit / "startup" / "sub_start.sh"), "--once"],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a machine and the processes that FLARE started for its jobs, unless it has ended."""
    import psutil

    if process.poll() is not None:
        return  # its number may be another process's by now
    with contextlib.suppress(psutil.NoSuchProcess):
        machine = psutil.Process(process.pid)
        for one in (machine, *machine.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


@contextmanager
def session(kit: Path, *, patience_s: float = 10.0) -> Iterator[Any]:
    """An administrator's session with the server.

    Raises:
        QktError: the server cannot be reached in time, code ``no-server``.
    """
    require_extra("nvflare")
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    with contextlib.redirect_stdout(io.StringIO()):
        try:
            one = new_secure_session(kit.name, str(kit), timeout=patience_s)
        except _flare_errors() as error:
            raise QktError(
                f"the federation's server cannot be reached: {str(error)[:200]}",
                remedy="Check that it runs, and that the folder is an administrator's startup kit.",
                code="no-server",
                file=kit,
            ) from None
    try:
        yield one
    except _flare_errors() as error:
        raise QktError(
            f"the federation's server said or did: {str(error)[:200]}",
            remedy="Check that it runs, then run the same command again.",
            code="no-server",
            file=kit,
        ) from None
    finally:
        with contextlib.suppress(*_flare_errors()):
            one.close()


Say = Callable[[str], None]
"""Callback with a line of text for every change."""
POLL_S = 2.0


def submit(
    kit: Path,
    sites: Sequence[str],
    queries: Sequence[str],
    *,
    contribute: bool,
    patience_s: int,
    silence_s: int = SILENCE_S,
) -> str:
    """Submit a job to a running server and return its id.

    Args:
        kit: an administrator's startup kit.
        patience_s: how long the server waits for a site's reply.
    """
    job = make_job(sites, queries, contribute=contribute, patience_s=patience_s, silence_s=silence_s)
    with tempfile.TemporaryDirectory(prefix="qkt-") as folder, session(kit) as one:
        with contextlib.redirect_stdout(io.StringIO()):
            job.export_job(folder)
        return str(one.submit_job(str(Path(folder) / job.name)))


def _flare_errors() -> tuple[type[Exception], ...]:
    """The exceptions of FLARE's administration: two dozen types without a common base."""
    from nvflare.apis import fl_exception
    from nvflare.fuel.flare_api import api_spec

    named = (*vars(api_spec).values(), *vars(fl_exception).values())
    own = (v for v in named if isinstance(v, type) and issubclass(v, Exception))
    return (*own, OSError, RuntimeError, ValueError)


def server_start(kit: Path) -> float:
    """Start time of the server by its own clock. A restarted server has lost its jobs."""
    with session(kit) as one:
        try:
            return float(one.get_system_info().server_info.start_time)
        except (KeyError, TypeError):  # a server that is just ending or starting does not say everything
            raise RuntimeError("it does not say when it was started") from None


def list_jobs(kit: Path) -> list[dict[str, str]]:
    """Every job of the server, latest first: ``job``, ``state``, ``submitted``."""
    with session(kit) as one:
        found = one.list_jobs(reverse=True)
    return [
        {"job": str(j["job_id"]), "state": str(j["status"]), "submitted": str(j["submit_time"])}
        for j in found
    ]


def ask_outcomes(kit: Path, job: str) -> dict[str, FederationOutcome]:
    """Outcomes of a running job's teachers and queries so far.

    Raises:
        QktError: the job is not running, code ``no-job``.
    """
    from qkt_clinical.federation.flare import OUTCOMES

    with session(kit) as one:
        try:
            return _parsed(one.do_app_command(job, OUTCOMES, None))
        except _flare_errors() as error:
            raise QktError(
                f"the job does not answer: {str(error)[:200]}",
                remedy="'qkt federation status' lists jobs, 'qkt federation fetch' brings a finished one's.",
                code="no-job",
            ) from None


ToldName = Annotated[str, Field(pattern=f"^(teacher {NAME.pattern}|{NAME.pattern}/{NAME.pattern})$")]
TOLD = TypeAdapter(Annotated[dict[ToldName, FederationOutcome], Field(max_length=2000)])
"""What a server tells of a job: ``teacher <site>`` and ``<hospital>/<query>``."""


def _parsed(found: Any) -> dict[str, FederationOutcome]:
    """Parse a server's report of a job's outcomes.

    Raises:
        QktError: not outcomes, code ``reply``.
    """
    try:
        return TOLD.validate_python(found)
    except ValidationError:
        raise QktError(
            "what the server says of the job cannot be understood",
            remedy="Let server and administrator install the same version of qkt-clinical.",
            code="reply",
        ) from None


def fetch(kit: Path, job: str, out: Path) -> dict[str, FederationOutcome]:
    """Fetch a finished job's outcomes, and the students that hospitals sent, into ``out``.

    Raises:
        QktError: no such job, or it has no results, code ``no-results``.
    """
    from qkt_clinical.federation.flare import OUTCOMES, SAID

    with tempfile.TemporaryDirectory(prefix="qkt-") as folder, session(kit) as one:
        try:
            got = Path(one.download_job_result(job, folder))
            (found,) = got.rglob(f"{SAID}/{OUTCOMES}.json")
            told = json.loads(read_plain(found, MAX_JSON_BYTES))
        except _flare_errors() as error:
            raise QktError(
                f"no results of job {job[:50]}: {str(error)[:200]}",
                remedy="'qkt federation status' lists jobs; one that broke off has none: submit it again.",
                code="no-results",
            ) from None
        outcomes = _parsed(told)
        with new_folder(out) as target:
            copy_folder(found.parent, target)
    return outcomes


def attend(
    kit: Path,
    sites: Sequence[str],
    queries: Sequence[str],
    *,
    contribute: bool,
    patience_s: int,
    say: Say,
    silence_s: int = SILENCE_S,
) -> dict[str, FederationOutcome]:
    """Submit queries and wait until each is answered or refused, or until the timeout.

    What fails for want of a site or of the server is submitted again: a site that had made something before
    says so at once, so nothing is done twice.

    Args:
        patience_s: seconds in all.

    Returns:
        ``<hospital>/<query>`` and ``teacher <site>`` to what became of it; ``missing`` where time ran out.
    """
    start, told = time.monotonic(), dict[str, FederationOutcome]()
    outcomes = {q: FederationOutcome(state="missing", code="time-out") for q in queries}
    left = list(queries)

    def remaining() -> int:
        return int(patience_s - (time.monotonic() - start))

    def watch(job: str, server: float) -> dict[str, FederationOutcome] | None:
        """Outcomes of a finished job; None if it was aborted."""
        while remaining() > 0:
            time.sleep(POLL_S)
            try:
                state = next((j["state"] for j in list_jobs(kit) if j["job"] == job), "gone")
            except QktError:
                continue  # the server is not there: it may come back
            if state == "gone" or state.startswith("FINISHED"):
                with tempfile.TemporaryDirectory(prefix="qkt-") as folder:
                    try:
                        return fetch(kit, job, Path(folder) / "results")
                    except QktError:
                        say(f"the job ended without results ({state})")
                        return None
            try:
                found = ask_outcomes(kit, job)
            except QktError:  # it has not begun, has just ended, or is lost
                with contextlib.suppress(QktError):
                    if server_start(kit) != server:
                        say("the job is lost: its server was started again")
                        return None
                continue
            for name, outcome in found.items():
                if told.get(name) != outcome:
                    told[name] = outcome
                    say(outcome.line(name))
        return None

    while left and remaining() > 0:
        try:
            server = server_start(kit)
            job = submit(
                kit,
                sites,
                left,
                contribute=contribute,
                patience_s=max(1, remaining()),
                silence_s=silence_s,
            )
        except QktError as error:
            if error.code != "no-server" or remaining() <= 0:
                raise
            time.sleep(POLL_S)
            continue
        say(f"job {job}: {len(left)} queries")
        outcomes |= watch(job, server) or {}
        absent = any(o.state == "missing" for name, o in outcomes.items() if name not in queries)
        left = [
            q
            for q in queries
            if outcomes[q].state not in ("answered", "refused")
            or (absent and outcomes[q].code == "uncovered")  # who is missing may know the class
        ]
    return outcomes


def play(
    root: Path, out: Path, params: Params, *, sites: Sequence[str], port: int, patience_s: int, say: Say
) -> dict[str, FederationOutcome]:
    """A federation of real processes on this machine: server, sites and an administrator, over TLS.

    As in production, but for the folder in which the machines stand side by side.

    Returns:
        As :func:`simulate`.
    """
    chosen = {k: r for k, r in params.queries.items() if r.hospital in sites}
    params = params.model_copy(update={"sites": tuple(sites), "queries": chosen})
    queries = named_queries(params)
    kits = set_up(root, out, params, port=port)
    running = []
    try:
        running = [start(kits / name, out / "logs" / f"{name}.log") for name in (HOST, *sites)]
        attend(kits / ADMIN, sites, queries, contribute=True, patience_s=patience_s, say=say)
    finally:
        for process in running:
            kill(process)
    return gather(out, queries)


def set_up(root: Path, out: Path, params: Params, *, port: int) -> Path:
    """Kits and workspaces of all machines of a federation on this one; the folder with the kits."""
    lay_out(root, out, params)
    (out / "logs").mkdir(exist_ok=True)
    kits = provision(out / "kits", params.sites, server=HOST, port=port, admin=ADMIN)
    for name in (HOST, *params.sites):
        own = SERVER if name == HOST else name
        write_local(kits / name / "local", str((out / "sites" / own).resolve()))
    serve(kits / HOST, (out / "storage").resolve())
    return kits


if __name__ == "__main__":
    sys.exit(_simulate(Path(sys.argv[1])))
