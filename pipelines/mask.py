"""Stage ``mask``: ``python3 -m pipelines.mask SITE``."""

import sys
from pathlib import Path

from qkt_clinical.common.console import errors_as_lines
from qkt_clinical.config.loading import load_params
from qkt_clinical.stages.mask import mask_site

HERE = Path()


def main(site: str) -> None:
    """Run the stage in the workspace that is the current folder."""
    mask_site(HERE, site, load_params(HERE))


if __name__ == "__main__":
    with errors_as_lines("mask"):
        main(*sys.argv[1:])
