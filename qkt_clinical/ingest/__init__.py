"""Stage ``ingest``: hospital folders to prepared sites, one file per source kind.

Importing this loads no reading library; each reader loads its own when the first file needs it.
"""

from __future__ import annotations

from qkt_clinical.ingest.check import check_file, check_folder
from qkt_clinical.ingest.codes import REASONS
from qkt_clinical.ingest.stage import (
    find_crossings,
    held_back_counts,
    held_back_warnings,
    ingest_site,
    locate,
    warnings_of,
)

reasons = REASONS
"""Reason code to its meaning and remedy."""

__all__ = [
    "check_file",
    "check_folder",
    "find_crossings",
    "held_back_counts",
    "held_back_warnings",
    "ingest_site",
    "locate",
    "reasons",
    "warnings_of",
]
