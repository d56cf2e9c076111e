"""``query.json`` of a student: the query that it answers."""

from __future__ import annotations

from qkt_clinical.config.base import Name
from qkt_clinical.config.query import QueryConfig


class AskedQuery(QueryConfig):
    """``query.json``: the query file as it was, with who asked and the query's name."""

    hospital: Name
    query: Name

    @property
    def config(self) -> QueryConfig:
        """What the query file said."""
        return QueryConfig.model_validate(self.model_dump(include=set(QueryConfig.model_fields)))
