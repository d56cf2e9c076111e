from __future__ import annotations

import pytest

from qkt_clinical.counts import shown_count, shown_parts, shown_total, too_few, withhold


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (1, "<5"), (4, "<5"), (5, "5"), (12345, "12,345")])
def test_count(number: int, text: str) -> None:
    assert shown_count(number) == text
    assert too_few(number) == (text == "<5")


@pytest.mark.parametrize(
    ("total", "parts", "shown"),
    [
        (90, (45, 45), 90),
        (90, (45, 42, 3), "≥5"),
        (90, (45, 45, 0), 90),
        (4, (), "<5"),
        (4, (2, 2), "<5"),
        (7, (3, 4), "≥5"),
        (0, (), 0),
    ],
)
def test_a_total_does_not_tell_a_hidden_part(total: int, parts: tuple[int, ...], shown: int | str) -> None:
    assert shown_total(total, parts) == shown


def test_parts_of_a_known_total_do_not_tell_each_other() -> None:
    assert shown_parts({"F": 30, "M": 12}) == {"F": 30, "M": 12}
    assert shown_parts({"F": 30, "M": 3, "X": 9}) == {"F": "≥5", "M": "<5", "X": "≥5"}


def test_figures_of_few_images_are_withheld() -> None:
    figures = {"a": 0.5, "b": 1.0, "c": 0.25, "d": None}
    assert withhold(figures, {"a": 50, "b": 4, "c": 5}) == {"a": 0.5, "b": None, "c": 0.25, "d": None}
