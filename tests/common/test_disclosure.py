from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qkt_clinical.common.disclosure import (
    shown_count,
    shown_parts,
    shown_share,
    shown_total,
    suppress,
    too_few,
)
from qkt_clinical.common.files import write_json
from qkt_clinical.config.loading import parse
from qkt_clinical.config.params import Params
from qkt_clinical.config.query import QueryRef
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import write_prepared
from qkt_clinical.records.outputs import read_outputs
from qkt_clinical.report.model_card import unmeasured_model_card
from qkt_clinical.report.model_card_text import to_markdown, to_summary
from qkt_clinical.stages.plan import plan_query
from qkt_clinical.stages.train import train_site
from qkt_clinical.stages.transfer import transfer_query
from qkt_clinical.tracking.runs import answer_item
from tests.four_hospitals import ask


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
    assert suppress(figures, {"a": 50, "b": 4, "c": 5}) == {"a": 0.5, "b": None, "c": 0.25, "d": None}


@pytest.mark.parametrize(
    ("count", "total", "share"),
    [
        (2, 59, None),
        (57, 59, None),
        (5, 59, 0.08),
        (5, 8, None),
        (4, 4, None),
        (0, 3, None),
        (0, 0, None),
        (0, 59, 0.0),
        (59, 59, 1.0),
        (5, 11, 0.45),
        (995, 1000, 0.99),
    ],
)
def test_share(count: int, total: int, share: float | None) -> None:
    assert shown_share(count, total) == share


@pytest.mark.slow
def test_no_count_below_five_can_be_reckoned_from_a_share_and_its_total() -> None:
    for total in range(150):
        for count in range(total + 1):
            share = shown_share(count, total)
            if share is not None and total:
                fits = [n for n in range(total + 1) if shown_share(n, total) == share]
                assert not {1, 2, 3, 4} & {*fits, *(total - n for n in fits)}
    # Nor the total itself: any share that is told of fewer than a hundred is one of larger totals as well.
    for total in range(10, 100):
        for count in range(5, total - 4):
            assert shown_share(count, total) in {shown_share(n, 150) for n in range(5, 146)} | {None}


@pytest.mark.parametrize(("count", "total"), [(-1, 5), (6, 5)])
def test_what_is_no_share(count: int, total: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        shown_share(count, total)


# --- what the stages leave behind ---------------------------------------------------------------------

CLASSES, SHAPE = ("a", "b", "c"), (3, 16, 16)
PARAMS = parse(
    Params,
    {
        "classes": CLASSES,
        "sites": ["aster", "birch"],
        "queries": {},
        "device": "cpu",
        "train": {"epochs": 1, "batch_size": 8},
        "transfer": {"images": 16},
    },
    file="params.yaml",
)
ASTER = QueryRef(hospital="aster", query="q")
HELD = {"train": (10, 10), "calibration": (2, 2), "val": (6, 2), "test": (0, 0)}
"""Images of a hospital's two classes."""


def prepare(root: Path, site: str, classes: tuple[int, int]) -> None:
    rows = [(s, c) for s, held in HELD.items() for c, n in zip(classes, held, strict=True) for _ in range(n)]
    write_prepared(
        Workspace(root).prepared(site),
        site=site,
        source_kind="images",
        classes=CLASSES,
        images=np.random.default_rng(len(site)).integers(0, 256, (len(rows), *SHAPE), dtype=np.uint8),
        labels=np.array([c for _, c in rows]),
        groups=np.array([f"p{i}" for i in range(len(rows))]),
        splits={s: np.array([i for i, row in enumerate(rows) if row[0] == s], dtype=np.int64) for s in HELD},
        spacing_mm=None,
        normalisation="unit",
        transforms=(),
        outcomes=[],
    )


@pytest.mark.slow
def test_stages_write_no_figure_of_few_images(tmp_path: Path) -> None:
    """Two validation images of ``b``; four calibration images, and few training images, by which the budget
    was kept: how many is not told, nor of how few they are."""
    for site, classes in (("aster", (0, 1)), ("birch", (1, 2))):
        prepare(tmp_path, site, classes)
        metrics = train_site(tmp_path, site, PARAMS)
        first, second = (CLASSES[c] for c in classes)
        assert metrics["recall"][first] is not None
        assert metrics["recall"][second] is None
        kept = json.loads((Workspace(tmp_path).teacher(site) / "metrics.json").read_text())
        assert kept == metrics
        scores = [1.0 if c in classes else 0.0 for c in range(3)]
        mask = {"estimator": "combined", "probes": 8, "seed": 0, "classes": CLASSES, "scores": scores}
        known = {"threshold": 0.5, "automatic": True, "known": [s > 0.5 for s in scores]}
        write_json(Workspace(tmp_path).teacher(site) / "mask.json", mask | known)
    ask(tmp_path, classes=["c"])
    plan_query(tmp_path, "aster", "q", PARAMS)
    second_phase = transfer_query(tmp_path, "aster", "q", PARAMS, device="cpu").phase2
    assert second_phase.own_images == "≥5"
    assert second_phase.false_query_rate == 0.0, "of more than four"
    text = (Workspace(tmp_path).student("aster", "q") / "phases.json").read_text()
    assert json.loads(text)["phase2"]["own_images"] == "≥5"
    outputs = read_outputs(tmp_path, PARAMS.model_copy(update={"queries": {"q": ASTER}}))
    (answer,) = outputs.unmeasured
    item = answer_item(answer, outputs)
    assert item.metrics["given_away"] == 0.0
    card = unmeasured_model_card(answer, outputs)
    assert (
        "False-query rate 0.0%, budget 3.0%, on the ≥5 of the hospital's own images on which it was set."
        in to_markdown(card)
    )
    assert "False-query rate 0.0%" in to_summary(card)
