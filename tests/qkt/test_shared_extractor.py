"""Networks over one frozen extractor: a student needs it once."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from qkt_clinical.data.inputs import to_input
from qkt_clinical.models.class_means import mean_features
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt import panel as panel_room
from qkt_clinical.qkt.answer import answer_query
from qkt_clinical.qkt.panel import Panel, Teacher, same_extractor
from qkt_clinical.qkt.prediction import scores_of
from qkt_clinical.qkt.steps import Answer, LocalData
from qkt_clinical.task import MULTICLASS
from tests.shapes import CPU, shapes, teacher

pytestmark = pytest.mark.slow

TRAIN, CALIBRATION, TEST = shapes((0, 1), 40, 5), shapes((0, 1), 30, 6), shapes((0, 1, 3), 20, 99)


def with_head_for(extractor: Classifier, classes: tuple[int, ...], seed: int) -> Classifier:
    """The extractor with a head of its own: discriminants of a hospital's images."""
    from qkt_clinical.qkt.discriminant import discriminant_rows

    network = copy.deepcopy(extractor)
    images, labels = shapes(classes, 40, seed)
    features = predict(network, to_input(images), CPU, features=True)
    truth = torch.from_numpy(labels)
    weight, bias = discriminant_rows(features, truth, [features.shape[1]], [[]], [], network.spec.classes)
    with torch.no_grad():
        network.head.weight.copy_(weight)
        network.head.bias.copy_(bias)
    return network


def means(network: Classifier, classes: tuple[int, ...], seed: int) -> dict[int, torch.Tensor]:
    images, labels = shapes(classes, 40, seed)
    return mean_features(predict(network, to_input(images), CPU, features=True), torch.from_numpy(labels))


@pytest.fixture(scope="module")
def frozen() -> Classifier:
    """An extractor that has seen all shapes."""
    return teacher((0, 1, 2, 3), site="elsewhere")


@pytest.fixture(scope="module")
def teachers(frozen: Classifier) -> list[Teacher]:
    """Birch and cedar over the frozen extractor, dahlia over one of its own."""
    held = {"birch": (1, 3), "cedar": (0, 3)}
    found = [
        Teacher(site, with_head_for(frozen, k, 20 + n), k, k, class_means=means(frozen, k, 20 + n))
        for n, (site, k) in enumerate(held.items())
    ]
    other = teacher((0, 1, 3), site="dahlia")
    return [*found, Teacher("dahlia", other, (0, 1, 3), (0, 1, 3), class_means=means(other, (0, 1, 3), 30))]


def ask(own: Classifier, teachers: list[Teacher], method: str = "qkt") -> Answer:
    data = LocalData(TRAIN, CALIBRATION)
    return answer_query(
        own,
        teachers,
        data,
        (3,),
        task=MULTICLASS,
        method=method,
        budget=0.05,  # type: ignore[arg-type]
    )


def test_extractors_are_told_apart_by_their_weights(frozen: Classifier, teachers: list[Teacher]) -> None:
    birch, cedar, dahlia = (t.network for t in teachers)
    assert same_extractor(birch, cedar)
    assert not same_extractor(birch, dahlia)
    moved = copy.deepcopy(birch)
    with torch.no_grad():
        next(moved.extractor.parameters()).add_(1e-3)
    assert not same_extractor(birch, moved)
    panel = Panel((frozen, birch, dahlia, cedar), ((0,), (1,), (0, 1), (0,)), (0, 1), ("b", "d", "c"))
    assert panel.parts == ((0, 1, 3), (2,))


@pytest.mark.parametrize("method", ["qkt", "qkt-light", "routed"])
def test_a_student_holds_a_shared_extractor_once(
    frozen: Classifier, teachers: list[Teacher], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = with_head_for(frozen, (0, 1), 19)
    asked = teachers[:2]
    once = ask(own, asked, method)
    monkeypatch.setattr(panel_room, "same_extractor", lambda *_: False)
    copies = ask(own, asked, method)
    assert len(once.network.spec.branches) == 1
    assert len(copies.network.spec.branches) == 3
    if method == "routed":  # nothing is reduced: only the discriminants see the features once, not thrice
        inputs = to_input(TEST[0])
        one, other = (scores_of(a.network, a.decision, [], inputs, CPU) for a in (once, copies))
        found = torch.tensor(once.decision.relevant)
        agree = one[:, found].argmax(dim=1) == other[:, found].argmax(dim=1)
        assert float(agree.double().mean()) > 0.9


def test_the_query_is_recognised_by_heads_over_one_extractor(
    frozen: Classifier, teachers: list[Teacher]
) -> None:
    own = with_head_for(frozen, (0, 1), 19)
    answer = ask(own, teachers)
    assert len(answer.network.spec.branches) == 2, "dahlia has another"
    scores = scores_of(answer.network, answer.decision, [], to_input(TEST[0]), CPU)
    told = scores.argmax(dim=1)
    labels = torch.from_numpy(TEST[1])
    recall = [float((told[labels == c] == c).double().mean()) for c in (0, 1, 3)]
    assert min(recall) > 0.8, recall
    # Only dahlia's layers are brought to the hospital's images: the others are the hospital's own.
    assert [r.site for r in answer.adaptation] == ["dahlia"]


def test_the_consensus_over_parts_is_that_over_networks(frozen: Classifier, teachers: list[Teacher]) -> None:
    own = with_head_for(frozen, (0, 1), 19)
    networks = (own, *(t.network for t in teachers))
    panel = Panel(networks, ((0, 1), *(t.claimed for t in teachers)), (0, 1, 3), ("b", "c", "d"))
    inputs = to_input(TEST[0])
    features = [predict(n, inputs, CPU, features=True) for n in networks]
    whole = sum(f @ w.T + b for f, (w, b) in zip(features, panel.rows, strict=True))
    firsts = [features[part[0]] for part in panel.parts]
    parts = sum(f @ w.T + b for f, (w, b) in zip(firsts, panel.part_rows, strict=True))
    assert len(firsts) == 2
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    assert replace(panel, local_weight=4.0).parts == panel.parts
