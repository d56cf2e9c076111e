from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qkt_clinical.benchmark.ablations import answer_ablated
from qkt_clinical.benchmark.distillation import carry_rows
from qkt_clinical.benchmark.phases import DistillationParams, Phase1Way
from qkt_clinical.catalog import BY_NETWORKS, Method
from qkt_clinical.common.files import write_json
from qkt_clinical.config.params import MeansPrivacy, TransferParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Images
from qkt_clinical.errors import QueryError
from qkt_clinical.models.bundle import load_bundle, write_bundle
from qkt_clinical.models.class_means import class_means
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier, build
from qkt_clinical.qkt.answer import answer_query
from qkt_clinical.qkt.consensus import consensus, consensus_rows, margin
from qkt_clinical.qkt.discriminant import discriminant_rows
from qkt_clinical.qkt.head import DISCRIMINANT_SHARE, balanced_sample, refine_head
from qkt_clinical.qkt.operating_point import (
    as_if_held_out,
    false_query_rate,
    offset_for_budget,
    offsets_for_budget,
    query_scores,
)
from qkt_clinical.qkt.panel import Teacher
from qkt_clinical.qkt.prediction import mirrored, predict_scores, scores_of
from qkt_clinical.qkt.steps import Answer, LocalData
from qkt_clinical.records.card import MASK, InputSpec, Mask
from qkt_clinical.records.phases import Phase1
from qkt_clinical.stages.transfer import correct_masks
from qkt_clinical.task import MULTICLASS, mean_recall
from qkt_clinical.training.augment import make_views, view_batches
from tests.shapes import CLASSES, CPU, counted, same, shapes, spec, state, teacher

pytestmark = pytest.mark.slow

BUDGET = 0.1
PARAMS = TransferParams(adaptation=False)
"""Teachers as they are sent: tests/qkt/test_adaptation.py is about what brings them to the images."""
DISTILLATION = DistillationParams(epochs=6, batch_size=32, views=3)
WAYS: dict[str, tuple[Method, Phase1Way]] = {
    "qkt": ("qkt", "merge"),
    "qkt-light": ("qkt-light", "merge"),
    "routed": ("routed", "merge"),
    "distill": ("qkt", "distill"),
    "joint": ("qkt", "joint"),
}
"""The three methods, and what else the first one's phase 1 is in ablations."""
IMAGES = 80
"""Training images of the asking hospital."""
DATA = LocalData(shapes((0, 1), IMAGES // 2, 5), shapes((0, 1), 30, 6))
HELD = len(DATA.calibration[1])
LEARNED = min(PARAMS.images, len(DATA.train[1]))
"""Training images on which an operating point is set beside these."""
FEW = shapes((3,), 5, 8)
RARE = LocalData(
    (np.concatenate([DATA.train[0], FEW[0]]), np.concatenate([DATA.train[1], FEW[1]])),
    shapes((0, 1, 3), 20, 6),
)
"""With five images of frames."""
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
    budget: float = BUDGET,
    params: TransferParams = PARAMS,
    seed: int = 1,
    progress: Callable[[int, int], None] | None = None,
    phase1: Phase1Way = "merge",
    phase2: bool = True,
    distillation: DistillationParams = DISTILLATION,
) -> Answer:
    if (phase1, phase2) == ("merge", True):
        return answer_query(
            own,
            teachers,
            data,
            query,
            method=method,
            budget=budget,
            params=params,
            seed=seed,
            progress=progress,
            task=MULTICLASS,
        )
    return answer_ablated(
        own,
        teachers,
        data,
        query,
        method=method,
        phase1=phase1,
        phase2=phase2,
        distillation=distillation,
        budget=budget,
        params=params,
        seed=seed,
        progress=progress,
        task=MULTICLASS,
    )


def asked(
    own: Classifier,
    teachers: Sequence[Teacher],
    method: Method = "qkt",
    *,
    query: tuple[int, ...] = (3,),
    rare: bool = False,
    phase1: Phase1Way = "merge",
    phase2: bool = True,
) -> Answer:
    """:func:`ask`, once for all tests that read the same answer and change nothing of it."""
    return _found(own, tuple(teachers), method, query, rare, phase1, phase2)


@functools.cache
def _found(
    own: Classifier,
    teachers: tuple[Teacher, ...],
    method: Method,
    query: tuple[int, ...],
    rare: bool,
    phase1: Phase1Way,
    phase2: bool,
) -> Answer:
    data = RARE if rare else DATA
    return ask(own, teachers, method, query=query, data=data, phase1=phase1, phase2=phase2)


def course(answer: Answer) -> tuple[object, ...]:
    """All that is told of an answer beside its weights."""
    return answer.decision, answer.screening, answer.phase1, answer.refined.curves, answer.operating_point


def answers(answer: Answer, teachers: Sequence[Teacher], images: np.ndarray) -> Tensor:
    return scores_of(answer.network, answer.decision, teachers, to_input(images), CPU).argmax(dim=1)


def balanced_accuracy(predicted: Tensor, relevant: Sequence[int]) -> float:
    labels = torch.from_numpy(TEST[1])
    member = torch.isin(labels, torch.tensor(relevant))
    return mean_recall(predicted[member], labels[member])


def own_accuracy(own: Classifier, relevant: Sequence[int]) -> float:
    logits = predict(own, to_input(TEST[0]), CPU)[:, list(relevant)]
    return balanced_accuracy(torch.tensor(relevant)[logits.argmax(dim=1)], relevant)


def with_means(teacher_: Teacher) -> Teacher:
    """A teacher whose bundle holds class means."""
    images, labels = shapes(teacher_.claimed, 20, 31)
    means = class_means(
        teacher_.network, images, labels, "unit", CPU, MeansPrivacy(epsilon=None), generator(0)
    )
    return replace(teacher_, class_means=means)


# --- the whole ------------------------------------------------------------------------------------


def keeps_its_budget(answer: Answer, teachers: list[Teacher]) -> None:
    """Whether the answers on calibration images are those that the operating point was set by."""
    point, query = answer.operating_point, torch.tensor(answer.decision.query)
    given = torch.isin(answers(answer, teachers, DATA.calibration[0]), query)
    offsets = torch.tensor(answer.decision.offsets)
    assert torch.equal(given, (point.scores[:HELD] + offsets).max(dim=1).values > 0)
    assert len(point.scores) == point.own_images == HELD + LEARNED
    assert false_query_rate(point.scores, offsets) == pytest.approx(point.false_query_rate)
    assert point.false_query_rate <= BUDGET


@pytest.mark.parametrize("query", [(2,), (2, 3)])
@pytest.mark.parametrize("way", WAYS)
def test_the_answer_beats_the_hospitals_own_model(
    own: Classifier, birch: Teacher, cedar: Teacher, way: str, query: tuple[int, ...]
) -> None:
    method, phase1 = WAYS[way]
    teachers = [birch, cedar]
    before = [state(n) for n in (own, birch.network, cedar.network)]
    answer = asked(own, teachers, method, query=query, phase1=phase1)
    assert all(same(state(n), b) for n, b in zip((own, birch.network, cedar.network), before, strict=True))

    decision, point = answer.decision, answer.operating_point
    assert (decision.method, decision.local, decision.query) == (method, (0, 1), query)
    assert decision.experts == (("birch", "cedar") if method == "routed" else ())
    assert decision.flips == (method == "routed")
    assert not answer.network.training
    assert (point.own_images, decision.budget) == (HELD + LEARNED, BUDGET)
    assert len(decision.offsets) == len(query)

    keeps_its_budget(answer, teachers)

    relevant = decision.relevant
    predicted = answers(answer, teachers, TEST[0])
    assert set(predicted.tolist()) <= set(relevant)
    # The own model never names the query: at best 2/3 (2/4) of the classes can be right.
    assert own_accuracy(own, relevant) <= 2 / len(relevant)
    assert balanced_accuracy(predicted, relevant) > own_accuracy(own, relevant) + 0.1


@pytest.mark.parametrize("way", WAYS)
def test_same_seed_same_answer_in_any_state_of_the_process(own: Classifier, birch: Teacher, way: str) -> None:
    method, phase1 = WAYS[way]
    torch.manual_seed(1)
    first = asked(own, [birch], method, phase1=phase1)
    torch.manual_seed(2)
    second = ask(copy.deepcopy(own).train(), [birch], method, phase1=phase1)
    assert same(state(first.network), state(second.network))
    assert course(first) == course(second)
    if method != "routed":
        other = ask(own, [birch], method, phase1=phase1, seed=2)
        assert not same(state(first.network), state(other.network))


@pytest.mark.parametrize("way", WAYS)
def test_the_order_of_teachers_does_not_matter(
    own: Classifier, birch: Teacher, cedar: Teacher, way: str
) -> None:
    method, phase1 = WAYS[way]
    one, other = (asked(own, t, method, phase1=phase1) for t in ([birch, cedar], [cedar, birch]))
    assert same(state(one.network), state(other.network))
    assert course(one) == course(other)


def test_the_order_of_the_query_does_not_matter(own: Classifier, cedar: Teacher) -> None:
    one, other = (asked(own, [cedar], "qkt-light", query=q) for q in ((2, 3), (3, 2)))
    assert same(state(one.network), state(other.network))
    assert one.decision == other.decision


@pytest.mark.parametrize("rare", [False, True])
def test_the_own_extractor_is_kept_bit_for_bit(own: Classifier, birch: Teacher, rare: bool) -> None:
    routed = asked(own, [birch], "routed", rare=rare)
    if rare:
        assert [b.rank for b in routed.network.spec.branches] == [1.0, 1.0]
        for number, network in enumerate((own, birch.network)):
            kept = routed.network.get_submodule(f"extractor.branches.{number}")
            assert same(state(kept), state(network.extractor))
    else:
        assert same(state(routed.network), state(own))
        assert routed.network.spec == own.spec
    for method, rank in (("qkt", PARAMS.rank), ("qkt-light", PARAMS.light_rank)):
        answer = asked(own, [birch], method, rare=rare)  # type: ignore[arg-type]
        assert answer.network.spec.name == "amalgam"
        assert [b.rank for b in answer.network.spec.branches] == [1.0, rank]
        first = answer.network.get_submodule("extractor.branches.0")
        assert same(state(first), state(own.extractor))
        # Rare samples refine the head and nothing else.
        unrefined = asked(own, [birch], method, rare=rare, phase2=False)  # type: ignore[arg-type]
        assert same(state(answer.network.extractor), state(unrefined.network.extractor))
        assert same(state(answer.network.head), state(unrefined.network.head)) != rare


def test_at_full_rank_the_student_says_what_the_networks_agree_on(
    own: Classifier, birch: Teacher, cedar: Teacher
) -> None:
    inputs = to_input(TEST[0])
    whole = ask(own, [birch, cedar], params=PARAMS.model_copy(update={"rank": 1.0}))
    logits = [predict(n, inputs, CPU) for n in (own, birch.network, cedar.network)]
    known = [(0, 1), birch.claimed, cedar.claimed]
    expected = consensus(logits, known, whole.decision.relevant, whole.decision.own_weight)
    assert torch.allclose(predict(whole.network, inputs, CPU), expected, atol=1e-4)
    half = predict(asked(own, [birch, cedar]).network, inputs, CPU)
    assert not torch.allclose(half, expected, atol=1e-2)


def test_light_leaves_out_who_knows_no_query_class_and_is_smaller(
    own: Classifier, birch: Teacher, cedar: Teacher
) -> None:
    light = asked(own, [birch, cedar], "qkt-light", query=(2,))
    assert same(state(light.network), state(asked(own, [cedar], "qkt-light", query=(2,)).network))
    assert [b.name for b in light.network.spec.branches] == ["resnet-small", "densenet-small"]
    assert light.phase1 is not None
    assert light.phase1.teacher_passes == 1

    def size(method: Method) -> int:
        network = asked(own, [cedar], method, query=(2,)).network
        return sum(p.numel() for p in network.parameters())

    assert size("routed") < size("qkt-light") < size("qkt")


def test_without_phase_1_the_own_features_must_do(own: Classifier, cedar: Teacher) -> None:
    with counted(cedar.network) as sizes:
        answer = ask(own, [cedar], phase1="none")
    assert sum(sizes) == HELD + 3 * IMAGES
    assert answer.phase1 == Phase1(kind="none", views=3, teacher_passes=3)
    assert same(state(answer.network.extractor), state(own.extractor))
    assert answer.network.spec == own.spec
    assert bool((answer.network.head.weight[2].abs() < 1e-6).all()), "a class outside R"


def test_joint_learning_changes_the_extractor_and_asks_every_view_once(
    own: Classifier, birch: Teacher
) -> None:
    with counted(birch.network) as sizes:
        answer = ask(own, [birch], phase1="joint")
    assert sizes[0] == HELD
    assert sum(sizes) == HELD + IMAGES * DISTILLATION.views
    assert answer.network.spec == own.spec
    assert not same(state(answer.network.extractor), state(own.extractor))


def test_a_teacher_of_local_classes_alone_counts_for_them(
    own: Classifier, birch: Teacher, cedar: Teacher
) -> None:
    inputs, one_view = to_input(TEST[0]), PARAMS.model_copy(update={"flips": False})
    logits = {n: predict(c, inputs, CPU) for n, c in (("own", own), ("birch", birch.network))}
    alone = ask(own, [cedar], "routed", query=(2,), params=one_view)
    both = ask(own, [birch, cedar], "routed", query=(2,), params=one_view)
    assert both.decision.experts == ("birch", "cedar")
    without = scores_of(alone.network, alone.decision, [cedar], inputs, CPU)
    found = scores_of(both.network, both.decision, [birch, cedar], inputs, CPU)
    crosses, weight = margin(logits["own"], 1, (0, 1)), both.decision.own_weight
    assert torch.allclose(without[:, 1], crosses, atol=1e-4)
    agreed = (weight * crosses + margin(logits["birch"], 1, (1, 3))) / (weight + 1)
    assert torch.allclose(found[:, 1], agreed, atol=1e-4)
    assert torch.allclose(found[:, 0], without[:, 0], atol=1e-4), "of discs it knows nothing"
    students = [ask(own, teachers, query=(2,)).network for teachers in ([cedar], [birch, cedar])]
    assert [len(s.spec.branches) for s in students] == [2, 3]


# --- what teachers are asked ----------------------------------------------------------------------


@pytest.mark.parametrize(("method", "images"), [("qkt", 400), ("qkt", 30), ("qkt-light", 400)])
def test_a_merge_shows_one_view_of_an_image_to_a_teacher_once(
    own: Classifier, birch: Teacher, cedar: Teacher, method: Method, images: int
) -> None:
    told: list[tuple[int, int]] = []
    with counted(birch.network) as one, counted(cedar.network) as other:
        answer = ask(
            own,
            [birch, cedar],
            method,
            params=PARAMS.model_copy(update={"images": images}),
            progress=lambda done, total: told.append((done, total)),
        )
    # Before that the calibration images, once: they tell how far teachers can be relied on.
    # And one view alone, for the order of the layers.
    assert one == other == [HELD, min(IMAGES, images), 1]
    first = answer.phase1
    assert first is not None
    rank = PARAMS.rank if method == "qkt" else PARAMS.light_rank
    assert (first.kind, first.rank) == ("low-rank-merge", rank)
    assert (first.views, first.teacher_passes) == (1, 2)
    assert [row["layer number"] for row in first.curves] == [i + 1.0 for i in range(len(first.curves))]
    assert set(first.curves[0]) == {"layer number", "birch", "cedar"}
    assert all(0 <= row[site] < 1 for row in first.curves for site in ("birch", "cedar") if site in row)
    assert told == [(1, 3), (2, 3), (3, 3)]
    with counted(birch.network) as sizes:
        answers(answer, [birch, cedar], TEST[0])
    assert sizes == [], "a student answers alone"


def test_distillation_shows_every_view_to_a_teacher_once(
    own: Classifier, birch: Teacher, cedar: Teacher
) -> None:
    setting = DISTILLATION.model_copy(update={"epochs": 9})
    with counted(birch.network) as one, counted(cedar.network) as other:
        answer = ask(own, [birch, cedar], phase1="distill", distillation=setting)
    # The calibration images, three views of 80 images, and nothing later: not in nine epochs, not for the
    # operating point.
    assert one[0] == other[0] == HELD
    assert sum(one) == sum(other) == HELD + IMAGES * setting.views
    first = answer.phase1
    assert first is not None
    assert (first.kind, first.views, first.teacher_passes) == ("distill", 3, 2 * 3)
    assert [row["epoch"] for row in first.curves] == [i + 1.0 for i in range(9)]
    assert answer.network.spec == own.spec
    with counted(birch.network) as sizes:
        answers(answer, [birch, cedar], TEST[0])
    assert sizes == [], "a student answers alone"


@pytest.mark.parametrize("flips", [True, False])
def test_routed_asks_experts_about_own_images_once(own: Classifier, birch: Teacher, flips: bool) -> None:
    times = 4 if flips else 1
    with counted(birch.network) as sizes:
        answer = ask(own, [birch], "routed", params=PARAMS.model_copy(update={"flips": flips}))
    assert sum(sizes) == times * (HELD + LEARNED)
    assert answer.decision.flips == flips
    assert answer.phase1 is None
    with counted(birch.network) as sizes:
        answers(answer, [birch], TEST[0])
    assert sum(sizes) == times * len(TEST[0])


def test_a_routed_answer_does_not_depend_on_which_way_round_an_image_is(
    own: Classifier, birch: Teacher
) -> None:
    answer, inputs = asked(own, [birch], "routed"), to_input(TEST[0][:20])
    scores = [scores_of(answer.network, answer.decision, [birch], v, CPU) for v in mirrored(inputs)]
    assert len(scores) == 4
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], atol=1e-4, rtol=1e-4)
    plain = [predict(own, v, CPU) for v in mirrored(inputs)]
    assert not torch.allclose(plain[0], plain[1], atol=1e-2)


@pytest.mark.parametrize("method", BY_NETWORKS)
@pytest.mark.parametrize("query", [(2,), (2, 3)])
def test_class_means_add_discriminants_to_the_head_alone(
    own: Classifier, birch: Teacher, cedar: Teacher, method: Method, query: tuple[int, ...]
) -> None:
    plain = [birch, cedar]
    placed = [with_means(t) for t in plain]
    answer = ask(own, placed, method, query=query)
    assert answer.refined.placed_by == (("cedar",) if query == (2,) else ("birch", "cedar"))
    assert answer.decision.experts == ()
    without = ask(own, placed, method, query=query, params=PARAMS.model_copy(update={"discriminant": False}))
    assert without.refined.placed_by == ()
    assert same(state(without.network), state(asked(own, plain, method, query=query).network))
    if method != "routed":  # which keeps experts where there is no head to refine
        assert same(state(answer.network.extractor), state(without.network.extractor))
    assert not same(state(answer.network.head), state(without.network.head))
    relevant = answer.decision.relevant
    assert balanced_accuracy(answers(answer, placed, TEST[0]), relevant) > own_accuracy(own, relevant) + 0.1
    keeps_its_budget(answer, placed)


def test_the_head_is_a_mean_of_consensus_and_discriminants(own: Classifier, birch: Teacher) -> None:
    placed = with_means(birch)
    network, plain = (
        ask(own, [placed], params=PARAMS.model_copy(update={"discriminant": on})).network
        for on in (True, False)
    )
    features = predict(network, to_input(DATA.train[0]), CPU, features=True)
    means = {c: m for c, m in placed.class_means.items() if c in placed.claimed}
    widths = [own.head.in_features, birch.network.head.in_features]
    rows, shifts = discriminant_rows(
        features, torch.from_numpy(DATA.train[1]), widths, [[], [means]], [3], len(CLASSES)
    )
    added, moved = (
        (getattr(network.head, part) - (1 - DISCRIMINANT_SHARE) * getattr(plain.head, part)).detach()
        / DISCRIMINANT_SHARE
        for part in ("weight", "bias")
    )
    scale = (added * rows).sum() / (rows * rows).sum()
    assert float(scale) > 0
    assert torch.allclose(added, scale * rows, rtol=1e-3, atol=1e-4)
    assert torch.allclose(moved, scale * shifts, rtol=1e-3, atol=1e-3)


def test_a_query_class_without_a_class_mean_leaves_the_consensus(
    own: Classifier, birch: Teacher, cedar: Teacher
) -> None:
    # Birch alone has means, and knows nothing of class 2.
    answer = ask(own, [with_means(birch), cedar], query=(2, 3))
    assert answer.refined.placed_by == ()
    assert same(state(answer.network), state(asked(own, [birch, cedar], query=(2, 3)).network))


def test_a_mean_of_a_class_that_is_not_claimed_does_not_count(own: Classifier, birch: Teacher) -> None:
    placed = with_means(birch)
    forged = replace(
        placed, class_means={**placed.class_means, 0: torch.full_like(placed.class_means[1], 1e3)}
    )
    assert same(state(ask(own, [placed]).network), state(ask(own, [forged]).network))


@pytest.mark.parametrize("size", [1e15, 3e38])
def test_class_means_that_are_nonsense_cost_no_own_class(
    own: Classifier, birch: Teacher, size: float
) -> None:
    means = {c: torch.full_like(mean, size) for c, mean in with_means(birch).class_means.items()}
    answer = ask(own, [replace(birch, class_means=means)])
    point, local = answer.operating_point, torch.tensor([0, 1])
    assert bool(torch.isfinite(answer.network.head.weight).all())
    assert point.false_query_rate <= BUDGET
    images, labels = shapes((0, 1), 40, 99)
    right = answers(answer, [birch], images) == torch.from_numpy(labels)
    before = local[predict(own, to_input(images), CPU)[:, local].argmax(dim=1)] == torch.from_numpy(labels)
    assert float(right.double().mean()) >= float(before.double().mean()) - 2 * BUDGET


def test_rare_classes_are_refined_by_their_samples(own: Classifier, birch: Teacher) -> None:
    answer = ask(own, [with_means(birch)], data=RARE)
    assert answer.refined.placed_by == ()
    assert same(state(answer.network), state(asked(own, [birch], rare=True).network))


def test_discriminants_that_cost_own_classes_too_much_are_left_out(
    own: Classifier, birch: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels that training images do not deserve: what the hospital knew would be lost."""
    # So large a share that they have the say, however sure the networks of this machine are.
    monkeypatch.setattr("qkt_clinical.qkt.head.DISCRIMINANT_SHARE", 0.9)
    images, labels = DATA.train
    confused = LocalData((images, 1 - labels), DATA.calibration)
    answer = ask(own, [with_means(birch)], data=confused)
    assert answer.refined.placed_by == ()
    assert answer.operating_point.within_budget


def test_a_network_of_other_features_takes_up_no_class_means(own: Classifier, birch: Teacher) -> None:
    answer = ask(own, [with_means(birch)], phase1="distill")
    assert answer.refined.placed_by == ()


def test_images_for_a_merge_are_of_all_classes_alike() -> None:
    labels = np.array([0] * 10 + [1] * 2 + [2] * 6)
    found = [balanced_sample(labels, 8, seed).numpy() for seed in (1, 1, 2)]
    assert np.bincount(labels[found[0]]).tolist() == [3, 2, 3]
    assert found[0].tolist() == found[1].tolist() == sorted(found[0].tolist())
    assert found[0].tolist() != found[2].tolist()
    assert torch.equal(balanced_sample(labels, 400, 1), torch.arange(18))


def test_an_epoch_shows_every_image_once_each_in_a_view_of_its_own() -> None:
    views = torch.zeros(3, 41, 1, 2, 2)
    drawn = list(view_batches(views, 8, torch.Generator().manual_seed(0)))
    images = torch.cat([image for _, image in drawn])
    assert sorted(images.tolist()) == list(range(41))
    assert set(torch.cat([view for view, _ in drawn]).tolist()) == {0, 1, 2}
    assert len(drawn) == 5, "a last image alone joins the batch before"


def test_views_are_the_images_themselves_first() -> None:
    inputs = to_input(DATA.train[0])
    views = make_views(inputs, 3, 1.0, 7, CPU)
    assert torch.equal(views[0], inputs)
    assert [v.shape for v in views] == [inputs.shape] * 3
    assert not torch.allclose(views[1], views[2])
    assert torch.equal(make_views(inputs, 2, 1.0, 7, CPU)[1], views[1]), "a view does not depend on how many"
    assert not torch.equal(make_views(inputs, 2, 1.0, 8, CPU)[1], views[1])


# --- phase 2 --------------------------------------------------------------------------------------


def test_rows_are_carried_through_the_maps(own: Classifier, birch: Teacher, cedar: Teacher) -> None:
    network, sources = build(spec(), seed=11).eval(), (own, birch.network, cedar.network)
    width = network.head.in_features
    maps = [nn.Linear(width, n.head.in_features) for n in sources]
    known, before = [(0, 1), birch.claimed, cedar.claimed], state(network.extractor)
    heads = [(n.head.weight.detach(), n.head.bias.detach()) for n in sources]
    carry_rows(network, maps, consensus_rows(heads, known, (0, 1, 3), 2.0))
    assert same(state(network.extractor), before)
    features = torch.randn(20, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = [n.head(m(features)) for n, m in zip(sources, maps, strict=True)]
        found = network.head(features)
    assert torch.allclose(found, consensus(seen, known, (0, 1, 3), 2.0), atol=1e-4)
    # Class 3 is birch's and cedar's alike, whose rivals count by their mean.
    frame = (seen[1][:, 3] - seen[1][:, 1] + seen[2][:, 3] - (seen[2][:, 0] + seen[2][:, 2]) / 2) / 2
    assert torch.allclose(found[:, 3], frame, atol=1e-4)
    assert bool((found[:, 2] == 0).all())


def test_refinement_moves_the_head_alone_and_lowers_the_loss(own: Classifier) -> None:
    network = copy.deepcopy(own)
    before = state(network.extractor)
    images, labels = shapes((0, 1), 20, 8)
    few = shapes((3,), 4, 8)
    features = predict(network, to_input(np.concatenate([images, few[0]])), CPU, features=True)
    target = torch.from_numpy(np.concatenate([labels, few[1]]))
    with counted(network) as sizes:
        curves = refine_head(network, features, target, (0, 1), (3,), task=MULTICLASS)
    assert sizes == []
    assert same(state(network.extractor), before)
    assert not torch.equal(network.head.weight, own.head.weight)
    assert torch.equal(network.head.weight[2], own.head.weight[2]), "a class outside R is left alone"
    assert curves[-1]["loss"] < 0.5 * curves[0]["loss"]


@pytest.mark.parametrize("way", WAYS)
def test_a_rare_query_class(own: Classifier, birch: Teacher, way: str) -> None:
    method, phase1 = WAYS[way]
    answer = asked(own, [birch], method, rare=True, phase1=phase1)
    point, decision = answer.operating_point, answer.decision
    assert answer.rare == {3: 5}
    assert (decision.rare, decision.local) == ((3,), (0, 1))
    assert point.own_images == 40 + LEARNED, "images of the query are no false queries"
    assert answer.refined.curves[-1]["loss"] < answer.refined.curves[0]["loss"]
    assert decision.experts == ()
    assert decision.flips == (method == "routed")
    assert point.false_query_rate <= BUDGET
    relevant = decision.relevant
    found = balanced_accuracy(answers(answer, [birch], TEST[0]), relevant)
    assert found > own_accuracy(own, relevant) + 0.05


def test_training_images_that_the_operating_point_is_set_on(own: Classifier, birch: Teacher) -> None:
    def scores(images: Images) -> Tensor:
        return query_scores(predict(answer.network, to_input(images), CPU), (0, 1), (3,))

    params = PARAMS.model_copy(update={"images": 50})
    answer = ask(own, [birch], query=(3,), params=params)
    found = answer.operating_point.scores
    assert len(found) == HELD + 50
    torch.testing.assert_close(found[:HELD], scores(DATA.calibration[0]), atol=1e-4, rtol=1e-4)
    # Each of the others is one training image, all of them moved by the same.
    every = scores(DATA.train[0]).flatten()
    candidates = torch.stack([found[HELD] - s for s in every]).flatten()
    distances = [(found[HELD:] - every[None] - c).abs().min(dim=1).values.max() for c in candidates]
    move = candidates[int(torch.stack(distances).argmin())]
    assert float(min(distances)) < 1e-3
    labels = [torch.from_numpy(part[1]) for part in (DATA.train, DATA.calibration)]
    moved = as_if_held_out(every[:, None], labels[0], found[:HELD], labels[1])
    assert float((moved.flatten() - every - move).abs().max()) < 1.0, "by a sample as by all of them"
    again = ask(own, [birch], query=(3,), params=params).operating_point
    assert torch.equal(again.scores, found)


def test_an_operating_point_on_calibration_images_alone(own: Classifier, birch: Teacher) -> None:
    ways = [
        answer_ablated(
            own, [birch], DATA, (3,), task=MULTICLASS, budget=BUDGET, params=PARAMS, on_training=on
        )
        for on in (True, False)
    ]
    both, alone = (answer.operating_point for answer in ways)
    assert (both.own_images, alone.own_images) == (HELD + LEARNED, HELD)
    assert torch.equal(both.scores[:HELD], alone.scores)
    assert same(*(state(answer.network) for answer in ways)), "the networks are the same"
    assert alone.decision.offsets[0] == pytest.approx(
        offset_for_budget(alone.scores, BUDGET, lost=alone.lost)
    )


def test_what_the_own_model_gives_to_a_rare_class_today_is_not_promised(
    own: Classifier, birch: Teacher
) -> None:
    held = RARE.calibration[0][RARE.calibration[1] != 3]
    logits = predict(own, to_input(held), CPU)
    behind = logits[:, :2].max(dim=1).values - logits[:, 3]
    for lift, left in ((float(behind.sort().values[10:12].mean()), 29), (1e4, 40)):
        # Lifted so far, the own model gives eleven images of local classes to the query, or all of them.
        louder = copy.deepcopy(own)
        with torch.no_grad():
            louder.head.bias[3] += lift
        answer = ask(louder, [birch], data=RARE)
        assert left < answer.operating_point.own_images <= left + LEARNED
        assert answer.operating_point.false_query_rate <= BUDGET
    today = predict(own, to_input(DATA.calibration[0]), CPU)
    assert bool((today.argmax(dim=1) < 2).all())
    with torch.no_grad():
        louder = copy.deepcopy(own)
        louder.head.bias[3] += 1e4
    absent = ask(louder, [birch], "routed").operating_point
    assert absent.own_images == HELD + LEARNED, "of an absent class everything is promised"


@pytest.mark.parametrize(
    ("method", "rare"), [("qkt", True), ("qkt-light", False), ("routed", False), ("routed", True)]
)
def test_query_classes_share_the_budget(
    own: Classifier, birch: Teacher, cedar: Teacher, method: Method, rare: bool
) -> None:
    teachers, data = [birch, cedar], RARE if rare else DATA
    loose = ask(own, teachers, method, query=(2, 3), data=data, budget=0.45)
    strict = asked(own, teachers, method, query=(2, 3), rare=rare)
    for answer, budget in ((loose, 0.45), (strict, BUDGET)):
        point = answer.operating_point
        expected = offsets_for_budget(point.scores, budget, lost=point.lost, labels=point.labels)
        assert (point.labels is not None) == rare
        assert answer.decision.offsets == tuple(expected.tolist())
        assert point.false_query_rate <= budget
    assert all(s < w for s, w in zip(strict.decision.offsets, loose.decision.offsets, strict=True))


@pytest.mark.parametrize("method", ["qkt", "qkt-light"])
def test_a_few_images_of_one_class_do_not_push_another_down(
    own: Classifier, birch: Teacher, cedar: Teacher, method: Method
) -> None:
    rows = [
        asked(own, [birch, cedar], method, query=(2, 3), rare=True, phase2=phase2).network.head.weight
        for phase2 in (False, True)
    ]
    assert torch.equal(rows[0][2], rows[1][2]), "bars are absent"
    assert not torch.equal(rows[0][3], rows[1][3])


@pytest.mark.parametrize("method", BY_NETWORKS)
def test_without_phase_2_nothing_is_offset(
    own: Classifier, birch: Teacher, cedar: Teacher, method: Method
) -> None:
    answer = asked(own, [birch, cedar], method, query=(2, 3), rare=True, phase2=False)
    assert answer.decision.offsets == (0.0, 0.0)
    assert answer.refined.curves == ()


# --- files, errors ------------------------------------------------------------------------


@pytest.mark.parametrize("method", BY_NETWORKS)
def test_a_student_from_its_files_answers_alike(
    own: Classifier, cedar: Teacher, tmp_path: Path, method: Method
) -> None:
    answer = asked(own, [cedar], method)
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
        known = tuple(c in cedar.claimed for c in range(4))
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


# --- screening ------------------------------------------------------------------------------------

UNSCREENED = PARAMS.model_copy(update={"screening": False})


def excluded(answer: Answer) -> dict[str, str]:
    """Why each teacher that is not included is not."""
    return {r.site: r.reason for r in answer.screening if not r.included}


@pytest.mark.parametrize("method", BY_NETWORKS)
def test_where_all_teachers_are_honest_screening_changes_no_bit(
    own: Classifier, birch: Teacher, cedar: Teacher, method: Method
) -> None:
    screened = ask(own, [replace(t, verified=t.claimed) for t in (birch, cedar)], method)
    plain = ask(own, [birch, cedar], method, params=UNSCREENED)
    assert same(state(screened.network), state(plain.network))
    assert [r.site for r in screened.screening if r.included] == ["birch", "cedar"]
    assert plain.screening == ()
    assert course(replace(screened, screening=())) == course(plain)


def renamed(teacher: Teacher) -> Teacher:
    """Its classes' names passed on to the next."""
    network = copy.deepcopy(teacher.network)
    known, following = list(teacher.claimed), [*teacher.claimed[1:], teacher.claimed[0]]
    with torch.no_grad():
        network.head.weight[known] = network.head.weight[following].clone()
        network.head.bias[known] = network.head.bias[following].clone()
    return replace(teacher, network=network)


@pytest.mark.parametrize("method", BY_NETWORKS)
def test_an_answer_without_a_bad_teacher_is_the_one_as_if_it_were_not_there(
    own: Classifier, birch: Teacher, cedar: Teacher, method: Method
) -> None:
    answer = ask(own, [renamed(birch), cedar], method)
    expected = asked(own, [cedar], method)
    assert same(state(answer.network), state(expected.network))
    assert answer.decision == expected.decision
    assert [t.site for t in answer.teachers] == ["cedar"]
    (result,) = [r for r in answer.screening if not r.included]
    assert (result.site, result.recalls) == ("birch", {1: 0.0})
    assert "by chance" in result.reason
    harmed = ask(own, [renamed(birch), cedar], method, params=UNSCREENED)
    assert not same(state(harmed.network), state(expected.network)) or method == "routed"
    assert harmed.screening == ()


@pytest.mark.parametrize("method", BY_NETWORKS)
def test_a_false_claim_of_a_mask_has_no_effect(
    own: Classifier, birch: Teacher, cedar: Teacher, method: Method
) -> None:
    liar = replace(birch, claimed=(0, 1, 2, 3), verified=birch.claimed)
    answer = ask(own, [liar, cedar], method, query=(2,))
    expected = asked(own, [birch, cedar], method, query=(2,))
    assert same(state(answer.network), state(expected.network))
    assert answer.decision == expected.decision
    claimed = {t.site: t.claimed for t in answer.teachers}
    assert claimed.get("birch", birch.claimed) == birch.claimed
    (result,) = [r for r in answer.screening if r.site == "birch"]
    assert result.unverified == (0, 2)


def test_a_false_claim_is_taken_out_of_the_mask_of_an_expert(
    own: Classifier, birch: Teacher, cedar: Teacher, tmp_path: Path
) -> None:
    claims = {"birch": (0, 1, 2, 3), "cedar": cedar.claimed}
    for teacher_ in (birch, cedar):
        folder = tmp_path / teacher_.site
        folder.mkdir()
        card = {
            "kind": "teacher",
            "site": teacher_.site,
            "classes": CLASSES,
            "input": InputSpec(shape=(3, 16, 16), normalisation="unit", spacing_mm=None),
            "training": {},
        }
        write_bundle(folder, teacher_.network, card)
        known = tuple(c in claims[teacher_.site] for c in range(4))
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
        write_json(folder / MASK, mask.model_dump(mode="json"))
    bundles = [load_bundle(tmp_path / site) for site in claims]
    honest = (tmp_path / "cedar" / MASK).read_bytes()
    teachers = [Teacher.of(b, t.claimed) for b, t in zip(bundles, (birch, cedar), strict=True)]
    answer = ask(own, teachers, "routed")
    correct_masks(tmp_path, bundles, answer)
    corrected = Teacher.of(load_bundle(tmp_path / "birch"))
    assert corrected.claimed == birch.claimed
    assert (tmp_path / "cedar" / MASK).read_bytes() == honest
    inputs = to_input(TEST[0])
    found = scores_of(answer.network, answer.decision, [corrected, cedar], inputs, CPU)
    expected = asked(own, [birch, cedar], "routed")
    other = scores_of(expected.network, expected.decision, [birch, cedar], inputs, CPU)
    assert torch.allclose(found, other, atol=1e-5), "but for rounding, as if nobody had lied"


def test_a_query_class_without_a_usable_teacher(own: Classifier, birch: Teacher, cedar: Teacher) -> None:
    with pytest.raises(QueryError, match="birch names images of shared classes less often") as caught:
        ask(own, [renamed(birch)])
    assert caught.value.code == "untrusted"
    liar = replace(birch, claimed=(1, 2, 3), verified=birch.claimed)
    with pytest.raises(QueryError, match="birch claims classes that its network does not show"):
        ask(own, [liar, replace(cedar, claimed=(0, 3))], query=(2,))


@pytest.mark.parametrize("method", BY_NETWORKS)
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
