from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qkt_clinical.bundle import load_bundle
from qkt_clinical.config import Workspace
from qkt_clinical.errors import BundleError, InputError
from qkt_clinical.serving import BATCH, Answerer, _load_pyfunc
from qkt_clinical.training import to_input
from qkt_clinical.transfer import predict_scores
from tests.sample_run import SHAPE, asked_class, sample_params, write_sample_run

PARAMS = sample_params()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serving")
    write_sample_run(root, PARAMS, weights=True)
    return root


@pytest.fixture(scope="module")
def teacher(root: Path) -> Answerer:
    return _load_pyfunc(str(Workspace(root).teacher("h0")))


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, *SHAPE), dtype=np.float32)


def test_importing_it_loads_no_mlflow() -> None:
    code = "import sys, qkt_clinical.serving; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_teacher_answers_among_the_classes_it_knows(teacher: Answerer) -> None:
    data = images(6)
    table = teacher.predict(data)
    assert list(table.columns) == ["label", *(f"probability_{c}" for c in PARAMS.classes)]
    with torch.no_grad():
        logits = teacher.bundle.network((torch.from_numpy(data) - 0.5) / 0.5)[:, :3].double()
    expected = torch.softmax(logits, dim=1).numpy()
    found = table.iloc[:, 1:].to_numpy(dtype=float)
    np.testing.assert_allclose(found[:, :3], expected, rtol=1e-6)
    assert (found[:, 3:] == 0).all()
    assert list(table["label"]) == [PARAMS.classes[i] for i in expected.argmax(1)]


def test_a_teacher_without_a_mask_answers_among_all_classes(root: Path, tmp_path: Path) -> None:
    folder = Workspace(root).teacher("h0")
    for name in ("bundle.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    table = _load_pyfunc(str(tmp_path)).predict(images(2))
    assert (table.iloc[:, 1:].to_numpy(dtype=float) > 0).all()


@pytest.mark.parametrize("index", [0, 1], ids=["qkt", "qkt-light"])
def test_a_student_answers_by_its_decision(root: Path, index: int) -> None:
    folder = Workspace(root).student(f"h{index}", f"q{index}")
    data = images(40, seed=1)
    table = _load_pyfunc(str(folder)).predict(data)
    bundle = load_bundle(folder)
    scores = predict_scores(bundle, to_input(data))
    assert list(table["label"]) == [PARAMS.classes[i] for i in scores.argmax(1).tolist()]
    probabilities = table.iloc[:, 1:].to_numpy(dtype=float)
    np.testing.assert_allclose(probabilities.sum(1), 1.0, rtol=1e-9)
    relevant = [*PARAMS.classes[index : index + 3], asked_class(PARAMS, index)]
    assert {c for c in PARAMS.classes if (table[f"probability_{c}"] > 0).any()} == set(relevant)


def test_a_routed_student_asks_its_experts(root: Path) -> None:
    folder = Workspace(root).student("h2", "q2")
    bundle = load_bundle(folder)
    assert list(bundle.experts) == ["h0", "h1"]
    table = Answerer(bundle).predict(images(5))
    scores = predict_scores(bundle, to_input(images(5)))
    assert list(table["label"]) == [PARAMS.classes[i] for i in scores.argmax(1).tolist()]


def test_many_images_are_answered_as_few(teacher: Answerer) -> None:
    data = images(BATCH + 2)
    whole = teacher.predict(data).iloc[:, 1:].to_numpy(dtype=float)
    tail = teacher.predict(data[-3:]).iloc[:, 1:].to_numpy(dtype=float)
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
        ([["a"]], "input-type"),
        ([[1.0], [1.0, 2.0]], "input-type"),
        (object(), "input-type"),
    ],
)
def test_what_is_no_image_is_refused(teacher: Answerer, data: object, code: str) -> None:
    with pytest.raises(InputError) as caught:
        teacher.predict(data)
    assert caught.value.code == code
    assert caught.value.where.site == "h0"


def test_unknown_parameters_are_refused(teacher: Answerer) -> None:
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
