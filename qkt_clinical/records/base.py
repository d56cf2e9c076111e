"""Base of all records: frozen models of finite numbers, and estimates with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Number = Annotated[int, Field(ge=0, le=10**15)]
"""A count; larger values than any of our files can hold are damage."""

SignedFraction = Annotated[float, Field(ge=-1, le=1)]
"""A difference of fractions."""


class Record(BaseModel):
    """A JSON file or a part of one. Unknown keys of later versions are ignored; numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


def renamed(data: Any, names: Mapping[str, str]) -> Any:
    """A part of an older file with today's keys; anything but a mapping as it is.

    Args:
        names: an older key to today's.
    """
    return {names.get(k, k): v for k, v in data.items()} if isinstance(data, Mapping) else data


class Estimate(Record):
    """A figure with its bootstrap interval, which need not contain it."""

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
