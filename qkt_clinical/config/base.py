"""Base of all configuration models: strict parsing and checked names."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")

Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _shows(value: str) -> str:
    if not value.isprintable() or value != value.strip():
        raise ValueError("must be text that shows, without blanks at its ends")
    return value


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"names {', '.join(twice[:5])} twice")
    return names


ClassName = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_shows)]
"""Of a class in the federation's label space: text on one line, without control characters."""

MAX_CLASSES = 1000

Classes = Annotated[tuple[ClassName, ...], Field(max_length=MAX_CLASSES), AfterValidator(_each_once)]

Names = Annotated[tuple[Name, ...], Field(max_length=1000), AfterValidator(_each_once)]
"""Of sites, each once."""


class Strict(BaseModel):
    """A frozen model that refuses unknown keys, and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
