from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qkt_clinical.common.files import digest_file, to_json, write_json
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.records.base import Estimate
from qkt_clinical.records.model_card import ModelCard
from qkt_clinical.records.outputs import Outputs, read_outputs
from qkt_clinical.report.model_card import METHODS, _confused, student_model_card, teacher_model_card
from qkt_clinical.report.model_card_text import _plain, to_markdown, to_summary
from tests.sample_run import FEW_AT, asked_class, sample_params, write_sample_run

PARAMS = sample_params()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """Three hospitals; the second one's answer ends worse than its own model."""
    root = tmp_path_factory.mktemp("cards")
    write_sample_run(root, PARAMS, loss_at=1)
    return read_outputs(root, PARAMS)


def student(outputs: Outputs, index: int) -> ModelCard:
    return student_model_card(outputs.queries[index], outputs)


def kinds(card: ModelCard) -> dict[str, list[tuple[str, ...]]]:
    found: dict[str, list[tuple[str, ...]]] = {}
    for failure in card.known_failures:
        found.setdefault(failure.kind, []).append(failure.classes)
    return found


def changed(tmp_path: Path, **evaluation: Any) -> Outputs:
    write_sample_run(tmp_path, PARAMS)
    path = Workspace(tmp_path).reports / "evaluation" / "h0" / "q0.json"
    write_json(path, {**json.loads(path.read_text()), **evaluation})
    return read_outputs(tmp_path, PARAMS)


def test_a_card_is_the_same_each_time_and_reads_back(outputs: Outputs) -> None:
    cards = [student(outputs, i) for i in range(3)] + [teacher_model_card(s, PARAMS) for s in outputs.sites]
    for card in cards:
        text = to_json(card.model_dump(mode="json"))
        assert ModelCard.model_validate_json(text) == card
    assert student(outputs, 0) == student(outputs, 0)
    assert [c.name for c in cards] == [
        *(f"student.h{i}.q{i}" for i in range(3)),
        *(f"teacher.h{i}" for i in range(3)),
    ]


def test_few_images_are_not_counted_out(outputs: Outputs) -> None:
    card, asked = student(outputs, FEW_AT), asked_class(PARAMS, FEW_AT)
    local = PARAMS.classes[FEW_AT : FEW_AT + 3]
    assert card.data is not None
    assert card.data.images["train"] == {local[0]: "135", local[1]: "132", local[2]: "<5"}
    assert card.data.patients == {"train": "40", "calibration": "11", "val": "<5", "test": "14"}
    assert card.tested is not None
    assert card.tested.images == {**dict.fromkeys(local, "50"), asked: "<5"}
    few = [f for f in card.known_failures if f.kind == "few-test-images"]
    assert [f.text for f in few] == [f"<5 test images of {asked}: too few to give figures."]
    of_it = [f for f in card.figures if f.class_name == asked]
    assert {f.name for f in of_it} == {"recall", "precision", "AUROC", "AUPRC"}
    assert {(f.before, f.after, f.change) for f in of_it} == {(None, None, None)}
    assert f"| recall, {asked} | – | – | – |" in to_markdown(card)
    others = [f.after for f in card.figures if f.class_name in local and f.name in {"AUROC", "AUPRC"}]
    assert all(others)
    means = {f.name: f.after for f in card.figures if f.class_name is None}
    assert means["balanced accuracy"] is means["query accuracy"] is None, "it would tell that of the class"
    (recall,) = [f for f in card.known_failures if f.kind == "gate" and "query_recall" in f.text]
    assert "too few test images, at least 0.5 wanted" in recall.text
    (rule,) = [f for f in card.known_failures if f.kind == "gate" and "query_images" in f.text]
    assert rule.figure is None
    assert "query_images is not met: test images of every class asked for, <5, at least 20" in rule.text


def test_the_gates_unmet_rules_are_failures(outputs: Outputs) -> None:
    verdict = outputs.queries[1].verdict
    assert verdict is not None
    card = student(outputs, 1)
    assert card.gate == "failed"
    unmet = [r.rule for r in verdict.rules if not r.passed]
    assert unmet
    assert len(kinds(card)["gate"]) == len(unmet)


def test_a_loss_is_told_as_plainly_as_a_gain(outputs: Outputs) -> None:
    """Before 0.96 and 0.90 after for the hospital's own classes; the class asked for is recalled at 0.04.

    Two of fifty are no number to be told, neither of images recognised nor of those missed.
    """
    card, asked = student(outputs, 1), asked_class(PARAMS, 1)
    local = outputs.queries[1].evaluation.local
    found = kinds(card)
    assert found["low-recall"] == [(asked,)]
    assert found["forgotten"] == [(c,) for c in outputs.queries[1].evaluation.relevant if c in local]
    (low,) = [f for f in card.known_failures if f.kind == "low-recall"]
    assert low.text == f"More than 20% of the images of {asked} are missed."
    assert low.figure is None
    lost = next(f for f in card.known_failures if f.kind == "forgotten")
    assert (lost.figure, lost.text) == (None, f"{lost.classes[0]} is recalled less.")
    recall = next(f for f in card.figures if f.name == "recall" and f.class_name == local[0])
    assert (recall.before, recall.change) == (None, None)


def test_a_loss_of_which_no_small_number_can_be_reckoned_is_told(tmp_path: Path) -> None:
    """Forty-five of fifty before and forty after."""
    write_sample_run(tmp_path, PARAMS, recalls=(0.9, 0.8))
    card, local = student(read_outputs(tmp_path, PARAMS), 0), PARAMS.classes[:3]
    lost = next(f for f in card.known_failures if f.kind == "forgotten")
    assert lost.figure == pytest.approx(0.1)
    assert lost.text == f"{lost.classes[0]} is recalled less, by 10.0 points."
    recall = next(f for f in card.figures if f.name == "recall" and f.class_name == local[0])
    assert recall.after == Estimate(value=0.8, low=0.76, high=0.84)
    assert recall.change == Estimate(value=-0.1, low=-0.14, high=-0.06)


def test_a_good_answer_has_no_such_failures(outputs: Outputs) -> None:
    found = kinds(student(outputs, 0))
    assert {"low-recall", "forgotten", "no-gain", "not-judged"} & set(found) == set()


def test_a_loss_that_chance_can_explain_is_said_to_be_one(tmp_path: Path) -> None:
    first = PARAMS.classes[0]
    loss = {first: {"value": 0.08, "low": -0.02, "high": 0.2}}
    card = student(changed(tmp_path, class_forgetting=loss), 0)
    (lost,) = [f for f in card.known_failures if f.kind == "forgotten"]
    assert lost.text == f"{first} is recalled less. Chance can explain it."


@pytest.mark.parametrize(
    ("gain", "text"),
    [
        ({"value": 0.02, "low": -0.01, "high": 0.05}, "Chance can explain the gain in balanced accuracy."),
        (
            {"value": -0.2, "low": -0.3, "high": -0.1},
            "Balanced accuracy is lower than that of the hospital's own model.",
        ),
        (
            {"value": -0.02, "low": -0.05, "high": 0.0},
            "Balanced accuracy is lower than that of the hospital's own model. Chance can explain it.",
        ),
        (
            {"value": 0.0, "low": 0.0, "high": 0.0},
            "Balanced accuracy is that of the hospital's own model: nothing was gained.",
        ),
    ],
)
def test_no_gain(tmp_path: Path, gain: dict[str, float], text: str) -> None:
    card = student(changed(tmp_path, gain=gain), 0)
    assert [f.text for f in card.known_failures if f.kind == "no-gain"] == [text]


def test_the_most_confused_pairs() -> None:
    found = _confused(
        ["a", "b", "c"],
        [[80, 15, 5], [27, 120, 3], [2, 2, 0]],
        [[80, 15, 5], [18, None, None], None],
    )
    assert [(f.classes, f.figure) for f in found] == [
        (("b", "a"), 0.18),
        (("a", "b"), 0.15),
        (("a", "c"), 0.05),
    ], "of c there are four images: nothing is said"
    assert found[0].text == "18% of the images of b are taken for a."
    (hidden,) = _confused(["a", "b"], [[20, 0], [4, 16]], [[100, 0], [None, None]])
    assert (hidden.figure, hidden.text) == (None, "Some of the images of b are taken for a.")


def test_an_answer_that_was_not_judged_says_so(tmp_path: Path) -> None:
    write_sample_run(tmp_path, PARAMS)
    (Workspace(tmp_path).reports / "gate" / "h0" / "q0.json").unlink()
    card = student(read_outputs(tmp_path, PARAMS), 0)
    assert card.gate == "not judged"
    assert kinds(card)["not-judged"] == [()]


def test_a_teachers_card(outputs: Outputs) -> None:
    card = teacher_model_card(outputs.sites[0], PARAMS)
    recall = {f.class_name: f.after.value for f in card.figures if f.name == "recall" and f.after}
    assert recall == {}, "four of 35, three of 32 were missed; of the third there are three"
    assert outputs.sites[0].manifest is not None
    more = outputs.sites[0].manifest.model_copy(
        update={"counts": {"val": dict(zip(PARAMS.classes[:3], (100, 55, 3), strict=True))}}
    )
    told = teacher_model_card(replace(outputs.sites[0], manifest=more), PARAMS)
    shown = {f.class_name: f.after.value for f in told.figures if f.name == "recall" and f.after}
    assert shown == {PARAMS.classes[0]: 0.88, PARAMS.classes[1]: 0.91}
    assert all(f.before is None and f.change is None for f in card.figures)
    assert card.answers_for == PARAMS.classes[:3]
    assert card.calibration is None
    assert "not-tested" in kinds(card)
    (few,) = [f for f in card.known_failures if f.kind == "few-test-images"]
    assert few.text == f"<5 validation images of {PARAMS.classes[2]}: too few to give figures."
    assert ", ".join(PARAMS.classes[:3]) in card.privacy[0]


def test_a_teachers_card_says_what_differential_privacy_there_was(outputs: Outputs) -> None:
    site = outputs.sites[0]
    assert "No differential privacy was applied" in teacher_model_card(site, PARAMS).privacy[1]
    spent = {"epsilon": 7.995, "delta": 1e-5, "clip": 1.0, "noise_multiplier": 0.9, "protected": "image"}
    assert site.card is not None
    trained = replace(site, card=site.card.model_copy(update={"training": site.card.training | spent}))
    card = teacher_model_card(trained, PARAMS)
    assert "epsilon 7.995 at delta 1e-05, noise multiplier 0.9, gradients cut to 1.0" in card.privacy[1]
    assert "not for patients of several images" in card.privacy[1]
    assert card.method.settings["epsilon"] == 7.995


def test_digests_of_everything_it_was_made_from(outputs: Outputs) -> None:
    query = outputs.queries[0]
    p = student(outputs, 0).provenance
    assert p.bundle == digest_file(query.student / "bundle.json")
    assert p.weights == digest_file(query.student / "weights.safetensors")
    assert p.evaluation == digest_file(query.evaluation_file)
    assert p.data == outputs.sites[0].data_digest
    # What other hospitals ask does not change a card; another seed does.
    for changed, same in (({"queries": {}}, True), ({"seed": PARAMS.seed + 1}, False)):
        other = replace(outputs, params=PARAMS.model_copy(update=changed))
        assert (student_model_card(query, other).provenance.parameters == p.parameters) is same
    assert set(p.teachers) == set(query.plan.relevant)


def test_a_student_says_whose_networks_it_holds(outputs: Outputs) -> None:
    assert "whole copies of the teachers of h0, h1" in student(outputs, 2).privacy[0]
    assert "parts of the teachers of h1" in student(outputs, 0).privacy[0]


def test_a_hospital_whose_data_is_not_here(tmp_path: Path) -> None:
    write_sample_run(tmp_path, PARAMS)
    (Workspace(tmp_path).prepared("h0") / "manifest.json").unlink()
    outputs = read_outputs(tmp_path, PARAMS)
    for card in (student(outputs, 0), teacher_model_card(outputs.sites[0], PARAMS)):
        assert card.data is None
        assert card.provenance.data is None
        assert "The data of h0 is not here." in to_markdown(card)


def test_every_method_has_its_words() -> None:
    from qkt_clinical.catalog import METHODS as NAMES

    assert set(METHODS) == {"teacher", *NAMES}


def test_the_readable_card(outputs: Outputs) -> None:
    for card in (student(outputs, 1), teacher_model_card(outputs.sites[0], PARAMS)):
        text = to_markdown(card)
        assert all(f"- {_plain(failure.text)}\n" in text for failure in card.known_failures)
        for word in ("Not a medical device", "## Privacy", "## Provenance", card.provenance.weights):
            assert word in text
        summary = to_summary(card)
        assert len(summary) < 5000
        assert "Not for diagnosis" in summary
        assert card.provenance.bundle in summary
        for line in text.splitlines():
            assert not line.startswith("|") or line.endswith(" |")
    asked = asked_class(PARAMS, 0)
    assert f"| recall, {asked} | 0.0% (0–4) | 80.0% (76–84) | +80.0 (+76.0 to +84.0) |" in to_markdown(
        student(outputs, 0)
    )


def test_names_from_elsewhere_stay_text(tmp_path: Path) -> None:
    markup = "<img src=x onerror=alert(1)>|[a](http://b)"
    params: Params = sample_params(classes=[markup, *PARAMS.classes[1:]])
    write_sample_run(tmp_path, params)
    outputs = read_outputs(tmp_path, params)
    for text in (to_markdown(student(outputs, 0)), to_summary(student(outputs, 0))):
        assert "<img" not in text
        assert "[a](" not in text
