"""What a label means: the one place that knows how outputs become a loss, an answer and figures.

Networks, the method, the baselines and the evaluation ask a :class:`Task` and take no argmax themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from qkt_clinical.catalog import TaskName
from qkt_clinical.errors import ConfigError

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]

TIE_BREAK = 1e-3
"""What a nat of cross-entropy counts for in a validation score, in recall."""


@dataclass(frozen=True)
class LabelFigures:
    """How answers fare, label by label, under several weightings of the images."""

    recall: Reals
    """(draws, classes): share of a label's images answered so; NaN where it has no weight."""
    precision: Reals
    """(draws, classes): share of the images answered so that are of the label; NaN where none is."""
    confusion: Integers
    """(classes, classes): images by truth, in rows, and answer; every image counts once."""


class Task(Protocol):
    """What a network's outputs (N, C) and an image's labels are to each other.

    Scores are outputs after the decision rule, minus infinity for what is no possible answer. Tensors are
    single or double precision on any device, and so is what is returned; arrays are the evaluation's.
    """

    @property
    def name(self) -> TaskName:
        """As in the catalogue."""

    def counts(self, labels: Integers, classes: int) -> Integers:
        """How many images bear each label, (classes,)."""

    def weights(self, labels: Integers, classes: int) -> Tensor:
        """What :meth:`loss` weighs labels with, float32 (classes,), from all of a hospital's labels."""

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Loss of each image (N,), in the outputs' dtype."""

    def loss(self, outputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Mean loss () of a batch, float32.

        Args:
            weights: from :meth:`weights`, not from the batch: a rare label is missing from many a batch.
        """

    def balanced_loss(self, outputs: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
        """Loss () in which every one of ``classes`` that is there counts alike, in the outputs' dtype."""

    @overload
    def answer(self, scores: Tensor) -> Tensor: ...
    @overload
    def answer(self, scores: NDArray[np.floating[Any]]) -> Integers: ...
    def answer(self, scores: Tensor | NDArray[np.floating[Any]]) -> Tensor | Integers:
        """What is answered, in the form of labels."""

    @overload
    def probabilities(self, scores: Tensor) -> Tensor: ...
    @overload
    def probabilities(self, scores: Reals) -> Reals: ...
    def probabilities(self, scores: Tensor | Reals) -> Tensor | Reals:
        """Probability of each class (N, C), in the scores' dtype; 0 for a score of minus infinity."""

    def log_probabilities(self, scores: Tensor) -> Tensor:
        """Their logarithms (N, C), in the scores' dtype."""

    def confidence(self, probabilities: Reals, labels: Integers) -> tuple[Reals, NDArray[np.bool_]]:
        """How sure each answer is, in [0, 1], and whether it came true: what calibration is measured on."""

    def validation_score(self, outputs: Tensor, labels: Tensor) -> float:
        """How good outputs on validation images are, at least one; the epoch of the highest is kept."""

    def recall(self, answers: Tensor, labels: Tensor) -> dict[int, float]:
        """Share answered right of each label that is there, by label."""

    def figures(self, answers: Integers, labels: Integers, classes: int, weights: Reals) -> LabelFigures:
        """What answers are worth, label by label.

        Args:
            weights: (draws, N), how often each image counts in each draw.
        """


def _recall(answers: Tensor, labels: Tensor) -> dict[int, float]:
    return {int(c): float((answers[labels == c] == c).float().mean()) for c in labels.unique()}


def mean_recall(answers: Tensor, labels: Tensor) -> float:
    """Mean over the classes in ``labels`` (N,) of the share of ``answers`` (N,) that is right."""
    recall = _recall(answers, labels)
    return sum(recall.values()) / len(recall)


def _shares(right: NDArray[np.bool_], of: Integers, classes: int, weights: Reals) -> Reals:
    """Of the images ``of`` each class the share that is right, (draws, classes); NaN where there is none."""
    member = (of[:, None] == np.arange(classes)[None]).astype(np.float64)
    total = weights @ member
    found = weights @ (member * right[:, None])
    out: Reals = np.divide(found, total, out=np.full_like(total, np.nan), where=total > 0)
    return out


class _Multiclass:
    """One label an image (N,), an index of a class; classes compete, and the highest score is the answer."""

    name: TaskName = "multiclass"

    def counts(self, labels: Integers, classes: int) -> Integers:
        return np.bincount(labels, minlength=classes)

    def weights(self, labels: Integers, classes: int) -> Tensor:
        """Every class that is there counts alike; mean 1 over images, 0 for a class without any."""
        counts = self.counts(labels, classes).astype(np.float64)
        weights = np.where(counts > 0, len(labels) / np.maximum(counts, 1) / max(1, (counts > 0).sum()), 0.0)
        return torch.from_numpy(weights).float()

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(outputs, labels, reduction="none")

    def loss(self, outputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return (self.losses(outputs.float(), labels) * weights[labels]).mean()

    def balanced_loss(self, outputs: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
        each = self.losses(outputs, labels)
        means = [each[labels == c].mean() for c in classes if bool((labels == c).any())]
        return torch.stack(means).mean()

    @overload
    def answer(self, scores: Tensor) -> Tensor: ...
    @overload
    def answer(self, scores: NDArray[np.floating[Any]]) -> Integers: ...
    def answer(self, scores: Tensor | NDArray[np.floating[Any]]) -> Tensor | Integers:
        """The class of the highest score, (N,); of equal ones the first."""
        return scores.argmax(1)

    @overload
    def probabilities(self, scores: Tensor) -> Tensor: ...
    @overload
    def probabilities(self, scores: Reals) -> Reals: ...
    def probabilities(self, scores: Tensor | Reals) -> Tensor | Reals:
        """The softmax: they add up to 1."""
        if isinstance(scores, Tensor):
            return torch.softmax(scores, dim=1)
        exp = np.exp(scores - scores.max(axis=1, keepdims=True))
        return cast(Reals, exp / exp.sum(axis=1, keepdims=True))

    def log_probabilities(self, scores: Tensor) -> Tensor:
        return scores.log_softmax(dim=1)

    def confidence(self, probabilities: Reals, labels: Integers) -> tuple[Reals, NDArray[np.bool_]]:
        """Of the most probable class, (N,) each."""
        return probabilities.max(axis=1), self.answer(probabilities) == labels

    def validation_score(self, outputs: Tensor, labels: Tensor) -> float:
        """Mean recall, less a thousandth of the cross-entropy.

        Small validation sets give the same recall for many epochs; the loss decides among them.
        """
        return mean_recall(self.answer(outputs), labels) - TIE_BREAK * float(F.cross_entropy(outputs, labels))

    def recall(self, answers: Tensor, labels: Tensor) -> dict[int, float]:
        return _recall(answers, labels)

    def figures(self, answers: Integers, labels: Integers, classes: int, weights: Reals) -> LabelFigures:
        right = answers == labels
        confusion = np.zeros((classes, classes), dtype=np.int64)
        np.add.at(confusion, (labels, answers), 1)
        return LabelFigures(
            recall=_shares(right, labels, classes, weights),
            precision=_shares(right, answers, classes, weights),
            confusion=confusion,
        )


MULTICLASS: Task = _Multiclass()
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in (MULTICLASS,)})


def task_of(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none (``unknown-task``).
    """
    if name not in TASKS:
        raise ConfigError(
            f"unknown task {name!r}", remedy=f"Tasks are: {', '.join(TASKS)}.", code="unknown-task"
        )
    return TASKS[name]
