"""``policy.yaml``: what may leave a hospital, and whose queries and teachers it accepts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qkt_clinical.config.base import Classes, Name, Names, Strict

# --- params.yaml ---------------------------------------------------------------------------------


PublicKey = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""Ed25519, in hexadecimal."""


class Share(Strict):
    """What a site shares with the federation."""

    teacher: bool = False
    """Its bundle and mask, to the server and through it to hospitals whose queries it may help to answer."""
    statistics: bool = False
    """Class means, which say where its classes lie; without them answers are poorer.

    With the teacher those of its own features and of a shared encoder's, without it these alone.
    """
    metrics: bool = False
    """Figures of its own students, with intervals and without counts."""
    student: bool = False
    """Its own students' bundles."""


class Policy(Strict):
    """``policy.yaml``: what a site shares with a federation, and with whom; everything else is refused."""

    share: Share = Share()
    mask: Literal["all", "query"] = "query"
    """Whether others see the mask of every class, or of those asked for and the asking hospital's own."""
    refuse_classes: Classes = ()
    """Classes about which the site answers nobody."""
    refuse_requesters: Names = ()
    """Hospitals that the site does not answer."""
    queries_per_day: Annotated[int, Field(ge=0)] = 0
    """Queries that the site helps to answer at most within any 24 hours."""
    keys: dict[Name, PublicKey] = Field(default_factory=dict)
    """Sites whose teachers are used only if they are signed, with their Ed25519 public keys."""


POLICY = "policy.yaml"

OPEN_POLICY = """\
# What may leave this hospital for a federation, and whose queries it answers; what is not said is refused.
share:
  teacher: true # its network and what it knows, for other hospitals' queries
  statistics: true # class means with it, with noise; see docs/privacy.md
  metrics: true # figures of its own students, with intervals, without counts
  student: false # its own students
mask: all # all | query: others see only whether we know the classes asked for and the asking hospital's own
refuse_classes: []
refuse_requesters: []
queries_per_day: 1000
keys: {} # hospital: its public key; the teacher of whoever is named is used only if it is signed
"""
"""The policy of generated and simulated hospitals."""
