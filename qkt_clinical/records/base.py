"""What all records have in common: frozen models of finite numbers, and figures with their intervals."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Number = Annotated[int, Field(ge=0, le=10**15)]
"""How many; more than any file of ours can mean is damage."""

SignedFraction = Annotated[float, Field(ge=-1, le=1)]
"""A difference of fractions."""


class Record(BaseModel):
    """A JSON file or a part of one. Keys that a later version adds are left out; numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Estimate(Record):
    """A figure with its bootstrap interval, which need not hold it."""

    value: float
    low: float
    high: float

    @model_validator(mode="after")
    def _in_order(self) -> Estimate:
        if self.low > self.high:
            raise ValueError("an interval whose lower end is the higher one")
        return self


def _between(estimate: Estimate, least: float) -> Estimate:
    for number in (estimate.value, estimate.low, estimate.high):
        if not least <= number <= 1:
            raise ValueError(f"{number:g} is not between {least:g} and 1")
    return estimate


def _proportion(estimate: Estimate) -> Estimate:
    return _between(estimate, 0)


def _difference(estimate: Estimate) -> Estimate:
    return _between(estimate, -1)


Proportion = Annotated[Estimate, AfterValidator(_proportion)]
"""A fraction with its interval."""

Difference = Annotated[Estimate, AfterValidator(_difference)]
"""A difference of fractions with its interval."""
