"""What is asked of DVC: its graph of stages, one stage made or found unchanged, its lock file in order.

DVC is loaded when a function is called: it takes a second.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkt_clinical.errors import ConfigError, QktError

LOCK_FILE = "dvc.lock"
PATIENCE_S = 60.0
"""For a stage that another process makes, or made: a killed one counts until the system has forgotten it."""


class StageFailed(QktError):
    """A stage ended with an error, which it has told itself."""

    code = "stage-failed"


@dataclass(frozen=True)
class StageGraph:
    """The stages that were asked for and all that they need."""

    order: tuple[str, ...]
    """As ``dvc repro`` would run them."""
    needs: dict[str, frozenset[str]]
    """Stage to the stages that it reads of."""


@contextlib.contextmanager
def _repository(root: Path) -> Iterator[Any]:
    """DVC's view of a workspace, which waits for DVC's lock as long as another holds it.

    The current folder is the workspace meanwhile: DVC names stages by where it is called.

    Raises:
        ConfigError: it is none of DVC's, or its files cannot be used.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with contextlib.chdir(root):
        try:
            repository = Repo(_wait_for_lock=True)
        except DvcException as error:
            raise _refused(error) from error
        try:
            yield repository
        finally:
            repository.close()


def _refused(error: Exception) -> ConfigError:
    return ConfigError(
        f"DVC cannot use this workspace: {str(error).splitlines()[0][:300]}",
        remedy="Run it in the folder with dvc.yaml; 'dvc stage list' names its stages.",
        code="dvc",
    )


def stage_graph(root: Path, targets: Sequence[str] = ()) -> StageGraph:
    """The graph of a workspace's stages.

    Args:
        targets: stages, or groups such as ``train``; all where none is named.

    Raises:
        ConfigError: the workspace is none of DVC's, or has no such stage.
    """
    from dvc.exceptions import DvcException
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    with _repository(root) as repository:
        try:
            graph = get_active_graph(repository.index.graph)
            wanted = collect_stages(repository, targets or ("dvc.yaml",))
        except DvcException as error:
            raise _refused(error) from error
        planned = plan_repro(graph, wanted)
        names = {stage: stage.addressing for stage in planned}
        needs = {
            name: frozenset(names[other] for other in graph.successors(stage))
            for stage, name in names.items()
        }
        return StageGraph(tuple(names.values()), needs)


def unchanged_stages(root: Path, graph: StageGraph) -> tuple[str, ...]:
    """The stages that have nothing to do: neither they have changed nor those that they read of."""
    from dvc.lock import LockError

    found: list[str] = []
    with _repository(root) as repository, repository.lock:
        stages = {stage.addressing: stage for stage in repository.index.stages}
        for name in graph.order:
            # Another process may be making a stage: whoever runs this one waits for it.
            with contextlib.suppress(LockError):
                if graph.needs[name] <= set(found) and not stages[name].changed():
                    found.append(name)
    return tuple(found)


def reproduce_stage(root: Path, name: str) -> bool:
    """Make one stage as ``dvc repro --single-item`` does; False where nothing that it reads has changed.

    Raises:
        StageFailed: its command failed, or DVC could not take in what it wrote.
    """
    from dvc.exceptions import DvcException
    from dvc.lock import LockError

    give_up = time.monotonic() + PATIENCE_S
    with _repository(root) as repository:
        while True:
            try:
                return bool(repository.reproduce(name, single_item=True))
            except DvcException as error:
                cause = error.__cause__ or error  # DVC's own error says no more than that the stage failed
                if isinstance(cause, LockError) and time.monotonic() < give_up:
                    time.sleep(0.5)
                    continue
                raise StageFailed(
                    str(cause).splitlines()[0][:300],
                    remedy="What the stage said stands above; run the command again when it is put right.",
                    stage=name,
                ) from error


def locked_stages(root: Path) -> tuple[str, ...]:
    """The stages in ``dvc.lock``, in its order."""
    with _repository(root) as repository, repository.lock:
        return tuple(_stages_of(repository))


def _stages_of(repository: Any) -> dict[str, Any]:
    from dvc.dvcfile import Lockfile

    content, _ = Lockfile(repository, os.fspath(Path(LOCK_FILE).resolve()))._load()
    stages: dict[str, Any] = content.get("stages", {})
    return stages


def sort_lock_file(root: Path, first: Sequence[str], order: Sequence[str]) -> None:
    """Put the stages in ``dvc.lock`` where ``dvc repro`` would have put them.

    Args:
        first: stages that were in it before, in its order then.
        order: of those that came after them.
    """
    from dvc.utils.serialize import modify_yaml

    wanted = [*first, *(name for name in order if name not in first)]
    with _repository(root) as repository, repository.lock:
        found = list(_stages_of(repository))
        sorted_names = [n for n in wanted if n in found] + [n for n in found if n not in wanted]
        if found == sorted_names:
            return
        with modify_yaml(LOCK_FILE) as content:
            stages = content["stages"]
            rows = {name: stages[name] for name in sorted_names}
            stages.clear()
            stages.update(rows)
