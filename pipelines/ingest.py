"""Stage ``ingest``: ``python3 -m pipelines.ingest [SITE]``."""

from pipelines.start import HERE, of_site, start
from qkt_clinical.common.console import progress, tell_warnings
from qkt_clinical.common.workers import cores
from qkt_clinical.config.params import Params
from qkt_clinical.ingest import held_back_counts, held_back_warnings, ingest_site, warnings_of


def main(params: Params, site: str) -> None:
    """Run the stage in the workspace that is the current folder."""
    with progress(f"ingest {site}") as step:
        manifest = ingest_site(HERE, site, params, workers=cores(), progress=step)
    apart = held_back_warnings(held_back_counts(HERE, site))
    tell_warnings("ingest", site, [*warnings_of(manifest, params.ingest.splits.model_dump()), *apart])


if __name__ == "__main__":
    start("ingest", of_site, main)
