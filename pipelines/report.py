"""Stage ``report``: ``python3 -m pipelines.report``."""

import sys
from pathlib import Path

from qkt_clinical.common.console import errors_as_lines
from qkt_clinical.config.loading import load_params
from qkt_clinical.report import write_figure, write_report

HERE = Path()


def main() -> None:
    """Run the stage in the workspace that is the current folder."""
    write_report(HERE, load_params(HERE))
    write_figure(HERE)


if __name__ == "__main__":
    with errors_as_lines("report"):
        main(*sys.argv[1:])
