"""``integrity.json`` of a prepared site: what became of every input file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from pydantic import (
    ConfigDict,
    RootModel,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from qkt_clinical.common.files import write_json
from qkt_clinical.config.base import Strict
from qkt_clinical.errors import PreparedError

INTEGRITY = "integrity.json"


class FileOutcome(Strict):
    """One input file, or one rejected image of a file that holds many."""

    file: str
    """A salted hash of its path, and its ending if it is a known one; empty where no file is to blame."""
    accepted: bool
    code: str | None
    """Why it was rejected, see :data:`qkt_clinical.ingest.codes.REASONS`."""
    kind: str
    """Of the source."""
    item: str | None = None
    """Of the rejected image in its file."""

    @model_validator(mode="after")
    def _rejected_for_a_reason(self) -> FileOutcome:
        if self.accepted != (self.code is None):
            raise ValueError("a rejected file has a code, and no other")
        return self

    @model_serializer(mode="wrap")
    def _without_a_missing_item(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        written: dict[str, object] = handler(self)
        if self.item is None:
            del written["item"]
        return written


class Integrity(RootModel[tuple[FileOutcome, ...]]):
    """``integrity.json``."""

    model_config = ConfigDict(frozen=True)


def rejected_by_code(outcomes: Iterable[FileOutcome]) -> dict[str, int]:
    """Numbers of rejected files and images by their code."""
    return dict(Counter(o.code for o in outcomes if o.code is not None))


def write_integrity(folder: Path, outcomes: Iterable[FileOutcome]) -> None:
    """Write ``integrity.json`` of a prepared site."""
    write_json(folder / INTEGRITY, Integrity(tuple(outcomes)).model_dump(mode="json"))


def read_integrity(folder: Path) -> tuple[FileOutcome, ...]:
    """Read ``integrity.json`` of a prepared site.

    Raises:
        PreparedError: absent or not such a file.
    """
    path = folder / INTEGRITY
    try:
        return Integrity.model_validate_json(path.read_bytes()).root
    except (OSError, ValidationError):
        raise PreparedError(
            "no readable integrity.json",
            remedy="Run 'qkt ingest' for this site.",
            file=path,
            site=folder.name,
        ) from None
