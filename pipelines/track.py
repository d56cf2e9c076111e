"""Stage ``track``: ``python3 -m pipelines.track``."""

import sys
from pathlib import Path

from qkt_clinical.config import load_params
from qkt_clinical.console import errors_as_lines
from qkt_clinical.tracking import track

HERE = Path()


def main() -> None:
    """Run the stage in the workspace that is the current folder."""
    track(HERE, load_params(HERE))


if __name__ == "__main__":
    with errors_as_lines("track"):
        main(*sys.argv[1:])
