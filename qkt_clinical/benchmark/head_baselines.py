"""Answers by a linear head over the features of a frozen encoder that all hospitals have."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from qkt_clinical.baselines import federated_head, gaussian_heads, statistics, statistics_dp
from qkt_clinical.benchmark.case import (
    Case,
    MethodResult,
    OwnScores,
    calibration_of,
    learned_of,
    with_budget,
)
from qkt_clinical.benchmark.store import ResultStore
from qkt_clinical.common.disclosure import SMALLEST_COUNT
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.params import PrivacyParams
from qkt_clinical.models.networks import multiply_adds

PRIVACY = PrivacyParams()
"""Of ``statistics-dp``, and of the means of ``qkt-statistics``: the defaults of ``shared_encoder``."""

LinearHead = tuple[Tensor, Tensor]
"""Weight (C, F) and bias (C,)."""


@dataclass(frozen=True)
class EncodedHospital:
    """A hospital's training images as features (N, F) of the frozen encoder, and labels (N,)."""

    name: str
    features: Tensor
    labels: Tensor


def encoded(case: Case) -> list[EncodedHospital]:
    """The asking hospital, without what is hidden from it, and all others."""
    bank = case.store.features
    assert bank is not None
    others = (h for h in case.store.federation.hospitals if h.name != case.question.student)
    return [
        EncodedHospital(h.site, bank.of(h.train.images), torch.from_numpy(h.train.labels))
        for h in (case.store.data(case.question.asking), *others)
    ]


def answered_by_head(
    case: Case,
    learn: Callable[[Tensor, Tensor, Sequence[int]], LinearHead],
    change: Callable[[Tensor], Tensor],
    moved: int,
) -> MethodResult:
    """A linear head over the encoder's features, with the budget.

    Args:
        learn: makes it, given features and labels of calibration images and the local classes.
        change: of every image's features before the head.
        moved: bytes.
    """
    store, bank = case.store, case.store.features
    assert bank is not None
    hospital = store.data(case.question.asking)
    held_out = calibration_of(hospital, case.question.query)
    local = [c for c in hospital.held if c not in case.question.query]
    seen, labels = change(bank.of(held_out.images)), torch.from_numpy(held_out.labels)
    learned = learned_of(case, hospital)
    start = time.perf_counter()
    weight, bias = learn(seen, labels, local)
    seconds = time.perf_counter() - start

    def scores(features: Tensor) -> Tensor:
        return features @ weight.T + bias

    own = OwnScores(
        scores(seen), labels, scores(change(bank.of(learned.images))), torch.from_numpy(learned.labels)
    )
    return MethodResult(
        with_budget(case, scores(change(bank.of(case.images.images))), own, local),
        moved,
        seconds=seconds,
        cost=bank.multiply_adds / multiply_adds(store.bundle(case.student).network, case.inputs.shape[1:]),
    )


def class_statistics(case: Case, *, centred: bool = False, private: bool = False) -> MethodResult:
    """Linear discriminants of everybody's class statistics over a frozen encoder's features.

    Args:
        centred: every hospital takes its own mean off its features.
        private: other hospitals' statistics have noise, as much as ``train.privacy`` has by default.
    """
    classes, members = case.store.federation.spec.classes, encoded(case)
    centre = members[0].features.mean(dim=0)
    shared = derive(case.store.federation.seed, "benchmark", "statistics-dp")

    def change(features: Tensor) -> Tensor:
        if private:
            return statistics_dp.projected(features, seed=shared)
        return features - centre if centred else features

    each = []
    for number, member in enumerate(members):
        if private and number:
            each.append(
                statistics_dp.private_statistics(
                    change(member.features),
                    member.labels,
                    classes,
                    epsilon=PRIVACY.epsilon,
                    delta=PRIVACY.delta,
                    seed=derive(shared, member.name),
                )
            )
            continue
        own = member.features - member.features.mean(dim=0) if centred else change(member.features)
        each.append(statistics.class_statistics(own, member.labels, classes))
    pooled = statistics.without_small(statistics.pool(each), SMALLEST_COUNT if private else 1)

    def learn(seen: Tensor, labels: Tensor, local: Sequence[int]) -> LinearHead:
        return statistics.best_head(pooled, case.relevant, local, seen, labels, task=case.store.task)

    return answered_by_head(case, learn, change, sum(s.bytes for s in each[1:]))


def drawn_heads(case: Case) -> MethodResult:
    """A head trained on features drawn from other hospitals' mixtures, and on the hospital's own."""
    own, *others = encoded(case)
    mixtures = [
        gaussian_heads.class_mixtures(h.features, h.labels, seed=case.seed("gaussian-heads", h.name))
        for h in others
    ]
    features, labels = gaussian_heads.drawn_features(
        mixtures, case.relevant, seed=case.seed("gaussian-heads")
    )
    train = torch.cat([own.features, features]), torch.cat([own.labels, labels])

    def learn(seen: Tensor, truth: Tensor, local: Sequence[int]) -> LinearHead:
        classes = case.store.federation.spec.classes
        return gaussian_heads.best_head(train, (seen, truth), local, classes, task=case.store.task)

    moved = sum(m.bytes for held in mixtures for c, m in held.items() if c in case.relevant)
    return answered_by_head(case, learn, lambda features: features, moved)


@lru_cache(maxsize=4)
def _averaged_head(store: ResultStore, asks_as: str) -> tuple[LinearHead, int, float]:
    """Head, bytes and seconds of what all hospitals train while classes are hidden from one, or none."""
    bank = store.features
    assert bank is not None
    members = store.federation.members(asks_as)
    start = time.perf_counter()
    head, moved = federated_head.federated_head(
        [(bank.of(h.train.images), torch.from_numpy(h.train.labels)) for h in members],
        store.federation.spec.classes,
        store.settings.baselines.head,
        task=store.task,
        seed=derive(store.federation.seed, "benchmark", "federated-head"),
    )
    return head, moved, time.perf_counter() - start


def averaged_head(case: Case) -> MethodResult:
    """A head that all hospitals train together over the features, by federated averaging."""
    head, moved, seconds = _averaged_head(case.store, case.question.asks_as)
    found = answered_by_head(case, lambda *_: head, lambda features: features, moved)
    return replace(found, rounds=case.store.settings.baselines.head.rounds, seconds=seconds)
