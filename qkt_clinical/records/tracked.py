"""``reports/track.json``: what the workspace's outputs are in MLflow."""

from __future__ import annotations

from qkt_clinical.config.base import Sha256
from qkt_clinical.records.base import Record


class Tracked(Record):
    """Digests by name: a run's of everything that it shows, a model's of its folder.

    Numbers of runs and versions are MLflow's and are not told: a rebuilt MLflow counts anew.
    """

    format: str = "qkt-track/1"
    runs: dict[str, Sha256]
    models: dict[str, Sha256]
