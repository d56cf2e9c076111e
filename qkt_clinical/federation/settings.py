"""What a machine of the federation knows of itself: ``local/qkt.json`` in its startup kit."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qkt_clinical.config import Name, PublicKey, Strict
from qkt_clinical.errors import QktError

FILE = "qkt.json"


class Settings(Strict):
    """``qkt.json``."""

    workspace: Annotated[str, Field(min_length=1, max_length=4096)]
    """Folder with the machine's params.yaml; ``{site}`` stands for its name."""
    signing_key: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """File with a site's private key, by which it signs its teacher."""
    keys: dict[Name, PublicKey] = Field(default_factory=dict)
    """Of the server: whose teachers are kept only if they are signed."""


def require_flare() -> None:
    """Do nothing where NVIDIA FLARE is installed.

    Raises:
        QktError: it is not, code ``flare-missing``.
    """
    from importlib.util import find_spec

    if find_spec("nvflare") is None:
        raise QktError(
            "NVIDIA FLARE is not installed, which federations and federated methods need",
            remedy="Install it with pip install 'qkt-clinical[federation]', or leave such methods out.",
            code="flare-missing",
        )
