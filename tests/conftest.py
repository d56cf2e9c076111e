"""Settings and small fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from tests.places import ROOT

# The same examples every time, and no database of failures beside the sources.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None, max_examples=60)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder with params.yaml, dvc.yaml and hospitals/."""
    return ROOT
