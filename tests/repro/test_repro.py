"""``qkt repro`` on small pipelines of DVC's, whose stages are real programs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.places import ROOT

pytestmark = pytest.mark.slow

STEP = """
import os, sys, time
from pathlib import Path
stage, _, item = os.environ["DVC_STAGE"].partition("@")
print("at work on", item or stage, flush=True)
{extra}
sources = [Path("in", item)] if stage == "first" else sorted(Path("first").iterdir())
if stage == "second":
    sources = [Path("first", item)]
Path(stage).mkdir(exist_ok=True)
Path(stage, item or "all").write_text(stage + "".join(s.read_text() for s in sources))
"""


def make(root: Path, *, items: str = "abc", extra: str = "") -> Path:
    """A pipeline: every item goes through ``first`` and ``second``, then all of them through ``last``."""
    each = {"foreach": list(items)}
    stages = {
        "first": {
            **each,
            "do": {"cmd": "python3 step.py", "deps": ["in/${item}", "step.py"], "outs": ["first/${item}"]},
        },
        "second": {
            **each,
            "do": {"cmd": "python3 step.py", "deps": ["first/${item}"], "outs": ["second/${item}"]},
        },
        "last": {"cmd": "python3 step.py", "deps": ["first", "second"], "outs": ["last/all"]},
    }
    (root / "in").mkdir(parents=True)
    (root / ".dvc").mkdir()
    shutil.copyfile(ROOT / ".dvc" / "config", root / ".dvc" / "config")
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (root / "step.py").write_text(STEP.format(extra=extra))
    for item in items:
        (root / "in" / item).write_text(item)
    return root


def environment(**more: str) -> dict[str, str]:
    here = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "OMP_WAIT"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**here, "PATH": path, "PYTHONPATH": str(ROOT), **more}


def repro(root: Path, *words: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "qkt_clinical.cli", "repro", *words],
        cwd=root,
        env=environment(**more),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def dvc(root: Path, *words: str) -> str:
    command = [sys.executable, "-m", "dvc", *words]
    return subprocess.run(
        command, cwd=root, env=environment(), capture_output=True, text=True, check=True
    ).stdout


def outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    return {row["stage"]: row["outcome"] for row in json.loads(done.stdout)}


def files(root: Path) -> dict[str, bytes]:
    names = ("first", "second", "last")
    found = {p for name in names for p in (root / name).rglob("*") if p.is_file()} | {root / "dvc.lock"}
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(found)}


def test_outputs_and_lock_file_are_those_of_dvc_repro(tmp_path: Path) -> None:
    ours, theirs = make(tmp_path / "ours"), make(tmp_path / "theirs")
    done = repro(ours, "--jobs", "3", "--json")
    assert set(outcomes(done).values()) == {"made"}
    dvc(theirs, "repro")
    assert files(ours) == files(theirs)
    assert len(files(ours)) == 8
    assert "up to date" in dvc(ours, "status")
    assert "Nothing has changed" in repro(ours, "--jobs", "3").stdout

    for root in (ours, theirs):
        (root / "in" / "b").write_text("another")
    done = repro(ours, "--jobs", "3", "--json")
    assert {k for k, v in outcomes(done).items() if v == "made"} == {"first@b", "second@b", "last"}
    dvc(theirs, "repro")
    assert files(ours) == files(theirs)


def test_independent_stages_run_at_the_same_time(tmp_path: Path) -> None:
    meet = """
if stage == "first":
    Path("here-" + item).touch()
    for _ in range(600):
        if all(Path("here-" + i).exists() for i in "abc"):
            break
        time.sleep(0.1)
    else:
        sys.exit("the others did not come")
"""
    root = make(tmp_path / "ws", extra=meet)
    repro(root, "--jobs", "3")
    assert (root / "last" / "all").read_text() == "lastfirstafirstbfirstc"


def test_a_failure_ends_what_needs_it_and_nothing_else(tmp_path: Path) -> None:
    trip = """
if item == "b" and Path("stone").exists():
    sys.exit("stumbled over a stone")
"""
    root = make(tmp_path / "ws", extra=trip)
    (root / "stone").touch()
    done = repro(root, "--jobs", "2", "--json", code=1)
    assert outcomes(done) == {
        **{"first@a": "made", "second@a": "made", "first@c": "made", "second@c": "made"},
        **{"first@b": "failed", "second@b": "not run", "last": "not run"},
    }
    assert "first@b: stumbled over a stone" in done.stderr
    assert "error [stages-failed]: failed: first@b; 2 stages that need them were not run" in done.stderr
    log = Path(next(row["log"] for row in json.loads(done.stdout) if row["stage"] == "first@b"))
    assert "at work on b" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    (root / "stone").unlink()
    after = outcomes(repro(root, "--jobs", "2", "--json"))
    assert {k for k, v in after.items() if v == "made"} == {"first@b", "second@b", "last"}
    assert "up to date" in dvc(root, "status")


def test_every_stage_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    note = 'Path("gpu-" + stage + item).write_text(os.environ["CUDA_VISIBLE_DEVICES"]); time.sleep(0.5)'
    root = make(tmp_path / "ws", items="ab", extra=note)
    repro(root, "--gpus", "5,GPU-7f")
    assert {(root / f"gpu-first{i}").read_text() for i in "ab"} == {"5", "GPU-7f"}
    assert "is no list of devices" in repro(root, "--gpus", "0;1", code=1).stderr


def test_a_workspace_elsewhere(tmp_path: Path) -> None:
    root = make(tmp_path / "ws")
    done = repro(tmp_path, "--root", "ws", "second@b", "last", "--json", "--jobs", "2")
    assert outcomes(done)["last"] == "made"
    assert "up to date" in dvc(root, "status")
    assert not (tmp_path / ".qkt").exists()


def test_targets_as_dvc_names_them(tmp_path: Path) -> None:
    root = make(tmp_path / "ws")
    assert list(outcomes(repro(root, "second@b", "--json"))) == ["first@b", "second@b"]
    assert not (root / "first" / "a").exists()
    assert "error [dvc]" in repro(root, "nothing@b", code=1).stderr
    assert "error [dvc]" in repro(tmp_path, code=1).stderr


PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from qkt_clinical.cli import main
main()
"""
"""``qkt`` as a terminal starts it: tests that run in the background start what ignores Ctrl-C."""


def running(word: str) -> list[int]:
    """Processes with a word in their command line or environment."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                text = (place / "cmdline").read_bytes() + (place / "environ").read_bytes()
            except OSError:
                continue
            if word.encode() in text:
                found.append(int(place.name))
    return found


@pytest.fixture
def mark() -> Iterator[str]:
    """A word for the environment of what a test starts; whatever bears it is ended with the test."""
    word = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    yield word
    for process in running(word):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def until(what: Callable[[], object], seconds: float = 120.0) -> None:
    give_up = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < give_up
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_it_leaves_nothing_running_and_goes_on(
    tmp_path: Path, mark: str, number: signal.Signals
) -> None:
    wait = """
if item == "b" and not Path("go").exists():
    Path("waiting").touch()
    time.sleep(300)
"""
    root = make(tmp_path / "ws", extra=wait)
    killed = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "repro", "--jobs", "2"],
        cwd=root,
        env=environment(QKT_TEST_MARK=mark),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until((root / "waiting").exists)
    until(lambda: (root / "second" / "a").exists())
    assert "error [repro-running]" in repro(root, code=1).stderr
    killed.send_signal(number)
    killed.wait(timeout=120)
    until(lambda: not running(mark))
    (root / "go").touch()
    after = outcomes(repro(root, "--jobs", "2", "--json"))
    assert after["first@b"] == after["last"] == "made"
    assert "up to date" in dvc(root, "status")


SBATCH = f"""#!{sys.executable}
import os, subprocess, sys
arguments = dict(a.split("=", 1) for a in sys.argv[1:] if a.startswith("--") and "=" in a)
print(f"{{os.getpid()}};cluster", flush=True)
program = sys.argv[sys.argv.index("--wrap") + 1]
with open(os.environ["SBATCH_CALLS"], "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
with open(arguments["--output"], "w") as log:
    done = subprocess.run(["/bin/sh", "-c", program], cwd=arguments["--chdir"], stdout=log, stderr=log)
sys.exit(done.returncode)
"""


SCANCEL = f"""#!{sys.executable}
import os, signal, sys
with open(os.environ["SBATCH_CALLS"], "a") as calls:
    calls.write("scancel " + sys.argv[1] + "\\n")
os.killpg(int(sys.argv[1]), signal.SIGTERM)
"""


def cluster(tmp_path: Path) -> dict[str, str]:
    """Stand-ins for Slurm's programs, and the environment that finds them."""
    place = tmp_path / "bin"
    place.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    path = f"{place}{os.pathsep}{environment()['PATH']}"
    return {"PATH": path, "SBATCH_CALLS": str(tmp_path / "calls")}


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_cluster_s_jobs_are_cancelled(tmp_path: Path, mark: str) -> None:
    wait = 'Path("waiting-" + item).touch(); time.sleep(300)'
    root = make(tmp_path / "ws", extra=wait)
    stopped = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "repro", "--slurm", "--jobs", "2"],
        cwd=root,
        env=environment(QKT_TEST_MARK=mark, **cluster(tmp_path)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(lambda: len(list(root.glob("waiting-*"))) == 2)
    stopped.send_signal(signal.SIGINT)
    assert "error [stopped]: stopped; stages that had ended are kept" in stopped.communicate(timeout=120)[1]
    until(lambda: not running(mark))
    lines = (tmp_path / "calls").read_text().splitlines()
    assert sum(line.startswith("scancel ") for line in lines) == 2


def test_stages_as_jobs_of_a_cluster(tmp_path: Path) -> None:
    """The stand-in for ``sbatch`` takes what ours is called with, and really runs the job."""
    trip = 'if stage == "second" and item == "b" and Path("stone").exists(): sys.exit("stumbled")'
    root = make(tmp_path / "ws", extra=trip)
    (root / "stone").touch()
    more, calls = cluster(tmp_path), tmp_path / "calls"
    words = ("--slurm", "--sbatch", "--partition 'big gpu'", "--jobs", "2", "--json")
    done = repro(root, *words, code=1, **more)
    assert outcomes(done)["second@b"] == "failed"
    assert outcomes(done)["second@c"] == "made"
    assert outcomes(done)["last"] == "not run"
    assert "second@b: stumbled" in done.stderr
    (root / "stone").unlink()
    after = outcomes(repro(root, *words, **more))
    assert {k for k, v in after.items() if v == "made"} == {"second@b", "last"}
    lines = calls.read_text().splitlines()
    assert len(lines) == 6 + 2, "no job for what has not changed"
    assert all("--wait" in line and "--partition big gpu" in line for line in lines)
    assert not any("first@" in line.split("--wrap")[1] for line in lines), "no name where a shell reads"

    theirs = make(tmp_path / "theirs", extra=trip)
    (theirs / "stone").touch()
    with pytest.raises(subprocess.CalledProcessError):
        dvc(theirs, "repro", "--keep-going")
    (theirs / "stone").unlink()
    dvc(theirs, "repro")
    assert files(root) == files(theirs)
    (root / "in" / "a").write_text("another")
    assert "error [slurm-missing]" in repro(root, "--slurm", code=1, PATH=os.defpath).stderr
