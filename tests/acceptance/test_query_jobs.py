"""Query jobs by commands, as programs where that matters: a walk, kills, two workers, damaged teachers."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from qkt_clinical.cli import main
from qkt_clinical.common.files import digest_file, digest_folder, write_json
from qkt_clinical.config.loading import load_params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.datasets.phantom import phantom_params, write_federation
from qkt_clinical.datasets.workspace import write_workspace
from qkt_clinical.ingest import ingest_site
from qkt_clinical.records.card import CARD, WEIGHTS
from qkt_clinical.stages.mask import mask_site
from qkt_clinical.stages.train import train_site
from qkt_clinical.tracking.client import registry_client
from qkt_clinical.tracking.mirror import track
from tests.chromium import chromium, needs_chromium
from tests.servers import mlflow_server

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

QKT = Path(sys.executable).parent / "qkt"
QUICK = {
    "train": {"epochs": 4, "batch_size": 16},
    "transfer": {"images": 40},
    "mask": {"probes": 48},
    "evaluate": {"bootstrap": 20},
    "sites": ["aster", "birch", "cedar"],
    "queries": {},
}
STEPS = ("plan", "transfer", "register")
"""Of a job, those that take long enough to be hit; the other is over in no time without test images."""


def qkt(root: Path, *words: str, code: int = 0) -> str:
    """Run a command in this process; its standard output, or with an exit code of 1 its standard error."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(root),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main(list(words))
    assert (ended.value.code or 0) == code, out.getvalue() + err.getvalue()
    if code:
        assert out.getvalue() == ""
    return err.getvalue() if code else out.getvalue()


def program(root: Path, *words: str) -> str:
    """Run a command as a program of its own; its standard output."""
    done = subprocess.run([str(QKT), *words], cwd=root, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hospitals with teachers in the registry; nobody has asked anything yet."""
    root = tmp_path_factory.mktemp("federation")
    write_federation(root, dims=2, images_per_site=60)
    write_workspace(root, phantom_params(2) | QUICK)
    params = load_params(root)
    for folder in (root / "hospitals").iterdir():
        shutil.rmtree(folder / "queries" if folder.name in params.sites else folder, ignore_errors=True)
    for site in params.sites:
        ingest_site(root, site, params)
        train_site(root, site, params)
        mask_site(root, site, params)
    return root


def copy(federation: Path, target: Path) -> Path:
    """A workspace like another, with a registry of its own."""
    shutil.copytree(federation, target, symlinks=True)
    track(target, load_params(target))
    return target


@pytest.fixture
def root(federation: Path, tmp_path: Path) -> Path:
    """A copy of its own for a test that answers queries."""
    return copy(federation, tmp_path / "copy")


@pytest.fixture(scope="module")
def refusing(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy for all tests of what is refused, after which the registry is as before."""
    return copy(federation, tmp_path_factory.mktemp("refusing") / "copy")


def absent(root: Path, hospital: str) -> str:
    """A class that the hospital lacks and another's mask says it knows."""
    params = load_params(root)
    manifest = json.loads((Workspace(root).prepared(hospital) / "manifest.json").read_text())
    held = set(manifest["counts"]["train"])
    for other in params.sites:
        mask = json.loads((Workspace(root).teacher(other) / "mask.json").read_text())
        known = [c for c, k in zip(mask["classes"], mask["known"], strict=True) if k and c not in held]
        if other != hospital and known:
            return str(known[0])
    raise AssertionError("everybody knows the same")


def runs(root: Path) -> list[tuple[str, str]]:
    """(kind, status) of every run in MLflow."""
    params = load_params(root)
    with registry_client(root, params) as client:
        experiment = client.get_experiment_by_name(params.track.experiment)
        assert experiment is not None
        found = client.search_runs([experiment.experiment_id], max_results=1000)
        return [(r.data.tags["qkt.kind"], r.info.status) for r in found]


def versions(root: Path, model: str) -> list[int]:
    """Numbers of a model's versions."""
    listed = json.loads(qkt(root, "registry", "list", "--json"))
    return next((m["versions"] for m in listed if m["name"] == model), [])


def assert_shown(address: str, model: str, folder: Path) -> None:
    """MLflow's own pages say what the client says: two versions, each with its alias."""
    wanted = {"1": "champion", "2": "candidate"}
    with chromium(folder / "profile") as browser:
        browser.set_window_size(1800, 1200)
        browser.get(f"{address}/#/models/{model}")
        deadline = time.monotonic() + 60
        shown: dict[str, list[str]] = {}
        while shown != {n: [alias] for n, alias in wanted.items()} and time.monotonic() < deadline:
            time.sleep(0.5)
            texts = browser.execute_script(
                "return [...document.querySelectorAll('[role=row]')].map(r => r.innerText)"
            )
            rows = {m[1]: text for text in texts if (m := re.search(r"Version (\d+)", text))}
            shown = {n: re.findall(r"@\s*(champion|candidate)", text) for n, text in rows.items()}
        assert shown == {n: [alias] for n, alias in wanted.items()}, texts
        assert "rolled back by R. Viewer" in rows["1"]
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        assert len(set(picture.resize((128, 90)).get_flattened_data())) > 20, "something is to be seen"


def test_a_walk_by_commands_alone(root: Path, tmp_path: Path) -> None:
    params = load_params(root)
    hospital = params.sites[0]
    asked = absent(root, hospital)
    qkt(root, "query", "new", hospital, "first", "--classes", asked, "--budget", "0.1")
    seen = json.loads(program(root, "query", "plan", hospital, "first", "--json"))
    assert seen["classes"] == [asked]
    assert seen["bytes_moved"] == sum(t["bytes"] for t in seen["teachers"] if t["relevant"]) > 0
    assert seen["fetched_bytes"] == seen["bytes_moved"], "nothing is here yet"
    assert seen["expected_seconds"] > 0
    assert set(seen["versions"]) == {t["site"] for t in seen["teachers"] if t["relevant"]}
    assert not Workspace(root).fetched(hospital, "first").exists(), "nothing was spent"
    assert "mask" in qkt(root, "query", "plan", hospital, "first")
    model = f"student.{hospital}.first"
    assert versions(root, model) == []

    # No other hospital's images are opened: they are not here.
    elsewhere = root.with_name("elsewhere")
    for site in params.sites[1:]:
        for folder in (root / "hospitals" / site, Workspace(root).prepared(site)):
            (elsewhere / folder.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            folder.rename(elsewhere / folder.relative_to(root))
    held_back = Workspace(root).held_back(hospital)  # nor what the hospital itself could measure by
    (elsewhere / held_back.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
    held_back.rename(elsewhere / held_back.relative_to(root))
    for site in params.sites[1:]:
        Workspace(root).teacher(site).rename(elsewhere / site)
    job = json.loads(program(root, "query", "run", hospital, "first", "--json"))
    assert (job["state"], job["version"], job["error"]) == ("answered", "1", None)
    assert f"no test images of {asked}" in job["note"]
    assert "The pipeline does not know of it: no teacher of " in job["note"]
    assert load_params(root).queries == {}, "dvc repro could not plan it here"
    assert versions(root, model) == [1]
    shown = json.loads(qkt(root, "registry", "show", model, "--json"))
    assert (shown["tags"]["qkt.gate"], shown["aliases"]) == ("not judged", ["candidate"])
    assert "is not promoted" in qkt(root, "registry", "promote", model, code=1)
    for path in sorted(elsewhere.rglob("*"), key=lambda p: len(p.parts)):
        target = root / path.relative_to(elsewhere)
        if path.parent == elsewhere and path.name in params.sites:
            path.rename(Workspace(root).teacher(path.name))
        elif path.exists() and not target.exists():
            path.rename(target)

    # The same bytes by the pipeline's stages, which know the query when the teachers are here.
    student = digest_folder(Workspace(root).student(hospital, "first"))
    job = json.loads(qkt(root, "query", "run", hospital, "first", "--json"))
    assert (job["state"], job["version"]) == ("answered", "1")
    assert [(r.hospital, r.query) for r in load_params(root).queries.values()] == [(hospital, "first")]
    qkt(root, "plan", hospital, "first")
    qkt(root, "transfer", hospital, "first")
    assert digest_folder(Workspace(root).student(hospital, "first")) == student
    measured = json.loads(qkt(root, "evaluate", hospital, "first", "--json"))
    assert measured[0]["after"]["balanced_accuracy"] > 0
    judged = subprocess.run(
        [str(QKT), "gate", hospital, "first", "--json"], cwd=root, check=False, capture_output=True
    )
    passed = json.loads(judged.stdout)[0]["passed"]
    assert judged.returncode == (0 if passed else 1)
    qkt(root, "track")
    assert versions(root, model) == [1], "the same student, now measured"
    shown = json.loads(qkt(root, "registry", "show", model, "--json"))
    assert shown["tags"]["qkt.gate"] == ("passed" if passed else "failed")
    qkt(root, "registry", "promote", model, "--reviewer", "R. Viewer", "--reason", "a test")

    # Another question by the same name: a second version, promoted and taken back.
    path = root / "hospitals" / hospital / "queries" / "first.yaml"
    path.write_text(path.read_text().replace("method: qkt ", "method: qkt-light "))
    assert json.loads(qkt(root, "query", "status", hospital, "first", "--json"))["state"] == "waiting"
    assert json.loads(qkt(root, "query", "run", hospital, "first", "--json"))["version"] == "2"
    qkt(root, "registry", "promote", model, "--reviewer", "R. Viewer", "--reason", "a test")
    qkt(root, "registry", "rollback", model, "--reviewer", "R. Viewer", "--reason", "the first was better")
    listed = next(m for m in json.loads(qkt(root, "registry", "list", "--json")) if m["name"] == model)
    assert (listed["versions"], listed["aliases"]) == ([1, 2], {"candidate": 2, "champion": 1})
    with registry_client(root, params) as client:
        assert client.get_model_version_by_alias(model, "champion").version in (1, "1")
    assert all(status == "FINISHED" for _, status in runs(root))
    if needs_chromium.args[0] is False:
        with mlflow_server(f"sqlite:///{root}/mlflow.db", tmp_path / "server") as address:
            assert_shown(address, model, tmp_path)
    assert qkt(root, "query", "show", hospital, "first").startswith(f"asks for {asked} by qkt-light")
    assert [j["state"] for j in json.loads(qkt(root, "query", "list", "--json"))] == ["answered"]
    # Asked again, nothing has changed: nothing is transferred, fetched or registered anew.
    assert json.loads(qkt(root, "query", "run", hospital, "first", "--json"))["version"] == "2"
    assert versions(root, model) == [1, 2]


@pytest.mark.nightly  # tests/jobs/test_run.py ends a job in many ways every time
@pytest.mark.parametrize("moments", [10])
def test_killed_at_random_moments_the_answer_is_the_same(root: Path, moments: int) -> None:
    hospital = load_params(root).sites[1]
    qkt(root, "query", "new", hospital, "killed", "--classes", absent(root, hospital))
    space = Workspace(root)
    student, record = space.student(hospital, "killed"), space.scratch / "jobs" / f"{hospital}.killed.json"

    def forget() -> None:
        """All that is left of an answer but its version in the registry."""
        record.unlink(missing_ok=True)
        for folder in (student, space.fetched(hospital, "killed")):
            shutil.rmtree(folder, ignore_errors=True)

    def step() -> str | None:
        job = json.loads(record.read_text()) if record.is_file() else {}
        return job.get("step") if job.get("state") == "running" else None

    draw = random.Random(0)
    seen: list[str] = []
    while len(seen) < moments or not set(STEPS) <= set(seen):
        # A moment after a step has begun; the one that was hit least has its turn, so that every one is hit.
        target = min(STEPS, key=seen.count)
        process = subprocess.Popen(
            [str(QKT), "query", "run", hospital, "killed"],
            cwd=root,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and step() != target:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 1.5 if target == "transfer" else 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (hit := step()) is None:  # it was answered before
            forget()
            continue
        seen.append(hit)
        job = json.loads(qkt(root, "query", "status", hospital, "killed", "--json"))
        assert (job["state"], job["step"]) == ("interrupted", hit)
    job = json.loads(qkt(root, "query", "resume", hospital, "killed", "--json"))
    assert (job["state"], job["version"]) == ("answered", "1")
    interrupted = digest_folder(student)
    model = f"student.{hospital}.killed"
    assert versions(root, model) == [1]
    found = runs(root)
    assert {status for _, status in found} == {"FINISHED"}, "no orphan"
    assert [kind for kind, _ in found].count("query") == 1
    assert not [p for p in root.rglob("*.part") if ".dvc" not in p.parts]
    forget()
    qkt(root, "query", "run", hospital, "killed")
    assert digest_folder(student) == interrupted, "uninterrupted, the same bytes"
    assert versions(root, model) == [1]


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.nightly)])
def test_two_workers_answer_every_query_once(root: Path, count: int) -> None:
    for number, hospital in zip(range(count), itertools.cycle(load_params(root).sites), strict=False):
        words = ("--classes", absent(root, hospital), "--method", "qkt-light")
        qkt(root, "query", "new", hospital, f"n{number}", *words)
    workers = [
        subprocess.Popen(
            [str(QKT), "query", "work", "--json"],
            cwd=root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    taken: list[str] = []
    for worker in workers:
        out, err = worker.communicate(timeout=3600)
        assert worker.returncode == 0, err
        taken += [f"{j['hospital']}/{j['query']}" for j in json.loads(out)]
    assert len(taken) == len(set(taken)) == count, "each once"
    jobs = json.loads(qkt(root, "query", "status", "--json"))
    assert {j["state"] for j in jobs} == {"answered"}
    assert len(load_params(root).queries) == count, "the pipeline was told of all"
    listed = json.loads(qkt(root, "registry", "list", "--json"))
    students = [m for m in listed if m["name"].startswith("student.")]
    assert [m["versions"] for m in students] == [[1]] * count
    assert {status for _, status in runs(root)} == {"FINISHED"}


# --- what must be refused -------------------------------------------------------------------------


def registered(root: Path, site: str) -> Path:
    """The folder in which MLflow keeps a teacher's bundle."""
    params = load_params(root)
    with registry_client(root, params) as client:
        name = f"teacher.{site}"
        version = client.get_model_version_by_alias(name, "candidate").version
        place = client.get_model_version_download_uri(name, str(version))
    return Path(place.removeprefix("file://")) / "data" / site


def flip(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def rewrite(folder: Path, **tensors: Any) -> None:
    """Other weights with a card that fits them."""
    save_file(load_file(folder / WEIGHTS) | tensors, folder / WEIGHTS)
    fit(folder)


def fit(folder: Path) -> None:
    card = json.loads((folder / CARD).read_text())
    card["weights"] = {
        "bytes": (folder / WEIGHTS).stat().st_size,
        "sha256": digest_file(folder / WEIGHTS),
    }
    write_json(folder / CARD, card)


def not_a_number(folder: Path) -> None:
    weight = load_file(folder / WEIGHTS)["head.weight"]
    weight[0, 0] = np.nan
    rewrite(folder, **{"head.weight": weight})


def fewer_classes(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    rewrite(folder, **{k: weights[k][:-1] for k in ("head.weight", "head.bias")})


def huge_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    fit(folder)


def a_pickle(folder: Path) -> None:
    # As pickle writes os.system("touch ran"), spelt out: nothing here may import the module.
    (folder / WEIGHTS).write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    fit(folder)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (flip, "bundle-digest"),
        (not_a_number, "bundle-values"),
        (fewer_classes, "bundle-size"),
        (huge_header, "bundle-size"),
        (a_pickle, "bundle-size"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_damaged_teacher_is_refused_in_one_line(
    refusing: Path, tmp_path: Path, damage: Callable[[Path], None], code: str
) -> None:
    params = load_params(refusing)
    hospital, site = params.sites[2], None
    asked, name = absent(refusing, hospital), damage.__name__.replace("_", "-")
    qkt(refusing, "query", "new", hospital, name, "--classes", asked)
    for other in params.sites:
        mask = json.loads((Workspace(refusing).teacher(other) / "mask.json").read_text())
        if other != hospital and mask["known"][mask["classes"].index(asked)]:
            site = other
    assert site is not None
    folder = registered(refusing, site)
    shutil.copytree(folder, tmp_path / "sound")
    damage(folder)
    try:
        refuse(refusing, ("query", "run", hospital, name), code)
    finally:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "sound", folder)
    assert not (refusing / "ran").exists()


def refuse(root: Path, words: tuple[str, ...], code: str) -> None:
    """One line with a remedy, exit code 1, and a registry as before."""
    before = versions_of_all(root)
    lines = qkt(root, *words, "--json", code=1).strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error [{code}]: ")
    assert versions_of_all(root) == before
    assert {status for _, status in runs(root)} == {"FINISHED"}


def versions_of_all(root: Path) -> dict[str, int]:
    params = load_params(root)
    with registry_client(root, params) as client:
        return {
            m.name: len(client.search_model_versions(f"name = '{m.name}'"))
            for m in client.search_registered_models()
        }


def test_what_nobody_can_teach_and_what_cannot_be_calibrated(refusing: Path) -> None:
    root = refusing
    params = load_params(root)
    hospital = params.sites[1]
    asked = absent(root, hospital)
    others = ",".join(s for s in params.sites if s != hospital)
    qkt(root, "query", "new", hospital, "nobody", "--classes", asked, "--exclude", others)
    for verb in ("plan", "run"):
        refuse(root, ("query", verb, hospital, "nobody"), "uncovered")
    failed = json.loads(qkt(root, "query", "status", hospital, "nobody", "--json"))
    assert (failed["state"], failed["error"]["code"]) == ("failed", "uncovered")
    assert asked in failed["error"]["message"]

    prepared = Workspace(root).prepared(hospital)
    splits = json.loads((prepared / "splits.json").read_text())
    manifest = json.loads((prepared / "manifest.json").read_text())
    write_json(prepared / "splits.json", splits | {"calibration": []})
    manifest["counts"]["calibration"], manifest["patients"]["calibration"] = {}, 0
    manifest["digests"]["splits.json"] = digest_file(prepared / "splits.json")
    write_json(prepared / "manifest.json", manifest)
    qkt(root, "query", "new", hospital, "blind", "--classes", asked)
    for verb in ("plan", "run"):
        refuse(root, ("query", verb, hospital, "blind"), "no-calibration")


def test_a_query_taken_back_while_it_runs(root: Path) -> None:
    hospital = load_params(root).sites[2]
    qkt(root, "query", "new", hospital, "back", "--classes", absent(root, hospital))
    process = subprocess.Popen(
        [str(QKT), "query", "run", hospital, "back"],
        cwd=root,
        text=True,
        stderr=subprocess.PIPE,
    )
    while json.loads(qkt(root, "query", "status", hospital, "back", "--json"))["state"] != "running":
        assert process.poll() is None
        time.sleep(0.05)
    assert "will stop soon" in qkt(root, "query", "cancel", hospital, "back")
    _, said = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "error [job-cancelled]" in said
    assert json.loads(qkt(root, "query", "status", hospital, "back", "--json"))["state"] == "cancelled"
    assert json.loads(qkt(root, "query", "work", "--json")) == [], "workers leave it alone"
    assert json.loads(qkt(root, "query", "run", hospital, "back", "--json"))["state"] == "answered"
