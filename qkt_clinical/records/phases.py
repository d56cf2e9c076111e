"""``phases.json``: what the two phases of a transfer went through."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qkt_clinical.config.base import Fraction
from qkt_clinical.records.base import Number, Record


class Trusted(Record):
    """What the hospital's own images said of a fetched teacher."""

    site: str
    heard: bool
    reason: str
    dismissed: tuple[str, ...] = ()
    """Classes that it claims and is not believed to know."""


class Phase1(Record):
    """What the student took up from the relevant teachers."""

    kind: str = "distill"
    curves: tuple[dict[str, float], ...] = ()
    views: Number
    teacher_passes: Number


class Phase2(Record):
    """Refinement of the head; the operating point."""

    offsets: dict[str, float]
    budget: Fraction
    given_away: Fraction | None
    """Of the calibration images; None where they are too few to tell."""
    calibration_images: Number | str
    own_weight: Annotated[float, Field(gt=0)]
    rare: dict[str, str] = Field(default_factory=dict)
    """Rare class to number of training images, as it may be shown."""
    curves: tuple[dict[str, float], ...] = ()


class Phases(Record):
    """``phases.json``."""

    method: str
    trust: tuple[Trusted, ...] = ()
    phase1: Phase1 | None = None
    phase2: Phase2
