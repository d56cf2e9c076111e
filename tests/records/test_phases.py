"""``phases.json``: written and read by one model, the first format too; it tells nothing of few images."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from qkt_clinical.models.networks import build
from qkt_clinical.qkt.adaptation import AdaptationResult
from qkt_clinical.qkt.steps import Answer, OperatingPoint, Refined
from qkt_clinical.qkt.teacher_screening import ScreeningResult
from qkt_clinical.records.card import DecisionRule
from qkt_clinical.records.phases import Phase1, Phases
from qkt_clinical.stages.transfer import make_record
from qkt_clinical.task import MULTICLASS
from tests.shapes import CLASSES, spec

FIRST: dict[str, Any] = {
    "format": "qkt-phases/1",
    "method": "qkt",
    "trust": [
        {
            "site": "birch",
            "heard": False,
            "reason": "why",
            "dismissed": ["disc"],
            "recalls": {"cross": 0.5, "disc": None},
            "agreement": None,
        }
    ],
    "phase1": {
        "kind": "transplant",
        "curves": [{"layer number": 1.0, "birch": 0.25}],
        "views": 1,
        "teacher_passes": 2,
        "rank": 0.5,
    },
    "phase2": {
        "offsets": {"frame": 1.5},
        "budget": 0.1,
        "given_away": 0.25,
        "calibration_images": "≥5",
        "own_weight": 2.0,
        "rare": {"frame": "<5"},
        "curves": [{"epoch": 0.0, "loss": 1.0}],
    },
}


def test_the_first_format_is_read() -> None:
    found = Phases.model_validate(FIRST)
    assert found.format == "qkt-phases/2"
    (result,) = found.screening
    assert (result.site, result.included, result.unverified) == ("birch", False, ("disc",))
    assert result.recalls == {"cross": 0.5, "disc": None}
    assert found.phase1 is not None
    assert (found.phase1.kind, found.phase1.rank) == ("low-rank-merge", 0.5)
    assert (found.phase2.false_query_rate, found.phase2.local_model_weight) == (0.25, 2.0)
    assert found.phase2.rare == {"frame": "<5"}
    bare = {k: v for k, v in FIRST.items() if k != "trust"} | {"phase1": None}
    assert Phases.model_validate(bare).screening == ()


def test_what_is_written_is_read_again() -> None:
    found = Phases.model_validate(FIRST)
    written = json.dumps(found.model_dump(mode="json"))
    assert "heard" not in written
    assert Phases.model_validate_json(written) == found


@pytest.mark.parametrize(
    "damage",
    [
        {"format": "qkt-phases/3"},
        {"phase2": None},
        {"phase2": []},
        {"trust": [3]},
        {"trust": "all"},
        {"phase1": [1]},
    ],
)
def test_what_is_no_record_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Phases.model_validate(FIRST | damage)


def answer_with(false_queries: int, images: int, named: dict[int, tuple[int, int]]) -> Answer:
    decision = DecisionRule(
        method="qkt",
        local=(0, 1),
        query=(3,),
        rare=(3,),
        offsets=(1.5,),
        budget=0.1,
        own_weight=2.0,
    )
    return Answer(
        teachers=(),
        adaptation=(AdaptationResult("birch", 0.12345, 0.5), AdaptationResult("cedar", math.inf, 0.0)),
        screening=(ScreeningResult("birch", True, "why", (2,), named, 0.123456),),
        phase1=Phase1(kind="low-rank-merge", views=1, teacher_passes=1, rank=0.5),
        refined=Refined(build(spec(), seed=0), ({"epoch": 0.0, "loss": 1.0},), placed_by=("birch",)),
        rare={3: 4},
        operating_point=OperatingPoint(decision, images, false_queries, torch.zeros(images, 1)),
    )


def test_a_record_tells_nothing_of_few_images() -> None:
    labels = np.array([0] * 30 + [1] * 29)
    for false_queries, rate in ((2, None), (0, 0.0), (5, 0.08), (56, None), (59, 1.0)):
        answer = answer_with(false_queries, 59, {0: (29, 30), 1: (20, 29)})
        record = make_record(answer, CLASSES, labels, task=MULTICLASS)
        assert record.phase2.false_query_rate == rate
        assert record.phase2.own_images == 59
        assert record.phase2.rare == {"frame": "<5"}
        assert record.phase2.placed_by == ("birch",)
        assert [(t.shift, t.share) for t in record.adaptation] == [(0.123, 0.5), (None, 0.0)]
        (result,) = record.screening
        assert result.recalls == {"disc": None, "cross": 0.69}, "one of thirty is not told"
        assert (result.unverified, result.agreement) == (("bars",), 0.12)


def test_a_record_of_calibration_images_alone_is_read() -> None:
    answer = answer_with(5, 59, {0: (29, 30), 1: (20, 29)})
    today = make_record(answer, CLASSES, np.array([0] * 30 + [1] * 29), task=MULTICLASS)
    written = today.model_dump(mode="json")
    written["phase2"]["calibration_images"] = written["phase2"].pop("own_images")
    assert Phases.model_validate(written) == today


def test_a_total_that_would_tell_a_part_is_not_told() -> None:
    record = make_record(
        answer_with(0, 33, {1: (3, 3)}), CLASSES, np.array([0] * 30 + [1] * 3), task=MULTICLASS
    )
    assert record.phase2.own_images == "≥5"
    assert record.screening[0].recalls == {"cross": None}
    few = make_record(answer_with(0, 4, {}), CLASSES, np.array([0] * 4), task=MULTICLASS)
    assert (few.phase2.own_images, few.phase2.false_query_rate) == ("<5", None)
