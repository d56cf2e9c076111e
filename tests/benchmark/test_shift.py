"""Shifts between hospitals and what they tell: the tables by hand, and pairs of a small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.shift import Pair, accuracy, correlations, how_trained, pairs, table
from qkt_clinical.benchmark.runner import RESULT, federations_of
from qkt_clinical.benchmark.settings import BenchmarkSettings
from qkt_clinical.benchmark.simulate import LabelledImages
from qkt_clinical.benchmark.store import ResultStore
from qkt_clinical.config.params import MaskParams, TrainParams
from qkt_clinical.task import MULTICLASS
from tests.benchmark.test_sites import HELD, write_site
from tests.shapes import CPU, shapes, teacher

pytestmark = pytest.mark.slow


def pair(hospital: str, apart: float, sent: float, adapted: float, share: float = 1.0) -> Pair:
    accuracies = {0.0: sent, 0.5: (sent + adapted) / 2, 1.0: adapted}
    return Pair(hospital, "birch", apart, apart / 10, share, 0.9, accuracies)


def test_tables_by_hand() -> None:
    found = [pair("aster", 0.1, 0.8, 0.8, 0.0), pair("aster", 0.3, 0.6, 0.7), pair("elm", 0.9, 0.2, 0.7)]
    first, second = table(found)
    assert (first["hospital"], first["teacher of"], first["own network"]) == ("aster", "birch", "90.0")
    assert (first["as sent"], first["half"], first["all"], first["chosen"]) == (
        "70.0",
        "72.5",
        "75.0",
        "75.0",
    )
    assert (first["image shift"], first["shift"]) == (pytest.approx(0.2), pytest.approx(0.02))
    assert first["share"] == 0.5
    assert (second["hospital"], second["chosen"]) == ("elm", "70.0")
    for row in correlations(found):
        assert row["lacks as sent"] == pytest.approx(1.0), "the farther, the less it reads"
        assert row["gains by all of the statistics"] == pytest.approx(1.0)
        assert row["pairs"] == 3


def test_only_shared_classes_can_be_answered() -> None:
    network = teacher((0, 1, 2), site="birch")
    images, labels = shapes((0, 1), 10, 7)
    found = accuracy(network, LabelledImages(images, labels), (0, 1), MULTICLASS)
    assert found > 0.8
    assert accuracy(network, LabelledImages(images, 1 - labels), (0, 1), MULTICLASS) == pytest.approx(
        1 - found
    )


def test_pairs_of_a_run(tmp_path: Path) -> None:
    files = [write_site(tmp_path, name, held) for name, held in HELD.items()]
    settings = BenchmarkSettings(
        sites=True,
        device="cpu",
        train=TrainParams(epochs=1, batch_size=32, appearance=0.0),
        mask=MaskParams(probes=16),
    )
    torch.set_num_threads(1)
    store = ResultStore(tmp_path / "work", federations_of(files, settings)(0), settings, CPU)
    for name in HELD:
        store.train(f"full/{name}")
    found = list(pairs(store))
    assert [(p.hospital, p.teacher) for p in found] == [(a, b) for a in HELD for b in HELD if a != b]
    for one in found:
        assert one.image_shift > 0
        assert one.shift > 0
        assert all(0 <= value <= 1 for value in one.accuracies.values())
        assert one.chosen == one.accuracies[one.share]
        (back,) = (p for p in found if (p.teacher, p.hospital) == (one.hospital, one.teacher))
        assert back.image_shift == one.image_shift


def test_a_run_says_how_its_networks_were_trained(tmp_path: Path) -> None:
    (tmp_path / RESULT).write_text(json.dumps({"settings": {"train": {"appearance": 0.5, "epochs": 2}}}))
    assert how_trained(tmp_path) == TrainParams(appearance=0.5, epochs=2)
