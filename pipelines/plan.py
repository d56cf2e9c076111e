"""Stage ``plan``: ``python3 -m pipelines.plan [HOSPITAL QUERY]``."""

from pipelines.start import HERE, of_query, start
from qkt_clinical.common.locks import hold_query
from qkt_clinical.config.params import Params
from qkt_clinical.stages.plan import plan_query


def main(params: Params, hospital: str, query: str) -> None:
    """Run the stage in the workspace that is the current folder."""
    with hold_query(HERE, hospital, query):
        plan_query(HERE, hospital, query, params)


if __name__ == "__main__":
    start("plan", of_query, main)
