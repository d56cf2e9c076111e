"""Settings of a machine of the federation: ``local/qkt.json`` in its startup kit."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qkt_clinical.config.base import NAME, Name, Names, Strict
from qkt_clinical.config.policy import PublicKey

FILE = "qkt.json"


QueryName = Annotated[str, Field(pattern=f"^{NAME.pattern}/{NAME.pattern}$")]
"""``<hospital>/<query>``."""


class NamedInJob(Strict):
    """The sites and queries that a job names."""

    sites: Names
    queries: Annotated[tuple[QueryName, ...], Field(max_length=1000)]


class FederationSettings(Strict):
    """``qkt.json``."""

    workspace: Annotated[str, Field(min_length=1, max_length=4096)]
    """Folder with the machine's params.yaml; ``{site}`` stands for its name."""
    signing_key: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """File with a site's private key, by which it signs its teacher."""
    keys: dict[Name, PublicKey] = Field(default_factory=dict)
    """Of the server: whose teachers are kept only if they are signed."""
