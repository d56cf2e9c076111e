"""Stage ``transfer``: ``python3 -m pipelines.transfer [HOSPITAL QUERY]``."""

from pipelines.start import HERE, of_query, start
from qkt_clinical.common.console import progress
from qkt_clinical.common.locks import hold_query
from qkt_clinical.config.params import Params
from qkt_clinical.stages.transfer import transfer_query


def main(params: Params, hospital: str, query: str) -> None:
    """Run the stage in the workspace that is the current folder."""
    with hold_query(HERE, hospital, query), progress(f"transfer {hospital}/{query}") as step:
        transfer_query(HERE, hospital, query, params, progress=step)


if __name__ == "__main__":
    start("transfer", of_query, main)
