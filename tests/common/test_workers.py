from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from qkt_clinical.common import workers
from qkt_clinical.common.workers import in_order, start_method


def work(item: int, *, deadly: frozenset[int] = frozenset(), home: int = 0) -> tuple[int, int]:
    """The item doubled, and who did it; a deadly one ends its process, unless that is ``home``."""
    if item in deadly and os.getpid() != home:
        os._exit(3)
    return 2 * item, os.getpid()


def lost(item: int) -> tuple[int, int]:
    return -item, 0


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are started after the first item, with five items at a time."""
    monkeypatch.setattr(workers, "WORTH_S", {"fork": 0.0, "spawn": 0.0})
    monkeypatch.setattr(workers, "PROBE_S", 0.0)
    monkeypatch.setattr(workers, "CHUNK_SIZE", 5)


@pytest.mark.usefixtures("eager")
def test_results_come_in_order_from_several_processes() -> None:
    found = list(in_order(work, iter(range(200)), 200, workers=2, lost=lost))
    assert [result for result, _ in found] == list(range(0, 400, 2))
    assert found[0][1] == os.getpid()
    assert {pid for _, pid in found[1:]}.isdisjoint({os.getpid()})


def test_one_worker_is_this_process_and_little_work_is_done_here() -> None:
    for count in (1, 2):
        assert {pid for _, pid in in_order(work, range(30), 30, workers=count, lost=lost)} == {os.getpid()}
    assert list(in_order(work, (), 0, workers=2, lost=lost)) == []


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
def test_an_item_that_ends_its_process_is_lost_alone() -> None:
    deadly = partial(work, deadly=frozenset({7, 8, 150}), home=os.getpid())
    found = [result for result, _ in in_order(deadly, range(200), 200, workers=2, lost=lost)]
    assert found == [-i if i in (7, 8, 150) else 2 * i for i in range(200)]


@pytest.mark.usefixtures("eager")
def test_items_are_taken_as_they_are_needed() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for i in range(1000):
            taken += 1
            yield i

    results = in_order(work, items(), 1000, workers=2, lost=lost)
    for done in range(1, 300):
        next(results)
        assert taken <= done + 1 + 6 * 5 + 5  # six chunks of five under way, and those of the chunk at hand
    results.close()


@pytest.mark.usefixtures("eager")
def test_an_error_of_the_work_is_raised() -> None:
    with pytest.raises(TypeError):
        list(in_order(work, [1, 2, None, 4], 4, workers=2, lost=lost))  # type: ignore[list-item]


def test_processes_are_forked_only_where_that_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    assert start_method() == ("fork" if sys.platform == "linux" else "spawn")
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    assert start_method() == "spawn"
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "torch", threading)
    assert start_method() == "spawn"
