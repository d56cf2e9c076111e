"""Query jobs: a hospital asks, and its own machine answers with teachers from the registry."""

from __future__ import annotations

from qkt_clinical.jobs.new import new_query
from qkt_clinical.jobs.run import preview, resume, run, work
from qkt_clinical.jobs.state import Board, Job

__all__ = ["Board", "Job", "new_query", "preview", "resume", "run", "work"]
