"""Query files, and how a query is named."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qkt_clinical.catalog import DEFAULT_BUDGET, DEFAULT_METHOD, Method
from qkt_clinical.config.base import Classes, Name, Names, Strict

# --- hospitals/<site>/queries/<query>.yaml --------------------------------------------------------


class QueryConfig(Strict):
    """What a hospital asks: ``hospitals/<site>/queries/<query>.yaml``."""

    classes: Classes = Field(min_length=1)
    """Classes to learn, in the federation's label space."""
    method: Method = DEFAULT_METHOD
    budget: Annotated[float, Field(gt=0.0, le=0.5)] = DEFAULT_BUDGET
    """Largest false-query rate: the share of own images that may be taken for the query."""
    max_teachers: Annotated[int, Field(ge=1, le=64)] | None = None
    exclude_teachers: Names = ()


class QueryRef(Strict):
    """A query that the pipeline answers: ``hospitals/<hospital>/queries/<query>.yaml``."""

    hospital: Name
    query: Name
