"""The promotion gate: is an answer good enough for a reviewer to let it into use? Pure functions.

Rules judge bounds of intervals, not values: what might be chance does not pass. Nothing is promoted here; the
verdict says what speaks for and against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from qkt_clinical.config import GateParams


class Rule(BaseModel):
    """One rule with the figure that it judged."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    rule: str
    meaning: str
    figure: float | None
    """None where there is no such figure; the rule is not met then."""
    bound: Literal["at least", "at most"]
    threshold: float
    passed: bool


class Verdict(BaseModel):
    """All rules of one answer; it passes if each is met."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal["qkt-gate/1"] = "qkt-gate/1"
    hospital: str
    query: str
    passed: bool
    rules: tuple[Rule, ...]


def _rule(
    name: str, meaning: str, figure: float | None, bound: Literal["at least", "at most"], threshold: float
) -> Rule:
    met = figure is not None and (figure >= threshold if bound == "at least" else figure <= threshold)
    return Rule(rule=name, meaning=meaning, figure=figure, bound=bound, threshold=threshold, passed=met)


def judge(evaluation: Mapping[str, Any], params: GateParams) -> Verdict:
    """Apply the absolute rules to one answer.

    Args:
        evaluation: as in ``reports/evaluation/<hospital>/<query>.json``.
        params: the thresholds.
    """
    asked, after = evaluation["classes"], evaluation["after"]
    lows = [None if (r := after["recall"].get(c)) is None else float(r["low"]) for c in asked]
    known = [low for low in lows if low is not None]
    cases = min((int(evaluation["test_images"].get(c, 0)) for c in asked), default=0)
    rules = (
        _rule(
            "query_recall",
            "recall of every class asked for, lower end of its interval",
            min(known) if len(known) == len(lows) and known else None,
            "at least",
            params.query_recall,
        ),
        _rule(
            "forgetting",
            "retained accuracy lost, upper end of its interval",
            float(evaluation["forgetting"]["high"]),
            "at most",
            params.forgetting,
        ),
        _rule(
            "calibration", "expected calibration error", float(after["ece"]), "at most", params.calibration
        ),
        _rule(
            "query_images",
            "test images of every class asked for",
            float(cases),
            "at least",
            float(params.query_images),
        ),
    )
    return Verdict(
        hospital=evaluation["hospital"],
        query=evaluation["query"],
        passed=all(rule.passed for rule in rules),
        rules=rules,
    )
