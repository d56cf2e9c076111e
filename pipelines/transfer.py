"""Stage ``transfer``: ``python3 -m pipelines.transfer HOSPITAL QUERY``."""

import sys
from pathlib import Path

from qkt_clinical.common.console import errors_as_lines, progress
from qkt_clinical.common.locks import hold_query
from qkt_clinical.config.loading import load_params
from qkt_clinical.stages.transfer import transfer_query

HERE = Path()


def main(hospital: str, query: str) -> None:
    """Run the stage in the workspace that is the current folder."""
    with hold_query(HERE, hospital, query), progress(f"transfer {hospital}/{query}") as step:
        transfer_query(HERE, hospital, query, load_params(HERE), progress=step)


if __name__ == "__main__":
    with errors_as_lines("transfer"):
        main(*sys.argv[1:])
