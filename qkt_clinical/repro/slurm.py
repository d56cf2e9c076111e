"""Stages as jobs of a Slurm cluster, one ``sbatch --wait`` for each; the workspace lies on a shared disk."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from qkt_clinical.errors import ConfigError
from qkt_clinical.repro.one_stage import OUTCOME, STAGE


class ClusterJobs:
    """Stages as jobs; as a runner of :func:`.run.run_stages`.

    Args:
        options: for ``sbatch``, such as ``--partition gpu --gres gpu:1``.
    """

    def __init__(self, root: Path, environment: Mapping[str, str], options: Sequence[str] = ()) -> None:
        self._root, self._environment, self._options = root, environment, options
        self._job = ""
        self._stopped = False

    def run(self, name: str, log: Path) -> str:
        """Make a stage: ``made``, ``unchanged`` or ``failed``; returns when its job has ended.

        Raises:
            ConfigError: there is no ``sbatch``.
        """
        outcome = log.with_suffix(".outcome")
        outcome.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
        # A shell on the cluster reads the program's line: the stage's name goes in the environment.
        program = shlex.join([sys.executable, "-m", "qkt_clinical.repro.one_stage"])
        command = ["sbatch", "--wait", "--parsable", "--export=ALL", "--job-name=qkt-repro"]
        command += [f"--chdir={self._root}", f"--output={log}", *self._options, "--wrap", program]
        environment = {**os.environ, **self._environment, STAGE: name, OUTCOME: os.fspath(outcome)}
        try:
            # In a session of its own: Ctrl-C must not end it before its job is cancelled.
            submitted = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise ConfigError(
                "sbatch is not here",
                remedy="Run it where jobs are submitted, or leave --slurm out.",
                code="slurm-missing",
            ) from None
        with submitted as waiting:
            assert waiting.stdout is not None
            self._job = waiting.stdout.readline().strip().partition(";")[0]
            if self._stopped:
                self._cancel()
            waiting.stdout.read()
        self._job = ""
        if waiting.returncode:
            return "failed"
        try:
            return outcome.read_text(encoding="utf-8")
        except OSError:
            return "failed"

    @property
    def alive(self) -> bool:
        """Whether it can make another stage."""
        return not self._stopped

    def stop(self) -> None:
        """Cancel the job that is running."""
        self._stopped = True
        self._cancel()

    def _cancel(self) -> None:
        """Cancel the job, whose ``sbatch`` ends with it."""
        if self._job:
            with contextlib.suppress(OSError):
                subprocess.run(["scancel", self._job], check=False, stdout=subprocess.DEVNULL)
