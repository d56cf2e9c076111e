"""The HTML report of a run and the figure for the README. Reads outputs, never computes a model."""

from __future__ import annotations

from qkt_clinical.report.figure import write_figure
from qkt_clinical.report.write import write_report

__all__ = ["write_figure", "write_report"]
