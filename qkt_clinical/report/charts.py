"""Numbers and text ready for drawing: formats, and points of line charts. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qkt_clinical.common.wording import figure, percent


@dataclass(frozen=True)
class Line:
    """One series of a line chart; ``path`` holds points in a square of 100 by 100, y downwards."""

    name: str
    path: str
    first: str
    last: str


@dataclass(frozen=True)
class LineChart:
    """Lines on common axes with the texts at the axes' ends."""

    title: str
    lines: tuple[Line, ...]
    top: str
    bottom: str
    left: str
    right: str

    @property
    def words(self) -> str:
        """Text alternative of the chart."""
        return "; ".join(f"{line.name} from {line.first} to {line.last}" for line in self.lines)


def line_chart(
    title: str,
    rows: Sequence[Mapping[str, float]],
    names: Sequence[str] | None = None,
    axis: str = "epoch",
) -> LineChart | None:
    """A chart of the columns ``names`` (None: all) over ``axis``; None if there is nothing to draw."""
    rows = [row for row in rows if axis in row]
    if names is None:
        names = sorted({key for row in rows for key in row} - {axis})
    columns = {n: [(row[axis], row[n]) for row in rows if n in row] for n in names}
    columns = {n: pairs for n, pairs in columns.items() if pairs}
    if not columns:
        return None
    epochs = [e for pairs in columns.values() for e, _ in pairs]
    values = [v for pairs in columns.values() for _, v in pairs]
    left, right, bottom, top = min(epochs), max(epochs), min(0.0, *values), max(values)

    def place(epoch: float, value: float) -> str:
        x = 100 * (epoch - left) / ((right - left) or 1.0)
        y = 100 - 100 * (value - bottom) / ((top - bottom) or 1.0)
        return f"{x:.2f},{y:.2f}"

    lines = tuple(
        Line(name, " ".join(place(*pair) for pair in pairs), figure(pairs[0][1]), figure(pairs[-1][1]))
        for name, pairs in columns.items()
    )
    return LineChart(title, lines, figure(top), figure(bottom), f"{axis} {left:.0f}", f"{axis} {right:.0f}")


@dataclass(frozen=True)
class Curve:
    """One model's reliability; points (x, y) in a square of 100 by 100, y downwards."""

    name: str
    points: tuple[tuple[float, float], ...]
    words: str


def reliability_curve(name: str, bins: Sequence[tuple[float, float]]) -> Curve:
    """The curve of (confidence, accuracy) per bin."""
    return Curve(
        name,
        tuple((100 * confidence, 100 - 100 * accuracy) for confidence, accuracy in bins),
        f"{name}: " + ", ".join(f"sure of {percent(c, 0)}, right in {percent(a, 0)}" for c, a in bins),
    )
