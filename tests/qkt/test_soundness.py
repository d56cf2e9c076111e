"""Networks that are valid files and nonsense: set aside by name, whatever the method, and told."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from qkt_clinical.catalog import BY_NETWORKS, Method
from qkt_clinical.data.inputs import to_input
from qkt_clinical.errors import BundleError, QueryError
from qkt_clinical.models.networks import Classifier, build
from qkt_clinical.qkt.answer import answer_query
from qkt_clinical.qkt.masks import compute_mask, verified_classes
from qkt_clinical.qkt.panel import Teacher
from qkt_clinical.qkt.soundness import MAX_LOGIT, NetworkOutputs, defect, indistinct, observe
from qkt_clinical.qkt.steps import Answer, LocalData
from qkt_clinical.task import MULTICLASS
from tests.shapes import CLASSES, CPU, same, shapes, spec, state, teacher
from tests.stages.test_transfer import DATA, RARE

pytestmark = pytest.mark.slow

Spoil = Callable[[Classifier], None]
WEIGHTS, ACTIVATIONS, ANSWERS, CONSTANT = "its weights", "its layers", "its answer", "does not depend"


def head(value: float) -> Spoil:
    return lambda network: network.head.weight.fill_(value)


def scaled_head(factor: float) -> Spoil:
    return lambda network: network.head.weight.mul_(factor)


def bias(value: float, named: int = 3) -> Spoil:
    return lambda network: network.head.bias[named].fill_(value)


def variances(value: float) -> Spoil:
    def spoil(network: Classifier) -> None:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(value)  # type: ignore[union-attr]

    return spoil


def norm_weights(value: float) -> Spoil:
    def spoil(network: Classifier) -> None:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(value)

    return spoil


def all_parameters(value: float) -> Spoil:
    def spoil(network: Classifier) -> None:
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(value)

    return spoil


def one_class(named: int) -> Spoil:
    def spoil(network: Classifier) -> None:
        network.head.weight.zero_()
        network.head.bias.zero_()
        network.head.bias[named] = 30.0

    return spoil


def duplicated(network: Classifier) -> None:
    network.head.weight.copy_(network.head.weight[3].expand_as(network.head.weight))
    network.head.bias.fill_(0.0)


def blind(network: Classifier) -> None:
    """Its extractor gives every image the same features."""
    last = [m for m in network.extractor.modules() if isinstance(m, nn.BatchNorm2d)][-1]
    for module in network.extractor.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.zero_()
    last.bias.fill_(1.0)


NONSENSE: dict[str, tuple[Spoil, str]] = {
    "head of 3e38": (head(3e38), WEIGHTS),
    "head of 1e30": (head(1e30), WEIGHTS),
    "head times 1e8": (scaled_head(1e8), ANSWERS),
    "head of zeros": (head(0.0), CONSTANT),
    "all zeros": (all_parameters(0.0), CONSTANT),
    "denormal head": (scaled_head(1e-40), CONSTANT),
    "all denormal": (all_parameters(1e-40), CONSTANT),
    "variances of 1e38": (variances(1e38), WEIGHTS),
    "variances of 1e9": (variances(1e9), CONSTANT),
    "not a number": (bias(math.nan), WEIGHTS),
    "infinite bias": (bias(math.inf), WEIGHTS),
    "bias of 3e38": (bias(3e38), WEIGHTS),
    "norms of 1e30": (norm_weights(1e30), WEIGHTS),
    "norms of 1e8": (norm_weights(1e8), ACTIVATIONS),
    "one constant class": (one_class(3), CONSTANT),
    "one class duplicated": (duplicated, CONSTANT),
    "blind": (blind, CONSTANT),
}


@pytest.fixture(scope="module")
def own() -> Classifier:
    return teacher((0, 1), site="aster")


@pytest.fixture(scope="module")
def birch() -> Teacher:
    return Teacher("birch", teacher((1, 3), site="birch"), (1, 3))


@pytest.fixture(scope="module")
def elm(birch: Teacher) -> Teacher:
    """Who will be spoilt: it shares no class with the hospital."""
    return Teacher("elm", teacher((2, 3), site="elm"), (2, 3))


def spoilt(sound: Teacher, kind: str) -> Teacher:
    network = copy.deepcopy(sound.network)
    with torch.no_grad():
        NONSENSE[kind][0](network)
    return replace(sound, network=network)


def ask(own: Classifier, teachers: list[Teacher], method: Method, data: LocalData = DATA) -> Answer:
    return answer_query(own, teachers, data, (3,), method=method, budget=0.1, seed=1, task=MULTICLASS)


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_set_aside_by_name(own: Classifier, birch: Teacher, elm: Teacher, kind: str) -> None:
    answer = ask(own, [birch, spoilt(elm, kind)], "routed")
    assert [t.site for t in answer.teachers] == ["birch"]
    assert answer.decision.experts == ("birch",)
    (result,) = [r for r in answer.screening if not r.included]
    assert result.site == "elm"
    assert NONSENSE[kind][1] in result.reason
    assert all(math.isfinite(o) for o in answer.decision.offsets)


@pytest.mark.parametrize("data", [DATA, RARE], ids=["absent", "rare"])
@pytest.mark.parametrize(
    ("method", "kind"),
    list(zip(BY_NETWORKS, ["head of 3e38", "all zeros", "infinite bias", "all zeros"], strict=True)),
)
def test_the_answer_is_the_one_as_if_it_were_not_there(
    own: Classifier, birch: Teacher, elm: Teacher, kind: str, method: Method, data: LocalData
) -> None:
    answer, expected = (
        ask(own, teachers, method, data) for teachers in ([birch, spoilt(elm, kind)], [birch])
    )
    assert same(state(answer.network), state(expected.network))
    assert answer.decision == expected.decision


@pytest.mark.parametrize("method", BY_NETWORKS)
def test_without_screening_nonsense_is_set_aside_as_well(
    own: Classifier, birch: Teacher, elm: Teacher, method: Method
) -> None:
    from qkt_clinical.config.params import TransferParams

    answer = answer_query(
        own,
        [birch, spoilt(elm, "head of 3e38")],
        DATA,
        (3,),
        method=method,
        params=TransferParams(screening=False),
        seed=1,
        task=MULTICLASS,
    )
    assert [(r.site, r.included) for r in answer.screening] == [("birch", True), ("elm", False)]


@pytest.mark.parametrize("method", BY_NETWORKS)
def test_if_no_teacher_is_left_each_is_named(
    own: Classifier, birch: Teacher, elm: Teacher, method: Method
) -> None:
    with pytest.raises(QueryError) as caught:
        ask(own, [spoilt(birch, "head of zeros"), spoilt(elm, "head of 1e30")], method)
    assert caught.value.code == "untrusted"
    assert "birch its answer does not depend on the image; elm its weights are not finite" in str(
        caught.value
    )


@pytest.mark.parametrize("kind", ["head of 3e38", "all zeros", "not a number", "variances of 1e9"])
def test_the_hospitals_own_network_is_held_to_the_same(own: Classifier, birch: Teacher, kind: str) -> None:
    broken = spoilt(Teacher("aster", own, (0, 1)), kind).network
    with pytest.raises(QueryError, match="the hospital's own network gives no usable answers") as caught:
        ask(broken, [birch], "qkt")
    assert caught.value.code == "unsound-network"
    assert "qkt train" in caught.value.remedy


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["resnet-small", "resnet-small-gn", "densenet-small"])
def test_sound_teachers_are_never_set_aside(name: str, seed: int) -> None:
    """After two epochs as after many, on few images and on flat ones."""
    network = teacher((seed % 4, (seed + 1) % 4), site=f"site{seed}", name=name, epochs=2)  # type: ignore[arg-type]
    held = (seed % 4, (seed + 1) % 4)
    for images in (shapes((0, 1), 30, seed)[0], shapes((2, 3), 2, seed)[0], shapes((0,), 1, seed)[0]):
        found = observe(network, to_input(images), flips=False, device=CPU)
        assert defect(network, found, varied=len(images) > 1) == ""
        assert not indistinct(found.logits, held)


def test_equal_images_do_not_show_whether_a_network_looks(own: Classifier) -> None:
    inputs = to_input(shapes((0,), 1, 0)[0]).expand(6, -1, -1, -1)
    found = observe(own, inputs, flips=False, device=CPU)
    assert defect(own, found, varied=False) == ""
    assert "does not depend" in defect(own, found)


def test_what_is_observed_is_what_the_network_says(own: Classifier) -> None:
    inputs = to_input(DATA.calibration[0])
    found = observe(own, inputs, flips=False, device=CPU)
    with torch.no_grad():
        torch.testing.assert_close(found.logits, own(inputs))
        features = own.features(inputs)
    assert float(features.abs().max()) <= found.largest < 1e3
    assert not any(m._forward_hooks for m in own.modules())


def test_indistinct_classes_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 5.0, 4.0], [3.0, 2.0, 7.0, 4.5], [0.0, 2.0, 4.0, 9.0]])
    # Class 1 never moves; class 2 is class 0 and four more.
    assert indistinct(logits, (0, 1, 2, 3)) == {0, 1, 2}
    assert indistinct(logits, (0, 3)) == frozenset()
    assert indistinct(logits[:1], (0, 1)) == frozenset(), "one image shows nothing"
    assert indistinct(logits, ()) == frozenset()


def test_a_claim_of_a_class_that_looks_like_another_does_not_count(
    own: Classifier, birch: Teacher, elm: Teacher
) -> None:
    network = copy.deepcopy(elm.network)
    with torch.no_grad():
        network.head.weight[3] = network.head.weight[2]
    answer = ask(own, [birch, replace(elm, network=network)], "qkt")
    (result,) = [r for r in answer.screening if r.site == "elm"]
    assert (result.included, result.unverified) == (False, (2, 3))


def test_defects_by_hand() -> None:
    network = build(spec(), seed=0)
    logits = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    outputs = NetworkOutputs(torch.zeros(2, 3), logits, 1.0)
    assert defect(network, outputs) == ""
    assert "its layers" in defect(network, replace(outputs, largest=math.nan))
    assert "its answers" in defect(network, replace(outputs, logits=logits * 2 * MAX_LOGIT))
    assert "does not depend" in defect(network, replace(outputs, logits=logits * 0 + 3.0))
    assert "does not depend" in defect(network, replace(outputs, logits=logits * 0 + logits[:, :2].sum()))


@pytest.mark.parametrize("kind", ["head of 3e38", "not a number"])
def test_a_mask_is_not_read_from_nonsense(own: Classifier, kind: str) -> None:
    broken = spoilt(Teacher("aster", own, (0, 1)), kind).network
    if kind == "not a number":
        with pytest.raises(BundleError, match="no finite answer to noise"):
            compute_mask(broken, (3, 16, 16), CLASSES, probes=16)
    with torch.no_grad():
        broken.head.weight.fill_(math.nan)
    assert verified_classes(broken, (3, 16, 16), threshold="auto", probes=16, seed=0) == ()
