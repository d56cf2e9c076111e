"""What the scripts of this folder share: rows and their printing."""

from __future__ import annotations

from collections.abc import Sequence

Row = dict[str, str | int | float]


def markdown(rows: Sequence[Row]) -> str:
    """A table; figures with three digits."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    for row in rows:
        cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
