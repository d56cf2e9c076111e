"""An answer without any other hospital's network: by class means over an encoder that all have, alone.

The hospital's own network tells its own classes. Where the query lies, the teachers' class means over the
features of a frozen encoder say (:func:`qkt_clinical.qkt.discriminant.shared_rows`); they are some kilobytes
and have noise, so that an answer moves nothing of a teacher but its mask and what an epsilon bounds. For the
own network an absent query class lies amid the local ones.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from qkt_clinical.catalog import BY_MEANS
from qkt_clinical.config.params import TransferParams
from qkt_clinical.errors import QueryError
from qkt_clinical.models.class_means import mean_features
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.answer import LEAVE_OUT, answer_of, own_alone, set_operating_point, validate
from qkt_clinical.qkt.head import beside
from qkt_clinical.qkt.low_rank_merge import full_rank, merge_networks
from qkt_clinical.qkt.panel import PhaseSettings, Teacher, head_of
from qkt_clinical.qkt.steps import Adapted, Answer, LocalData, Merged, Refined, ValidQuery
from qkt_clinical.qkt.teacher_screening import ScreeningResult
from qkt_clinical.task import Task

MEANS_SHARE = 0.65
"""Of discriminants over the encoder in the head, the own network having the rest."""
CHANCE = 3.0
"""Standard deviations by which an agreement may lie below 0 without being a contradiction."""


def amid(head: tuple[Tensor, Tensor], local: Sequence[int], query: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of a head whose classes asked for lie amid the local ones: the mean of their rows.

    Args:
        head: weight (C, F) and bias (C,).
    """
    weight, bias = (part.clone() for part in head)
    weight[list(query)] = weight[list(local)].mean(dim=0)
    bias[list(query)] = bias[list(local)].mean()
    return weight, bias


def means_agreement(there: Mapping[int, Tensor], here: Mapping[int, Tensor]) -> tuple[float | None, float]:
    """How far a teacher's class means lie to each other as the hospital's own do, from -1 to 1.

    The mean over the classes that both have of the cosine between where either sees the class, each from the
    middle of these classes: a stain or a camera that moves all of them alike is no disagreement.

    Args:
        there: class to mean features (F,) of the teacher; here: of the asking hospital's images.

    Returns:
        None where they have fewer than two classes in common, or one of them sees no difference; and the most
        that chance would take from 0, since means may be hardly more than noise: directions drawn at random
        among F have a cosine of standard deviation 1 / sqrt(F), and of k classes about their middle k - 1 are
        drawn.
    """
    shared = sorted(set(there) & set(here))
    if len(shared) < 2:
        return None, math.inf
    one, other = (torch.stack([means[c].double() for c in shared]) for means in (there, here))
    one, other = one - one.mean(dim=0), other - other.mean(dim=0)
    if not (bool(one.any()) and bool(other.any())):
        return None, math.inf
    chance = CHANCE / math.sqrt(one.shape[1] * (len(shared) - 1))
    return float(cosine_similarity(one, other, dim=1).mean()), chance


def screen_means(
    class_means: Mapping[str, Mapping[int, Tensor]], here: Mapping[int, Tensor]
) -> list[ScreeningResult]:
    """Which teachers' class means are used: not those that contradict the hospital's own images.

    Nobody's network is here to verify a claim by. Whoever swaps the names of two classes that the hospital
    has puts them the other way round; about other classes a teacher is believed.

    Args:
        class_means: by site, class to mean features (F,).
        here: of the asking hospital's images.
    """
    found = []
    for site, there in sorted(class_means.items()):
        seen, chance = means_agreement(there, here)
        if seen is None:
            result = ScreeningResult(site, included=True, reason="shares no two classes to compare")
        elif seen < -chance:
            result = ScreeningResult(
                site,
                included=False,
                reason="its class means contradict the hospital's own images of the same classes",
                agreement=seen,
            )
        else:
            result = ScreeningResult(
                site,
                included=True,
                reason="its class means do not contradict the hospital's own images of the same classes",
                agreement=seen,
            )
        found.append(result)
    return found


def _used(
    question: ValidQuery, class_means: Mapping[str, Mapping[int, Tensor]], results: Sequence[ScreeningResult]
) -> dict[str, Mapping[int, Tensor]]:
    """The class means of the teachers that are included.

    Raises:
        QueryError: a query class is left to nobody (``untrusted``).
    """
    used = {r.site: class_means[r.site] for r in results if r.included}
    left = [q for q in question.query if not any(q in means for means in used.values())]
    if left:
        why = "; ".join(f"{r.site}: {r.reason}" for r in results if left[0] in class_means[r.site])
        raise QueryError(
            f"no teacher of query class {left[0]} can be used: {why}", remedy=LEAVE_OUT, code="untrusted"
        )
    return used


def _speakers(
    student: Classifier, class_means: Mapping[str, Mapping[int, Tensor]], seen: Container[str]
) -> list[Teacher]:
    """Nobody's network is here: the own one stands where theirs would, and none is asked."""
    return [
        Teacher(site, student, tuple(sorted(means)), encoder_means=means)
        for site, means in class_means.items()
        if site in seen
    ]


def answer_by_means(
    student: Classifier,
    class_means: Mapping[str, Mapping[int, Tensor]],
    data: LocalData,
    query: Sequence[int],
    *,
    task: Task,
    budget: float = 0.02,
    params: TransferParams | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> Answer:
    """Answer a query by the own network and other hospitals' class means, ``qkt-means``.

    Args:
        student: the asking hospital's own network; left as it is.
        class_means: by hospital, class to its mean features (F,) by the encoder, of classes that its mask
            says it knows.
        data: the asking hospital's own images, with their features by the same encoder.
        query: class indices.
        budget: at most this share of the hospital's own images may go to the query.

    Raises:
        QueryError: as :func:`qkt_clinical.qkt.answer.answer_query`.
    """
    settings = PhaseSettings(task, params or TransferParams(), seed, device or torch.device("cpu"))
    every = _speakers(student, class_means, class_means)
    question = validate(student, every, data, query, method=BY_MEANS, budget=budget)
    results: list[ScreeningResult] = []
    if settings.params.screening:
        assert question.encoded is not None
        labels = torch.from_numpy(question.labels)
        results = screen_means(class_means, mean_features(question.encoded.train.double(), labels))
        used = _used(question, class_means, results)
        question = replace(question, teachers=tuple(_speakers(question.student, used, used)))
    screened = replace(own_alone(question, settings), results=tuple(results))
    head = head_of(question.student)
    rows = amid(head, question.local, [q for q in question.query if q not in question.rare])
    network = merge_networks(question.student, [full_rank(question.student)], [rows])
    refined = beside(question, screened, Refined(network), settings, share=MEANS_SHARE)
    merged = Merged(network)
    point = set_operating_point(question, screened, merged, refined, settings, on_training=False)
    if refined.encoded is None:  # own classes would pay more than the budget: the query is told by chance
        point = replace(point, within_budget=False)
    return answer_of(Adapted(question), screened, merged, refined, point)
