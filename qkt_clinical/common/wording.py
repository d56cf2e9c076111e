"""Numbers in words, as reports, model cards and MLflow show them."""

from __future__ import annotations

from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage, such as ``93.8%``."""
    return f"{100 * value:.{digits}f}%"


def percents(low: float, high: float) -> str:
    """An interval of shares, such as ``90–97``, clipped to 0 and 100."""
    return f"{100 * max(low, 0.0):.0f}–{100 * min(high, 1.0):.0f}"


def points(value: float) -> str:
    """A difference of shares in percentage points with its sign, such as ``+3.1`` or ``−0.4``."""
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", MINUS)


def size(number: int) -> str:
    """A number of bytes in decimal units, such as ``1.2 MB``."""
    value, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.95:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def words(names: Sequence[str], last: str = "and") -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {last} {names[-1]}"


def figure(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}".replace("-", MINUS)


IMAGES_FROM = {
    "own": "on the hospital’s own images",
    "others": "on other hospitals’ images, whose scanner and stain may give them away",
}
"""Whose images of the query figures rest on, in words."""
