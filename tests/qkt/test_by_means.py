"""An answer by the own network and other hospitals' class means alone."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qkt_clinical.config.params import TransferParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Images
from qkt_clinical.errors import QueryError
from qkt_clinical.models.class_means import mean_features
from qkt_clinical.models.encoder_network import EncoderExtractor
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.by_means import amid, answer_by_means, means_agreement, screen_means
from qkt_clinical.qkt.operating_point import decide
from qkt_clinical.qkt.steps import Answer, EncodedImages, LocalData
from qkt_clinical.task import MULTICLASS
from tests.shapes import CPU, same, shapes, state, teacher

pytestmark = pytest.mark.slow

TRAIN, CALIBRATION, TEST = shapes((0, 1), 40, 5), shapes((0, 1), 30, 6), shapes((0, 1, 3), 40, 99)
BUDGET = 0.05
NO_ENCODER = cast(EncoderExtractor, None)


def encoded(images: Images) -> Tensor:
    """What stands for an encoder's features: colours on a grid of 4 x 4, of length 1."""
    return F.normalize(F.adaptive_avg_pool2d(to_input(images), 4).flatten(1), dim=1)


def means_of(classes: tuple[int, ...], seed: int) -> dict[int, Tensor]:
    """Class means of another hospital."""
    images, labels = shapes(classes, 40, seed)
    return mean_features(encoded(images), torch.from_numpy(labels))


@pytest.fixture(scope="module")
def own() -> Classifier:
    return teacher((0, 1), site="aster")


def ask(
    own: Classifier,
    means: dict[str, dict[int, Tensor]],
    query: tuple[int, ...] = (3,),
    params: TransferParams | None = None,
    features: EncodedImages | None = None,
) -> Answer:
    features = features or EncodedImages(NO_ENCODER, encoded(TRAIN[0]), encoded(CALIBRATION[0]))
    data = LocalData(TRAIN, CALIBRATION, encoded=features)
    return answer_by_means(own, means, data, query, task=MULTICLASS, budget=BUDGET, params=params)


def told(answer: Answer) -> Tensor:
    """Classes that the answer gives to the test images."""
    head = answer.refined.encoded
    assert head is not None
    logits = predict(answer.refined.network, to_input(TEST[0]), CPU) + head.logits(encoded(TEST[0]))
    rule = answer.decision
    return decide(logits, rule.local, rule.query, torch.tensor(rule.offsets)).argmax(dim=1)


def test_a_class_that_nobody_taught_the_network_lies_amid_its_own_by_hand() -> None:
    weight = torch.tensor([[1.0, 0.0], [3.0, 2.0], [9.0, 9.0], [7.0, 7.0]])
    bias = torch.tensor([1.0, 2.0, 9.0, 7.0])
    rows, shifts = amid((weight, bias), local=[0, 1], query=[2])
    assert rows[2].tolist() == [2.0, 1.0]
    assert float(shifts[2]) == 1.5
    assert torch.equal(rows[[0, 1, 3]], weight[[0, 1, 3]])
    assert weight[2].tolist() == [9.0, 9.0], "the head given is left as it is"
    # So its logit is the mean of theirs, whatever the features.
    features = torch.tensor([[0.3, -2.0]])
    logits = features @ rows.T + shifts
    assert float(logits[0, 2]) == pytest.approx(float(logits[0, :2].mean()))


def test_a_class_that_only_others_have_is_recognised_by_their_means_alone(own: Classifier) -> None:
    before = state(own)
    answer = ask(own, {"birch": means_of((1, 3), 11), "cedar": means_of((0, 3), 12)})
    labels = torch.from_numpy(TEST[1])
    found = told(answer)
    recall = {c: float((found[labels == c] == c).double().mean()) for c in (0, 1, 3)}
    assert recall[3] > 0.8, "asked for"
    assert min(recall[0], recall[1]) > 0.85, "known"
    assert answer.refined.encoded is not None
    assert answer.refined.encoded.placed_by == ("birch", "cedar")
    assert [b.name for b in answer.refined.network.spec.branches] == ["resnet-small"], "the own network's"
    assert answer.operating_point.within_budget
    assert answer.operating_point.false_query_rate <= BUDGET
    assert same(state(own), before)
    assert answer.adaptation == ()
    assert [(r.site, r.included, r.agreement) for r in answer.screening] == [
        ("birch", True, None),
        ("cedar", True, None),
    ], "they share one class each with the hospital: nothing to compare"


def test_what_own_classes_would_pay_for_is_not_taken_and_the_answer_says_so(own: Classifier) -> None:
    """An encoder that takes the hospital's classes for one another on images that it was not fitted to."""
    seen, labels = encoded(CALIBRATION[0]), torch.from_numpy(CALIBRATION[1])
    swapped = seen.clone()
    swapped[labels == 0], swapped[labels == 1] = seen[labels == 1], seen[labels == 0]
    wrong = EncodedImages(NO_ENCODER, encoded(TRAIN[0]), swapped)
    answer = ask(own, {"birch": means_of((1, 3), 11)}, features=wrong)
    assert answer.refined.encoded is None
    assert not answer.operating_point.within_budget
    assert answer.operating_point.lost == 0, "the own network stays as it was"


def test_agreement_by_hand() -> None:
    def agreement(there: dict[int, Tensor], here: dict[int, Tensor]) -> float | None:
        return means_agreement(there, here)[0]

    here = {0: torch.tensor([1.0, 0.0]), 1: torch.tensor([0.0, 1.0]), 2: torch.tensor([5.0, 5.0])}
    moved = {c: 3 * m + 7 for c, m in here.items() if c != 2}
    assert agreement(moved, here) == pytest.approx(1.0), "another camera"
    swapped = {0: here[1], 1: here[0], 3: here[2]}
    assert agreement(swapped, here) == pytest.approx(-1.0)
    # (1, -1) and (-1, 1) against (1, 1) and (-1, -1): at right angles.
    assert agreement({0: torch.tensor([1.0, 1.0]), 1: torch.tensor([0.0, 0.0])}, here) == pytest.approx(0.0)
    assert agreement({0: here[0], 3: here[1]}, here) is None, "one class in common"
    assert agreement({0: here[0], 1: here[0]}, here) is None, "no difference"


def test_means_that_are_hardly_more_than_noise_are_no_contradiction() -> None:
    draw = torch.Generator().manual_seed(0)
    here = {c: torch.randn(400, generator=draw) for c in range(4)}
    left_out = 0
    for _ in range(200):
        there = {c: torch.randn(400, generator=draw) for c in range(4)}
        left_out += not screen_means({"birch": there}, here)[0].included
    assert left_out <= 4
    swapped = {0: here[1], 1: here[0], 2: here[3], 3: here[2]}
    noisy = {c: m + torch.randn(400, generator=draw) for c, m in swapped.items()}
    (result,) = screen_means({"birch": noisy}, here)
    assert not result.included


def test_whoever_swaps_two_classes_that_the_hospital_has_is_left_out(own: Classifier) -> None:
    liar = means_of((0, 1, 3), 11)
    liar[0], liar[1] = liar[1], liar[0]
    honest = means_of((0, 1, 3), 12)
    answer = ask(own, {"birch": liar, "cedar": honest})
    assert [(r.site, r.included) for r in answer.screening] == [("birch", False), ("cedar", True)]
    assert "contradict" in answer.screening[0].reason
    assert answer.refined.encoded is not None
    assert answer.refined.encoded.placed_by == ("cedar",)
    assert torch.equal(told(answer), told(ask(own, {"cedar": honest})))
    with pytest.raises(QueryError, match="contradict") as caught:
        ask(own, {"birch": liar})
    assert caught.value.code == "untrusted"
    off = TransferParams(screening=False)
    believed = ask(own, {"birch": liar}, params=off)
    assert believed.screening == ()


def test_the_order_of_hospitals_changes_nothing(own: Classifier) -> None:
    means = {"birch": means_of((1, 3), 11), "cedar": means_of((0, 3), 12)}
    one, two = ask(own, means), ask(own, dict(reversed(means.items())))
    assert torch.equal(told(one), told(two))
    assert one.decision == two.decision


def test_means_of_which_none_is_of_the_query_are_refused(own: Classifier) -> None:
    with pytest.raises(QueryError) as caught:
        ask(own, {"birch": means_of((0, 1), 11)})
    assert caught.value.code == "uncovered"
