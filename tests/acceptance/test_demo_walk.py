"""The walk of a reviewer over the demo's own workspace, with an MLflow server: by commands alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qkt_clinical.common.files import digest_folder
from qkt_clinical.config.loading import load_params
from qkt_clinical.tracking.client import registry_client
from tests.acceptance.test_query_jobs import absent, assert_shown, qkt, versions
from tests.chromium import needs_chromium
from tests.places import ROOT
from tests.servers import mlflow_server

pytestmark = [pytest.mark.acceptance, pytest.mark.nightly, needs_chromium]

BIN = Path(sys.executable).parent
REVIEWER = ("--reviewer", "R. Viewer", "--reason", "a walk")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make demo`` leaves in a clone of the last commit, with this environment as it is."""
    if not (ROOT / ".git").exists():
        pytest.skip("not in a clone of the repository")
    clone = tmp_path_factory.mktemp("clone") / "qkt-clinical"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    stamp = f"{sys.prefix}/.installed"
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["make", "-o", stamp, "demo", f"VENV={sys.prefix}", f"STAMP={stamp}"],
        cwd=clone,
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    status = ["git", "status", "--porcelain"]
    assert subprocess.run(status, cwd=clone, capture_output=True, text=True, check=True).stdout == "", (
        "a run leaves the work tree as it was"
    )
    return clone


def gate(root: Path, *words: str) -> bool:
    """Whether an answer passes."""
    command = [str(BIN / "qkt"), "gate", *words, "--json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    passed = bool(json.loads(done.stdout)[0]["passed"])
    assert done.returncode == (0 if passed else 1)
    return passed


def test_a_query_is_planned_answered_judged_promoted_and_rolled_back(demo: Path, tmp_path: Path) -> None:
    hospital, name = "elm", "walk"
    model = f"student.{hospital}.{name}"
    with mlflow_server(f"sqlite:///{tmp_path}/server.db", tmp_path / "server") as address:
        params = demo / "params.yaml"
        params.write_text(params.read_text().replace("uri: null", f"uri: {address}"))
        qkt(demo, "track")
        asked = absent(demo, hospital)
        qkt(demo, "query", "new", hospital, name, "--classes", asked)
        plan = json.loads(qkt(demo, "query", "plan", hospital, name, "--json"))
        assert asked in {c for t in plan["teachers"] if t["relevant"] for c in t["teaches"]}
        assert plan["expected_seconds"] > 0
        digests = []
        for number, method in enumerate(("qkt", "qkt-light"), 1):
            path = demo / "hospitals" / hospital / "queries" / f"{name}.yaml"
            path.write_text(path.read_text().replace("method: qkt ", f"method: {method} "))
            job = json.loads(qkt(demo, "query", "run", hospital, name, "--json"))
            assert (job["state"], job["version"]) == ("answered", str(number)), job
            qkt(demo, "evaluate", hospital, name)
            passed = gate(demo, hospital, name)
            qkt(demo, "track")
            assert versions(demo, model) == list(range(1, number + 1)), "measured, and no other version"
            shown = json.loads(qkt(demo, "registry", "show", model, "--json"))
            assert shown["tags"]["qkt.gate"] == ("passed" if passed else "failed")
            digests.append(digest_folder(demo / "models" / "students" / hospital / name))
            if not passed:
                assert "is not promoted" in qkt(demo, "registry", "promote", model, code=1)
            qkt(demo, "registry", "promote", model, *(() if passed and number == 1 else REVIEWER))
        qkt(
            demo, "registry", "rollback", model, "--reviewer", "R. Viewer", "--reason", "the first was better"
        )
        listed = next(m for m in json.loads(qkt(demo, "registry", "list", "--json")) if m["name"] == model)
        assert (listed["versions"], listed["aliases"]) == ([1, 2], {"candidate": 2, "champion": 1})
        with registry_client(demo, load_params(demo)) as client:
            for alias, digest in (("champion", digests[0]), ("candidate", digests[1])):
                version = client.get_model_version_by_alias(model, alias)
                assert version.tags["qkt.digest"] == digest
                assert version.tags["qkt.query"] == name
            experiment = client.get_experiment_by_name("qkt-clinical")
            assert experiment is not None
            found = client.search_runs([experiment.experiment_id], max_results=1000)
            assert {r.info.status for r in found} == {"FINISHED"}
        assert_shown(address, model, tmp_path)
