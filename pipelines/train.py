"""Stage ``train``: ``python3 -m pipelines.train SITE``."""

import sys
from pathlib import Path

from qkt_clinical.common.console import errors_as_lines, progress
from qkt_clinical.config.loading import load_params
from qkt_clinical.stages.train import train_site

HERE = Path()


def main(site: str) -> None:
    """Run the stage in the workspace that is the current folder."""
    with progress(f"train {site}") as step:
        train_site(HERE, site, load_params(HERE), progress=step)


if __name__ == "__main__":
    with errors_as_lines("train"):
        main(*sys.argv[1:])
