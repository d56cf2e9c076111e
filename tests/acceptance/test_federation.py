"""A federation on NVIDIA FLARE: its simulator, and real processes that are killed."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from qkt_clinical.common.files import digest_folder
from qkt_clinical.config.loading import load_params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.datasets.phantom import phantom_params, write_federation
from qkt_clinical.datasets.workspace import write_workspace
from qkt_clinical.federation import run
from qkt_clinical.federation.audit import RECORD, read_record
from qkt_clinical.federation.server import Server
from qkt_clinical.ingest import ingest_site
from qkt_clinical.stages.mask import mask_site
from qkt_clinical.stages.plan import plan_query
from qkt_clinical.stages.train import train_site
from qkt_clinical.stages.transfer import transfer_query
from tests.servers import Line, free_port

pytest.importorskip("nvflare", reason="the extra 'federation' is not installed")
pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

SILENCE_S = 15
"""For so long a site may be silent before a job goes on without it."""
QKT = Path(sys.executable).parent / "qkt"
SITES = ("aster", "birch", "cedar")
QUICK = {
    "train": {"epochs": 6, "batch_size": 16},
    "transfer": {"images": 40},
    "mask": {"probes": 48},
    "evaluate": {"bootstrap": 20},
    "sites": list(SITES),
    "queries": {
        "aster-basophil": {"hospital": "aster", "query": "basophil"},
        "cedar-platelet": {"hospital": "cedar", "query": "platelet"},
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hospitals with images and queries; nothing is prepared or trained."""
    root = tmp_path_factory.mktemp("hospitals")
    write_federation(root, dims=2, images_per_site=60)
    write_workspace(root, phantom_params(2) | QUICK)
    return root


@pytest.fixture(scope="module")
def students(root: Path) -> dict[str, str]:
    """Digests of the students by the pipeline's stages in one workspace."""
    params = load_params(root)
    for site in SITES:
        ingest_site(root, site, params)
        train_site(root, site, params)
        mask_site(root, site, params)
    found = {}
    for ref in params.queries.values():
        plan_query(root, ref.hospital, ref.query, params)
        transfer_query(root, ref.hospital, ref.query, params)
        student = Workspace(root).student(ref.hospital, ref.query)
        found[f"{ref.hospital}/{ref.query}"] = digest_folder(student)
    return found


@pytest.mark.nightly  # tests/federation/test_federation.py hands the messages over every time, to the byte
def test_the_simulator_answers_as_the_pipeline_to_the_byte(
    root: Path, students: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [str(QKT), "federation", "simulate", "--out", str(tmp_path), "--json"],
        cwd=root,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert {name: one["state"] for name, one in outcomes.items()} == dict.fromkeys(students, "answered")
    for name, digest in students.items():
        assert digest_folder(tmp_path / "students" / name) == digest
    assert "teacher birch: answered" in done.stderr, "progress is told"
    # Each machine has its own: no site holds another's images, the server nobody's.
    for site in SITES:
        place = tmp_path / "sites" / site
        assert [p.name for p in (place / "data" / "prepared").iterdir()] == [site]
        assert [p.name for p in (place / "hospitals").iterdir()] == [site]
    assert not (tmp_path / "sites" / "server" / "data").exists()


@contextlib.contextmanager
def machines(kits: Path, out: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """All machines of a federation; what a test puts in place of one is ended, too."""
    found: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name in (run.HOST, *SITES):
            found[name] = run.start(kits / name, out / "logs" / f"{name}.log")
        yield found
    finally:
        for process in found.values():
            run.kill(process)


@contextlib.contextmanager
def asleep(machine: subprocess.Popen[bytes]) -> Iterator[None]:
    """A machine that nobody can reach for a while, with the processes of its jobs."""
    top = psutil.Process(machine.pid)
    found = [top, *top.children(recursive=True)]
    for process in found:
        process.suspend()
    try:
        yield
    finally:
        for process in found:
            process.resume()


def until(what: Callable[[], bool], seconds: float = 180) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)


@pytest.mark.nightly
def test_real_processes_one_site_and_the_server_killed(
    root: Path, students: dict[str, str], tmp_path: Path
) -> None:
    """A site is killed in its training, another cannot be reached for a while, and the server is killed in a
    query; every query is answered all the same.
    """
    params = load_params(root)
    port = free_port()
    kits = run.set_up(root, tmp_path, params, port=port)
    server = Server(tmp_path / "sites" / "server")
    kit = kits / run.ADMIN
    command = [str(QKT), "federation", "submit", "--kit", str(kit), "--wait", "--json"]
    command += ["--patience", "420", "--silence", "15"]
    begun = time.monotonic()
    with machines(kits, tmp_path) as running:
        asking = subprocess.Popen(
            command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        until(lambda: server.outcome("teachers", "birch").state == "running")
        until(lambda: any((tmp_path / "sites" / "birch" / ".qkt").rglob("*birch*")))
        run.kill(running["birch"])
        assert server.outcome("teachers", "birch").state != "answered", "killed before it was done"
        running["birch"] = run.start(kits / "birch", tmp_path / "logs" / "birch.log")
        with asleep(running["cedar"]):  # unreachable for less than the silence that counts
            time.sleep(6)
        until(lambda: server.outcome("queries", "aster", "basophil").state == "running", 300)
        run.kill(running[run.HOST])
        running[run.HOST] = run.start(kits / run.HOST, tmp_path / "logs" / f"{run.HOST}.log")
        said, errors = asking.communicate(timeout=480)
    assert asking.returncode == 0, errors
    outcomes = json.loads(said)
    assert {name: one["state"] for name, one in outcomes.items()} == dict.fromkeys(students, "answered")
    assert time.monotonic() - begun < 480, "within the time that was stated"
    for name in students:
        hospital, query = name.split("/")
        made = Workspace(tmp_path / "sites" / hospital).student(hospital, query)
        if len(outcomes[name]["teachers"]) == len(SITES) - 1:
            assert digest_folder(made) == students[name]
    for site in SITES:
        assert list(read_record(tmp_path / "sites" / site / RECORD)), "and the record is whole"


@pytest.mark.nightly
def test_real_processes_one_loses_the_network_and_one_comes_late(
    root: Path, students: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Birch is cut off while it trains, aster falls asleep over its answer for longer than is waited for it.

    Both are given up by the job in which they fell silent, come back with what they made, and take part.
    """
    from nvflare.lighter import provision

    params, port = load_params(root), free_port()
    prepare = provision.prepare_project

    with Line(port) as line:

        def by_line(project: dict[str, Any]) -> Any:
            for one in project["participants"]:
                if one["name"] == "birch":
                    one["connect_to"] = {"host": run.HOST, "port": line.port}
            return prepare(project)

        monkeypatch.setattr(provision, "prepare_project", by_line)
        kits = run.set_up(root, tmp_path, params, port=port)
        server = Server(tmp_path / "sites" / "server")
        told: list[str] = []
        with machines(kits, tmp_path) as running, ThreadPoolExecutor(1) as pool:
            attended = pool.submit(
                run.attend,
                kits / run.ADMIN,
                SITES,
                list(students),
                contribute=True,
                patience_s=420,
                silence_s=SILENCE_S,
                say=told.append,
            )
            until(lambda: any((tmp_path / "sites" / "birch" / ".qkt").rglob("*birch*")))
            line.cut()
            until(lambda: server.outcome("teachers", "cedar").state == "answered")
            until(lambda: server.outcome("teachers", "birch").state == "missing")
            line.mend()
            fetched = Workspace(tmp_path / "sites" / "aster").fetched("aster", "basophil")
            until(fetched.is_dir)
            with asleep(running["aster"]):
                until(lambda: server.outcome("queries", "aster", "basophil").state == "missing")
            outcomes = attended.result(timeout=480)
    assert {name: one.state for name, one in outcomes.items()} == dict.fromkeys(outcomes, "answered"), told
    assert "teacher birch: missing, the site did not reply in time" in told
    for name, digest in students.items():  # as if nothing had happened: who came back takes part
        hospital, query = name.split("/")
        assert digest_folder(Workspace(tmp_path / "sites" / hospital).student(hospital, query)) == digest
