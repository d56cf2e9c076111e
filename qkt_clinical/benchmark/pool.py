"""Independent tasks in worker processes, one torch thread each, so that figures do not depend on how many."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

import torch

from qkt_clinical.errors import QktError

Task = TypeVar("Task")


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # not Linux


def _end_with_parent() -> None:
    """End this worker as soon as its parent is gone; it would wait for the next task for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _start(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches the whole group of processes: workers end at once, the parent says what to do.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    prepare(*arguments)


def _guarded(work: Callable[[Task], None], task: Task) -> dict[str, str | None] | None:
    """None, or the error that a user can act on, as text: exceptions with arguments cannot be sent back."""
    try:
        work(task)
    except QktError as error:
        return error.as_dict()
    return None


def _raise(error: dict[str, str | None] | None) -> None:
    if error is not None:
        raise QktError(
            str(error["message"]),
            remedy=str(error["remedy"]),
            code=error["code"],
            stage=error["stage"],
            site=error["site"],
            file=error["file"],
        )


def run_tasks(
    work: Callable[[Task], None],
    tasks: Sequence[Task],
    *,
    workers: int,
    prepare: Callable[..., None],
    arguments: tuple[Any, ...],
) -> Iterator[Task]:
    """Yield every task when it is done; those that take longest should come first.

    Args:
        work: a module's function of one task.
        workers: 1 works in this process.
        prepare: called with ``arguments`` once in every process, before its first task.

    Raises:
        QktError: a task met one, or a worker was ended from outside.
    """
    if not tasks:
        return
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            prepare(*arguments)
            for task in tasks:
                work(task)
                yield task
        finally:
            torch.set_num_threads(threads)
        return
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(prepare, arguments),
    )
    finished = False
    try:
        futures: dict[Future[Any], Task] = {pool.submit(_guarded, work, task): task for task in tasks}
        for future in as_completed(futures):
            _raise(future.result())
            yield futures[future]
        finished = True
    except BrokenProcessPool:
        raise QktError(
            "a worker process ended unexpectedly, perhaps for want of memory",
            remedy="Add --resume to go on, with fewer --workers.",
            code="worker",
        ) from None
    finally:
        if not finished:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - before:
                child.terminate()
        pool.shutdown()
