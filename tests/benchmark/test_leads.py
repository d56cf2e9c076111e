"""Leads of one method above another, by hand."""

from __future__ import annotations

import pytest

from benchmarks.leads import leads


def row(seed: int, student: str, query: str, method: str, balanced: float) -> dict[str, object]:
    return {"seed": seed, "student": student, "query": query, "method": method, "balanced_accuracy": balanced}


def test_leads_are_paired_by_question_by_hand() -> None:
    first = [
        row(0, "h1", "a", "qkt", 0.9),
        row(0, "h2", "a", "qkt", 0.8),
        row(1, "h1", "a", "qkt", 0.7),
        row(1, "h2", "b", "qkt", 0.1),  # the other has no such answer
    ]
    other = [
        row(1, "h1", "a", "local", 0.75),
        row(0, "h2", "a", "local", 0.6),
        row(0, "h1", "a", "local", 0.8),
    ]
    (found,) = leads(first + other, [("qkt", "local")])
    # 10, 20 and -5 points; a draw of three hospitals may take one of them thrice.
    assert found == {
        "method": "qkt",
        "above": "local",
        "points": "8.3 (-5.0 to 20.0)",
        "questions": 3,
        "below": 1,
        "worst": "-5.0",
    }
    with pytest.raises(KeyError):
        list(leads(first, [("qkt", "local")]))
