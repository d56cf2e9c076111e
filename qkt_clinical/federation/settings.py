"""What a machine of the federation knows of itself: ``local/qkt.json`` in its startup kit."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qkt_clinical.config import Strict

FILE = "qkt.json"


class Settings(Strict):
    """``qkt.json``."""

    workspace: Annotated[str, Field(min_length=1, max_length=4096)]
    """Folder with the machine's params.yaml; ``{site}`` stands for its name."""
