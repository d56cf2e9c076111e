"""Stage ``report``: ``python3 -m pipelines.report``."""

from pipelines.start import HERE, of_all, start
from qkt_clinical.config.params import Params
from qkt_clinical.report import write_figure, write_report


def main(params: Params) -> None:
    """Run the stage in the workspace that is the current folder."""
    write_report(HERE, params)
    write_figure(HERE)


if __name__ == "__main__":
    start("report", of_all, main)
