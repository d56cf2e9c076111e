"""Stage ``track``: ``python3 -m pipelines.track``."""

import sys
from pathlib import Path

from qkt_clinical.common.console import errors_as_lines
from qkt_clinical.config.loading import load_params
from qkt_clinical.tracking.mirror import track

HERE = Path()


def main() -> None:
    """Run the stage in the workspace that is the current folder."""
    track(HERE, load_params(HERE))


if __name__ == "__main__":
    with errors_as_lines("track"):
        main(*sys.argv[1:])
