"""One stage as a program of its own, for a cluster's job: ``python -m qkt_clinical.repro.one_stage``.

Its name is in the environment, since a shell reads the command.
"""

from __future__ import annotations

import os
from pathlib import Path

from qkt_clinical.common.console import errors_as_lines, owners_alone
from qkt_clinical.common.files import write_text
from qkt_clinical.errors import ConfigError
from qkt_clinical.repro.with_dvc import reproduce_stage

STAGE = "QKT_REPRO_STAGE"
OUTCOME = "QKT_REPRO_OUTCOME"
"""File to which ``made`` or ``unchanged`` is written when the stage has ended well."""


def main() -> None:
    """Make the stage in the workspace that is the current folder."""
    name, outcome = os.environ.get(STAGE), os.environ.get(OUTCOME)
    if not name or not outcome:
        raise ConfigError("no stage is named", remedy="Run 'qkt repro', which starts this.")
    write_text(Path(outcome), "made" if reproduce_stage(Path(), name) else "unchanged")


if __name__ == "__main__":
    with errors_as_lines(), owners_alone():
        main()
