"""Small counts: what may be told of numbers of images and patients, and of what rests on few.

One rule for pages, model cards, MLflow and whatever else may leave a hospital: a number from 1 to 4 is told
as ``<5``; a figure that rests on so few images is not told; and a number from which a hidden one could be
reckoned, as the total less the other parts, is told as ``≥5``. Pure functions.

Shares have a rule of their own, for a share and its total tell the count: 0.034 of 59 images is 2 of them.
A share is not told where the count, or what is left of the total, is 1 to 4; all others are rounded to two
decimals. Whoever knows the total reckons only counts of 5 and more from them. Whoever does not know it cannot
reckon it either: 0.45 may be 5 of 11, 9 of 20 or 45 of 100, while 0.454545 is 5 of 11. 0 and 1 say the same
of every total. A mean of shares of which one is not told would tell that one, and is not told either.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

SMALLEST_COUNT = 5
"""Numbers of images or patients below this are not told, except 0; of fewer, a figure speaks of persons."""
ENOUGH = f"≥{SMALLEST_COUNT}"
SHOWN_DECIMALS = 2
"""Of shares and means: six would betray the number of images that they rest on."""

Figure = TypeVar("Figure")


def too_few(number: int) -> bool:
    """Whether a number of images or patients may not be told: 1 to 4."""
    return 0 < number < SMALLEST_COUNT


def shown_count(number: int) -> str:
    """A number of images or patients as a report may show it; 1 to 4 become ``<5``."""
    return f"<{SMALLEST_COUNT}" if too_few(number) else f"{number:,}"


def shown_total(total: int, parts: Iterable[int]) -> int | str:
    """A total as JSON may hold it beside its parts: ``≥5`` where it would tell a hidden part."""
    if too_few(total):
        return shown_count(total)
    return ENOUGH if any(map(too_few, parts)) else total


def shown_parts(numbers: Mapping[str, int]) -> dict[str, int | str]:
    """The parts of a total that is known: with one hidden, the others are told as ``≥5``."""
    return {name: shown_total(number, numbers.values()) for name, number in numbers.items()}


def suppress(figures: Mapping[str, Figure], images: Mapping[str, int]) -> dict[str, Figure | None]:
    """Figures as they may be told: None for what rests on 1 to 4 images.

    Args:
        figures: by name, of classes for instance.
        images: how many images each rests on; a name that is absent rests on none.
    """
    return {name: None if too_few(images.get(name, 0)) else figure for name, figure in figures.items()}


def shown_share(count: int, total: int) -> float | None:
    """``count`` of ``total`` images or patients as a share from which no number of 1 to 4 can be reckoned.

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
    """A figure that is no share of a told number, as a mean of recalls or an error: to two decimals."""
    return round(value, SHOWN_DECIMALS)


def shown_bounds(low: float, high: float) -> tuple[float, float]:
    """The ends of an interval, to two decimals outward: what is told holds what was found."""
    scale = 10**SHOWN_DECIMALS
    # Rounded first: 0.94 times 100 is a little less than 94.
    return math.floor(round(low * scale, 6)) / scale, math.ceil(round(high * scale, 6)) / scale


def hide_a_second(hidden: Collection[str], parts: Collection[str], images: Mapping[str, int]) -> set[str]:
    """Which parts of a mean that is told are not told: a single hidden one could be reckoned from the rest.

    Args:
        hidden: those that may not be told for themselves.
        parts: of the mean.
        images: how many images each rests on; of the others the one of the fewest is hidden too.
    """
    found = {part for part in parts if part in hidden}
    others = sorted((images.get(part, 0), part) for part in parts if part not in found)
    return found | {part for _, part in others[:1]} if len(found) == 1 else found
