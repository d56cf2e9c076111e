"""Stage ``gate``: ``python3 -m pipelines.gate``."""

from pipelines.start import HERE, of_all, start
from qkt_clinical.common.console import tell_skipped
from qkt_clinical.config.params import Params
from qkt_clinical.stages.gate import gate_queries


def main(params: Params) -> None:
    """Run the stage in the workspace that is the current folder."""
    gate_queries(HERE, params, skipped=tell_skipped)


if __name__ == "__main__":
    start("gate", of_all, main)
