"""Small-cell suppression: which counts and figures may leave a hospital.

One rule for report pages, model cards, MLflow and everything else that may leave a hospital. A count from
1 to 4 is shown as ``<5``. A figure that rests on so few images is suppressed. A count from which a hidden
one could be computed, such as the total less the other parts, is shown as ``≥5``. Pure functions.

Shares have a rule of their own, since a share and its total reveal the count: 0.034 of 59 images is 2 of
them. A share is suppressed where the count, or the rest of the total, is 1 to 4; all other shares are rounded
to two decimals. Those who know the total can compute only counts of 5 and more from them. Those who do not
know the total cannot compute it either: 0.45 may be 5 of 11, 9 of 20 or 45 of 100, while 0.454545 is 5 of
11. 0 and 1 are the same for every total. A mean of shares would reveal its only suppressed share, and is
therefore suppressed as well.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

SMALLEST_COUNT = 5
"""Counts of images or patients below this are suppressed, except 0: figures of fewer describe persons."""
ENOUGH = f"≥{SMALLEST_COUNT}"
SHOWN_DECIMALS = 2
"""Of shares and means: six decimals would reveal the number of images."""

Figure = TypeVar("Figure")


def too_few(number: int) -> bool:
    """Whether a count of images or patients must be suppressed: 1 to 4."""
    return 0 < number < SMALLEST_COUNT


def shown_count(number: int) -> str:
    """A count of images or patients as a report may show it; 1 to 4 become ``<5``."""
    return f"<{SMALLEST_COUNT}" if too_few(number) else f"{number:,}"


def shown_total(total: int, parts: Iterable[int]) -> int | str:
    """A total for JSON, next to its parts: ``≥5`` where it would reveal a hidden part."""
    if too_few(total):
        return shown_count(total)
    return ENOUGH if any(map(too_few, parts)) else total


def shown_parts(numbers: Mapping[str, int]) -> dict[str, int | str]:
    """The parts of a known total: if one is hidden, the others are shown as ``≥5``."""
    return {name: shown_total(number, numbers.values()) for name, number in numbers.items()}


def suppress(figures: Mapping[str, Figure], images: Mapping[str, int]) -> dict[str, Figure | None]:
    """Figures by name, with None in place of those that rest on 1 to 4 images.

    Args:
        figures: by name, of classes for instance.
        images: how many images each rests on; a name that is absent rests on none.
    """
    return {name: None if too_few(images.get(name, 0)) else figure for name, figure in figures.items()}


def shown_share(count: int, total: int) -> float | None:
    """``count / total`` as a share from which no count of 1 to 4 can be computed.

    Returns:
        The share, rounded to two decimals; None where there is no total, or where the total, the count or
        what is left of the total is 1 to 4.

    Raises:
        ValueError: the count is not from 0 to the total.
    """
    if not 0 <= count <= total:
        raise ValueError(f"{count} of {total} is no share")
    if total == 0 or any(map(too_few, (total, count, total - count))):
        return None
    return round(count / total, SHOWN_DECIMALS)


def shown_figure(value: float) -> float:
    """Two decimals of a figure that is not a share of a shown count, such as a mean of recalls."""
    return round(value, SHOWN_DECIMALS)


def shown_bounds(low: float, high: float) -> tuple[float, float]:
    """The bounds of an interval rounded outward to two decimals, so that it contains the exact one."""
    scale = 10**SHOWN_DECIMALS
    # Rounded first: 0.94 times 100 is a little less than 94.
    return math.floor(round(low * scale, 6)) / scale, math.ceil(round(high * scale, 6)) / scale


def hide_a_second(hidden: Collection[str], parts: Collection[str], images: Mapping[str, int]) -> set[str]:
    """Parts of a shown mean to suppress: a single hidden part could be computed from the others.

    Args:
        hidden: parts that are suppressed for their own counts.
        parts: of the mean.
        images: number of images of each part; the one with the fewest of the others is hidden too.
    """
    found = {part for part in parts if part in hidden}
    others = sorted((images.get(part, 0), part) for part in parts if part not in found)
    return found | {part for _, part in others[:1]} if len(found) == 1 else found
