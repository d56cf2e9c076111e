"""What may leave a hospital: nothing from which a number of 1 to 4 images can be reckoned."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkt_clinical.common.disclosure import hide_a_second, shown_bounds, shown_count, shown_figure, too_few
from qkt_clinical.records.evaluation import Evaluation, OperatingPointResult, OthersFigures
from qkt_clinical.records.outputs import read_outputs
from qkt_clinical.records.published import PublishedEvaluation, published, published_metrics
from qkt_clinical.records.summary import QuerySummary
from qkt_clinical.records.training import TeacherMetrics
from tests.sample_run import sample_params, write_sample_run

NAMES = ("a", "b", "c", "d")


def estimate(value: float) -> dict[str, float]:
    return {"value": round(value, 6), "low": round(max(value - 0.05, 0), 6), "high": min(value + 0.05, 1)}


def scores(rows: list[list[int]]) -> dict[str, Any]:
    """Of a confusion matrix; ``d`` is asked for."""
    recall = [row[i] / sum(row) for i, row in enumerate(rows)]
    columns = [sum(column) for column in zip(*rows, strict=True)]
    named = dict(zip(NAMES, recall, strict=True))
    return {
        "query_accuracy": estimate(recall[3]),
        "retained_accuracy": estimate(sum(recall[:3]) / 3),
        "balanced_accuracy": estimate(sum(recall) / 4),
        "ece": estimate(0.1234567),
        "recall": {c: estimate(r) for c, r in named.items()},
        "precision": {
            c: estimate(rows[i][i] / columns[i]) if columns[i] else None for i, c in enumerate(NAMES)
        },
        "class_auroc": {c: estimate(r) for c, r in named.items()},
        "class_auprc": {c: estimate(r) for c, r in named.items()},
        "confusion": rows,
    }


def measured(before: list[list[int]], after: list[list[int]]) -> Evaluation:
    first, second = scores(before), scores(after)
    images = {c: sum(row) for c, row in zip(NAMES, before, strict=True)}

    def change(name: str, sign: int = 1) -> dict[str, float]:
        value = sign * (second[name]["value"] - first[name]["value"])
        return {"value": value, "low": max(value - 0.05, -1), "high": min(value + 0.05, 1)}

    return Evaluation.model_validate(
        {
            "hospital": "h",
            "query": "q",
            "classes": ["d"],
            "method": "qkt",
            "teachers": [],
            "bytes_moved": 0,
            "budget": 0.05,
            "relevant": NAMES,
            "local": NAMES[:3],
            "test_images": images,
            "passes_per_prediction": 1,
            "before": first,
            "after": second,
            "gain": change("balanced_accuracy"),
            "query_gain": change("query_accuracy"),
            "forgetting": change("retained_accuracy", -1),
            "gain_p": 0.0312501,
            "class_forgetting": {c: dict.fromkeys(("value", "low", "high"), 0.0) for c in NAMES},
        }
    )


def numbers(value: Any) -> Iterator[float]:
    """Every number that is no whole one, at any depth."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, float):
        yield value


def told_counts(told: PublishedEvaluation, evaluation: Evaluation) -> Iterator[int]:
    """Numbers of images that figures which are told stand for: recognised, missed, confused."""
    for side, held in ((told.before, evaluation.before), (told.after, evaluation.after)):
        for i, (name, shown) in enumerate(zip(told.relevant, side.confusion, strict=True)):
            row = held.confusion[i] or ()
            if side.recall[name] is not None:
                yield from (row[i], sum(row) - row[i])
            yield from (n for n, cell in zip(row, shown or (), strict=bool(shown)) if cell is not None)


ROW = st.lists(st.integers(0, 60), min_size=4, max_size=4).filter(lambda row: sum(row) > 0)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(ROW, min_size=4, max_size=4), st.data())
def test_no_small_number_can_be_reckoned_from_any_evaluation(
    rows: list[list[int]], data: st.DataObject
) -> None:
    before = [data.draw(st.permutations(row)) for row in rows]
    evaluation = measured([list(row) for row in before], rows)
    told = published(evaluation)
    assert not [n for n in told_counts(told, evaluation) if too_few(n)]
    for side in (told.before, told.after):
        hidden = [c for c in NAMES if side.recall[c] is None]
        if side.balanced_accuracy is not None:
            assert len(hidden) != 1, "the mean would tell the one"
        if side.retained_accuracy is not None:
            assert len([c for c in hidden if c != "d"]) != 1
            assert side.recall["d"] is not None or not hidden or "d" not in hidden
        for row in side.confusion:
            assert row is None or [*row].count(None) != 1, "the others would tell the one"
        if evaluation.few:
            assert side.balanced_accuracy is side.retained_accuracy is side.macro_auroc is None
    text = json.dumps(told.model_dump(mode="json"))
    for number in numbers(json.loads(text)):
        assert number == round(number, 3)
    assert PublishedEvaluation.model_validate_json(text) == told


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(ROW, min_size=4, max_size=4), ROW, st.data())
def test_nor_from_figures_on_others_images_beside_those_on_own(
    rows: list[list[int]], theirs: list[int], data: st.DataObject
) -> None:
    """The own classes' recalls are the same in both blocks: no pair of means may tell a hidden one."""
    main = measured([list(data.draw(st.permutations(row))) for row in rows], rows)
    beside = measured(
        [*(list(row or ()) for row in main.before.confusion[:3]), list(data.draw(st.permutations(theirs)))],
        [*rows[:3], theirs],
    )
    parts = ("before", "after", "gain", "forgetting", "query_gain", "test_images", "test_sites")
    others = OthersFigures.model_validate({name: getattr(beside, name) for name in parts})
    evaluation = main.model_copy(update={"others": others, "test_images_from": "own"})
    told = published(evaluation)
    assert told.others is not None
    assert told.model_copy(update={"others": None, "test_images_from": "others"}) == published(main)
    for side, first, held in (
        (told.others.before, told.before, others.before),
        (told.others.after, told.after, others.after),
    ):
        right, total = (held.confusion[3] or ())[3], sum(held.confusion[3] or ())
        if too_few(right) or too_few(total - right) or too_few(total):
            assert side.recall["d"] is side.query_accuracy is side.balanced_accuracy is None
        if side.balanced_accuracy is not None:
            assert None not in first.recall.values(), "the mean would tell what is hidden"
    assert told.others.test_images["d"] == shown_count(sum(theirs))
    assert PublishedEvaluation.model_validate_json(told.model_dump_json()) == told


def test_an_evaluation_of_before_held_back_images_can_be_read() -> None:
    rows = [[40, 10, 0, 0], [9, 45, 6, 0], [0, 11, 38, 8], [12, 0, 0, 41]]
    new = ("test_images_from", "held_back", "others")
    old = {k: v for k, v in measured(rows, rows).model_dump(mode="json").items() if k not in new}
    found = Evaluation.model_validate(old)
    assert (found.test_images_from, found.held_back, found.others) == ("others", {}, None)
    assert QuerySummary.of(found).test_images == "others"
    before = {
        k: v for k, v in QuerySummary.of(found).model_dump().items() if k not in ("test_images", "others")
    }
    assert QuerySummary.model_validate(before) == QuerySummary.of(found)
    assert published(found).others is None


@pytest.mark.parametrize(
    ("held", "told"), [({}, "53"), ({"d": 3}, "≥5"), ({"d": 50}, "≥5"), ({"d": 20}, "53"), ({"d": 53}, "53")]
)
def test_numbers_of_held_back_images_cannot_be_reckoned(held: dict[str, int], told: str) -> None:
    rows = [[40, 10, 0, 0], [9, 45, 6, 0], [0, 11, 38, 8], [12, 0, 0, 41]]
    evaluation = measured(rows, rows).model_copy(update={"held_back": held})
    assert published(evaluation).test_images["d"] == told
    assert "held_back" not in published(evaluation).model_dump()


def test_figures_have_two_decimals_and_intervals_hold_what_was_found() -> None:
    rows = [[40, 10, 0, 0], [9, 45, 6, 0], [0, 11, 38, 8], [12, 0, 0, 41]]
    told = published(measured(rows, rows))
    assert told.after.balanced_accuracy is not None
    mean = (40 / 50 + 45 / 60 + 38 / 57 + 41 / 53) / 4
    assert told.after.balanced_accuracy.value == round(mean, 2)
    assert told.after.balanced_accuracy.low == math.floor(100 * (mean - 0.05)) / 100
    assert told.after.balanced_accuracy.high == math.ceil(100 * (mean + 0.05)) / 100
    assert {c: f and f.value for c, f in told.after.recall.items()} == {
        "a": 0.8,
        "b": 0.75,
        "c": 0.67,
        "d": 0.77,
    }
    assert told.after.confusion[0] == (80, 20, 0, 0)
    assert told.gain_p == 0.031
    assert told.gain is not None
    assert told.gain.value == 0.0


def test_near_the_ends_a_recall_and_the_one_that_would_tell_it_are_hidden() -> None:
    """Two images of ``a`` are missed; of ``b`` there are the fewest others."""
    rows = [[48, 2, 0, 0], [9, 30, 6, 0], [0, 11, 38, 8], [12, 0, 0, 41]]
    told = published(measured(rows, rows)).after
    assert [c for c in NAMES if told.recall[c] is None] == ["a", "b"]
    assert told.confusion[0] == (None, None, 0, 0)
    assert told.balanced_accuracy is not None
    assert told.retained_accuracy is not None
    rows = [[40, 10, 0, 0], *rows[1:3], [2, 0, 0, 51]]
    alone = published(measured(rows, rows))
    assert alone.after.recall["d"] is None
    assert alone.after.query_accuracy is alone.query_gain is None
    assert alone.after.retained_accuracy is None, "with the mean of all it would tell the query's"


def test_false_query_rates_with_suppression() -> None:
    rows = [[40, 10, 0, 0], [9, 45, 6, 0], [0, 11, 38, 8], [12, 0, 0, 41]]
    whole = measured(rows, rows)
    for given_away, told in ((8 / 167, 0.05), (3 / 167, None), (0.0, 0.0)):
        point = OperatingPointResult.model_validate(
            {
                "offsets": {"d": 0.5},
                "budget": 0.05,
                "given_away_own": None,
                "own_images": "<5",
                "given_away_test": estimate(given_away),
                "test_images": 167,
            }
        )
        shown = published(whole.model_copy(update={"operating_point": point})).operating_point
        assert shown is not None
        assert (shown.given_away_test and shown.given_away_test.value) == told


def test_of_a_class_with_few_images_nothing_is_told(tmp_path: Path) -> None:
    """Of the class that h2 asks for there are three test images."""
    params = sample_params()
    write_sample_run(tmp_path, params)
    held = json.loads((tmp_path / "reports/evaluation/h2/q2.json").read_text())
    query = read_outputs(tmp_path, params).queries[2]
    out = query.published.model_dump(mode="json")
    assert held["test_images"] == {"eosinophil": 3} | dict.fromkeys(held["local"], 50)
    assert out["test_images"] == {"eosinophil": "<5"} | dict.fromkeys(held["local"], "50")
    assert "flips" not in out
    for side in ("before", "after"):
        for name in ("recall", "precision", "class_auroc", "class_auprc", "class_ece", "class_reliability"):
            assert out[side][name]["eosinophil"] is None, name
        for name in ("query_accuracy", "balanced_accuracy", "auroc", "macro_auroc", "macro_precision"):
            assert out[side][name] is None, name
        assert out[side]["confusion"][held["relevant"].index("eosinophil")] is None
        # The bin of four images is not there, and no bin says how many it holds: with the total it would.
        for bins in (out[side]["reliability"], out[side]["class_reliability"][held["local"][0]]):
            assert bins == [{"confidence": c, "accuracy": a} for c, a in ((0.75, 0.8), (0.95, 0.9))]
    assert out["gain"] is out["query_gain"] is out["class_forgetting"]["eosinophil"] is None
    verdict = query.published_verdict
    assert verdict is not None
    assert verdict.measured is not None
    assert verdict.measured.balanced_accuracy is None
    assert all(r.figure is None or r.figure == round(r.figure, 2) for r in verdict.rules)
    assert query.verdict is not None
    assert [r.passed for r in verdict.rules] == [r.passed for r in query.verdict.rules]


def test_figures_of_a_teacher() -> None:
    found = TeacherMetrics(
        balanced_accuracy=0.871234,
        recall={"a": 0.8, "b": 0.954545, "c": 0.859155},
        epochs=9,
        best_epoch=4,
        stopped_early=True,
    )
    told = published_metrics(found, {"a": 50, "b": 22, "c": 71})
    assert told.recall == {"a": None, "b": None, "c": 0.86}, "of b one was missed; a would tell it"
    assert told.balanced_accuracy == 0.87
    assert (told.epochs, told.best_epoch) == (9, 4)
    elsewhere = published_metrics(found, None)
    assert elsewhere.recall == {"a": 0.8, "b": 0.95, "c": 0.86}
    suppressed = found.model_copy(update={"recall": {**found.recall, "b": None}})
    assert published_metrics(suppressed, {"a": 50, "b": 3, "c": 71}).balanced_accuracy is None


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (0.94, 0.94, (0.94, 0.94)),
        (0.851852, 0.9, (0.85, 0.9)),
        (-0.061, -0.019, (-0.07, -0.01)),
        (0, 1, (0, 1)),
    ],
)
def test_bounds_are_rounded_outward(low: float, high: float, told: tuple[float, float]) -> None:
    assert shown_bounds(low, high) == told
    assert shown_figure(0.851852) == 0.85


def test_a_second_part_is_hidden_beside_a_single_one() -> None:
    images = {"a": 50, "b": 20, "c": 30}
    assert hide_a_second({"a"}, "abc", images) == {"a", "b"}
    assert hide_a_second({"a", "c"}, "abc", images) == {"a", "c"}
    assert hide_a_second((), "abc", images) == set()
    assert hide_a_second({"a"}, "a", images) == {"a"}
