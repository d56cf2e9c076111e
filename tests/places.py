"""Where the tests find what they do not write themselves."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The repository: params.yaml, dvc.yaml, hospitals/."""

SHARED = ROOT.parent / "shared" / "data"
"""Public data sets beside the repository; tests that need one skip without it."""
