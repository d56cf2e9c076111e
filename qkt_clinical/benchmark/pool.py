"""Independent tasks in worker processes, one torch thread each: figures do not depend on their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from qkt_clinical.common.workers import Pool
from qkt_clinical.errors import QktError

Task = TypeVar("Task")


def _start(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    prepare(*arguments)


def _guarded(work: Callable[[Task], None], task: Task) -> dict[str, str | None] | None:
    """None, or a typed error as text: exceptions with arguments cannot be sent between processes."""
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
    """Yield every task when it is done; put the longest tasks first.

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
    try:
        with Pool(min(workers, len(tasks)), _start, (prepare, arguments)) as pool:
            futures = {pool.submit(_guarded, work, task): task for task in tasks}
            for future in as_completed(futures):
                _raise(future.result())
                yield futures[future]
    except BrokenProcessPool:
        raise QktError(
            "a worker process ended unexpectedly, perhaps for want of memory",
            remedy="Add --resume to go on, with fewer --workers.",
            code="worker",
        ) from None
