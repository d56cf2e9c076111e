"""``reports/gate/<hospital>/<query>.json``: the rules of the gate, each with its figure."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Bound = Literal["at least", "at most"]


class Record(BaseModel):
    """What is written into files; keys that a later version adds are left out."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Bounds(Record):
    """A figure with its interval, as fractions."""

    value: float
    low: float
    high: float


class Measured(Record):
    """The figures of one version that others are held against."""

    balanced_accuracy: Bounds
    query_recall: dict[str, Bounds | None]
    """Of every class asked for; None where it has no test image, or too few to tell."""
    forgetting: Bounds
    data: str | None
    """Digest of the test images, labels and patients; None where it was not kept."""


class Champion(Record):
    """The version in use, as it was when it was promoted."""

    digest: str
    """Of its bundle."""
    measured: Measured | None
    """None where its figures were not kept."""


class Rule(Record):
    """One rule with the figure that it judged."""

    rule: str
    kind: Literal["absolute", "relative"] = "absolute"
    meaning: str
    figure: float | None
    """None where there is no such figure, or a count too small to be shown."""
    bound: Bound
    threshold: float
    passed: bool
    note: str | None = None
    """In words, what the figure does not say: both figures compared, or why there is none."""

    @property
    def said(self) -> str:
        """The rule with its figure, in words."""
        if self.figure is None:
            words = self.note or "no figure"
        else:
            words = f"{self.figure:.3g}{f' ({self.note})' if self.note else ''}"
        return f"{self.rule}: {words}, must be {self.bound} {self.threshold:g}"


class Verdict(Record):
    """All rules of one answer; it passes if each is met."""

    format: Literal["qkt-gate/1"] = "qkt-gate/1"
    hospital: str
    query: str
    digest: str | None = None
    """Of the bundle that was judged."""
    passed: bool
    rules: tuple[Rule, ...]
    measured: Measured | None = None
    champion: Champion | None = None
    """The version in use that the answer was held against; None where there is none."""

    @property
    def unmet(self) -> tuple[Rule, ...]:
        """Rules that are not met."""
        return tuple(rule for rule in self.rules if not rule.passed)
