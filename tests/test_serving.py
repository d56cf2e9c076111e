from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qkt_clinical.common.files import write_json
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.inputs import to_input
from qkt_clinical.errors import BundleError, InputError, QktError
from qkt_clinical.models.bundle import load_bundle
from qkt_clinical.models.out_of_distribution import make_reference
from qkt_clinical.qkt.prediction import predict_scores
from qkt_clinical.records.card import REFERENCE, read_card
from qkt_clinical.serving import BATCH, FLAG_COLUMNS, Predictor, _load_pyfunc, operating_point
from tests.sample_run import SHAPE, asked_class, sample_params, write_sample_run

PARAMS = sample_params()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serving")
    write_sample_run(root, PARAMS, weights=True)
    return root


@pytest.fixture(scope="module")
def teacher(root: Path) -> Predictor:
    return _load_pyfunc(str(Workspace(root).teacher("h0")))


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, *SHAPE), dtype=np.float32)


def chances(table: pd.DataFrame) -> np.ndarray:
    return table[[f"probability_{c}" for c in PARAMS.classes]].to_numpy(dtype=float)


@pytest.mark.slow
def test_importing_it_loads_no_mlflow() -> None:
    code = "import sys, qkt_clinical.serving; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_teacher_answers_among_the_classes_it_knows(teacher: Predictor) -> None:
    data = images(6)
    table = teacher.predict(data)
    assert list(table.columns) == ["label", *(f"probability_{c}" for c in PARAMS.classes), *FLAG_COLUMNS]
    with torch.no_grad():
        logits = teacher.bundle.network((torch.from_numpy(data) - 0.5) / 0.5)[:, :3].double()
    expected = torch.softmax(logits, dim=1).numpy()
    found = chances(table)
    np.testing.assert_allclose(found[:, :3], expected, rtol=1e-6)
    assert (found[:, 3:] == 0).all()
    assert list(table["label"]) == [PARAMS.classes[i] for i in expected.argmax(1)]


def test_a_teacher_without_a_mask_answers_among_all_classes(root: Path, tmp_path: Path) -> None:
    folder = Workspace(root).teacher("h0")
    for name in ("bundle.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    table = _load_pyfunc(str(tmp_path)).predict(images(2))
    assert (chances(table) > 0).all()


@pytest.mark.parametrize("index", [0, 1], ids=["qkt", "qkt-light"])
def test_a_student_answers_by_its_decision(root: Path, index: int) -> None:
    folder = Workspace(root).student(f"h{index}", f"q{index}")
    data = images(40, seed=1)
    table = _load_pyfunc(str(folder)).predict(data)
    bundle = load_bundle(folder)
    scores = predict_scores(bundle, to_input(data))
    assert list(table["label"]) == [PARAMS.classes[i] for i in scores.argmax(1).tolist()]
    probabilities = chances(table)
    np.testing.assert_allclose(probabilities.sum(1), 1.0, rtol=1e-9)
    relevant = [*PARAMS.classes[index : index + 3], asked_class(PARAMS, index)]
    assert {c for c in PARAMS.classes if (table[f"probability_{c}"] > 0).any()} == set(relevant)


def test_a_routed_student_asks_its_experts(root: Path) -> None:
    folder = Workspace(root).student("h2", "q2")
    bundle = load_bundle(folder)
    assert list(bundle.experts) == ["h0", "h1"]
    table = Predictor(bundle).predict(images(5))
    scores = predict_scores(bundle, to_input(images(5)))
    assert list(table["label"]) == [PARAMS.classes[i] for i in scores.argmax(1).tolist()]


def test_many_images_are_answered_as_few(teacher: Predictor) -> None:
    data = images(BATCH + 2)
    whole = chances(teacher.predict(data))
    tail = chances(teacher.predict(data[-3:]))
    assert len(whole) == BATCH + 2
    np.testing.assert_allclose(whole[-3:], tail, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (np.zeros((1, 3, 16, 17), np.float32), "input-shape"),
        (np.zeros(SHAPE, np.float32), "input-shape"),
        (np.zeros((0, *SHAPE), np.float32), "input-shape"),
        (np.full((1, *SHAPE), np.nan, np.float32), "input-values"),
        (np.full((1, *SHAPE), np.inf, np.float32), "input-values"),
        (np.full((1, *SHAPE), 255, np.uint8), "input-values"),
        (np.zeros((1, *SHAPE), np.complex64), "input-type"),
        (np.zeros((1, *SHAPE), bool), "input-type"),
        (np.full((1, *SHAPE), "1"), "input-type"),
        (np.full((1, *SHAPE), 1e300), "input-values"),
        (np.broadcast_to(np.float32(0), (1 << 20, *SHAPE)), "input-size"),
        (None, "input-type"),
        ([], "input-shape"),
        ([["a"]], "input-type"),
        ([[1.0], [1.0, 2.0]], "input-type"),
        (object(), "input-type"),
    ],
)
def test_what_is_no_image_is_refused(teacher: Predictor, data: object, code: str) -> None:
    with pytest.raises(InputError) as caught:
        teacher.predict(data)
    assert caught.value.code == code
    assert caught.value.where.site == "h0"


def test_unknown_parameters_are_refused(teacher: Predictor) -> None:
    with pytest.raises(InputError, match="threshold"):
        teacher.predict(images(1), params={"threshold": 0.5})


def test_a_changed_bundle_is_refused(root: Path, tmp_path: Path) -> None:
    folder = Workspace(root).teacher("h1")
    (tmp_path / "bundle.json").write_bytes((folder / "bundle.json").read_bytes())
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "weights.safetensors").write_bytes(data)
    with pytest.raises(BundleError) as caught:
        _load_pyfunc(str(tmp_path))
    assert caught.value.code == "bundle-digest"


@pytest.mark.parametrize(
    "error", [MemoryError("/srv/secret"), KeyError("/srv/secret"), OSError("/srv/secret")]
)
def test_what_nobody_foresaw_is_typed_and_names_no_path(
    teacher: Predictor, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("qkt_clinical.serving.check_images", fail)
    with pytest.raises(QktError) as caught:
        teacher.predict(images(1))
    assert "/srv" not in str(caught.value)
    assert caught.value.code in ("out-of-memory", "internal", "system")


def test_large_images_go_through_in_smaller_batches(
    teacher: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = chances(teacher.predict(images(7)))
    monkeypatch.setattr("qkt_clinical.serving.BATCH_NUMBERS", 2 * int(np.prod(SHAPE)))
    np.testing.assert_allclose(chances(teacher.predict(images(7))), whole, atol=1e-6)


@pytest.mark.parametrize("name", ["bundle.json", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "empty", "folder", "text"])
def test_a_damaged_bundle_is_one_typed_error(root: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "h1"
    shutil.copytree(Workspace(root).teacher("h1"), folder)
    (folder / name).unlink()
    if damage == "folder":
        (folder / name).mkdir()
    elif damage != "gone":
        (folder / name).write_text("" if damage == "empty" else "what a disk left of it")
    with pytest.raises(QktError):
        _load_pyfunc(str(folder))


def test_a_student_answers_with_its_operating_point(root: Path) -> None:
    asked = asked_class(PARAMS, 0)
    folder = Workspace(root).student("h0", "q0")
    table = _load_pyfunc(str(folder)).predict(images(3))
    assert operating_point(read_card(folder)) == {"budget": 0.05, f"offset_{asked}": -1.25}
    assert table["budget"].tolist() == [0.05] * 3
    assert table[f"offset_{asked}"].tolist() == [-1.25] * 3
    assert operating_point(read_card(Workspace(root).teacher("h0"))) == {}


def test_without_a_reference_nothing_is_said_of_the_image(teacher: Predictor) -> None:
    table = teacher.predict(images(2))
    assert (
        json.loads(table[list(FLAG_COLUMNS)].to_json(orient="records")) == [dict.fromkeys(FLAG_COLUMNS)] * 2
    )
    assert [table[c].tolist() for c in FLAG_COLUMNS] == [[None] * 2] * 3


def test_an_image_unlike_those_of_the_training_is_flagged(root: Path, tmp_path: Path) -> None:
    folder = Workspace(root).teacher("h0")
    for name in ("bundle.json", "weights.safetensors", "mask.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    bundle = load_bundle(tmp_path)
    dim = (images(80) * 40 + 100).astype(np.uint8)
    reference = make_reference(bundle.network, bundle.card, dim[:50], dim[50:], "unit")
    write_json(tmp_path / REFERENCE, reference.model_dump(mode="json"))
    own = (images(BATCH + 2, seed=1) * 40 + 100).astype(np.uint8).astype(np.float32) / 255
    table = _load_pyfunc(str(tmp_path)).predict(np.concatenate([own, np.zeros((1, *SHAPE), np.float32)]))
    flags = table["unlike_training"].tolist()
    assert set(map(type, flags)) == {bool}
    assert flags[-1] is True
    assert sum(flags[:-1]) <= 0.1 * len(own)
    assert table["unlike_training_threshold"].tolist() == [reference.threshold] * len(table)
    assert [s > reference.threshold for s in table["unlike_training_score"]] == flags
    assert json.loads(table.to_json(orient="records"))[-1]["unlike_training"] is True


def test_a_reference_without_threshold_scores_and_does_not_flag(root: Path) -> None:
    bundle = load_bundle(Workspace(root).teacher("h0"))
    none = np.zeros((0, *SHAPE), np.uint8)
    reference = make_reference(bundle.network, bundle.card, (images(9) * 255).astype(np.uint8), none, "unit")
    table = Predictor(bundle, reference).predict(images(2))
    assert table["unlike_training"].tolist() == [None, None]
    assert all(score > 0 for score in table["unlike_training_score"])
