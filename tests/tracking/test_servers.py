"""Tracking, registry and serving with real servers on this machine: SQLite behind MLflow, and PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, chdir
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from qkt_clinical.cli import main
from qkt_clinical.common.files import digest_file, digest_folder, to_json, write_json, write_text
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.models.bundle import load_bundle
from qkt_clinical.models.out_of_distribution import make_reference
from qkt_clinical.records.card import REFERENCE
from qkt_clinical.records.model_card import ModelCard
from qkt_clinical.records.registered import UnsoundVersion
from qkt_clinical.report.model_card_text import to_summary
from qkt_clinical.serving import Predictor, _load_pyfunc
from qkt_clinical.tracking.mirror import ALIAS, track
from qkt_clinical.tracking.registry import open_registry
from qkt_clinical.tracking.runs import DIGEST
from qkt_clinical.tracking.teachers import check_teacher_version, fetch_file, registered_teachers
from tests.sample_run import SHAPE, asked_class, sample_params, write_sample_run
from tests.servers import mlflow_server, post, postgres, postgres_programs, served_here, served_model

pytestmark = pytest.mark.slow

STUDENT = "student.h0.q0"


class Served(NamedTuple):
    """A workspace that has been tracked by a server."""

    root: Path
    params: Params
    uri: str
    artifacts: Path
    models: dict[str, dict[str, str]]


def dim(count: int, seed: int) -> np.ndarray:
    """Images as the hospital's own are, uint8."""
    return np.random.default_rng(seed).integers(80, 160, (count, *SHAPE), dtype=np.uint8)


# SQLite every time only where there is no PostgreSQL: without a server between, all other tests have it.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param("sqlite", marks=[pytest.mark.nightly] if postgres_programs() else []),
        pytest.param(
            "postgresql",
            marks=pytest.mark.skipif(
                postgres_programs() is None, reason="PostgreSQL's initdb and postgres are not installed"
            ),
        ),
    ],
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root, place = tmp_path_factory.mktemp("workspace"), tmp_path_factory.mktemp("server")
    with ExitStack() as stack:
        store = f"sqlite:///{place}/server.db"
        if request.param == "postgresql":
            store = stack.enter_context(postgres())
        uri = stack.enter_context(mlflow_server(store, place))
        params = sample_params(sites=2, track={"uri": uri})
        write_sample_run(root, params, weights=True)
        write_text(root / "params.yaml", to_json(params.model_dump(mode="json")))
        for folder in (Workspace(root).student("h0", "q0"), Workspace(root).teacher("h0")):
            bundle = load_bundle(folder)
            reference = make_reference(bundle.network, bundle.card, dim(60, 0), dim(40, 1), "unit")
            write_json(folder / REFERENCE, reference.model_dump(mode="json"))
        with chdir(root):
            models = track(root, params)["models"]
        yield Served(root, params, uri, place / "artifacts", models)


def test_everything_lies_with_the_server_and_nothing_beside_it(served: Served) -> None:
    assert not (served.root / "mlartifacts").exists()
    assert not (served.root / "mlflow.db").exists()
    weights = sorted(served.artifacts.rglob("weights.safetensors"))
    assert len(weights) == 4
    assert track(served.root, served.params)["models"] == served.models
    assert sorted(served.artifacts.rglob("weights.safetensors")) == weights


def test_registry_commands_and_client_agree(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    with open_registry(served.root, served.params) as registry:
        listed = {m["name"]: m for m in registry.models()}
    assert set(listed) == {"student.h0.q0", "student.h1.q1", "teacher.h0", "teacher.h1"}
    assert listed[STUDENT]["aliases"] == {ALIAS: 1}
    words = ["registry", "promote", STUDENT, "--reviewer", "A. Name", "--reason", "a rehearsal"]
    with chdir(served.root), pytest.raises(SystemExit) as ended:
        main([*words, "--root", str(served.root), "--json"])
    assert not ended.value.code, capsys.readouterr().err
    client = MlflowClient(served.uri, served.uri)
    version = client.get_model_version_by_alias(STUDENT, "champion")
    assert version.tags[DIGEST] == served.models[STUDENT]["digest"]
    assert version.tags["qkt.reason"] == "a rehearsal"
    with open_registry(served.root, served.params) as registry:
        shown = registry.show(STUDENT, "champion")
    assert shown["description"] == version.description
    assert sorted(shown["aliases"]) == [ALIAS, "champion"]
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    path = client.download_artifacts(version.run_id, "model_card.json")
    assert to_summary(ModelCard.model_validate_json(Path(path).read_bytes())) == version.description


def test_a_model_comes_back_through_the_client(served: Served) -> None:
    import mlflow

    data = dim(4, 2).astype(np.float32) / 255
    mlflow.set_tracking_uri(served.uri)
    try:
        model = mlflow.pyfunc.load_model(f"models:/{STUDENT}@{ALIAS}")
        found = model.predict(data)
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    expected: Predictor = _load_pyfunc(str(Workspace(served.root).student("h0", "q0")))
    assert found.equals(expected.predict(data))


def test_it_answers_over_http(served: Served, tmp_path: Path) -> None:
    own, strange = dim(40, 1)[:2].astype(np.float32) / 255, np.zeros((1, *SHAPE), np.float32)
    classes, asked = served.params.classes, asked_class(served.params, 0)
    with served_model(f"models:/{STUDENT}@{ALIAS}", served.uri, tmp_path) as address:
        status, answer = post(address, {"inputs": np.concatenate([own, strange]).tolist()})
        wrong, refused = post(address, {"inputs": own[:, :, :8].tolist()})
        dark, told = post(address, {"inputs": (own - 7).tolist()})
    assert status == 200
    rows = answer["predictions"]
    for row in rows:
        assert row["label"] in classes
        assert sum(row[f"probability_{c}"] for c in classes) == pytest.approx(1.0)
        assert (row["budget"], row[f"offset_{asked}"]) == (0.05, -1.25)
        assert (row["unlike_training_score"] > row["unlike_training_threshold"]) is row["unlike_training"]
    assert [row["unlike_training"] for row in rows] == [False, False, True]
    assert wrong == 400
    assert "shape" in json.dumps(refused)
    assert (dark, told["code"], set(told)) == (400, "input-values", {"code", "error_code", "message"})
    for answer in (refused, told):
        assert not [w for w in ("Traceback", "site-packages", str(tmp_path)) if w in json.dumps(answer)]


def test_a_model_without_a_reference_answers_null(served: Served) -> None:
    with served_here(f"models:/teacher.h1@{ALIAS}", served.uri) as address:
        status, answer = post(address, {"inputs": np.zeros((1, *SHAPE)).tolist()})
    assert status == 200
    (row,) = answer["predictions"]
    assert row["unlike_training"] is row["unlike_training_score"] is None
    assert "budget" not in row


def test_files_of_a_version_come_through_the_server_and_are_checked(served: Served, tmp_path: Path) -> None:
    """Bytes that were changed on the server's disk are found, whatever the tags say."""
    with open_registry(served.root, served.params) as registry:
        (teacher, *_) = registered_teachers(registry.client)
        names = ("bundle.json", "mask.json", "weights.safetensors")
        known = {n: fetch_file(teacher, n, tmp_path / n, 10**8) for n in names}
        assert known == {n: digest_file(Workspace(served.root).teacher(teacher.site) / n) for n in names}
        check_teacher_version(teacher, known)
        digest = registry.fetch("student.h1.q1", "1", tmp_path / "fetched")
        assert digest_folder(tmp_path / "fetched" / "data" / "q1") == digest
        (weights,) = (p for p in served.artifacts.rglob("weights.safetensors") if p.parent.name == "q1")
        data = weights.read_bytes()
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        try:
            with pytest.raises(UnsoundVersion) as caught:
                registry.promote("student.h1.q1", "1", by="R. Viewer", reason="it looked sound")
            assert caught.value.code == "version-digest"
        finally:
            weights.write_bytes(data)
