"""Stage ``plan``: ``python3 -m pipelines.plan HOSPITAL QUERY``."""

import sys
from pathlib import Path

from qkt_clinical.common.console import errors_as_lines
from qkt_clinical.common.locks import hold_query
from qkt_clinical.config.loading import load_params
from qkt_clinical.stages.plan import plan_query

HERE = Path()


def main(hospital: str, query: str) -> None:
    """Run the stage in the workspace that is the current folder."""
    with hold_query(HERE, hospital, query):
        plan_query(HERE, hospital, query, load_params(HERE))


if __name__ == "__main__":
    with errors_as_lines("plan"):
        main(*sys.argv[1:])
