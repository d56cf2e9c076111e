from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from qkt_clinical.common.files import digest_file, digest_folder
from qkt_clinical.common.system_metrics import (
    EVERY,
    SWITCH,
    read_system_metrics,
    sample_system_metrics,
    write_system_metrics,
)
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import write_prepared
from qkt_clinical.stages.train import train_site
from qkt_clinical.tracking.runs import Item, with_system_metrics
from tests.four_hospitals import CLASSES, PARAMS, SHAPE

BUNDLE = "0" * 64


@pytest.mark.parametrize("value", ["", "false", "no"])
def test_nothing_is_watched_unless_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str) -> None:
    monkeypatch.setenv(SWITCH, value)
    with sample_system_metrics() as samples:
        pass
    assert samples == []
    write_system_metrics(tmp_path, BUNDLE, samples)
    assert list(tmp_path.iterdir()) == []


def test_samples_follow_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(SWITCH, "true")
    monkeypatch.setenv(EVERY, "0.05")
    with sample_system_metrics() as samples:
        held = bytearray(200_000_000)
        held[::4096] = b"x" * len(held[::4096])
        time.sleep(0.4)
        while len(samples) < 3:
            time.sleep(0.01)
        during = samples[-1]["process_memory_usage_megabytes"]
        del held
    assert during - samples[-1]["process_memory_usage_megabytes"] > 150, "megabytes, of this process"
    assert all(0 <= s["cpu_utilization_percentage"] <= 100 for s in samples)
    assert all(0 < s["system_memory_usage_percentage"] <= 100 for s in samples)
    write_system_metrics(tmp_path, BUNDLE, samples)
    assert read_system_metrics(tmp_path, BUNDLE) == samples
    assert read_system_metrics(tmp_path, "1" * 64) == [], "of another bundle nothing is known"


def test_work_that_breaks_off_stops_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setenv(EVERY, "0.05")
    with pytest.raises(KeyError), sample_system_metrics() as samples:
        raise KeyError
    number = len(samples)
    time.sleep(0.15)
    assert len(samples) == number


def test_a_torn_file_is_as_none(tmp_path: Path) -> None:
    write_system_metrics(tmp_path, BUNDLE, [{"cpu_utilization_percentage": 1.0}])
    (tmp_path / "system-metrics" / f"{BUNDLE}.json").write_text("[{")
    assert read_system_metrics(tmp_path, BUNDLE) == []


def test_a_run_gets_them_as_mlflows_system_metrics(tmp_path: Path) -> None:
    write_system_metrics(
        tmp_path, BUNDLE, [{"cpu_utilization_percentage": 5.0}, {"cpu_utilization_percentage": 7.0}]
    )
    item = Item(
        "site", "aster", "1" * 64, "", {}, {}, curves={"curve/loss": [(1, 0.5)]}, tags={"qkt.bundle": BUNDLE}
    )
    assert with_system_metrics(item, tmp_path).curves == {
        "curve/loss": [(1, 0.5)],
        "system/cpu_utilization_percentage": [(0, 5.0), (1, 7.0)],
    }
    assert with_system_metrics(item, tmp_path).digest == item.digest, "no other run for it"


def test_a_watched_teacher_has_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    digests = []
    params = PARAMS.model_copy(update={"train": PARAMS.train.model_copy(update={"epochs": 2})})
    for name, value in (("plain", "false"), ("sample_system_metrics", "true")):
        monkeypatch.setenv(SWITCH, value)
        root = tmp_path / name
        write_prepared(
            Workspace(root).prepared("aster"),
            site="aster",
            source_kind="images",
            classes=CLASSES,
            images=np.random.default_rng(0).integers(0, 256, (16, *SHAPE), dtype=np.uint8),
            labels=np.arange(16) % 2,
            groups=np.array([f"p{i}" for i in range(16)]),
            splits={"train": np.arange(8), "calibration": np.arange(8, 12), "val": np.arange(12, 16)}
            | {"test": np.array([], dtype=np.int64)},
            spacing_mm=None,
            normalisation="unit",
            transforms=(),
            outcomes=[],
        )
        train_site(root, "aster", params)
        folder = Workspace(root).teacher("aster")
        digests.append(digest_folder(folder))
        samples = read_system_metrics(Workspace(root).scratch, digest_file(folder / "bundle.json"))
        assert bool(samples) == (value == "true")
    assert digests[0] == digests[1]
