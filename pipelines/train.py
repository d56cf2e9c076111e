"""Stage ``train``: ``python3 -m pipelines.train [SITE]``."""

from pipelines.start import HERE, of_site, start
from qkt_clinical.common.console import progress
from qkt_clinical.config.params import Params
from qkt_clinical.stages.train import train_site
from qkt_clinical.training.processes import begin_processes


def main(params: Params, site: str) -> None:
    """Run the stage in the workspace that is the current folder."""
    together = begin_processes(params.train.processes, ("pipelines.train", site), params.device)
    with together, progress(f"train {site}") as step:
        train_site(HERE, site, params, progress=step)


if __name__ == "__main__":
    start("train", of_site, main)
