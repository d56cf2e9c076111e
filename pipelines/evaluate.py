"""Stage ``evaluate``: ``python3 -m pipelines.evaluate``."""

import sys
from pathlib import Path

from qkt_clinical.common.console import errors_as_lines, tell_skipped
from qkt_clinical.config.loading import load_params
from qkt_clinical.stages.evaluate import evaluate_queries

HERE = Path()


def main() -> None:
    """Run the stage in the workspace that is the current folder."""
    evaluate_queries(HERE, load_params(HERE), skipped=tell_skipped)


if __name__ == "__main__":
    with errors_as_lines("evaluate"):
        main(*sys.argv[1:])
