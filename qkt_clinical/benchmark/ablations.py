"""Ablations of the phases: answers with a phase left out or replaced.

The same six steps as :func:`qkt_clinical.qkt.answer.answer_query`, with another step in the place of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType

import torch

from qkt_clinical.benchmark.distillation import (
    Training,
    learn_head,
    learn_jointly,
    merge_by_distillation,
)
from qkt_clinical.benchmark.phases import DistillationParams, Phase1Way
from qkt_clinical.catalog import Method
from qkt_clinical.config.params import TransferParams
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.answer import (
    adapt,
    answer_of,
    held_out_images,
    merge,
    operating_point_at,
    scores_to_keep,
    screen,
    set_operating_point,
    student_logits,
    validate,
)
from qkt_clinical.qkt.head import refine
from qkt_clinical.qkt.panel import PhaseSettings, Teacher
from qkt_clinical.qkt.steps import Answer, LocalData, Merged, Refined, Screened, ValidQuery
from qkt_clinical.task import Task

TRAINED: MappingProxyType[Phase1Way, Callable[[Training], Merged]] = MappingProxyType(
    {"distill": merge_by_distillation, "joint": learn_jointly, "none": learn_head}
)


def _merge(
    way: Phase1Way,
    question: ValidQuery,
    screened: Screened,
    settings: PhaseSettings,
    distillation: DistillationParams,
) -> Merged:
    if way == "merge":
        return merge(question, screened, settings)
    labels = torch.from_numpy(question.labels)
    return TRAINED[way](Training(screened.panel, question.inputs, labels, settings, distillation))


def answer_ablated(
    student: Classifier,
    teachers: Sequence[Teacher],
    data: LocalData,
    query: Sequence[int],
    *,
    task: Task,
    method: Method = "qkt",
    phase1: Phase1Way = "merge",
    phase2: bool = True,
    on_training: bool = True,
    distillation: DistillationParams | None = None,
    budget: float = 0.02,
    params: TransferParams | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Answer:
    """Answer a query with phases left out or replaced; arguments as of ``answer_query``.

    Args:
        phase1: how the student takes up the teachers.
        phase2: whether the head is refined on rare samples and given its operating point.
        on_training: whether that is set on training images too.
        distillation: of a phase 1 that is trained.

    Raises:
        QueryError: as ``answer_query``.
    """
    params = params or TransferParams()
    if phase1 != "merge":  # class means are of the teachers' features, which such a student does not have
        params = params.model_copy(update={"discriminant": False})
    settings = PhaseSettings(task, params, seed, device or torch.device("cpu"), progress)
    asked = validate(student, teachers, data, query, method=method, budget=budget)
    adapted = adapt(asked, settings)
    question = adapted.question
    screened = screen(question, settings)
    merged = _merge(phase1, question, screened, settings, distillation or DistillationParams())
    if phase2:
        refined = refine(question, screened, merged, settings)
        point = set_operating_point(question, screened, merged, refined, settings, on_training=on_training)
    else:
        refined = Refined(merged.network)
        images = held_out_images(question, screened)
        logits = student_logits(question, screened, merged, refined, images, settings)
        scores, _ = scores_to_keep(question, images, logits, settings)
        point = operating_point_at(question, screened, merged, scores, torch.zeros(scores.shape[1]))
    return answer_of(adapted, screened, merged, refined, point)
