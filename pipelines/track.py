"""Stage ``track``: ``python3 -m pipelines.track``."""

from pipelines.start import HERE, of_all, start
from qkt_clinical.config.params import Params
from qkt_clinical.tracking.mirror import track


def main(params: Params) -> None:
    """Run the stage in the workspace that is the current folder."""
    track(HERE, params)


if __name__ == "__main__":
    start("track", of_all, main)
