from __future__ import annotations

from pathlib import Path

from qkt_clinical.ingest import reasons

DOCS = Path(__file__).parents[1] / "docs"


def test_every_reason_code_is_explained() -> None:
    text = (DOCS / "ingest.md").read_text()
    rows = [f"| `{code}` | {meaning} | {remedy} |" for code, (meaning, remedy) in reasons.items()]
    assert text[text.index("| --- | --- | --- |\n| `unreadable`") :].splitlines()[1:] == rows
