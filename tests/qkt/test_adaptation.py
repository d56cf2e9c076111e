"""Teachers are brought to the hospital's images by the statistics of their layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qkt_clinical.catalog import Method
from qkt_clinical.config.params import TransferParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.models.class_means import mean_features
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier, build
from qkt_clinical.qkt.adaptation import (
    MIN_SHARED,
    SAME_CENTRE,
    SHARES,
    LayerStatistics,
    adapt_teachers,
    best_share,
    features_apart,
    images_to_measure,
    measure_statistics,
    normalisation_layers,
    shared_loss,
    shift,
    stored_statistics,
    with_moved_features,
    with_statistics,
)
from qkt_clinical.qkt.answer import answer_query
from qkt_clinical.qkt.panel import Teacher
from qkt_clinical.qkt.steps import LocalData
from qkt_clinical.task import MULTICLASS
from tests.shapes import CPU, counted, same, shapes, spec, state, teacher

BRIGHTER = 1.8


@pytest.fixture(scope="module")
def network() -> Classifier:
    return teacher((0, 1, 2), site="birch")


def strange(images: torch.Tensor) -> torch.Tensor:
    """The images as another scanner gives them: every value times a factor."""
    return BRIGHTER * images


def measured(network: Classifier, inputs: torch.Tensor, seed: int = 0) -> dict[str, LayerStatistics]:
    return measure_statistics(network, inputs, seed=seed, device=CPU)


def test_the_first_layers_statistics_are_those_of_what_it_is_given(network: Classifier) -> None:
    inputs = to_input(shapes((0, 1), 20, 3)[0])
    seen: list[torch.Tensor] = []
    first, layer = next(iter(normalisation_layers(network.extractor).items()))
    hook = layer.register_forward_hook(lambda module, given, out: seen.append(given[0].detach()))
    predict(network, inputs, CPU)
    hook.remove()
    axes = [0, 2, 3]
    found = measured(network, inputs)[first]
    assert torch.allclose(found.mean, seen[0].mean(axes), atol=1e-5)
    assert torch.allclose(found.variance, seen[0].var(axes), rtol=1e-4)


def test_one_pass_and_the_network_stays_as_it_is(network: Classifier) -> None:
    inputs, before = to_input(shapes((0, 1), 100, 3)[0]), state(network)
    with counted(network) as sizes:
        one = measured(network, inputs)
    assert sum(sizes) == len(inputs)
    assert max(sizes) - min(sizes) <= 1, "every batch counts the same"
    assert same(before, state(network))
    again, other = measured(network, inputs), measured(network, inputs, seed=1)
    first = next(reversed(one))
    assert torch.equal(one[first].mean, again[first].mean)
    assert not torch.equal(one[first].mean, other[first].mean)


@pytest.mark.parametrize(
    ("inputs", "held_out", "expected"), [(550, 150, 250), (550, 0, 550), (60, 30, 20), (15, 3, 15)]
)
def test_one_pass_over_all_images_pays_for_measuring_and_choosing(
    inputs: int, held_out: int, expected: int
) -> None:
    assert images_to_measure(inputs, held_out) == expected


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_shares_by_hand(network: Classifier, share: float) -> None:
    own, before = stored_statistics(network.extractor), state(network)
    other = {n: LayerStatistics(s.mean + 2.0, s.variance * 3.0) for n, s in own.items()}
    adapted = with_statistics(network, other, share)
    for name, now in stored_statistics(adapted.extractor).items():
        assert torch.allclose(now.mean, own[name].mean + 2.0 * share, atol=1e-5)
        assert torch.allclose(now.variance, own[name].variance * (1 + 2.0 * share), rtol=1e-4)
    assert same(before, state(network))
    assert same(before, state(adapted)) == (share == 0.0), "0 leaves it bit for bit"


def test_shift_by_hand() -> None:
    network = build(spec("resnet-small"), seed=0)
    own = stored_statistics(network.extractor)
    assert shift(network, own) == 0.0
    layer = next(iter(normalisation_layers(network.extractor).values()))
    moved = {n: LayerStatistics(s.mean + 1.0, s.variance) for n, s in own.items()}
    assert shift(network, moved) == pytest.approx(2 / (1 + layer.eps) / 4, rel=1e-5)
    wider = {n: LayerStatistics(s.mean, 4 * s.variance) for n, s in own.items()}
    assert shift(network, wider) == pytest.approx((0.25 + 4 - 2) / 4, rel=1e-3)
    lost = {n: LayerStatistics(s.mean * math.nan, s.variance) for n, s in own.items()}
    assert math.isnan(shift(network, lost))


def test_a_factor_on_the_images_is_taken_out(network: Classifier) -> None:
    """Convolutions are linear, so that the first layer's statistics, measured anew, undo the scanner."""
    inputs = to_input(shapes((0, 1, 2), 40, 3)[0])
    home = measured(network, inputs)
    adapted = with_statistics(network, measured(network, strange(inputs)), 1.0)
    expected = predict(with_statistics(network, home, 1.0), inputs, CPU)
    assert torch.allclose(predict(adapted, strange(inputs), CPU), expected, atol=0.05)
    assert not torch.allclose(predict(network, strange(inputs), CPU), expected, atol=0.5)


def test_the_smallest_share_that_is_as_good_as_the_best() -> None:
    assert best_share({0.0: 1.0, 0.5: 0.5, 1.0: 0.495}) == 0.5
    assert best_share({0.0: 1.0, 0.5: 0.5, 1.0: 0.4}) == 1.0
    assert best_share({0.0: 0.4, 0.5: 0.5, 1.0: 0.4}) == 0.0
    assert best_share(dict.fromkeys(SHARES, math.inf)) == 0.0


def test_few_images_or_classes_tell_nothing() -> None:
    logits, labels = torch.randn(MIN_SHARED, 4), torch.tensor([0, 1] * (MIN_SHARED // 2))
    assert shared_loss(logits, labels, [0, 1], task=MULTICLASS) is not None
    assert shared_loss(logits, labels, [0], task=MULTICLASS) is None
    assert shared_loss(logits, labels, [], task=MULTICLASS) is None
    assert shared_loss(logits[1:], labels[1:], [0, 1], task=MULTICLASS) is None


def adapt(
    teachers: list[Teacher], inputs: torch.Tensor, labels: torch.Tensor | None = None
) -> dict[str, tuple[float, float]]:
    images, truth = shapes((0, 1), 20, 5)
    held_out = to_input(images), torch.from_numpy(truth)
    of_inputs = torch.zeros(len(inputs), dtype=torch.int64) if labels is None else labels
    adapted, results = adapt_teachers(
        teachers, inputs, of_inputs, held_out, (0, 1), task=MULTICLASS, seed=0, device=CPU
    )
    assert [t.site for t in adapted] == [t.site for t in teachers]
    shares = {t.site: t.share for t in adapted}
    assert all(shares[r.site] == r.share for r in results)
    for before, now in zip(teachers, adapted, strict=True):
        assert same(state(before.network), state(now.network)) == (now.share == 0.0)
    return {r.site: (r.shift, r.share) for r in results}


def test_images_like_the_teachers_leave_it_as_it_was_sent(network: Classifier) -> None:
    inputs = to_input(shapes((0, 1, 2), 60, 3)[0])
    at_home = with_statistics(network, measured(network, inputs), 1.0)
    found = adapt([Teacher("birch", at_home, (0, 1, 2))], inputs)
    assert found["birch"][0] < SAME_CENTRE
    assert found["birch"][1] == 0.0


def from_afar(network: Classifier) -> Classifier:
    """The network as if it had seen other images at home: on these, its first layer is far off scale."""
    elsewhere = stored_statistics(network.extractor)
    first = next(iter(elsewhere))
    there = elsewhere[first]
    elsewhere[first] = LayerStatistics(there.mean + 1.5 * there.variance.sqrt(), 4 * there.variance)
    return with_statistics(network, elsewhere, 1.0)


def test_images_of_another_scanner_are_adapted_to(network: Classifier) -> None:
    inputs = to_input(shapes((0, 1), 60, 3)[0])
    sent = [
        Teacher("birch", from_afar(network), (0, 1, 2)),
        Teacher("cedar", from_afar(network), (2,)),
        Teacher("dahlia", build(spec("resnet-small-gn"), seed=0), (0, 1)),
    ]
    found = adapt(sent, inputs)
    assert found["birch"][0] > SAME_CENTRE
    assert found["birch"][1] > 0.0
    assert found["cedar"][1] == found["birch"][1], "who shares no class follows the others"
    assert "dahlia" not in found, "a network without statistics stays as it is"
    assert found == adapt(sent, inputs)


# --- networks without statistics ------------------------------------------------------------------


def linear(weight: torch.Tensor) -> Classifier:
    """A network whose features are the mean colour of an image, and whose head has these rows."""
    network = build(spec("resnet-small-gn"), seed=0)
    network.extractor = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.head = nn.Linear(3, len(weight))
    with torch.no_grad():
        network.head.weight.copy_(weight)
        network.head.bias.zero_()
    return network.eval()


def test_features_apart_by_hand() -> None:
    network = linear(torch.eye(4, 3))
    images = torch.zeros(6, 3, 8, 8)
    images[:4, 0] = torch.tensor([1.0, 3.0, 2.0, 2.0]).view(4, 1, 1)  # class 0, mean 2
    images[4:, 0] = torch.tensor([6.0, 8.0]).view(2, 1, 1)  # class 1, mean 7
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    home = {0: torch.tensor([3.0, 0.0, 0.0]), 1: torch.tensor([10.0, 0.0, 0.0]), 2: torch.full((3,), 99.0)}
    birch = Teacher("birch", network, (0, 1, 2), class_means=home)
    found = features_apart(birch, images, labels, (0, 1, 3), CPU)
    assert found is not None
    assert found[0].tolist() == [2.0, 0.0, 0.0], "1 and 3 in the mean, whatever their images"
    # Variances within the classes 0.5 and 1, so 0.75 in the mean; the others hardly vary, nor do they move.
    assert found[1] == pytest.approx(4 / (2 * 0.75) / 3, rel=1e-3)
    moved = with_moved_features(network, found[0], 0.5)
    assert torch.equal(moved.head.bias, torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert not network.head.bias.any(), "left as it is"
    expected = network.head(network.features(images) + 0.5 * found[0])
    torch.testing.assert_close(predict(moved, images, CPU), expected.detach())
    assert features_apart(birch, images, labels, (3,), CPU) is None, "no class in common"
    assert features_apart(Teacher("cedar", network, (0, 1)), images, labels, (0, 1), CPU) is None, "no means"


def test_a_network_that_holds_no_statistics_is_brought_by_its_class_means() -> None:
    """Classes differ in one colour, by a threshold that another scanner moves."""
    train, labels = shapes((0, 1), 60, 3)
    inputs, truth = to_input(train), torch.from_numpy(labels)
    plain = linear(torch.eye(4, 3))
    home = mean_features(predict(plain, inputs, CPU, features=True), truth)
    away = home[0] - home[1]
    network = linear(torch.stack([away, -away, 0 * away, 0 * away]))
    with torch.no_grad():
        network.head.bias[:2] = torch.tensor([-1.0, 1.0]) * float(away @ (home[0] + home[1]) / 2)
    elsewhere = {c: m + 4 * (home[0] - home[1]) for c, m in home.items()}
    with torch.no_grad():  # its threshold at home, where all features lie so much further
        network.head.bias[:2] -= torch.tensor([1.0, -1.0]) * float(away @ (4 * away))
    sent = [
        Teacher("birch", network, (0, 1), class_means=elsewhere),
        Teacher("cedar", network, (0, 1)),
    ]
    found = adapt(sent, inputs, truth)
    assert found["birch"][0] > SAME_CENTRE
    assert found["birch"][1] == 1.0
    assert "cedar" not in found, "nothing says where its classes lie"
    at_home = Teacher("dahlia", network, (0, 1), class_means=home)
    found = adapt([at_home], inputs, truth)
    assert found["dahlia"][0] < SAME_CENTRE
    assert found["dahlia"][1] == 0.0


def test_measuring_and_choosing_cost_one_pass_over_all_images(network: Classifier) -> None:
    sent = from_afar(network)
    with counted(sent) as sizes:
        found = adapt([Teacher("birch", sent, (0, 1, 2))], to_input(shapes((0, 1), 60, 3)[0]))
    assert found["birch"][0] > SAME_CENTRE, "every share is tried"
    assert sum(sizes) == 2 * 60 + 2 * 20


def test_within_a_centre_who_shares_no_class_takes_up_half_at_most(network: Classifier) -> None:
    inputs = to_input(shapes((0, 1), 60, 3)[0])
    at_home = with_statistics(network, measured(network, inputs), 1.0)
    found = adapt(
        [Teacher("birch", from_afar(network), (0, 1)), Teacher("cedar", at_home, (2,))],
        inputs,
    )
    assert found["cedar"][0] < SAME_CENTRE
    assert found["cedar"][1] == min(found["birch"][1], 0.5)


def test_a_claim_that_the_network_does_not_bear_out_changes_nothing(network: Classifier) -> None:
    """Else a lying mask would decide how far a teacher is brought to the hospital's images."""
    inputs = to_input(shapes((0, 1), 60, 3)[0])
    usual = Teacher("birch", from_afar(network), (0, 1))
    honest = Teacher("cedar", from_afar(network), (2,), verified=(2,))
    lying = Teacher("cedar", from_afar(network), (0, 1, 2), verified=(2,))
    believed = Teacher("cedar", from_afar(network), (0, 1, 2))
    assert (honest.supported, lying.supported, believed.supported) == ((2,), (2,), (0, 1, 2))
    assert adapt([usual, lying], inputs) == adapt([usual, honest], inputs)


@pytest.mark.slow
def test_an_answer_says_who_was_adapted_and_off_changes_nothing(network: Classifier) -> None:
    train, calibration = shapes((0, 1), 40, 7), shapes((0, 1), 20, 8)
    own, far = teacher((0, 1), site="aster"), from_afar(network)

    def ask(data: LocalData, on: bool) -> tuple[bool, tuple[float, ...]]:
        answer = answer_query(
            own,
            [Teacher("birch", far, (0, 1, 2))],
            data,
            [2],
            task=MULTICLASS,
            method="routed",
            params=TransferParams(adaptation=on, screening=False),
        )
        (expert,) = answer.teachers
        return same(state(far), state(expert.network)), tuple(r.share for r in answer.adaptation)

    assert ask(LocalData(train, calibration), on=False) == (True, ())
    as_sent, (share,) = ask(LocalData(train, calibration), on=True)
    assert share > 0.0
    assert not as_sent
    few = train[0][::8], train[1][::8]
    assert ask(LocalData(few, calibration), on=True) == (True, ()), "so few images say too little"


@pytest.mark.slow
def test_a_teacher_of_other_images_is_not_reduced(network: Classifier) -> None:
    train, calibration = shapes((0, 1), 40, 7), shapes((0, 1), 20, 8)
    inputs = to_input(train[0])
    at_home = with_statistics(network, measured(network, inputs), 1.0)
    teachers = [Teacher("birch", from_afar(network), (0, 1, 2)), Teacher("cedar", at_home, (0, 1, 2))]

    def ranks(method: Method) -> list[float]:
        answer = answer_query(
            teacher((0, 1), site="aster"),
            teachers,
            LocalData(train, calibration),
            [2],
            task=MULTICLASS,
            method=method,
            params=TransferParams(screening=False, rank=0.5, light_rank=0.25),
        )
        return [branch.rank for branch in answer.network.spec.branches]

    assert ranks("qkt") == [1.0, 1.0, 0.5]
    assert ranks("qkt-light") == [1.0, 0.25, 0.25]
