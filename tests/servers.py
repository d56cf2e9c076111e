"""Real servers for tests: MLflow with an artifact proxy, a throw-away PostgreSQL, and a served model.

Ports are free ones of this machine, waiting is bounded, and every process that is started here is ended here.
"""

from __future__ import annotations

import getpass
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PATIENCE = 180
"""Seconds that a program may take to start on a busy machine."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str) -> bytes:
    """The body of a page of this machine; no proxy is asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as answer:
        return bytes(answer.read())


def post(url: str, body: Any) -> tuple[int, Any]:
    """Status and JSON that a server answers to JSON."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with opener.open(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@contextmanager
def running(
    command: Sequence[str], ready: str, folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """A program, from when ``ready`` answers to the end of the block; its output is in ``folder``."""
    own = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # serving calls uvicorn
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        **(environment or {}),
    }
    log = folder / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=folder, env=own, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            end = time.monotonic() + PATIENCE
            while True:
                try:
                    get(ready)
                    break
                except OSError:
                    assert process.poll() is None, log.read_text(errors="replace")[-3000:]
                    assert time.monotonic() < end, log.read_text(errors="replace")[-3000:]
                    time.sleep(0.2)
            yield
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and its children, which are a session of their own."""
    for how, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 20)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience)


@contextmanager
def mlflow_server(store: str, folder: Path) -> Iterator[str]:
    """An MLflow server with an artifact proxy; its address."""
    folder.mkdir(parents=True, exist_ok=True)
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", store]
    command += ["--artifacts-destination", (folder / "artifacts").as_uri()]
    # Nor the three processes for jobs of language models, which would start beside the server.
    with running(command, f"{address}/health", folder, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}):
        yield address


@contextmanager
def served_model(model: str, tracking: str, folder: Path) -> Iterator[str]:
    """``mlflow models serve`` of a registered model; the address that answers."""
    folder.mkdir(parents=True, exist_ok=True)
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with running(command, f"{address}/ping", folder, {"MLFLOW_TRACKING_URI": tracking}):
        yield f"{address}/invocations"


@contextmanager
def served_here(model: str, tracking: str) -> Iterator[str]:
    """The same answers from a thread of this process, which need no other to start; their address."""
    import mlflow
    import uvicorn
    from mlflow.pyfunc import scoring_server

    mlflow.set_tracking_uri(tracking)
    try:
        app = scoring_server.init(mlflow.pyfunc.load_model(model))
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + PATIENCE
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < end
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        server.should_exit = True
        thread.join(20)


def postgres_programs() -> Path | None:
    """The folder that holds ``initdb`` and ``postgres``, or None."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if (found := shutil.which("initdb")) is not None:
        places.append(Path(found).resolve().parent)
    return next((p for p in places if (p / "initdb").is_file() and (p / "postgres").is_file()), None)


def _unprivileged() -> dict[str, Any]:
    """PostgreSQL refuses to run as root: as whom it runs instead, for ``subprocess``."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    chosen = names.get("postgres") or names["nobody"]
    return {"user": chosen.pw_uid, "group": chosen.pw_gid, "extra_groups": []}


@contextmanager
def postgres() -> Iterator[str]:
    """A throw-away PostgreSQL that listens on a socket in a folder of its own; its SQLAlchemy address."""
    import psycopg2

    programs = postgres_programs()
    assert programs is not None
    who = _unprivileged()
    # Not below pytest's folder, which no other user may enter; sockets need a short path, too.
    with tempfile.TemporaryDirectory(prefix="qkt-pg-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if who:
            os.chown(folder, who["user"], who["group"])
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
        options: dict[str, Any] = {"cwd": folder, "env": environment, **who}
        done = subprocess.run(
            [programs / "initdb", "-D", folder / "data", "-U", "mlflow", "--auth=trust", "--encoding=UTF8"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            **options,
        )
        assert done.returncode == 0, done.stderr
        command = [
            programs / "postgres",
            "-D",
            folder / "data",
            "-k",
            folder,
            "-F",
            "-c",
            "listen_addresses=",
        ]
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            **options,
        )
        try:
            end = time.monotonic() + PATIENCE
            while True:
                try:
                    psycopg2.connect(host=name, user="mlflow", dbname="postgres").close()
                    break
                except psycopg2.OperationalError:
                    assert process.poll() is None, f"PostgreSQL ended, run as {who or getpass.getuser()}"
                    assert time.monotonic() < end
                    time.sleep(0.2)
            yield f"postgresql+psycopg2://mlflow@/postgres?host={name}"
        finally:
            process.send_signal(signal.SIGINT)  # asks PostgreSQL to end connections and stop
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                _end(process)


class Line:
    """A connection between two machines that can be cut: passes on what comes to its port to another port."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._whole, self._ends, self._lock = True, set[socket.socket](), threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_ignored: object) -> None:
        self.cut()
        self._listener.close()

    def cut(self) -> None:
        """Break every connection; who calls is turned away."""
        with self._lock:
            self._whole = False
            for end in self._ends:
                _hang_up(end)
            self._ends.clear()

    def mend(self) -> None:
        """Let calls through again; what was broken stays broken."""
        self._whole = True

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                caller, _ = self._listener.accept()
                self._connect(caller)

    def _connect(self, caller: socket.socket) -> None:
        try:
            called = socket.create_connection(("127.0.0.1", self.target), timeout=10)
        except OSError:
            _hang_up(caller)
            return
        called.settimeout(None)
        with self._lock:
            self._ends |= {caller, called}
            if not self._whole:
                _hang_up(caller)
                _hang_up(called)
                return
        for one, other in ((caller, called), (called, caller)):
            threading.Thread(target=_pass_on, args=(one, other), daemon=True).start()


def _pass_on(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
    _hang_up(one)
    _hang_up(other)


def _hang_up(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
