"""What became of a site's input files."""

from __future__ import annotations

from pathlib import Path

import pytest

from qkt_clinical.data.integrity import (
    INTEGRITY,
    FileOutcome,
    read_integrity,
    rejected_by_code,
    write_integrity,
)
from qkt_clinical.errors import PreparedError

TAKEN = FileOutcome(file="a.dcm", accepted=True, code=None, kind="dicom")
REJECTED = FileOutcome(file="b.dcm", accepted=False, code="unreadable", kind="dicom")
IMAGE = FileOutcome(file="c.npz", accepted=False, code="duplicate", kind="npz", item="7")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_integrity(tmp_path, [TAKEN, REJECTED, IMAGE])
    assert read_integrity(tmp_path) == (TAKEN, REJECTED, IMAGE)
    text = (tmp_path / INTEGRITY).read_text()
    assert text.count('"item"') == 1, "only images of files that hold many have one"
    assert text.count('"code"') == 3


def test_numbers_by_code() -> None:
    assert rejected_by_code([TAKEN, REJECTED, IMAGE, REJECTED]) == {"unreadable": 2, "duplicate": 1}


@pytest.mark.parametrize(
    "text",
    [
        '[{"file": "a", "accepted": false, "code": null, "kind": "dicom"}]',
        '[{"file": "a", "accepted": true, "code": "duplicate", "kind": "dicom"}]',
        '[{"file": "a", "accepted": true}]',
        "{}",
        None,
    ],
)
def test_other_content_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / INTEGRITY).write_text(text)
    with pytest.raises(PreparedError):
        read_integrity(tmp_path)
