"""Reading and writing records: any damaged or foreign file ends in one typed error."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from qkt_clinical.common.files import write_json
from qkt_clinical.errors import OutputsError
from qkt_clinical.records.card import MAX_JSON_BYTES

MAX_RECORD_BYTES = 16 * MAX_JSON_BYTES
"""Bytes; an evaluation names every image that flipped."""
MAX_PLACE = 80
"""Characters of a place in a file that an error names: keys are the file's own."""
REMEDY = "Run 'dvc repro' to make it again."

Kind = TypeVar("Kind", bound=BaseModel)


def _place(error: ValidationError) -> str:
    """Where the first fault is and what it is, without the value."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"])) or "content"
    shown = "".join(c if c.isprintable() else "?" for c in place[:MAX_PLACE])
    return f"{shown}: {first['msg']}"


def parse_record(kind: type[Kind], data: bytes | str) -> Kind:
    """A record from JSON text.

    Raises:
        ValueError: it is none; the message says where and why, without the value.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise ValueError(_place(error)) from None


def read_record(
    kind: type[Kind],
    path: Path,
    *,
    site: str | None = None,
    stage: str | None = None,
    what: str | None = None,
    remedy: str = REMEDY,
) -> Kind:
    """A record from its file.

    Args:
        kind: the model of the file.
        path: of the file.
        site, stage, remedy: of the error.
        what: of the error, said before the fault itself.

    Raises:
        OutputsError: no plain file, larger than :data:`MAX_RECORD_BYTES`, or not such a record.
    """
    try:
        if not path.is_file():
            raise ValueError("no such file")
        with path.open("rb") as stream:
            data = stream.read(MAX_RECORD_BYTES + 1)
        if len(data) > MAX_RECORD_BYTES:
            raise ValueError(f"larger than {MAX_RECORD_BYTES:,} bytes")
        return parse_record(kind, data)
    except OSError:
        fault = "cannot be read"
    except ValueError as error:
        fault = str(error)
    said = fault if what is None else f"{what}: {fault}"
    raise OutputsError(said, remedy=remedy, file=path, site=site, stage=stage)


def write_record(path: Path, record: BaseModel) -> None:
    """Write a record as stable JSON, in one step."""
    write_json(path, record.model_dump(mode="json"))
