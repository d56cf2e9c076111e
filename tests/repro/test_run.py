"""Stages side by side, with runners that are none: what is stopped does not begin."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from qkt_clinical.repro import run as module
from qkt_clinical.repro.run import StageResult, environments, log_file, run_stages
from qkt_clinical.repro.with_dvc import StageGraph


@pytest.fixture(autouse=True)
def without_dvc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "unchanged_stages", lambda root, graph: tuple(graph.needs)[:1])
    monkeypatch.setattr(module, "locked_stages", lambda root: ())
    monkeypatch.setattr(module, "sort_lock_file", lambda root, first, order: None)


class Recorder:
    """A runner that notes what it is given, and waits for ``stop`` at a stage called ``wait``."""

    def __init__(self, made: list[str], begun: threading.Event) -> None:
        self.made, self.begun, self.stopped = made, begun, threading.Event()

    @property
    def alive(self) -> bool:
        return not self.stopped.is_set()

    def run(self, name: str, log: Path) -> str:
        self.made.append(name)
        self.begun.set()
        if name == "wait":
            assert self.stopped.wait(30)
            return "failed"
        return "made"

    def stop(self) -> None:
        self.stopped.set()


def test_results_come_in_the_graph_s_order(tmp_path: Path) -> None:
    graph = StageGraph(("a", "b", "c"), {"a": frozenset(), "b": frozenset({"a"}), "c": frozenset()})
    told: list[StageResult] = []
    made: list[str] = []

    def start(environment: Mapping[str, str]) -> Recorder:
        return Recorder(made, threading.Event())

    found = run_stages(tmp_path, graph, start, environments(2), told.append)
    assert [r.stage for r in found] == ["a", "b", "c"]
    assert [r.outcome for r in found] == ["unchanged", "made", "made"]
    assert sorted(made) == ["b", "c"], "no process starts for what has not changed"
    assert sorted(r.stage for r in told) == ["a", "b", "c"]


def test_what_is_interrupted_ends_at_once(tmp_path: Path) -> None:
    graph = StageGraph(("old", "a", "wait", "later"), {"old": frozenset(), "later": frozenset({"a", "wait"})})
    made: list[str] = []
    begun = threading.Event()

    def interrupt(result: StageResult) -> None:
        if result.outcome == "unchanged":
            return
        assert begun.wait(30)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stages(tmp_path, graph, lambda _: Recorder(made, begun), environments(2), interrupt)
    assert "later" not in made
    with pytest.raises(KeyboardInterrupt):  # the workspace is free again
        run_stages(tmp_path, graph, lambda _: Recorder(made, begun), environments(2), interrupt)


def test_gpus_are_shared_out_and_stages_become_file_names(tmp_path: Path) -> None:
    given = [e["CUDA_VISIBLE_DEVICES"] for e in environments(3, ["0", "1"])]
    assert given == ["0", "1", "0"]
    assert not any("CUDA_VISIBLE_DEVICES" in e for e in environments(2))
    assert log_file(tmp_path, "sub/dvc.yaml:train@a").name == "sub_dvc.yaml_train@a.log"
