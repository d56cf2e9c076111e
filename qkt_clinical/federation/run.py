"""Start jobs: in FLARE's simulator here; against running servers in production."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from qkt_clinical.config import Params
from qkt_clinical.errors import ConfigError, QktError
from qkt_clinical.federation.messages import TASKS
from qkt_clinical.federation.server import Outcome, Server
from qkt_clinical.federation.settings import FILE
from qkt_clinical.files import write_json, write_text

SERVER = "server"
PATIENCE_S = 3600
CLASSES = ("qkt_clinical.federation.flare.",)


def make_job(
    sites: Sequence[str], queries: Sequence[str], *, contribute: bool = True, patience_s: int = PATIENCE_S
):  # type: ignore[no-untyped-def]
    """A FLARE job that collects teachers and has queries answered."""
    from nvflare.job_config.api import FedJob

    from qkt_clinical.federation.flare import QueryController, SiteExecutor

    job = FedJob(name="qkt", min_clients=1)
    job.to_server(QueryController(list(sites), list(queries), contribute, patience_s))
    job.to_clients(SiteExecutor(), tasks=list(TASKS))
    return job


def write_local(folder: Path, workspace: str) -> None:
    """What qkt adds to a FLARE site's ``local/``: its workspace, its policy as a filter, our classes."""
    from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

    write_json(folder / FILE, {"workspace": workspace})
    policy = {"path": "qkt_clinical.federation.flare.OutboundPolicy", "direction": "out"}
    scope = {"name": "qkt", "task_result_filters": [policy]}
    write_json(folder / "privacy.json", {"scopes": [scope], "default_scope": "qkt"})
    for name in ("resources.json", "resources.json.default"):
        path = folder / name
        if path.is_file():
            found = json.loads(path.read_text())
            break
    else:
        path, found = folder / "resources.json", {"format_version": 2}
    found["class_allow_list"] = [*found.get("class_allow_list", DEFAULT_CLASS_ALLOW_LIST), *CLASSES]
    write_json(path, found)


def lay_out(root: Path, out: Path, params: Params) -> None:
    """A workspace for the server and for every site below ``out/sites``, each with its own data alone."""
    for name in (SERVER, *params.sites):
        place = out / "sites" / name
        place.mkdir(parents=True, exist_ok=True)
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


def simulate(root: Path, out: Path, params: Params, *, threads: int) -> dict[str, Outcome]:
    """The whole federation in FLARE's simulator: teachers of all sites, then every query of params.yaml.

    Students lie below ``out/students/<site>/<query>/`` afterwards.

    Returns:
        ``<hospital>/<query>`` to what became of it.

    Raises:
        QktError: FLARE's simulator ended with an error, code ``flare``.
    """
    queries = [f"{r.hospital}/{r.query}" for _, r in sorted(params.queries.items())]
    if not queries:
        raise ConfigError("no query in params.yaml", remedy="Ask one with 'qkt query new'.")
    lay_out(root, out, params)
    work = out / "flare"
    shutil.rmtree(work, ignore_errors=True)
    write_local(work / "local", str((out / "sites").resolve() / "{site}"))
    job = make_job(params.sites, queries)
    done = job.simulator_run(str(work), clients=list(params.sites), threads=threads)
    if done not in (None, 0):
        raise QktError(f"the simulator ended with {done}", remedy=f"See the logs below {work}.", code="flare")
    server = Server(out / "sites" / SERVER)
    outcomes = {}
    for one in queries:
        hospital, query = one.split("/")
        outcomes[one] = server.outcome("queries", hospital, query)
        made = out / "sites" / hospital / "models" / "students" / hospital / query
        target = out / "students" / hospital / query
        if outcomes[one].state == "answered":
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(made, target)
    return outcomes
