"""``metrics.json`` and ``curves.json`` of a teacher's training. They do not leave its site."""

from __future__ import annotations

from pydantic import ConfigDict, FiniteFloat, RootModel

from qkt_clinical.config.base import Fraction
from qkt_clinical.records.base import Number, Record


class TeacherMetrics(Record):
    """``metrics.json``: figures on validation images."""

    balanced_accuracy: Fraction | None
    recall: dict[str, Fraction | None]
    """None of a class with too few validation images."""
    epochs: Number
    best_epoch: Number
    stopped_early: bool


class TrainingCurves(RootModel[tuple[dict[str, FiniteFloat], ...]]):
    """``curves.json``: a row per epoch, its number under ``epoch``."""

    model_config = ConfigDict(frozen=True)
