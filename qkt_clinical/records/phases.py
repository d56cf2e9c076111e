"""``phases.json``: record of the two phases of a transfer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qkt_clinical.catalog import BY_MEANS
from qkt_clinical.config.base import Fraction
from qkt_clinical.records.base import Number, Record, renamed

Curves = tuple[dict[str, float], ...]
"""One row per step: a step's number and losses by name."""


class ScreenedTeacher(Record):
    """Screening result of a fetched teacher on the hospital's own images."""

    site: str
    included: bool
    reason: str
    unverified: tuple[str, ...] = ()
    """Classes that it claims and its network does not support."""
    misnamed: tuple[str, ...] = ()
    """Classes that do not count: its images look unlike the hospital's, and it names these wrongly."""
    recalls: dict[str, Fraction | None] = Field(default_factory=dict)
    """Recall of a shared class on the hospital's own held-out images; None: suppressed."""
    agreement: Annotated[float, Field(ge=-2, le=2)] | None = None
    """With the other experts; None: nothing to compare."""


FAR = 0.1
"""A shift beyond it is told as a warning: within one centre it stays below 0.05."""


class AdaptedTeacher(Record):
    """How far a teacher was brought to the hospital's images."""

    site: str
    shift: Annotated[float, Field(ge=0)] | None
    """Between its images and the hospital's, as its layers see them; None: it has no finite one."""
    share: Fraction
    """Of the statistics measured at the hospital; 0: left as it was sent."""


class Phase1(Record):
    """Phase 1: what the student learned from the relevant teachers."""

    kind: str = "distill"
    curves: Curves = ()
    views: Number
    teacher_passes: Number
    rank: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the teachers' rank that a merged low-rank network keeps."""


class Phase2(Record):
    """Phase 2: refinement of the head, and the operating point."""

    offsets: dict[str, float]
    budget: Fraction
    false_query_rate: Fraction | None
    """Of these images; None where it is suppressed."""
    own_images: Number | str
    """Calibration and training images on which the operating point was set."""
    within_budget: bool = True
    """False where own classes that change places with each other alone cost more than the budget.

    By ``qkt-means`` they do not cost it: then the query is not answered (:attr:`Phases.unanswered`).
    """
    local_model_weight: Annotated[float, Field(gt=0)]
    """Weight of the hospital's own network in the consensus, relative to a teacher's 1."""
    rare: dict[str, str] = Field(default_factory=dict)
    """Rare class to number of training images, as it may be shown."""
    placed_by: tuple[str, ...] = ()
    """Sites whose class means say where the query lies among the features; empty: the consensus alone."""
    encoder_placed_by: tuple[str, ...] = ()
    """The same among the features of a shared encoder; empty: there is none in the student."""
    curves: Curves = ()

    @model_validator(mode="before")
    @classmethod
    def _from_calibration_alone(cls, data: Any) -> Any:
        return renamed(data, {"calibration_images": "own_images"})


RENAMED = {
    "trust": "screening",
    "heard": "included",
    "dismissed": "unverified",
    "given_away": "false_query_rate",
    "own_weight": "local_model_weight",
}
"""Keys of ``qkt-phases/1`` and what they are called since."""
MERGE_KIND = "low-rank-merge"
"""``kind`` of phase 1 by a merged low-rank network."""


class Phases(Record):
    """``phases.json``; reads ``qkt-phases/1`` as well."""

    format: Literal["qkt-phases/2"] = "qkt-phases/2"
    method: str
    adaptation: tuple[AdaptedTeacher, ...] = ()
    """Of the teachers whose layers hold statistics; empty where adaptation was off."""
    screening: tuple[ScreenedTeacher, ...] = ()
    phase1: Phase1 | None = None
    phase2: Phase2

    @property
    def unanswered(self) -> bool:
        """Whether what class means say of the query, and nobody else, was not taken."""
        return self.method == BY_MEANS and not self.phase2.encoder_placed_by

    @model_validator(mode="before")
    @classmethod
    def _from_first_format(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("format") != "qkt-phases/1":
            return data
        found = {
            **renamed(data, RENAMED),
            "format": "qkt-phases/2",
            "phase2": renamed(data.get("phase2"), RENAMED),
        }
        if isinstance(found.get("screening"), list):
            found["screening"] = [renamed(teacher, RENAMED) for teacher in found["screening"]]
        if isinstance(first := found.get("phase1"), Mapping) and first.get("kind") == "transplant":
            found["phase1"] = {**first, "kind": MERGE_KIND}
        return found
