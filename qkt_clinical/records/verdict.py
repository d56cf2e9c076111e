"""``reports/gate/<hospital>/<query>.json``: the rules of the gate, each with its figure."""

from __future__ import annotations

from typing import Literal

from qkt_clinical.records.base import Difference, Proportion, Record

Bound = Literal["at least", "at most"]


class Measured(Record):
    """The figures of one version with which others are compared."""

    balanced_accuracy: Proportion | None
    """None where it is suppressed."""
    query_recall: dict[str, Proportion | None]
    """Of every class asked for; None where it has no test image, or too few to show a figure."""
    forgetting: Difference | None
    """None where it is suppressed."""
    data: str | None
    """Digest of the test images, labels and patients; None where it was not kept."""


class Champion(Record):
    """The version in use, as it was when it was promoted."""

    digest: str
    """Of its bundle."""
    measured: Measured | None
    """None where its figures were not kept."""


class GateRule(Record):
    """One rule with the figure that it judged."""

    rule: str
    kind: Literal["absolute", "relative"] = "absolute"
    meaning: str
    figure: float | None
    """None where there is no such figure, or the count is suppressed."""
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
    rules: tuple[GateRule, ...]
    measured: Measured | None = None
    champion: Champion | None = None
    """The version in use that the answer was held against; None where there is none."""

    @property
    def unmet(self) -> tuple[GateRule, ...]:
        """Rules that are not met."""
        return tuple(rule for rule in self.rules if not rule.passed)
