"""Worker processes: their number, start and end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

WORTH_S = {"fork": 0.3, "spawn": 1.5}
"""Work that is done sooner is not given to processes: spawned ones take half a second to start."""
PROBE_S = 0.02
"""Seconds for which this process works alone, to measure the duration of an item."""
CHUNK_S = 0.05
"""Work handed over at a time: sending costs a tenth of a millisecond."""
CHUNK_SIZE = 64
"""Items in a chunk at most, so that results on their way stay few."""


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # not Linux


def _end_with_parent() -> None:
    """End this worker when its parent has ended; otherwise it would wait for a task for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _start(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches the whole group of processes: workers end at once, the parent says what to do.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"  # for what is imported from here on
    if prepare is not None:
        prepare(*arguments)


def start_method() -> str:
    """``fork`` where it is quick and safe: on Linux, from a process with one thread and without torch."""
    alone = threading.active_count() == 1 and "torch" not in sys.modules
    return "fork" if sys.platform == "linux" and alone else "spawn"


class Pool:
    """A pool of processes that ends with this one; an error in the context ends them at once."""

    def __init__(
        self, workers: int, prepare: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
    ) -> None:
        self._before = set(multiprocessing.active_children())
        self._pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context(start_method()),
            initializer=_start,
            initargs=(prepare, arguments),
        )

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Queue a call of a module's function."""
        return self._pool.submit(function, *arguments)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - self._before:
                child.terminate()
        self._pool.shutdown()


def _chunk(work: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [work(item) for item in items]


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    count: int,
    *,
    workers: int,
    lost: Callable[[Item], Result],
) -> Iterator[Result]:
    """Results in the order of the items, a small window of them at a time.

    Args:
        work: a module's function (or a partial of one) of one item; any exception of it ends everything.
        items: taken as they are needed.
        count: how many there are.
        workers: processes at most. None are started for what this one does in less than :data:`WORTH_S`.
        lost: the result of an item that ends its process (a crash of a decoder, say).
    """
    queue = iter(items)
    worth = WORTH_S[start_method()]
    spent, done = 0.0, 0
    while workers == 1 or not done or spent < PROBE_S or spent / done * (count - done) < worth:
        started = time.monotonic()
        for item in islice(queue, 1):
            result = work(item)
            spent, done = spent + time.monotonic() - started, done + 1
            yield result
            break
        else:
            return
    size = max(1, min(CHUNK_SIZE, int(CHUNK_S * done / spent)))
    chunks = iter(lambda: list(islice(queue, size)), [])
    while True:
        waiting: deque[tuple[list[Item], Future[list[Result]]]] = deque()
        try:
            with Pool(workers) as pool:
                yield from _windowed(pool, work, chunks, waiting, 3 * workers)
            return
        except BrokenProcessPool:
            for chunk, _ in waiting:
                yield from _alone(work, chunk, lost)


def _windowed(
    pool: Pool,
    work: Callable[[Item], Result],
    chunks: Iterator[list[Item]],
    waiting: deque[tuple[list[Item], Future[list[Result]]]],
    window: int,
) -> Iterator[Result]:
    """Results of chunks; ``waiting`` holds those handed over whose results have not been yielded."""
    while True:
        for chunk in islice(chunks, window - len(waiting)):
            waiting.append((chunk, Future()))
            waiting[-1] = (chunk, pool.submit(_chunk, work, chunk))  # raises if a process has just died
        if not waiting:
            return
        results = waiting[0][1].result()
        waiting.popleft()
        yield from results


def _alone(
    work: Callable[[Item], Result], items: list[Item], lost: Callable[[Item], Result]
) -> Iterator[Result]:
    """Process items one by one in a new process until that ends as well: that item was the cause."""
    left = deque(items)
    while left:
        try:
            with Pool(1) as pool:
                while left:
                    result = pool.submit(work, left[0]).result()
                    left.popleft()
                    yield result
        except BrokenProcessPool:
            yield lost(left.popleft())
