from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qkt_clinical.bundle import load_bundle, write_bundle
from qkt_clinical.card import MASK, Mask
from qkt_clinical.catalog import METHODS, Method
from qkt_clinical.config import TransferParams
from qkt_clinical.errors import QueryError
from qkt_clinical.files import write_json
from qkt_clinical.networks import Classifier, build
from qkt_clinical.objectives import margin
from qkt_clinical.training import Checkpoint, mean_recall, predict, to_input
from qkt_clinical.transfer import (
    Answer,
    LocalData,
    Teacher,
    answer_query,
    carry_rows,
    expert_margins,
    make_views,
    predict_scores,
    refine_head,
    scores_of,
)
from tests.shapes import CLASSES, CPU, counted, same, shapes, spec, state, teacher

BUDGET = 0.1
PARAMS = TransferParams(epochs=6, batch_size=32, views=3)
IMAGES = 80
"""Training images of the asking hospital."""
DATA = LocalData(shapes((0, 1), IMAGES // 2, 5), shapes((0, 1), 30, 6))
HELD = len(DATA.calibration[1])
TEST = shapes(range(4), 40, 99)


@pytest.fixture(scope="module")
def own() -> Classifier:
    """The asking hospital's network: discs and crosses."""
    return teacher((0, 1), site="aster")


@pytest.fixture(scope="module")
def birch() -> Teacher:
    """Crosses and frames."""
    return Teacher("birch", teacher((1, 3), site="birch"), (1, 3))


@pytest.fixture(scope="module")
def cedar() -> Teacher:
    """Discs, bars and frames, in another architecture."""
    network = teacher((0, 2, 3), site="cedar", name="densenet-small")
    return Teacher("cedar", network, (0, 2, 3))


def ask(
    own: Classifier,
    teachers: Sequence[Teacher],
    method: Method = "qkt",
    *,
    query: Sequence[int] = (3,),
    data: LocalData = DATA,
    params: TransferParams = PARAMS,
    seed: int = 1,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Answer:
    return answer_query(
        own,
        teachers,
        data,
        query,
        method=method,
        budget=BUDGET,
        params=params,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )


def answers(answer: Answer, teachers: Sequence[Teacher], images: np.ndarray) -> Tensor:
    return scores_of(answer.network, answer.decision, teachers, to_input(images), CPU).argmax(dim=1)


def balanced_accuracy(predicted: Tensor, relevant: Sequence[int]) -> float:
    labels = torch.from_numpy(TEST[1])
    member = torch.isin(labels, torch.tensor(relevant))
    return mean_recall(predicted[member], labels[member])


def own_accuracy(own: Classifier, relevant: Sequence[int]) -> float:
    logits = predict(own, to_input(TEST[0]), CPU)[:, list(relevant)]
    return balanced_accuracy(torch.tensor(relevant)[logits.argmax(dim=1)], relevant)


# --- the whole ------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", [(2,), (2, 3)])
@pytest.mark.parametrize("method", METHODS)
def test_the_answer_beats_the_hospitals_own_model(
    own: Classifier, birch: Teacher, cedar: Teacher, method: Method, query: tuple[int, ...]
) -> None:
    teachers = [t for t in (birch, cedar) if set(t.known) & set(query)]
    before = [state(n) for n in (own, birch.network, cedar.network)]
    longer = PARAMS.model_copy(update={"epochs": 12, "views": 4})
    answer = ask(own, teachers, method, query=query, params=longer)
    assert all(same(state(n), b) for n, b in zip((own, birch.network, cedar.network), before, strict=True))

    decision, second = answer.decision, answer.phases["phase2"]
    assert (decision.method, decision.local, decision.query) == (method, (0, 1), query)
    assert decision.experts == (tuple(t.site for t in teachers) if method == "routed" else ())
    assert answer.network.spec == own.spec
    assert not answer.network.training
    assert (second["calibration_images"], second["budget"]) == (HELD, BUDGET)
    assert second["offsets"] == {str(q): o for q, o in zip(query, decision.offsets, strict=True)}

    given = torch.isin(answers(answer, teachers, DATA.calibration[0]), torch.tensor(query))
    assert float(given.double().mean()) == pytest.approx(second["given_away"])
    assert second["given_away"] <= BUDGET

    relevant = decision.relevant
    predicted = answers(answer, teachers, TEST[0])
    assert set(predicted.tolist()) <= set(relevant)
    # The own model never names the query: at best 2/3 (2/4) of the classes can be right.
    assert own_accuracy(own, relevant) <= 2 / len(relevant)
    assert balanced_accuracy(predicted, relevant) > own_accuracy(own, relevant) + 0.1


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_answer_in_any_state_of_the_process(
    own: Classifier, birch: Teacher, cedar: Teacher, method: Method
) -> None:
    torch.manual_seed(1)
    first = ask(own, [birch, cedar], method)
    torch.manual_seed(2)
    second = ask(copy.deepcopy(own).train(), [birch, cedar], method)
    assert same(state(first.network), state(second.network))
    assert (first.decision, first.phases) == (second.decision, second.phases)
    if method != "routed":
        assert not same(state(first.network), state(ask(own, [birch, cedar], method, seed=2).network))


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_teachers_does_not_matter(
    own: Classifier, birch: Teacher, cedar: Teacher, method: Method
) -> None:
    one, other = ask(own, [birch, cedar], method), ask(own, [cedar, birch], method)
    assert same(state(one.network), state(other.network))
    assert (one.decision, one.phases) == (other.decision, other.phases)


def test_the_order_of_the_query_does_not_matter(own: Classifier, cedar: Teacher) -> None:
    one, other = (ask(own, [cedar], "qkt-light", query=q) for q in ((2, 3), (3, 2)))
    assert same(state(one.network), state(other.network))
    assert one.decision == other.decision


def test_a_student_keeps_its_network_where_the_method_promises_it(own: Classifier, birch: Teacher) -> None:
    routed = ask(own, [birch], "routed")
    assert same(state(routed.network), state(own))
    light = state(ask(own, [birch], "qkt-light").network)
    before = state(own)
    changed = {k for k in before if not torch.equal(before[k], light[k])}
    assert changed == {"head.weight", "head.bias"}
    assert torch.equal(light["head.weight"][:3], before["head.weight"][:3])
    assert not torch.equal(light["head.weight"][3], before["head.weight"][3])


# --- what teachers are asked ----------------------------------------------------------------------


def test_phase_1_shows_every_view_to_a_teacher_once(own: Classifier, birch: Teacher, cedar: Teacher) -> None:
    epochs = PARAMS.model_copy(update={"epochs": 9})
    with counted(birch.network) as one, counted(cedar.network) as other:
        answer = ask(own, [birch, cedar], params=epochs)
    # Three views of 80 images, and nothing later: not in nine epochs, not for the operating point.
    assert one == other == [IMAGES] * PARAMS.views
    assert answer.phases["phase1"]["views"] == PARAMS.views
    assert answer.phases["phase1"]["teacher_passes"] == 2 * PARAMS.views
    assert len(answer.phases["phase1"]["curves"]) == 9
    with counted(birch.network) as sizes:
        answers(answer, [birch, cedar], TEST[0])
    assert sizes == [], "a student answers alone"


def test_light_shows_every_view_to_a_teacher_once(own: Classifier, birch: Teacher) -> None:
    with counted(birch.network) as sizes:
        answer = ask(own, [birch], "qkt-light")
    assert sum(sizes) == IMAGES * PARAMS.views
    assert answer.phases["phase1"] is None


def test_routed_asks_experts_about_calibration_images_alone(own: Classifier, birch: Teacher) -> None:
    with counted(birch.network) as sizes:
        answer = ask(own, [birch], "routed")
    assert sum(sizes) == HELD
    with counted(birch.network) as sizes:
        answers(answer, [birch], TEST[0])
    assert sum(sizes) == len(TEST[0]), "one pass per prediction"


def test_views_are_the_images_themselves_first() -> None:
    inputs = to_input(DATA.train[0])
    views = make_views(inputs, 3, 1.0, 7, CPU)
    assert torch.equal(views[0], inputs)
    assert [v.shape for v in views] == [inputs.shape] * 3
    assert not torch.allclose(views[1], views[2])
    assert torch.equal(make_views(inputs, 2, 1.0, 7, CPU)[1], views[1]), "a view does not depend on how many"
    assert not torch.equal(make_views(inputs, 2, 1.0, 8, CPU)[1], views[1])


def test_expert_margins_are_the_mean_over_those_who_know(birch: Teacher, cedar: Teacher) -> None:
    inputs = to_input(TEST[0][:10])
    found = expert_margins([birch, cedar], inputs, [2, 3], CPU)
    one, other = (predict(t.network, inputs, CPU) for t in (birch, cedar))
    assert torch.allclose(found[:, 0], margin(other, 2, cedar.known))
    assert torch.allclose(found[:, 1], (margin(one, 3, birch.known) + margin(other, 3, cedar.known)) / 2)


# --- phase 2 --------------------------------------------------------------------------------------


def test_rows_are_carried_through_the_maps(own: Classifier, birch: Teacher, cedar: Teacher) -> None:
    network = build(spec(), seed=11).eval()
    width = network.head.in_features
    maps = [nn.Linear(width, n.head.in_features) for n in (own, birch.network, cedar.network)]
    before = state(network.extractor)
    carry_rows(network, own, [birch, cedar], maps, [2, 3])
    assert same(state(network.extractor), before)
    features = torch.randn(20, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = network.head(features)
        seen = [n.head(m(features)) for n, m in zip((own, birch.network, cedar.network), maps, strict=True)]
    assert torch.allclose(logits[:, :2], seen[0][:, :2], atol=1e-4)
    # Class 2 is cedar's alone, class 3 the mean of both; rivals count by their mean.
    bars = seen[2][:, 2] - (seen[2][:, 0] + seen[2][:, 3]) / 2
    frame = (seen[1][:, 3] - seen[1][:, 1] + seen[2][:, 3] - (seen[2][:, 0] + seen[2][:, 2]) / 2) / 2
    assert torch.allclose(logits[:, 2], bars, atol=1e-4)
    assert torch.allclose(logits[:, 3], frame, atol=1e-4)


def test_a_rare_class_keeps_a_share_of_its_own_row(own: Classifier, birch: Teacher) -> None:
    network = build(spec(), seed=11).eval()
    maps = [nn.Linear(network.head.in_features, n.head.in_features) for n in (own, birch.network)]
    carry_rows(network, own, [birch], maps, [3])
    plain = state(network.head)
    carry_rows(network, own, [birch], maps, [3], [3], 2.0)
    with torch.no_grad():
        row = own.head.weight[3] @ maps[0].weight
    assert torch.allclose(network.head.weight[3], plain["weight"][3] + 2.0 * row, atol=1e-4)
    assert torch.equal(network.head.weight[:3], plain["weight"][:3])


def test_refinement_moves_the_head_alone_and_lowers_the_loss(own: Classifier) -> None:
    network = copy.deepcopy(own)
    before = state(network.extractor)
    images, labels = shapes((0, 1), 20, 8)
    few = shapes((3,), 4, 8)
    features = predict(network, to_input(np.concatenate([images, few[0]])), CPU, features=True)
    target = torch.from_numpy(np.concatenate([labels, few[1]]))
    with counted(network) as sizes:
        curves = refine_head(network, features, target, (0, 1), (3,), [0.4])
    assert sizes == []
    assert same(state(network.extractor), before)
    assert not torch.equal(network.head.weight, own.head.weight)
    assert torch.equal(network.head.weight[2], own.head.weight[2]), "a class outside R is left alone"
    assert curves[-1]["loss"] < 0.5 * curves[0]["loss"]


@pytest.mark.parametrize("method", METHODS)
def test_a_rare_query_class(own: Classifier, birch: Teacher, method: Method) -> None:
    common, few = DATA.train, shapes((3,), 5, 8)
    train = (np.concatenate([common[0], few[0]]), np.concatenate([common[1], few[1]]))
    held = shapes((0, 1, 3), 20, 6)
    answer = ask(own, [birch], method, data=LocalData(train, held))
    assert answer.phases["phase2"]["rare"] == {"3": 5}
    assert answer.decision.rare == (3,)
    assert answer.decision.local == (0, 1)
    assert answer.phases["phase2"]["calibration_images"] == 40, "images of the query are not given away"
    given = answers(answer, [birch], held[0][held[1] != 3]) == 3
    assert float(given.double().mean()) <= BUDGET
    relevant = answer.decision.relevant
    found = balanced_accuracy(answers(answer, [birch], TEST[0]), relevant)
    assert found > own_accuracy(own, relevant) + 0.05


# --- resume, files, errors ------------------------------------------------------------------------


class Stopped(Exception):
    pass


@pytest.mark.parametrize("epoch", [1, 4])
def test_a_stopped_transfer_ends_in_the_same_weights(
    own: Classifier, birch: Teacher, tmp_path: Path, epoch: int
) -> None:
    def stop(done: int, total: int) -> None:
        if done == epoch:
            raise Stopped

    expected = ask(own, [birch])
    checkpoint = Checkpoint(tmp_path, "run")
    with pytest.raises(Stopped):
        ask(own, [birch], checkpoint=checkpoint, progress=stop)
    told: list[int] = []
    resumed = ask(own, [birch], checkpoint=checkpoint, progress=lambda done, total: told.append(done))
    assert told == list(range(epoch + 1, PARAMS.epochs + 1))
    assert same(state(resumed.network), state(expected.network))
    assert (resumed.decision, resumed.phases) == (expected.decision, expected.phases)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_student_from_its_files_answers_alike(
    own: Classifier, cedar: Teacher, tmp_path: Path, method: Method
) -> None:
    answer = ask(own, [cedar], method)
    card = {
        "classes": CLASSES,
        "input": {"shape": (3, 16, 16), "normalisation": "unit", "spacing_mm": None},
        "training": {},
    }
    student = {**card, "kind": "student", "site": "aster", "query": "q", "decision": answer.decision}
    write_bundle(tmp_path, answer.network, student)
    if method == "routed":
        expert = tmp_path / "experts" / "cedar"
        expert.mkdir(parents=True)
        write_bundle(expert, cedar.network, {**card, "kind": "teacher", "site": "cedar"})
        with pytest.raises(QueryError, match="without a mask"):
            predict_scores(load_bundle(tmp_path), to_input(TEST[0]))
        known = tuple(c in cedar.known for c in range(4))
        mask = Mask(
            estimator="combined",
            probes=8,
            seed=0,
            classes=CLASSES,
            scores=tuple(float(k) for k in known),
            threshold=0.5,
            automatic=False,
            known=known,
        )
        write_json(expert / MASK, mask.model_dump(mode="json"))
        with pytest.raises(QueryError, match="answers no query"):
            predict_scores(load_bundle(expert), to_input(TEST[0]))
    found = predict_scores(load_bundle(tmp_path), to_input(TEST[0]))
    expected = scores_of(answer.network, answer.decision, [cedar], to_input(TEST[0]), CPU)
    assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))
    assert torch.allclose(found, expected, atol=1e-5)
    outside = [c for c in range(4) if c not in answer.decision.relevant]
    assert bool(torch.isneginf(found[:, outside]).all())


@pytest.mark.parametrize("method", METHODS)
def test_queries_that_cannot_be_answered(own: Classifier, birch: Teacher, method: Method) -> None:
    for teachers, query in (([], (3,)), ([birch], (2,)), ([birch], (2, 3))):
        with pytest.raises(QueryError) as caught:
            ask(own, teachers, method, query=query)
        assert caught.value.code == "uncovered"
    none = (DATA.calibration[0][:0], DATA.calibration[1][:0])
    for calibration in (none, shapes((3,), 5, 0)):
        with pytest.raises(QueryError) as caught:
            ask(own, [birch], method, data=LocalData(DATA.train, calibration))
        assert caught.value.code == "no-calibration"
    with pytest.raises(QueryError, match="no local class"):
        ask(own, [birch], method, data=LocalData(shapes((3,), 5, 0), DATA.calibration))
