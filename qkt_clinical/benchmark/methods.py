"""Answers of every method to one query: scores on the evaluation images, and costs.

To add a method or an ablation: its name and function into :func:`methods`; an ablation that is QKT with
something changed only needs its line in ``settings.SETUPS``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from qkt_clinical.baselines.averaging import average_networks
from qkt_clinical.baselines.ensembles import mean_logit_scores, mean_probability_scores, restrict
from qkt_clinical.baselines.fens import side_by_side, train_aggregator
from qkt_clinical.baselines.finetune import finetune
from qkt_clinical.baselines.small_federation import bytes_moved
from qkt_clinical.benchmark.ablations import answer_ablated
from qkt_clinical.benchmark.adversarial_teachers import draw_bad, spoil
from qkt_clinical.benchmark.case import (
    Case,
    MethodResult,
    OwnScores,
    calibration_of,
    learned_of,
    with_budget,
)
from qkt_clinical.benchmark.head_baselines import PRIVACY, averaged_head, class_statistics, drawn_heads
from qkt_clinical.benchmark.settings import (
    BUDGETS,
    DISTILLED,
    FEDERATED,
    FINETUNED,
    ON_TEACHERS,
    SETUPS,
    BenchmarkSettings,
    Setup,
)
from qkt_clinical.benchmark.simulate import SimulatedHospital
from qkt_clinical.benchmark.store import ResultStore, global_name, pooled_name
from qkt_clinical.catalog import BY_MEANS, DEFAULT_ESTIMATOR, ENCODED_METHODS, OWN_WITH_QUERY, POOLED
from qkt_clinical.common.disclosure import SMALLEST_COUNT
from qkt_clinical.common.seeding import derive
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Images
from qkt_clinical.errors import QueryError
from qkt_clinical.models.class_means import class_means, mean_features
from qkt_clinical.models.encoders import shared_features
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier, multiply_adds
from qkt_clinical.models.private_means import private_means
from qkt_clinical.qkt.adaptation import MIN_IMAGES, adapt_teachers
from qkt_clinical.qkt.answer import answer_query
from qkt_clinical.qkt.by_means import answer_by_means
from qkt_clinical.qkt.operating_point import decide, offsets_for_budget
from qkt_clinical.qkt.panel import Teacher
from qkt_clinical.qkt.prediction import predict_logits, routed_consensus, scores_of
from qkt_clinical.qkt.steps import Answer, EncodedImages, LocalData, OperatingPoint
from qkt_clinical.records.card import CARD, MASK, MIRRORS
from qkt_clinical.records.plan import SHARED

BYTES_OF_HALF = 2
"""Of a number in half precision, as bundles hold class means."""


def local(case: Case, *, own: str = "full") -> MethodResult:
    """The hospital's own model alone."""
    return MethodResult(restrict(case.logits(f"{own}/{case.question.asking}"), case.relevant))


def own_with_query(case: Case) -> MethodResult:
    """The hospital's own model, trained with what is hidden from it: an upper bound."""
    return MethodResult(restrict(case.logits(f"full/{case.question.student}"), case.relevant))


def pooled(case: Case) -> MethodResult:
    """One network of all hospitals' images, without those hidden from the asking one; the images move."""
    name = pooled_name(case.question.asks_as)
    others = [h for h in case.store.federation.hospitals if h.name != case.question.student]
    moved = sum(split.images.nbytes for h in others for split in (h.train, h.val))
    scores = restrict(case.logits(name), case.relevant)
    return MethodResult(scores, moved, seconds=case.store.seconds(name))


def ensemble(case: Case, combine: Callable[[Sequence[Tensor]], Tensor]) -> MethodResult:
    """Ensemble of all hospitals' networks at every prediction."""
    every = [case.student, *case.others]
    scores = restrict(combine([case.logits(name) for name in every]), case.relevant)
    return MethodResult(scores, sum(map(case.store.bytes, case.others)), passes=len(every))


def ensemble_of_probabilities(case: Case) -> MethodResult:
    """The mean of their probabilities."""
    return ensemble(case, partial(mean_probability_scores, task=case.store.task))


def ensemble_adapted(case: Case) -> MethodResult:
    """The mean of their probabilities, other hospitals' networks adapted and the budget kept as in QKT."""
    store, start = case.store, time.perf_counter()
    hospital = store.data(case.question.asking)
    held_out = calibration_of(hospital, case.question.query)
    local = tuple(c for c in hospital.held if c not in case.question.query)
    teachers = [
        Teacher(
            name.split("/")[1],
            store.bundle(name).network,
            known_classes(case, name, "default"),
            class_means=store.bundle(name).class_means,
        )
        for name in case.others
    ]
    inputs = to_input(held_out.images)
    if store.settings.transfer.adaptation and len(hospital.train) >= MIN_IMAGES:
        adapted, _ = adapt_teachers(
            teachers,
            to_input(hospital.train.images),
            torch.from_numpy(hospital.train.labels),
            (inputs, torch.from_numpy(held_out.labels)),
            local,
            task=store.task,
            seed=case.seed("transfer"),
            device=store.device,
        )
        teachers = list(adapted)
    networks = [store.bundle(case.student).network, *(t.network for t in teachers)]

    def scores(images: Tensor) -> Tensor:
        each = [predict(network, images, store.device) for network in networks]
        return mean_probability_scores(each, task=store.task)

    learned = learned_of(case, hospital)
    own = OwnScores(
        scores(inputs),
        torch.from_numpy(held_out.labels),
        scores(to_input(learned.images)),
        torch.from_numpy(learned.labels),
    )
    seconds = time.perf_counter() - start
    found = with_budget(case, scores(case.inputs), own, local)
    moved = sum(map(store.bytes, case.others))
    return MethodResult(found, moved, seconds=seconds, passes=len(networks))


@lru_cache(maxsize=4)
def _aggregator(
    store: ResultStore, asking: str, student: str, names: tuple[str, ...]
) -> tuple[nn.Module, float]:
    """What combines the networks' answers, trained by all on calibration images; seconds.

    Every other one of the asking hospital's own goes to that; the rest are left for the operating point.
    """
    start, classes = time.perf_counter(), store.federation.spec.classes
    members = []
    for hospital in (asking, *(h.name for h in store.federation.hospitals if h.name != student)):
        step = 2 if hospital == asking else 1
        seen = side_by_side([store.calibration_logits(name, hospital) for name in names])
        labels = torch.from_numpy(store.data(hospital).calibration.labels)
        members.append((seen[::step], labels[::step]))
    trained = train_aggregator(
        members,
        len(names),
        classes,
        store.settings.baselines.aggregator,
        task=store.task,
        seed=derive(store.federation.seed, "benchmark", "fens", asking),
    )
    return trained, time.perf_counter() - start


def learnt_ensemble(case: Case) -> MethodResult:
    """FENS: every hospital has every network, and all train what combines their answers."""
    store, question = case.store, case.question
    asking, names = store.data(question.asking), (case.student, *case.others)
    aggregator, seconds = _aggregator(store, question.asking, question.student, names)

    def scores(each: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            found: Tensor = aggregator(side_by_side(each))
        return found

    labels, learned = torch.from_numpy(asking.calibration.labels)[1::2], learned_of(case, asking)
    held_out = scores([store.calibration_logits(name, asking.name) for name in names])[1::2]
    kept = torch.isin(labels, torch.tensor(question.query), invert=True)
    trained_on = scores([case.predicted(name, learned) for name in names])
    own = OwnScores(held_out[kept], labels[kept], trained_on, torch.from_numpy(learned.labels))
    local = [c for c in asking.held if c not in question.query]
    answered = scores([case.logits(name) for name in names])
    params, hospitals = store.settings.baselines.aggregator, len(names)
    networks = sum(map(store.bytes, names)) * (hospitals - 1)
    return MethodResult(
        with_budget(case, answered, own, local),
        networks + bytes_moved(aggregator, hospitals, params.rounds),
        rounds=1 + params.rounds,
        seconds=seconds,
        passes=hospitals,
    )


def one_shot_average(case: Case) -> MethodResult:
    """Mean of all networks' weights, weighted by their numbers of training images."""
    every = [case.student, *case.others]
    start = time.perf_counter()
    networks = [case.store.bundle(name).network for name in every]
    sizes = [len(case.store.federation.hospital(name.split("/")[1]).train) for name in every]
    network = average_networks(networks, sizes)
    seconds = time.perf_counter() - start
    moved = sum(map(case.store.bytes, case.others))
    return MethodResult(case.restricted(network), moved, seconds=seconds)


def on_teachers(case: Case, kind: str) -> MethodResult:
    """Fine-tuning with class balance, or unmasked distillation from the mean of all networks."""
    name = f"{kind}/{case.question.asking}"
    moved = sum(map(case.store.bytes, case.others)) if kind == DISTILLED else 0
    scores = restrict(case.logits(name), case.relevant)
    return MethodResult(scores, moved, seconds=case.store.seconds(name))


def global_model(case: Case, algorithm: str, rounds: int | None = None) -> MethodResult:
    """Global network of a federation; ``None``: after the number of rounds best on validation images."""
    name = global_name(algorithm, rounds or case.best_rounds(algorithm), case.question.asks_as)
    done, moved = case.store.traffic(name)
    scores = restrict(case.logits(name), case.relevant)
    return MethodResult(scores, moved, rounds=done, seconds=case.store.seconds(name))


def global_model_finetuned(case: Case) -> MethodResult:
    """FedAvg's network after personal fine-tuning at the asking hospital."""
    untuned = global_model(case, "fedavg")
    name = global_name("fedavg", case.best_rounds("fedavg"), case.question.asks_as)
    network, data = case.store.bundle(name).network, case.store.data(case.question.asking)
    start = time.perf_counter()
    tuned = finetune(
        network,
        data.train.pair,
        data.val.pair,
        case.relevant,
        case.store.settings.baselines.personal,
        task=case.store.task,
        seed=case.seed("finetune"),
        name=f"fedavg-{case.question.student}",
        device=case.store.device,
    )
    seconds = untuned.seconds + time.perf_counter() - start
    return replace(untuned, scores=case.restricted(tuned), seconds=seconds)


def known_classes(case: Case, name: str, mask: str) -> tuple[int, ...]:
    """The classes that a teacher is taken to know; see :class:`Setup`."""
    store = case.store
    if mask == "none":
        return tuple(range(store.federation.spec.classes))
    if mask == "oracle":
        known = store.truth(name, primary_truth(store.settings))
    else:
        known = store.masks(name)[DEFAULT_ESTIMATOR if mask == "default" else mask].known
    return tuple(c for c, k in enumerate(known) if k)


def primary_truth(settings: BenchmarkSettings) -> str:
    """Ground truth of masks: a class that was trained on, or one that the teacher recalls.

    In the rare regime hospitals hold classes of so few images that their teachers did not learn them, and so
    do real ones.
    """
    return "held" if settings.regime == "absent" and not settings.sites else "recalled"


def relevant_teachers(case: Case, setup: Setup) -> dict[str, Teacher]:
    """Teachers that know a class asked for or one of the student's own, by the names of their networks.

    A teacher that an ablation leaves out of the query may still speak for local classes.
    """
    names = case.teachers(setup.teachers)
    known = {name: set(known_classes(case, name, setup.mask)) for name in names}
    for q in case.question.query:
        able = [name for name in names if q in known[name]]
        if setup.max_teachers is not None:
            masks = {name: case.store.masks(name)[DEFAULT_ESTIMATOR] for name in able}
            for name in sorted(able, key=lambda n: -masks[n].scores[q])[setup.max_teachers :]:
                known[name].discard(q)
    networks = {name: case.store.bundle(name).network for name in names}
    means = {name: own_means(case, name, exact=setup.exact_means) for name in names}
    spoilt = draw_bad(names, setup.bad_teachers, case.seed("bad")) if setup.bad else ()
    for name in spoilt:
        assert setup.bad is not None
        networks[name], claimed, means[name] = spoil(
            networks[name],
            sorted(known[name]),
            means[name],
            setup.bad,
            case.question.query[0],
            shape=case.inputs.shape[1:],
            seed=case.seed("bad", name),
        )
        known[name] = set(claimed)
    query, relevant = set(case.question.query), set(case.relevant)
    wanted = relevant if setup.rivals and setup.method not in ("qkt-light", BY_MEANS) else query

    def verified(name: str) -> tuple[int, ...] | None:
        """Verified classes; None where an ablation sets the mask, which would count as a false claim."""
        if setup.mask != "default":
            return None
        return case.store.verify(networks[name]) if name in spoilt else case.store.verified(name)

    return {
        name: Teacher(
            name.split("/")[1],
            networks[name],
            tuple(sorted(known[name])),
            verified(name),
            class_means=means[name],
            encoder_means=encoder_means(case, name, exact=setup.exact_means)
            if setup.method in ENCODED_METHODS
            else {},
        )
        for name in names
        if known[name] & wanted
    }


def encoded_images(case: Case, hospital: SimulatedHospital) -> EncodedImages:
    """The asking hospital's images as features of the run's encoder."""
    bank, encoder = case.store.features, case.store.encoder
    assert bank is not None
    assert encoder is not None
    train, held_out = (
        shared_features(bank.of(part.images)) for part in (hospital.train, hospital.calibration)
    )
    return EncodedImages(encoder, train, held_out)


def own_means(case: Case, name: str, *, exact: bool) -> Mapping[int, Tensor]:
    """What a teacher's bundle holds beside the network: class means of its own features.

    Args:
        exact: without the noise that ``train.class_means`` has by default.
    """
    store = case.store
    bundle = store.bundle(name)
    if not exact:
        return bundle.class_means
    params = store.settings.train.class_means.model_copy(update={"epsilon": None})
    train = store.data(name.split("/")[1]).train
    return class_means(bundle.network, *train.pair, "unit", store.device, params, torch.Generator())


def encoder_means(case: Case, name: str, *, exact: bool) -> dict[int, Tensor]:
    """What a teacher's bundle would hold beside the network: class means of the encoder's features.

    Args:
        exact: without the noise that ``shared_encoder`` has by default.
    """
    bank, train = case.store.features, case.store.data(name.split("/")[1]).train
    assert bank is not None
    features, labels = shared_features(bank.of(train.images)), torch.from_numpy(train.labels)
    if exact:
        return mean_features(features, labels, SMALLEST_COUNT)
    drawn = private_means(
        features,
        labels,
        epsilon=PRIVACY.epsilon,
        delta=PRIVACY.delta,
        least=SMALLEST_COUNT,
        draw=generator(case.store.federation.seed, "benchmark", "encoder-means", name),
    )
    return {c: mean.half().float() for c, mean in drawn.items()}  # as bundles hold them


def means_of_known(teacher: Teacher) -> dict[int, Tensor]:
    """The encoder's class means of classes that a teacher's mask says it knows."""
    return {c: mean for c, mean in teacher.encoder_means.items() if c in teacher.claimed}


def _answer(
    case: Case,
    setup: Setup,
    student: Classifier,
    hospital: SimulatedHospital,
    teachers: Sequence[Teacher],
    taught: Sequence[int],
) -> Answer:
    """The answer by the method itself, or by an ablation of its phases."""
    store, settings = case.store, case.store.settings
    encoded = encoded_images(case, hospital) if setup.method in ENCODED_METHODS else None
    data = LocalData(hospital.train.pair, hospital.calibration.pair, encoded=encoded)
    params = settings.transfer.model_copy(update=dict(setup.transfer))
    if setup.method == BY_MEANS:
        return answer_by_means(
            student,
            {t.site: means_of_known(t) for t in teachers},
            data,
            taught,
            task=store.task,
            budget=settings.budget,
            params=params,
            seed=case.seed("transfer"),
            device=store.device,
        )
    if (setup.phase1, setup.phase2, setup.on_training) == ("merge", True, True):
        return answer_query(
            student,
            teachers,
            data,
            taught,
            task=store.task,
            method=setup.method,
            budget=settings.budget,
            params=params,
            seed=case.seed("transfer"),
            device=store.device,
        )
    return answer_ablated(
        student,
        teachers,
        data,
        taught,
        task=store.task,
        phase1=setup.phase1,
        phase2=setup.phase2,
        on_training=setup.on_training,
        distillation=settings.distillation,
        budget=settings.budget,
        params=params,
        seed=case.seed("transfer"),
        device=store.device,
    )


def qkt(case: Case, setup: Setup) -> MethodResult:
    """An answer by QKT.

    Classes that no teacher knows are not taught; without any, or where none of those that claim to know a
    class can be used, the own model answers.
    """
    store = case.store
    teachers = relevant_teachers(case, setup)
    taught = [q for q in case.question.query if any(q in t.claimed for t in teachers.values())]
    if not taught:
        return local(case, own=setup.own)
    hospital = store.data(case.question.asking, setup.own)
    own_name = f"{setup.own}/{case.question.asking}"
    student = store.bundle(own_name).network
    start = time.perf_counter()
    try:
        answer = _answer(case, setup, student, hospital, list(teachers.values()), taught)
    except QueryError as error:
        if error.code != "untrusted":
            raise
        return replace(local(case, own=setup.own), bytes_moved=sum(map(store.bytes, teachers)))
    seconds = time.perf_counter() - start
    included = {t.site: t for t in answer.teachers if t.site in answer.decision.experts}
    asked = {name: included[t.site] for name, t in teachers.items() if t.site in included}
    experts = list(asked.values())

    def scores(inputs: Tensor, images: Images) -> Tensor:
        beside = answer.refined.encoded
        if beside is None:
            return scores_of(answer.network, answer.decision, experts, inputs, store.device)
        assert store.features is not None  # of every image, so that the encoder need not see them again
        logits = predict(answer.refined.network, inputs, store.device)
        logits = logits + beside.logits(shared_features(store.features.of(images)))
        offsets = torch.tensor(answer.decision.offsets)
        return decide(logits, answer.decision.local, answer.decision.query, offsets)

    if experts and not setup.bad:
        flips = answer.decision.flips
        each = [store.routed_logits(own_name, flips)[case.index]]
        for name, teacher in asked.items():  # as sent: every question shows it the same images, once will do
            as_sent = not teacher.share
            each.append(
                store.routed_logits(name, flips)[case.index]
                if as_sent
                else predict_logits(teacher.network, case.inputs, flips, store.device)
            )
        logits = routed_consensus(each, answer.decision, experts)
        offsets = torch.tensor(answer.decision.offsets)
        found = decide(logits, answer.decision.local, answer.decision.query, offsets)
    else:
        found = scores(case.inputs, case.images.images)
    # The file of class means holds one, or zeros, for every class of the federation.
    width = max((m.numel() for t in teachers.values() for m in t.encoder_means.values()), default=0)
    means = BYTES_OF_HALF * store.federation.spec.classes * width
    files = (CARD, MASK) if setup.method == BY_MEANS else SHARED
    shape, views = case.inputs.shape[1:], len(MIRRORS) if answer.decision.flips else 1
    return MethodResult(
        found,
        sum(store.bytes(name, files) + means for name in teachers),
        seconds=seconds,
        passes=(1 + len(experts)) * views,
        cost=None
        if experts
        else views * multiply_adds(answer.network, shape) / multiply_adds(student, shape),
        curve=at_budgets(found, answer.operating_point),
    )


def at_budgets(scores: Tensor, point: OperatingPoint) -> dict[float, Tensor]:
    """Scores of an answer at other budgets: only the query's offsets change.

    Args:
        scores: (N, C) as answered.
    """
    query, answered = list(point.decision.query), torch.tensor(point.decision.offsets)
    moved = {}
    for budget in BUDGETS:
        moved[budget] = scores.clone()
        offsets = offsets_for_budget(point.scores, budget, lost=point.lost, labels=point.labels)
        moved[budget][:, query] += (offsets - answered).to(scores)
    return moved


def methods(settings: BenchmarkSettings) -> dict[str, Callable[[Case], MethodResult]]:
    """Every separately computed method, by name."""
    found: dict[str, Callable[[Case], MethodResult]] = {
        "local": local,
        "ensemble-prob": ensemble_of_probabilities,
        "ensemble-logit": partial(ensemble, combine=mean_logit_scores),
        "ensemble-adapted": ensemble_adapted,
        "fens": learnt_ensemble,
        "one-shot-average": one_shot_average,
        "statistics": class_statistics,
        "statistics-centred": partial(class_statistics, centred=True),
        "statistics-dp": partial(class_statistics, private=True),
        "gaussian-heads": drawn_heads,
        "federated-head": averaged_head,
        OWN_WITH_QUERY: own_with_query,
        POOLED: pooled,
        FINETUNED: global_model_finetuned,
    }
    for kind in ON_TEACHERS:
        found[kind] = partial(on_teachers, kind=kind)
    for algorithm in FEDERATED:
        found[algorithm] = partial(global_model, algorithm=algorithm)
        for rounds in settings.rounds:
            found[f"ablation/{algorithm}-{rounds}"] = partial(
                global_model, algorithm=algorithm, rounds=rounds
            )
    return found | {name: partial(qkt, setup=setup) for name, setup in SETUPS.items()}
