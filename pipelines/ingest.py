"""Stage ``ingest``: ``python3 -m pipelines.ingest SITE``."""

import sys
from pathlib import Path

from qkt_clinical.common.console import errors_as_lines, progress, tell_warnings
from qkt_clinical.common.workers import cores
from qkt_clinical.config.loading import load_params
from qkt_clinical.ingest import ingest_site, warnings_of

HERE = Path()


def main(site: str) -> None:
    """Run the stage in the workspace that is the current folder."""
    params = load_params(HERE)
    with progress(f"ingest {site}") as step:
        manifest = ingest_site(HERE, site, params, workers=cores(), progress=step)
    tell_warnings("ingest", site, warnings_of(manifest, params.ingest.splits.model_dump()))


if __name__ == "__main__":
    with errors_as_lines("ingest"):
        main(*sys.argv[1:])
