"""Stage ``mask``: ``python3 -m pipelines.mask [SITE]``."""

from pipelines.start import HERE, of_site, start
from qkt_clinical.config.params import Params
from qkt_clinical.stages.mask import mask_site


def main(params: Params, site: str) -> None:
    """Run the stage in the workspace that is the current folder."""
    mask_site(HERE, site, params)


if __name__ == "__main__":
    start("mask", of_site, main)
