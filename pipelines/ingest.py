"""Stage ``ingest``: ``python3 -m pipelines.ingest SITE``."""

import sys
from pathlib import Path

from qkt_clinical.common.console import errors_as_lines, progress
from qkt_clinical.common.workers import cores
from qkt_clinical.config.loading import load_params
from qkt_clinical.ingest import ingest_site

HERE = Path()


def main(site: str) -> None:
    """Run the stage in the workspace that is the current folder."""
    with progress(f"ingest {site}") as step:
        ingest_site(HERE, site, load_params(HERE), workers=cores(), progress=step)


if __name__ == "__main__":
    with errors_as_lines("ingest"):
        main(*sys.argv[1:])
