"""Accuracies of real hospitals' questions under other draws of the images that judge. Pure functions.

Whole patients of every site are drawn with replacement, the same ones for all methods and questions, so that
differences between methods are of the same images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qkt_clinical.baselines.ensembles import restrict
from qkt_clinical.benchmark.simulate import Origins
from qkt_clinical.benchmark.summary import DRAWS, Resampled, row_key
from qkt_clinical.common.seeding import derive
from qkt_clinical.data.prepared import Labels
from qkt_clinical.evaluation.metrics import Floats

if TYPE_CHECKING:
    from qkt_clinical.benchmark.case import Case


def right_digits(case: Case, scores: Tensor) -> str:
    """A digit for each image that judges, 1 where scores (N, C) over the relevant classes are right."""
    right = case.store.task.answer(restrict(scores, case.relevant)).numpy() == case.images.labels
    return "".join("01"[int(r)] for r in right)


def judged(case: Case) -> dict[str, Any]:
    """What judges a question: indices of the images, classes asked for, and how the own network does."""
    return {
        "images": case.index.tolist(),
        "query": list(case.question.query),
        "before": right_digits(case, case.logits(case.student)),
    }


def image_weights(origins: Origins, draws: int = DRAWS) -> Floats:
    """How often each image counts in each draw (draws, N): as often as its patient is drawn at its site."""
    random = np.random.default_rng(derive(0, "benchmark", "bootstrap", "images"))
    weights: Floats = np.empty((draws, len(origins.sites)))
    for site in np.unique(origins.sites):
        at = np.flatnonzero(origins.sites == site)
        patient = np.unique(origins.groups[at], return_inverse=True)[1]
        count = int(patient.max()) + 1
        weights[:, at] = random.multinomial(count, np.full(count, 1 / count), size=draws)[:, patient]
    return weights


def resample(rows: Sequence[Mapping[str, Any]], labels: Labels, origins: Origins) -> Resampled:
    """Query, retained and balanced accuracy and forgetting (draws, 4) of every row.

    A class of which a draw has no image has the recall of all its images.

    Args:
        rows: with ``judged`` and ``right``.
        labels: of all images of the split.
        origins: of the same.
    """
    weights = image_weights(origins)

    @lru_cache(1)  # the rows of a question follow one another
    def of_question(images: tuple[int, ...]) -> tuple[Floats, NDArray[np.float64], NDArray[np.int64]]:
        own = labels[list(images)]
        classes = np.unique(own)
        return weights[:, list(images)], (own[:, None] == classes).astype(np.float64), classes

    @lru_cache(2)
    def recall(images: tuple[int, ...], digits: str) -> Floats:
        drawn, member, _ = of_question(images)
        right = member * (np.frombuffer(digits.encode(), dtype=np.uint8) == ord("1"))[:, None]
        total, found = drawn @ member, drawn @ right
        everywhere = np.broadcast_to(right.sum(axis=0) / member.sum(axis=0), total.shape)
        shares: Floats = np.divide(found, total, out=everywhere.copy(), where=total > 0)
        return shares

    def accuracies(row: Mapping[str, Any]) -> Floats:
        images = tuple(row["judged"]["images"])
        asked = np.isin(of_question(images)[2], row["judged"]["query"])
        before = recall(images, row["judged"]["before"])[:, ~asked].mean(axis=1)
        now = recall(images, row["right"])
        retained = now[:, ~asked].mean(axis=1)
        return np.stack([now[:, asked].mean(axis=1), retained, now.mean(axis=1), before - retained], axis=1)

    return {row_key(row): accuracies(row) for row in rows}
