"""An answer without any other hospital's network: by class means over an encoder that all have, alone.

The hospital's own network tells its own classes. Where the query lies, the teachers' class means over the
features of a frozen encoder say (:func:`qkt_clinical.qkt.discriminant.shared_rows`); they are some kilobytes
and have noise, so that nothing leaves a hospital but its mask and what an epsilon bounds. For the own network
an absent query class lies amid the local ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qkt_clinical.catalog import ON_STATISTICS
from qkt_clinical.config.params import TransferParams
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.answer import (
    Adapted,
    Answer,
    LocalData,
    Merged,
    Refined,
    answer_of,
    beside,
    own_alone,
    set_operating_point,
    validate,
)
from qkt_clinical.qkt.low_rank_merge import full_rank, merge_networks
from qkt_clinical.qkt.panel import PhaseSettings, Teacher, head_of
from qkt_clinical.task import Task

MEANS_SHARE = 0.65
"""Of discriminants over the encoder in the head, the own network having the rest."""


def amid(head: tuple[Tensor, Tensor], local: Sequence[int], query: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of a head whose classes asked for lie amid the local ones: the mean of their rows.

    Args:
        head: weight (C, F) and bias (C,).
    """
    weight, bias = (part.clone() for part in head)
    weight[list(query)] = weight[list(local)].mean(dim=0)
    bias[list(query)] = bias[list(local)].mean()
    return weight, bias


def answer_by_means(
    student: Classifier,
    class_means: Mapping[str, Mapping[int, Tensor]],
    data: LocalData,
    query: Sequence[int],
    *,
    task: Task,
    budget: float = 0.02,
    seed: int = 0,
    device: torch.device | None = None,
) -> Answer:
    """Answer a query by the own network and other hospitals' class means.

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
    settings = PhaseSettings(task, TransferParams(), seed, device or torch.device("cpu"))
    # Nobody's network is here: the own one stands where theirs would, and none is asked.
    teachers = [
        Teacher(site, student, tuple(sorted(means)), encoder_means=means)
        for site, means in class_means.items()
    ]
    question = validate(student, teachers, data, query, method=ON_STATISTICS, budget=budget)
    screened = own_alone(question, settings)
    head = head_of(question.student)
    rows = amid(head, question.local, [q for q in question.query if q not in question.rare])
    network = merge_networks(question.student, [full_rank(question.student)], [rows])
    refined = beside(question, screened, Refined(network), settings, share=MEANS_SHARE)
    merged = Merged(network)
    point = set_operating_point(question, screened, merged, refined, settings)
    return answer_of(Adapted(question), screened, merged, refined, point)
