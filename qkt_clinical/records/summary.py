"""``reports/queries.json``: one row for every query that was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from qkt_clinical.errors import ConfigError, OutputsError


class Headline(BaseModel):
    """What is said first of a model: shares of test images, 0..1."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    query_accuracy: float
    retained_accuracy: float
    balanced_accuracy: float


class Row(BaseModel):
    """One query: who asked, who answered, and how good its model was before and after."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    hospital: str
    query: str
    classes: tuple[str, ...]
    method: str
    teachers: tuple[str, ...]
    bytes_moved: int
    before: Headline
    after: Headline


ROWS: TypeAdapter[list[Row]] = TypeAdapter(list[Row])


def rows_of(values: Any) -> list[Row]:
    """Rows as ``evaluate_queries`` returns them."""
    return ROWS.validate_python(values)


def read_rows(path: Path) -> list[Row]:
    """Read ``reports/queries.json``.

    Raises:
        ConfigError: there is none yet.
        OutputsError: it is not what the stage ``evaluate`` writes.
    """
    try:
        return ROWS.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError("no results yet", remedy="Run 'dvc repro' or 'qkt evaluate'.", file=path) from None
    except (OSError, ValidationError):
        raise OutputsError(
            "not what the stage evaluate writes", remedy="Run 'dvc repro' to make it again.", file=path
        ) from None
