from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from nvflare.app_opt.pt.fedproxloss import PTFedProxLoss
from torch import Tensor, nn
from torch.nn import functional as F

from qkt_clinical.baselines.averaging import average_networks
from qkt_clinical.baselines.distill import distill_all, softened_divergence
from qkt_clinical.baselines.ensembles import mean_logit_scores, mean_probability_scores, restrict
from qkt_clinical.baselines.federated import Participant, global_network, round_draw, round_rate, train_round
from qkt_clinical.baselines.finetune import finetune
from qkt_clinical.baselines.params import DistillParams, FederatedParams, FinetuneParams
from qkt_clinical.common.seeding import derive
from qkt_clinical.data.inputs import to_input
from qkt_clinical.federation.peers import Algorithm
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier, build, fast_layout
from qkt_clinical.task import MULTICLASS, mean_recall
from qkt_clinical.training.loop import learning_rate_factor, shuffled
from tests.federated_reference import one_round, proximal_term, reference
from tests.shapes import CPU, counted, same, shapes, spec, state, teacher

pytestmark = pytest.mark.slow

IMAGES = 60
LOCAL = shapes((0, 1), IMAGES // 2, 5)
TEST = shapes(range(4), 30, 99)
FINETUNE = FinetuneParams(epochs=3, batch_size=32)
DISTILL = DistillParams(epochs=3, batch_size=32, views=3)
FEDERATED = FederatedParams(batch_size=32)


@pytest.fixture(scope="module")
def own() -> Classifier:
    """Discs and crosses."""
    return teacher((0, 1), site="aster")


@pytest.fixture(scope="module")
def birch() -> Classifier:
    """Crosses and frames."""
    return teacher((1, 3), site="birch")


@pytest.fixture(scope="module")
def cedar() -> Classifier:
    """Discs, bars and frames, in another architecture."""
    return teacher((0, 2, 3), site="cedar", name="densenet-small")


def close(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.allclose(one[k].double(), two[k].double(), rtol=1e-4, atol=1e-5) for k in one)


def distance(one: nn.Module, two: nn.Module) -> float:
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return math.sqrt(sum(((p - q) ** 2).sum().item() for p, q in pairs))


def accuracy(network: Classifier, relevant: Sequence[int]) -> float:
    """Mean recall over the relevant classes."""
    labels = torch.from_numpy(TEST[1])
    member = torch.isin(labels, torch.tensor(relevant))
    scores = restrict(predict(network, to_input(TEST[0]), CPU), relevant)
    return mean_recall(scores.argmax(dim=1)[member], labels[member])


# --- ensembles ------------------------------------------------------------------------------------


def test_mean_of_probabilities_by_hand() -> None:
    log = math.log
    one = torch.tensor([[log(2.0), 0.0, 0.0], [0.0, 0.0, 0.0]])  # softmax 1/2, 1/4, 1/4 and thirds
    other = torch.tensor([[0.0, 0.0, log(8.0)], [log(4.0), 0.0, 0.0]])  # 1/10, 1/10, 8/10; 2/3, 1/6, 1/6
    found = mean_probability_scores([one, other], task=MULTICLASS)
    expected = torch.tensor([[0.3, 0.175, 0.525], [0.5, 0.25, 0.25]]).log()
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-6)
    # Shifting a network's logits changes its probabilities not at all.
    assert torch.allclose(mean_probability_scores([one + 7.0, other], task=MULTICLASS), expected, atol=1e-6)


def test_mean_of_probabilities_stays_finite() -> None:
    found = mean_probability_scores(
        [torch.tensor([[0.0, 500.0]]), torch.tensor([[0.0, 300.0]])], task=MULTICLASS
    )
    # log((e^-500 + e^-300) / 2): the smaller one vanishes beside the larger.
    assert torch.allclose(found, torch.tensor([[-300.0 - math.log(2.0), 0.0]]))


def test_mean_of_logits_by_hand() -> None:
    one, other = torch.tensor([[1.0, -2.0]]), torch.tensor([[4.0, 0.5]])
    assert torch.equal(mean_logit_scores([one, other]), torch.tensor([[2.5, -0.75]]))


def test_the_two_ensembles_can_disagree() -> None:
    sure, doubtful = torch.tensor([[0.0, 9.0]]), torch.tensor([[30.0, 0.0]])
    assert mean_logit_scores([sure, doubtful, sure]).argmax() == 0
    assert mean_probability_scores([sure, doubtful, sure], task=MULTICLASS).argmax() == 1


@pytest.mark.parametrize("ensemble", [partial(mean_probability_scores, task=MULTICLASS), mean_logit_scores])
def test_ensembles_do_not_depend_on_the_order_of_networks(ensemble: object) -> None:
    assert callable(ensemble)
    draw = torch.Generator().manual_seed(0)
    logits = [torch.randn(200, 8, generator=draw) * 5 for _ in range(5)]
    before = [part.clone() for part in logits]
    assert torch.equal(ensemble(logits), ensemble(logits[::-1]))
    assert torch.allclose(ensemble(logits[:1]).softmax(1), logits[0].softmax(1), atol=1e-6)
    assert all(torch.equal(part, b) for part, b in zip(logits, before, strict=True))


def test_restriction_leaves_relevant_scores_alone() -> None:
    scores = torch.tensor([[5.0, 1.0, 2.0, 9.0], [0.0, -1.0, -2.0, 3.0]])
    found = restrict(scores, (1, 2))
    inf = math.inf
    assert torch.equal(found, torch.tensor([[-inf, 1.0, 2.0, -inf], [-inf, -1.0, -2.0, -inf]]))
    assert found.argmax(dim=1).tolist() == [2, 1]
    assert scores[0, 0] == 5.0


# --- averages -------------------------------------------------------------------------------------


def filled(value: float, count: int) -> Classifier:
    """Every float of the network is ``value``, every counter ``count``."""
    network = build(spec(), seed=0)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.fill_(value if tensor.is_floating_point() else count)
    return network


def test_average_by_hand() -> None:
    networks = [filled(1.0, 7), filled(2.0, 9), filled(-4.0, 11)]
    before = [state(n) for n in networks]
    found = average_networks(networks, [2, 5, 1]).state_dict()
    # (2 * 1 + 5 * 2 - 1 * 4) / 8 = 1
    assert any("running_var" in name for name in found)
    for tensor in found.values():
        assert bool((tensor == (1.0 if tensor.is_floating_point() else 7)).all())
    assert all(same(state(n), b) for n, b in zip(networks, before, strict=True))


def test_average_of_one_is_itself_and_of_none_is_refused(own: Classifier, cedar: Classifier) -> None:
    one = average_networks([own], [3.0])
    assert same(state(one), state(own))
    one.head.bias.data.add_(1.0)
    assert not torch.equal(one.head.bias, own.head.bias), "a network of its own"
    for networks, weights in (([], []), ([own], [0.0]), ([own, own], [1.0]), ([own, own], [2.0, -1.0])):
        with pytest.raises(ValueError, match="cannot be averaged"):
            average_networks(networks, weights)
    with pytest.raises(ValueError, match="different specifications"):
        average_networks([own, cedar], [1.0, 1.0])


def test_average_does_not_depend_on_the_order_of_networks() -> None:
    networks = [build(spec(), seed=s) for s in range(4)]
    weights = [0.1, 0.7, 3.0, 11.0]
    one, other = average_networks(networks, weights), average_networks(networks[::-1], weights[::-1])
    assert same(state(one), state(other))
    assert same(state(one), state(average_networks(networks, [w * 4 for w in weights])))


# --- losses ---------------------------------------------------------------------------------------


def test_softened_divergence_by_hand() -> None:
    # At temperature 2 the student says 1/2, 1/2 and the teacher 4/5, 1/5.
    target = torch.tensor([[0.8, 0.2]])
    expected = 4 * (0.8 * math.log(1.6) + 0.2 * math.log(0.4))
    assert float(softened_divergence(torch.zeros(1, 2), target, 2.0, task=MULTICLASS)) == pytest.approx(
        expected, rel=1e-5
    )
    logits = torch.tensor([[2 * math.log(4.0), 0.0]])
    assert float(softened_divergence(logits, target, 2.0, task=MULTICLASS)) == pytest.approx(0.0, abs=1e-6)


def test_proximal_terms_of_flare_and_of_the_reference_by_hand() -> None:
    network = build(spec(), seed=0)
    start = [p.detach().clone() for p in network.parameters()]
    assert proximal_term(network, start, 3.0).item() == 0.0
    with torch.no_grad():
        network.head.bias += torch.tensor([1.0, 0.0, -2.0, 0.0])
    global_network = build(spec(), seed=0).requires_grad_(False)
    for term in (proximal_term(network, start, 3.0), PTFedProxLoss(3.0)(network, global_network)):
        assert term.item() == pytest.approx(0.5 * 3.0 * 5.0)
        network.zero_grad()
        term.backward()
        assert torch.allclose(network.head.bias.grad, torch.tensor([3.0, 0.0, -6.0, 0.0]))


# --- fine-tuning ----------------------------------------------------------------------------------


def test_finetuning_learns_a_rare_class(own: Classifier) -> None:
    before = state(own)
    few = shapes((3,), 8, 8)
    train = (np.concatenate([LOCAL[0], few[0]]), np.concatenate([LOCAL[1], few[1]]))
    params = FinetuneParams(epochs=6, batch_size=16, learning_rate=3e-3)
    found = finetune(
        own,
        train,
        shapes((0, 1, 3), 8, 7),
        (0, 1, 3),
        params,
        seed=1,
        name="aster",
        device=CPU,
        task=MULTICLASS,
    )
    assert same(state(own), before)
    assert not found.training
    assert accuracy(own, (0, 1, 3)) <= 0.7
    assert accuracy(found, (0, 1, 3)) > accuracy(own, (0, 1, 3)) + 0.2


def test_finetuning_leaves_rows_outside_r_and_keeps_its_best_epoch(own: Classifier) -> None:
    still = FINETUNE.model_copy(update={"weight_decay": 0.0, "learning_rate": 1e-2})
    told: list[tuple[int, int]] = []

    def tuned(val: tuple[np.ndarray, np.ndarray], epochs: int, name: str = "aster") -> Classifier:
        longer = still.model_copy(update={"epochs": epochs})
        return finetune(
            own,
            LOCAL,
            val,
            (0, 1),
            longer,
            seed=1,
            name=name,
            device=CPU,
            progress=lambda done, total: told.append((done, total)),
            task=MULTICLASS,
        )

    none = (LOCAL[0][:0], LOCAL[1][:0])
    last = tuned(none, 2)
    assert told == [(1, 2), (2, 2)]
    assert torch.equal(last.head.weight[2:], own.head.weight[2:])
    assert not torch.equal(last.head.weight[:2], own.head.weight[:2])
    assert same(state(tuned(none, 2)), state(last))
    assert not same(state(tuned(none, 2, "birch")), state(last)), "seeds depend on the name"
    # Images of classes that are not relevant judge nothing: as without validation, the last epoch stays.
    assert same(state(tuned(shapes((2, 3), 5, 7), 2)), state(last))


def test_finetuning_returns_the_epoch_best_on_validation(own: Classifier) -> None:
    # Every training label is wrong, so that the first epoch, at the smallest rate, harms least.
    wrong = (LOCAL[0], 1 - LOCAL[1])
    params = FinetuneParams(epochs=4, batch_size=16, learning_rate=3e-3)
    val = shapes((0, 1), 20, 7)
    none = (val[0][:0], val[1][:0])
    last = finetune(own, wrong, none, (0, 1), params, seed=1, name="a", device=CPU, task=MULTICLASS)
    best = finetune(own, wrong, val, (0, 1), params, seed=1, name="a", device=CPU, task=MULTICLASS)
    assert accuracy(last, (0, 1)) < 0.3
    assert accuracy(best, (0, 1)) > accuracy(last, (0, 1)) + 0.1


# --- distillation from all ------------------------------------------------------------------------


def distilled(own: Classifier, teachers: Sequence[Classifier], seed: int = 1, **update: object) -> Classifier:
    params = DISTILL.model_copy(update=update)
    return distill_all(own, teachers, LOCAL[0], params, seed=seed, device=CPU, task=MULTICLASS)


def test_distillation_shows_every_view_to_a_teacher_once(
    own: Classifier, birch: Classifier, cedar: Classifier
) -> None:
    teachers = [own, birch, cedar]
    before = [state(n) for n in teachers]
    with counted(birch) as one, counted(cedar) as other:
        found = distilled(own, teachers, epochs=5)
    assert one == other == [IMAGES] * DISTILL.views
    assert all(same(state(n), b) for n, b in zip(teachers, before, strict=True))
    assert not found.training
    assert found.spec == own.spec


def test_distillation_is_reproducible_in_any_order(
    own: Classifier, birch: Classifier, cedar: Classifier
) -> None:
    torch.manual_seed(1)
    one = distilled(own, [own, birch, cedar])
    torch.manual_seed(2)
    assert same(state(distilled(own, [cedar, own, birch])), state(one))
    assert not same(state(distilled(own, [own, birch, cedar], seed=2)), state(one))


def test_distillation_learns_what_the_teachers_say(own: Classifier, birch: Classifier) -> None:
    views = to_input(LOCAL[0])

    def divergence(network: Classifier) -> float:
        target = mean_probability_scores(
            [predict(n, views, CPU) for n in (own, birch)], task=MULTICLASS
        ).exp()
        return float(softened_divergence(predict(network, views, CPU), target, 1.0, task=MULTICLASS))

    alike = {"epochs": 10, "augment": 0.0, "temperature": 1.0}
    assert divergence(distilled(own, [own, birch], **alike)) < 0.5 * divergence(own)


# --- federations ----------------------------------------------------------------------------------

HOSPITALS = (
    Participant("aster", LOCAL),
    Participant("birch", shapes((1, 3), 16, 6)),
    Participant("cedar", shapes((0, 2, 3), 12, 7)),
)


def federation(
    hospitals: Sequence[Participant],
    rounds: int,
    proximal: float = 0.0,
    *,
    seed: int = 1,
    params: FederatedParams = FEDERATED,
    algorithm: Algorithm = "fedprox",
) -> Classifier:
    return reference(
        hospitals, spec(), params, algorithm=algorithm, rounds=rounds, proximal=proximal, seed=seed
    )


def plain_epoch(network: Classifier, site: str, number: int, rate: float) -> None:
    """One local epoch, written out: AdamW, class weights, the softmax over all classes."""
    inputs, labels = to_input(LOCAL[0]), torch.from_numpy(LOCAL[1])
    settings = FEDERATED
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=settings.weight_decay)
    network.train()
    draw = generator(1, "federated", site, str(number))
    parts = list(shuffled(len(labels), settings.batch_size, draw))
    for step, index in enumerate(parts):
        optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(step, len(parts), 0.1)
        optimizer.zero_grad()
        F.cross_entropy(network(inputs[index]), labels[index]).backward()  # both classes have 30 images
        optimizer.step()
    network.eval()


def alone(rounds: int) -> Classifier:
    """One hospital's rounds, one upon the other."""
    network = global_network(spec(), 1)
    for number in range(1, rounds + 1):
        network, _ = one_round(network, HOSPITALS[0], FEDERATED, number, rounds)
    return network


def test_one_hospital_is_local_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkt_clinical.training.classifier.augment", lambda images, strength, draw: images)
    expected = fast_layout(build(spec(), seed=derive(1, "federated")))
    plain_epoch(expected, "aster", 1, FEDERATED.learning_rate)
    assert close(state(alone(1)), state(expected))
    # Over three rounds the rate falls along a cosine: 1, (1 + cos 0) / 2 = 1, (1 + cos 90°) / 2 = 1/2.
    for number, share in ((2, 1.0), (3, 0.5)):
        plain_epoch(expected, "aster", number, share * FEDERATED.learning_rate)
    assert close(state(alone(3)), state(expected))


def test_a_huge_proximal_weight_holds_the_global_network() -> None:
    start = build(spec(), seed=derive(1, "federated"))
    small = FederatedParams(batch_size=4)
    free, slight, held = (federation(HOSPITALS, 1, mu, params=small) for mu in (0.0, 0.1, 1e6))
    assert distance(held, start) < distance(slight, start) < distance(free, start)
    assert distance(held, start) < 0.1 * distance(free, start)


def test_a_round_leaves_the_global_network_and_the_images_alone() -> None:
    start, images = global_network(spec(), 1), HOSPITALS[0].train[0].copy()
    before = state(start)
    torch.manual_seed(1)
    one, _ = one_round(start, HOSPITALS[0], FEDERATED, 1, 2)
    torch.manual_seed(2)
    again, _ = one_round(start, HOSPITALS[0], FEDERATED, 1, 2)
    assert same(state(one), state(again))
    assert not one.training
    assert same(state(start), before)
    assert np.array_equal(HOSPITALS[0].train[0], images)
    other, _ = one_round(start, HOSPITALS[0], FEDERATED, 2, 2)
    assert not same(state(one), state(other))


def test_after_every_step_its_rate_is_told() -> None:
    rates: list[float] = []
    small = FederatedParams(batch_size=16)

    def note(local: Classifier, rate: float) -> None:
        rates.append(rate)

    train_round(
        global_network(spec(), 1),
        to_input(LOCAL[0]),
        torch.from_numpy(LOCAL[1]),
        small,
        learning_rate=0.5,
        draw=round_draw(1, "aster", 1),
        device=CPU,
        after_step=note,
        task=MULTICLASS,
    )
    assert rates == [0.5 * learning_rate_factor(step, 4, 0.1) for step in range(4)]


def test_the_rate_falls_over_the_rounds() -> None:
    rates = [round_rate(FEDERATED, number, 4) for number in (1, 2, 3, 4)]
    # The first is whole, then (1 + cos) / 2 of 0, 60 and 120 degrees.
    assert rates == pytest.approx([FEDERATED.learning_rate * share for share in (1, 1, 0.75, 0.25)])


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_the_global_network_learns_what_no_hospital_holds_alone(algorithm: Algorithm) -> None:
    params = FederatedParams(batch_size=16, learning_rate=3e-3)
    found = federation(HOSPITALS, 12, params=params, algorithm=algorithm)
    assert accuracy(found, range(4)) > 0.75
    personal = finetune(
        copy.deepcopy(found),
        LOCAL,
        shapes((0, 1), 10, 7),
        (0, 1),
        FINETUNE,
        seed=1,
        name="g",
        device=CPU,
        task=MULTICLASS,
    )
    assert accuracy(personal, (0, 1)) >= accuracy(found, (0, 1)) - 0.05
