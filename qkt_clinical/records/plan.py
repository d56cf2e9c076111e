"""``plan.json``: which teachers a query takes, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from qkt_clinical.catalog import BY_MEANS, ENCODED_METHODS, Method
from qkt_clinical.common.files import read_plain
from qkt_clinical.config.base import Classes, ClassName, Name, Sha256, Strict
from qkt_clinical.config.params import EncoderFile
from qkt_clinical.config.query import QueryConfig
from qkt_clinical.data.prepared import Manifest
from qkt_clinical.errors import QueryError
from qkt_clinical.records.card import CARD, MASK, MAX_JSON_BYTES, MEANS, WEIGHTS, Card, Mask, SharedEncoder

Count = Annotated[int, Field(ge=0)]

SHARED = (CARD, WEIGHTS, MASK)
"""The files of a teacher bundle that leave its site: no metrics, no curves.

Where it has class means over a shared encoder, these too: see :func:`shared_files`.
"""


def shared_files(card: Card) -> tuple[str, ...]:
    """All files of a teacher bundle that leave its site."""
    if card.network_kept:
        return CARD, MASK, MEANS
    return SHARED if card.encoder_means is None else (*SHARED, MEANS)


def moved_files(card: Card, method: Method) -> tuple[str, ...]:
    """Those of them that a query moves: what its method does not take stays where it is."""
    means = (MEANS,) if card.encoder_means is not None and method in ENCODED_METHODS else ()
    return (CARD, MASK, *means) if method == BY_MEANS else (*SHARED, *means)


@dataclass(frozen=True)
class Offer:
    """Description of a teacher for planning: its card and mask, without weights."""

    card: Card
    mask: Mask
    described: int
    """Bytes of both."""
    digest: str
    """SHA-256 of the card, which contains that of the weights."""

    def bytes_moved(self, method: Method) -> int:
        """Bytes of :func:`moved_files`."""
        files = moved_files(self.card, method)
        weights = self.card.weights.bytes if WEIGHTS in files else 0
        means = self.card.encoder_means
        return self.described + weights + (means.bytes if means is not None and MEANS in files else 0)


class Candidate(Strict):
    """One teacher as the plan sees it."""

    site: Name
    relevant: bool
    reason: str
    teaches: Classes
    """Query classes that it knows."""
    rivals: Classes
    """Classes of the hospital's own that it knows."""
    known: Classes
    scores: dict[ClassName, float]
    """Mask score per query class."""
    threshold: float
    bytes: Count
    digest: Sha256
    image_shift: Annotated[float, Field(ge=0)] | None = None
    """Between its training images and the hospital's; None where a card does not say what they look like."""


class Plan(Strict):
    """``plan.json``."""

    format: Literal["qkt-plan/1", "qkt-plan/2"] = "qkt-plan/2"
    """The first has no ``image_shift``."""
    hospital: Name
    query: Name
    classes: Classes
    method: Method
    budget: float
    local: Classes
    teachers: Annotated[tuple[Candidate, ...], Field(max_length=1000)]
    uncovered: Classes
    bytes_moved: Count

    @model_validator(mode="after")
    def _each_teacher_once(self) -> Plan:
        if len({t.site for t in self.teachers}) != len(self.teachers):
            raise ValueError("a teacher is named twice")
        return self

    @property
    def relevant(self) -> tuple[str, ...]:
        """Sites whose bundles are fetched."""
        return tuple(t.site for t in self.teachers if t.relevant)


class Asking(Strict):
    """Description of the asking hospital for planning; no numbers of images."""

    classes: Classes
    """The federation's label space."""
    held: Classes
    """Classes of which it has training images."""
    shape: Annotated[tuple[int, ...], Field(max_length=4)]
    normalisation: Literal["unit", "zscore"]
    shared_encoder: SharedEncoder | None = None
    """That it has, for methods by class means over one."""
    encoders: tuple[Sha256, ...] = ()
    """Digests of all encoders that it has: some teachers are sent without theirs."""

    @classmethod
    def of(
        cls, manifest: Manifest, shared: EncoderFile | None = None, start: EncoderFile | None = None
    ) -> Asking:
        """The hospital whose prepared data these are.

        Args:
            shared: the encoder that it has in common with others, by ``params.yaml``.
            start: that with which its own network started.
        """
        return cls(
            classes=manifest.classes,
            held=tuple(manifest.counts["train"]),
            shape=manifest.shape,
            normalisation=manifest.normalisation,
            shared_encoder=SharedEncoder.of(shared),
            encoders=tuple(sorted({file.digest for file in (shared, start) if file})),
        )

    def local(self, query: QueryConfig) -> tuple[str, ...]:
        """The hospital's own classes beside the query."""
        return tuple(c for c in self.held if c not in query.classes)


def read_plan(folder: Path) -> Plan:
    """Read ``plan.json``.

    Raises:
        QueryError: absent or not a plan.
    """
    try:
        return Plan.model_validate_json(read_plain(folder / "plan.json", MAX_JSON_BYTES))
    except (OSError, ValidationError):
        raise QueryError(
            "no readable plan", remedy="Run 'qkt plan' for this query first.", file=folder, code="no-plan"
        ) from None
