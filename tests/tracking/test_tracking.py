from __future__ import annotations

import errno
import getpass
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import yaml

from qkt_clinical.common.files import digest_folder, write_json
from qkt_clinical.config.params import GateParams, Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.errors import OutputsError, QktError
from qkt_clinical.records.card import CARD, MASK, REFERENCE, WEIGHTS
from qkt_clinical.records.model_card import ModelCard
from qkt_clinical.records.outputs import flat, read_outputs
from qkt_clinical.report.model_card import student_model_card, teacher_model_card
from qkt_clinical.report.model_card_text import to_markdown, to_summary
from qkt_clinical.stages.gate import gate_queries
from qkt_clinical.tracking.client import check_database, registry_client, tracking_uri
from qkt_clinical.tracking.mirror import ALIAS, _existing, _run, _Runs, track
from qkt_clinical.tracking.runs import DIGEST, KIND, Item, curves_of, key
from qkt_clinical.tracking.teachers import fetch_file, registered_teachers
from tests.sample_run import LAYERS, SHAPE, sample_params, write_sample_run

pytestmark = pytest.mark.slow

PARAMS = sample_params()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace that has been tracked once. Tests may change it and track again: each compares with what
    it found."""
    root = tmp_path_factory.mktemp("tracking")
    write_sample_run(root, PARAMS, weights=True)
    track(root, PARAMS)
    return root


@pytest.fixture
def client(root: Path) -> Iterator[Any]:
    import mlflow

    uri = tracking_uri(root, PARAMS)
    mlflow.set_tracking_uri(uri)
    yield mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


def runs_of(client: Any, params: Params = PARAMS) -> list[Any]:
    experiment = client.get_experiment_by_name(params.track.experiment).experiment_id
    return list(client.search_runs([experiment], max_results=1000))


def one(runs: list[Any], kind: str, name: str) -> Any:
    """The newest run of that kind and name."""
    found = [r for r in runs if r.data.tags[KIND] == kind and r.info.run_name == name]
    return max(found, key=lambda r: r.info.start_time)


def versions(client: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for version in client.search_model_versions():
        found.setdefault(version.name, []).append(version.tags[DIGEST])
    return found


def test_names_of_metrics_never_meet() -> None:
    assert key("ground-glass") == "ground-glass"
    names = ["a/b", "a_b", "a.b", "a b", "a_2f_b", "", "..", "x" * 300, "x" * 301]
    assert len({key(n) for n in names}) == len(names)
    assert all(0 < len(key(n)) <= 200 for n in names)


def test_flat_and_curves() -> None:
    assert flat("train", {"a": 1, "b": {"c": 2}}) == {"train.a": 1, "train.b.c": 2}
    rows = [{"epoch": 1.0, "loss": 0.5}, {"epoch": 2.0, "loss": 0.25, "own": 1.0}]
    assert curves_of("phase1", rows) == {"phase1/loss": [(1, 0.5), (2, 0.25)], "phase1/own": [(2, 1.0)]}
    rows = [
        {"layer number": 1.0, "birch": 0.5},
        {"layer number": 2.0, "birch": 0.25, "cedar": 0.1},
        {"loss": 3.0},
    ]
    assert curves_of("phase1", rows) == {
        "phase1/birch": [(1, 0.5), (2, 0.25)],
        "phase1/cedar": [(2, 0.1)],
    }


def test_runs_of_sites_hang_below_the_pipeline_and_those_of_queries_below_their_site(client: Any) -> None:
    runs = runs_of(client)
    assert {r.info.status for r in runs} <= {"FINISHED", "FAILED"}
    pipeline = one(runs, "pipeline", "pipeline")
    assert pipeline.data.metrics["queries"] == 3
    named = {r.info.run_id: (r.data.tags[KIND], r.info.run_name) for r in runs}
    for i in range(3):
        site, query = one(runs, "site", f"h{i}"), one(runs, "query", f"h{i}-q{i}")
        assert site.info.status == query.info.status == "FINISHED"
        assert named[site.data.tags["mlflow.parentRunId"]] == ("pipeline", "pipeline")
        assert named[query.data.tags["mlflow.parentRunId"]] == ("site", f"h{i}")


def test_a_query_of_a_hospital_without_a_teacher_here_hangs_below_the_pipeline(tmp_path: Path) -> None:
    params = sample_params(sites=2)
    write_sample_run(tmp_path, params)
    shutil.rmtree(Workspace(tmp_path).teacher("h0"))
    track(tmp_path, params)
    from mlflow import MlflowClient

    uri = tracking_uri(tmp_path, params)
    runs = runs_of(MlflowClient(uri, uri), params)
    pipeline = one(runs, "pipeline", "pipeline").info.run_id
    assert one(runs, "query", "h0-q0").data.tags["mlflow.parentRunId"] == pipeline
    site = one(runs, "site", "h1").info.run_id
    assert one(runs, "query", "h1-q1").data.tags["mlflow.parentRunId"] == site


def test_a_site_run_holds_metrics_curves_and_its_data_by_digest(client: Any) -> None:
    run = one(runs_of(client), "site", "h0")
    assert "balanced_accuracy" not in run.data.metrics, "it would tell the recall of a class of three images"
    assert not [m for m in run.data.metrics if m.startswith("recall/")], "of the others 4 and 3 were missed"
    assert run.data.params["train.network"] == "resnet-small"
    assert run.data.params["mask.threshold"] == "auto"
    curve = client.get_metric_history(run.info.run_id, "curve/loss")
    assert [(m.step, m.value) for m in curve][:2] == [(1, 1.1), (2, 0.55)]
    assert len(curve) == 12
    (entry,) = run.inputs.dataset_inputs
    source = json.loads(entry.dataset.source)
    assert source["sha256"].startswith(entry.dataset.digest)
    assert set(json.loads(entry.dataset.profile)) == {"shape", "dtype"}


def test_a_query_run_holds_before_after_and_files(client: Any) -> None:
    run = one(runs_of(client), "query", "h1-q1")
    metrics = run.data.metrics
    assert metrics["before/query_accuracy"] == 0.0
    assert metrics["after/query_accuracy"] == pytest.approx(0.82)
    assert metrics["gain"] == pytest.approx((3 * 0.94 + 0.82) / 4 - 0.72)
    assert metrics["gain/low"] < metrics["gain"] < metrics["gain/high"]
    assert {m for m in metrics if m.startswith("after/recall/")} == {"after/recall/lymphocyte"}
    assert metrics["bytes_moved"] == 1_234_567
    assert run.data.params["method"] == "qkt-light"
    first = one(runs_of(client), "query", "h0-q0")
    curve = client.get_metric_history(first.info.run_id, "phase1/h1")
    assert [(m.step, m.value) for m in curve] == [(i, round(0.01 * i, 6)) for i in range(1, LAYERS + 1)]
    names = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert names == {
        *("evaluation.json", "plan.json", "phases.json", "gate.json"),
        *("model_card.json", "model_card.md", "recall.svg", "reliability.svg"),
    }
    site = one(runs_of(client), "site", "h1")
    data = [[d.dataset.source for d in r.inputs.dataset_inputs] for r in (site, run)]
    assert data[0] == data[1] != []


def test_nothing_of_a_class_with_few_test_images_is_mirrored(client: Any) -> None:
    """h2 asks for eosinophils, of which there are three test images."""
    run = one(runs_of(client), "query", "h2-q2")
    assert not [m for m in run.data.metrics if m.startswith("after/recall/")], "of the others 3 were missed"
    assert not {"after/query_accuracy", "after/balanced_accuracy", "gain"} & set(run.data.metrics)
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    mirrored = json.loads((folder / "evaluation.json").read_text())
    assert mirrored["test_images"]["eosinophil"] == "<5"
    assert mirrored["after"]["recall"]["eosinophil"] is None
    judged = json.loads((folder / "gate.json").read_text())
    assert judged["measured"]["query_recall"] == {"eosinophil": None}
    assert "too few images" in (folder / "recall.svg").read_text()


def test_the_model_card_is_artifact_metadata_and_description(root: Path, client: Any) -> None:
    outputs = read_outputs(root, PARAMS)
    cards = [teacher_model_card(outputs.sites[0], PARAMS), student_model_card(outputs.queries[0], outputs)]
    for card, kind, name in zip(cards, ("site", "query"), ("h0", "h0-q0"), strict=True):
        folder = Path(one(runs_of(client), kind, name).info.artifact_uri.removeprefix("file://"))
        text = (folder / "model_card.json").read_text(encoding="utf-8")
        assert ModelCard.model_validate_json(text) == card
        assert (folder / "model_card.md").read_text(encoding="utf-8") == to_markdown(card)
        version = client.get_model_version_by_alias(card.name, ALIAS)
        assert version.description == to_summary(card)
        saved = Path(
            client.get_model_version_download_uri(card.name, version.version).removeprefix("file://")
        )
        found = yaml.safe_load((saved / "MLmodel").read_text())["metadata"]["model_card"]
        assert ModelCard.model_validate(found) == card


def test_models_are_registered_with_digest_alias_and_card(root: Path, client: Any) -> None:
    space = Workspace(root)
    folders = {f"teacher.h{i}": space.teacher(f"h{i}") for i in range(3)}
    folders |= {f"student.h{i}.q{i}": space.student(f"h{i}", f"q{i}") for i in range(3)}
    assert {m.name for m in client.search_registered_models()} == set(folders)
    for name, folder in folders.items():
        version = client.get_model_version_by_alias(name, ALIAS)
        names = (CARD, MASK, REFERENCE, WEIGHTS) if name.startswith("teacher.") else None
        assert version.tags[DIGEST] == digest_folder(folder, names)
        assert version.tags["qkt.site"] == name.split(".")[1]
        assert version.description
    routed = client.get_model_version_by_alias("student.h2.q2", ALIAS).tags
    assert routed["qkt.method"] == "routed"
    assert routed["qkt.gate"] == "failed", "of the class asked for there are three test images"


def test_other_rules_change_the_verdict_on_the_same_version(tmp_path: Path) -> None:
    params = sample_params(sites=2)
    write_sample_run(tmp_path, params, weights=True)
    first = track(tmp_path, params)["models"]
    lenient = params.model_copy(update={"gate": GateParams(query_recall=0, forgetting=1, query_images=0)})
    gate_queries(tmp_path, lenient)
    assert track(tmp_path, lenient)["models"] == first
    from mlflow import MlflowClient

    uri = tracking_uri(tmp_path, params)
    version = MlflowClient(uri, uri).get_model_version_by_alias("student.h0.q0", ALIAS)
    assert version.tags["qkt.gate"] == "passed"
    assert "Gate: passed" in version.description


def test_model_files_hold_no_pickle_no_path_and_no_user(root: Path, client: Any) -> None:
    files = [p for p in (root / "mlartifacts").rglob("*") if p.is_file()]
    assert not [p for p in files if p.suffix in {".pkl", ".pickle", ".pt", ".pth", ".bin"}]
    cards = [p for p in files if p.name == "MLmodel"]
    assert len(cards) >= 6
    for path in cards:
        flavor = yaml.safe_load(path.read_text())["flavors"]["python_function"]
        assert flavor["loader_module"] == "qkt_clinical.serving"
        assert flavor["code"] is None
        assert (path.parent / flavor["data"] / "weights.safetensors").is_file()
    for teacher in {p.parent for p in files if p.name == "mask.json" and p.parent.parent.name == "data"}:
        assert {p.name for p in teacher.iterdir()} <= {CARD, MASK, WEIGHTS, REFERENCE}, "and no figures"
    for path in files:
        if path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8")
            assert str(root) not in text, path.name
            assert str(Path(sys.prefix)) not in text, path.name
    for run in runs_of(client):
        assert run.data.tags["mlflow.user"] == "qkt-clinical"
        assert run.data.tags["mlflow.source.name"] == "qkt track"
        assert getpass.getuser() not in json.dumps(dict(run.data.tags)).split('"')


def test_requirements_are_exact_and_public(root: Path) -> None:
    (path, *_) = sorted((root / "mlartifacts").rglob("requirements.txt"))
    lines = path.read_text().split()
    assert all("==" in line and "+" not in line for line in lines)
    assert {line.split("==")[0] for line in lines} >= {"torch", "monai", "safetensors"}
    assert not [line for line in lines if line.startswith("qkt")]


def test_tracking_again_changes_nothing(root: Path, client: Any) -> None:
    first = track(root, PARAMS)
    before, held = [r.info.run_id for r in runs_of(client)], versions(client)
    report = (root / "reports" / "track.json").read_bytes()
    assert track(root, PARAMS) == first
    assert [r.info.run_id for r in runs_of(client)] == before
    assert versions(client) == held
    assert (root / "reports" / "track.json").read_bytes() == report
    assert first["runs"] == 7
    assert b"version" not in report


def test_the_process_keeps_its_own_mlflow_settings(root: Path) -> None:
    import mlflow

    mlflow.set_tracking_uri("sqlite:///:memory:")
    track(root, PARAMS)
    assert mlflow.get_tracking_uri() == "sqlite:///:memory:"
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    environment = dict(os.environ)
    track(root, PARAMS)
    assert dict(os.environ) == environment


def test_a_changed_mask_makes_a_new_run_and_version(root: Path, client: Any) -> None:
    track(root, PARAMS)
    before, held = len(runs_of(client)), versions(client)
    path = Workspace(root).teacher("h1") / "mask.json"
    original = path.read_bytes()
    mask = json.loads(original)
    mask["scores"][7] = 0.05
    write_json(path, mask)
    try:
        models = track(root, PARAMS)["models"]
        assert len(runs_of(client)) == before + 2  # the site and the pipeline
        after = versions(client)
        assert len(after.pop("teacher.h1")) == len(held.pop("teacher.h1")) + 1
        assert after == held
        assert (
            client.get_model_version_by_alias("teacher.h1", ALIAS).tags[DIGEST]
            == models["teacher.h1"]["digest"]
        )
    finally:
        path.write_bytes(original)
    # Back to the first content: no third version, and the alias returns to the first.
    again = track(root, PARAMS)["models"]["teacher.h1"]
    assert int(again["version"]) < int(models["teacher.h1"]["version"])
    assert client.get_model_version_by_alias("teacher.h1", ALIAS).version == int(again["version"])


def test_a_changed_evaluation_makes_a_run_but_no_version(root: Path, client: Any) -> None:
    track(root, PARAMS)
    before, held = len(runs_of(client)), versions(client)
    path = root / "reports" / "evaluation" / "h0" / "q0.json"
    original = path.read_bytes()
    data = json.loads(original)
    data["after"]["ece"] = {"value": 0.25, "low": 0.2, "high": 0.3}
    write_json(path, data)
    try:
        track(root, PARAMS)
        assert len(runs_of(client)) == before + 2
        assert one(runs_of(client), "query", "h0-q0").data.metrics["after/ece"] == 0.25
        assert versions(client) == held
    finally:
        path.write_bytes(original)


def test_what_an_interrupted_call_left_is_gone_on_with_or_ends_as_failed(root: Path, client: Any) -> None:
    track(root, PARAMS)
    digest = json.loads((root / "reports" / "track.json").read_text())["runs"]["pipeline pipeline"]
    (whole,) = (r for r in runs_of(client) if r.data.tags[DIGEST] == digest and r.info.status == "FINISHED")
    tags = dict(whole.data.tags)
    left = client.create_run(whole.info.experiment_id, tags=tags).info.run_id
    other = client.create_run(whole.info.experiment_id, tags=tags | {DIGEST: "0" * 64}).info.run_id
    client.delete_run(whole.info.run_id)
    track(root, PARAMS)
    assert client.get_run(left).info.status == "FINISHED"
    assert client.get_run(left).data.metrics == whole.data.metrics
    assert client.get_run(other).info.status == "FAILED", "nobody wants that any more"
    assert [r.info.run_id for r in runs_of(client) if r.data.tags[DIGEST] == digest] == [left]


def test_the_run_of_another_site_on_a_server_is_left_alone(root: Path, client: Any) -> None:
    track(root, PARAMS)
    experiment = client.get_experiment_by_name(PARAMS.track.experiment).experiment_id
    tags = {KIND: "query", DIGEST: "0" * 64}
    theirs = client.create_run(experiment, tags=tags | {"qkt.site": "elsewhere"}).info.run_id
    ours = client.create_run(experiment, tags=tags | {"qkt.site": PARAMS.sites[0]}).info.run_id
    _existing(client, experiment, "http://server", PARAMS, set())
    assert client.get_run(theirs).info.status == "RUNNING"
    assert client.get_run(ours).info.status == "FAILED"
    client.set_terminated(theirs, "FINISHED")


def test_a_removed_artifact_is_made_again(root: Path, client: Any) -> None:
    number = track(root, PARAMS)["models"]["teacher.h2"]["version"]
    folder = Path(client.get_model_version_download_uri("teacher.h2", number).removeprefix("file://"))
    shutil.rmtree(folder)
    models = track(root, PARAMS)["models"]
    assert int(models["teacher.h2"]["version"]) == int(number) + 1
    assert client.get_model_version_by_alias("teacher.h2", ALIAS).version == int(number) + 1


def test_a_database_from_another_folder_is_refused(root: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(root, moved, ignore=shutil.ignore_patterns("mlartifacts"))
    with pytest.raises(OutputsError) as caught:
        track(moved, PARAMS)
    assert caught.value.code == "moved-database"
    assert not (moved / "mlartifacts").exists()


def test_a_damaged_database_is_refused_at_once(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("what a disk left of it")
    with pytest.raises(OutputsError) as caught:
        track(root, sample_params(track={"uri": f"sqlite:///{path}"}))
    assert caught.value.code == "damaged-database"
    assert "ove it away" in caught.value.remedy


@pytest.mark.parametrize("linked", [False, True])
def test_a_file_that_is_not_the_workspaces_is_never_to_be_removed(
    root: Path, tmp_path: Path, linked: bool
) -> None:
    other = tmp_path / "passwd"
    other.write_text("root:x:0:0:root:/root:/bin/sh\n")
    path = tmp_path / "mlflow.db" if linked else other
    if linked:
        path.symlink_to(other)
    with pytest.raises(OutputsError) as caught:
        track(root, sample_params(track={"uri": f"sqlite:///{path}"}))
    assert "Remove" not in str(caught.value)
    assert "track.uri" in caught.value.remedy


def test_a_store_that_cannot_be_reached_is_one_typed_error(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(QktError) as caught:
        track(root, sample_params(track={"uri": f"sqlite:///{tmp_path}/file/mlflow.db"}))
    assert caught.value.code == "mlflow"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/somewhere"), "disk-full"),
        (PermissionError(errno.EACCES, "Permission denied", "/somewhere"), "system"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "mlflow"),
        (requests.exceptions.ChunkedEncodingError("Connection broken"), "mlflow"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_what_the_own_disk_refuses_is_not_laid_to_mlflow(root: Path, error: OSError, code: str) -> None:
    with pytest.raises(QktError) as caught, registry_client(root, PARAMS):
        raise error
    assert caught.value.code == code
    assert ("MLflow" in caught.value.message) == (code == "mlflow")
    assert "/somewhere" not in str(caught.value)


def test_a_database_without_its_driver_names_what_to_install(root: Path) -> None:
    uri = "mysql+nosuchdriver://user:secret@127.0.0.1/mlflow"
    for address, wanted in ((uri, "track.uri"), ("postgresql+psycopg3x://u:secret@h/x", "track.uri")):
        with pytest.raises(QktError) as caught, registry_client(root, sample_params(track={"uri": address})):
            pass
        assert wanted in caught.value.remedy
        assert "secret" not in str(caught.value)
    missing = ModuleNotFoundError("No module named 'psycopg2'", name="psycopg2")
    with (
        pytest.raises(QktError, match="pip install psycopg2-binary") as caught,
        registry_client(root, PARAMS),
    ):
        raise missing
    assert caught.value.code == "no-driver"
    with pytest.raises(ModuleNotFoundError), registry_client(root, PARAMS):
        raise ModuleNotFoundError("ours", name="qkt_clinical.nothing")


@pytest.fixture
def answering() -> Iterator[tuple[str, list[int]]]:
    """A server that answers everything with the status it is told, and its address."""
    status = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0])
            self.end_headers()
            self.wfile.write(b"<html>\x1b[2J what it has to say</html>")

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://name:secret@127.0.0.1:{server.server_port}", status
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "mlflow-login", "login"),
        (403, "mlflow-login", "login"),
        (404, "mlflow", "404"),
        (500, "mlflow", "failed"),
        (503, "mlflow", "failed"),
        (200, "mlflow", "JSON"),
        (0, "mlflow", "reached"),
    ],
)
def test_a_server_that_refuses_is_one_typed_line(
    root: Path,
    answering: tuple[str, list[int]],
    status: int,
    code: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri, answers = answering
    answers[0] = status
    uri = uri if status else "http://name:secret@127.0.0.1:9"
    for attempt in (track, lambda r, p: registry_client(r, p).__enter__()):
        with pytest.raises(QktError, match=words) as caught:
            attempt(root, sample_params(track={"uri": uri}))
        assert caught.value.code == code
        assert str(caught.value).isprintable()
        assert "secret" not in str(caught.value)


def test_what_the_database_refuses_is_one_typed_error(root: Path, tmp_path: Path) -> None:
    """Locked, full, read-only and torn: errors as SQLite really raises them."""
    from sqlalchemy import NullPool, create_engine, text

    path = tmp_path / "x.db"
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 0}, poolclass=NullPool)

    def execute(*statements: str) -> None:
        with registry_client(root, PARAMS), engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))

    def refused(*statements: str) -> str:
        with pytest.raises(QktError) as caught:
            execute(*statements)
        return caught.value.code

    many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 500)"
    fill = f"INSERT INTO t {many} SELECT hex(zeroblob(1000)) FROM n"
    execute("CREATE TABLE t (x)")
    assert refused("PRAGMA max_page_count = 4", fill) == "disk-full"
    assert refused("PRAGMA query_only = 1", fill) == "system"
    with engine.connect() as holder:
        holder.exec_driver_sql("BEGIN EXCLUSIVE")
        assert refused("INSERT INTO t VALUES (1)") == "database-busy"
    execute(fill)
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    assert refused("SELECT count(x) FROM t WHERE x > 'a'") == "damaged-database"


def test_an_error_without_words_is_typed(root: Path) -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(QktError) as caught, registry_client(root, PARAMS):
        raise MlflowException("")
    assert caught.value.code == "mlflow"


def test_a_full_disk_is_one_in_mlflows_words_too(root: Path) -> None:
    from mlflow.exceptions import MlflowException

    for error in (
        MlflowException("failures: {'x': OSError(28, 'No space left on device')}"),
        MlflowException("Failed to download"),
    ):
        error.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere")
        with pytest.raises(QktError) as caught, registry_client(root, PARAMS):
            raise error
        assert caught.value.code == "disk-full"
        assert "MLflow" not in str(caught.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_disk_that_is_full_while_a_teacher_is_fetched_is_told_as_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    track(root, PARAMS)
    real = Path.open

    def full(self: Path, *args: Any, **options: Any) -> Any:
        if self.name.endswith(".part"):
            return real(Path("/dev/full"), "wb", buffering=0)
        return real(self, *args, **options)

    with registry_client(root, PARAMS) as client:
        (teacher, *_) = registered_teachers(client)
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(QktError) as caught, registry_client(root, PARAMS):
        fetch_file(teacher, WEIGHTS, tmp_path / "got", 10**9)
    monkeypatch.undo()
    assert caught.value.code == "disk-full"
    assert list(tmp_path.iterdir()) == []


def test_a_workspace_that_may_not_be_written_ends_track_with_one_typed_error(tmp_path: Path) -> None:
    params = sample_params(sites=2)
    write_sample_run(tmp_path, params)
    (Workspace(tmp_path).scratch / "mlflow.lock").mkdir(parents=True)  # where the lock should be written
    with pytest.raises(QktError) as caught:
        track(tmp_path, params)
    assert caught.value.code == "system"


def test_runs_of_others_without_our_tags_are_passed_over(root: Path, client: Any) -> None:
    experiment = client.get_experiment_by_name(PARAMS.track.experiment).experiment_id
    theirs = client.create_run(experiment, tags={KIND: "site"}).info.run_id
    try:
        track(root, PARAMS)
    finally:
        client.delete_run(theirs)


def test_the_file_that_the_address_names_by_mistake_is_not_to_be_removed(tmp_path: Path) -> None:
    with pytest.raises(OutputsError) as caught:
        check_database("sqlite:////etc/passwd")
    assert "emove" not in caught.value.remedy
    assert "track.uri" in caught.value.remedy


def test_a_run_that_breaks_off_ends_as_failed(root: Path, client: Any) -> None:
    track(root, PARAMS)
    before = {r.info.run_id for r in runs_of(client)}
    experiment = client.get_experiment_by_name(PARAMS.track.experiment).experiment_id
    item = Item("site", "broken", "0" * 64, "note", params={}, metrics={})
    with pytest.raises(KeyboardInterrupt), _run(client, experiment, item, None, _Runs({}, {}), {}):
        raise KeyboardInterrupt
    (run,) = (r for r in runs_of(client) if r.info.run_id not in before)
    assert run.info.status == "FAILED"


def test_the_registry_is_rebuilt_from_the_workspace(root: Path, tmp_path: Path) -> None:
    first = track(root, PARAMS)["models"]
    fresh = tmp_path / "fresh"
    shutil.copytree(root, fresh, ignore=shutil.ignore_patterns("mlartifacts", "mlflow.db*"))
    second = track(fresh, PARAMS)["models"]
    assert {n: m["digest"] for n, m in second.items()} == {n: m["digest"] for n, m in first.items()}
    assert {m["version"] for m in second.values()} == {"1"}
    assert (fresh / "reports" / "track.json").read_bytes() == (root / "reports" / "track.json").read_bytes()


def test_a_registered_model_answers(root: Path, client: Any) -> None:
    import mlflow.pyfunc

    from qkt_clinical.serving import _load_pyfunc

    data = np.random.default_rng(0).random((4, *SHAPE), dtype=np.float32)
    model = mlflow.pyfunc.load_model(f"models:/student.h2.q2@{ALIAS}")
    expected = _load_pyfunc(str(Workspace(root).student("h2", "q2"))).predict(data)
    assert model.predict(data).equals(expected)
    with pytest.raises(Exception, match="shape"):
        model.predict(data[:, :, :8])


@pytest.mark.nightly  # what it loads answers above, and in a process of MLflow's in test_servers.py
def test_the_command_of_mlflow_answers(root: Path, tmp_path: Path) -> None:
    """``mlflow models predict`` on zeros, in a process of its own, without a network."""
    request, answer = tmp_path / "request.json", tmp_path / "answer.json"
    request.write_text(json.dumps({"inputs": np.zeros((2, *SHAPE)).tolist()}))
    command = [sys.executable, "-m", "mlflow", "models", "predict", "--env-manager", "local"]
    command += ["-m", f"models:/teacher.h0@{ALIAS}", "-i", str(request), "-o", str(answer)]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": tracking_uri(root, PARAMS),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(answer.read_text())["predictions"]
    assert len(rows) == 2
    assert rows[0]["label"] in PARAMS.classes[:3]
    assert sum(rows[0][f"probability_{c}"] for c in PARAMS.classes) == pytest.approx(1.0)
