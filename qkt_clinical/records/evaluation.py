"""``reports/evaluation/<hospital>/<query>.json``: figures on held-out images, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from qkt_clinical.common.disclosure import shown_count, shown_total, too_few
from qkt_clinical.config.base import Fraction
from qkt_clinical.records.base import Difference, Number, Proportion, Record, renamed


class Bin(Record):
    """One bin of a reliability curve: mean confidence, accuracy and number of images."""

    confidence: Fraction
    accuracy: Fraction
    images: Number


class Scores(Record):
    """Figures of one model on held-out images; None where undefined or suppressed.

    ``confusion`` has truth in rows, ordered as ``relevant``.
    """

    query_accuracy: Proportion
    retained_accuracy: Proportion
    balanced_accuracy: Proportion
    auroc: Proportion | None = None
    ece: Proportion
    recall: dict[str, Proportion | None]
    precision: dict[str, Proportion | None]
    class_auroc: dict[str, Proportion | None]
    class_auprc: dict[str, Proportion | None]
    class_ece: dict[str, Fraction | None] = Field(default_factory=dict)
    class_reliability: dict[str, tuple[Bin, ...] | None] = Field(default_factory=dict)
    macro_precision: Proportion | None = None
    macro_auroc: Proportion | None = None
    macro_auprc: Proportion | None = None
    confusion: tuple[tuple[Number, ...] | None, ...]
    reliability: tuple[Bin, ...] = ()


class Flip(Record):
    """A test image, ``index`` of the prepared arrays, that only one of the models classifies correctly."""

    site: str
    index: Number
    actual: str
    before: str
    after: str
    split: Literal["test", "held_back"] = "test"
    """Which of the hospital's arrays hold it."""

    @property
    def gained(self) -> bool:
        """Wrong before, right after."""
        return self.after == self.actual


class SubgroupScores(Record):
    """Figures of a group of patients; None where they rest on too few."""

    query_accuracy: Proportion | None
    retained_accuracy: Proportion | None
    balanced_accuracy: Proportion | None


class SubgroupResult(Record):
    """One group of a column such as sex or scanner; counts as they may be shown."""

    images: Number | str
    patients: Number | str
    before: SubgroupScores
    after: SubgroupScores


class OperatingPointResult(Record):
    """The query's offsets, and their false-query rate on the hospital's own images of its own classes.

    ``given_away_*`` is what ``qkt-evaluation/1`` calls that rate; the keys stay with the format.
    ``own_images`` are those on which the offsets were set.
    """

    offsets: dict[str, float]
    budget: Fraction
    given_away_own: Fraction | None
    own_images: Number | str
    given_away_test: Proportion | None
    test_images: Number | str

    @model_validator(mode="before")
    @classmethod
    def _from_calibration_alone(cls, data: Any) -> Any:
        return renamed(data, {"given_away_calibration": "given_away_own", "calibration_images": "own_images"})


def _confusion_fault(confusion: Sequence[Sequence[int] | None], images: Sequence[int]) -> str | None:
    """Why a confusion matrix contradicts the numbers of images per class; None if it does not."""
    size = len(images)
    rows = [row or () for row in confusion]
    if [len(row) for row in rows] != [size] * size:
        return f"a confusion matrix that is not {size} x {size}"
    if [sum(row) for row in rows] != list(images):
        return "a confusion matrix of other images than were tested"
    return None


ImagesFrom = Literal["own", "others"]
"""Whose images of the query judge an answer: the asking hospital's own, or other hospitals' as well."""


class OthersFigures(Record):
    """The same models on the hospital's own images of its own classes and other hospitals' of the query.

    Scanner and stain may tell these from the hospital's own, so that the figures flatter.
    """

    test_images: dict[str, Number]
    test_sites: tuple[str, ...]
    before: Scores
    after: Scores
    gain: Difference
    forgetting: Difference
    query_gain: Difference


class Evaluation(Record):
    """``reports/evaluation/<site>/<query>.json``."""

    format: Literal["qkt-evaluation/1"] = "qkt-evaluation/1"
    hospital: str
    query: str
    student: str | None = None
    """Digest of the folder of the student that was measured."""
    classes: tuple[str, ...]
    method: str
    teachers: tuple[str, ...]
    bytes_moved: Number
    budget: Fraction
    relevant: tuple[str, ...]
    local: tuple[str, ...]
    test_images: dict[str, Number]
    test_images_from: ImagesFrom = "others"
    """Of the images of the query; those of the other classes are always the hospital's own."""
    held_back: dict[str, Number] = Field(default_factory=dict)
    """Class to how many of its test images the hospital holds back for evaluation."""
    test_sites: tuple[str, ...] = ()
    test_data: str | None = None
    passes_per_prediction: Number
    before: Scores
    after: Scores
    gain: Difference
    forgetting: Difference
    query_gain: Difference
    gain_p: Fraction | None = None
    class_forgetting: dict[str, Difference | None]
    flips: tuple[Flip, ...] = ()
    operating_point: OperatingPointResult | None = None
    subgroups: dict[str, dict[str, SubgroupResult]] = Field(default_factory=dict)
    """Column to group, of hospitals whose site.yaml names the column."""
    others: OthersFigures | None = None
    """Where own images judge: the figures on other hospitals' images of the query, if there are such."""

    @model_validator(mode="after")
    def _consistent(self) -> Evaluation:
        for names in (self.relevant, self.classes, self.local):
            if len(set(names)) != len(names):
                raise ValueError("a class is named twice")
        for part in (self, self.others) if self.others else (self,):
            images = [part.test_images.get(c, 0) for c in self.relevant]
            for scores in (part.before, part.after):
                fault = _confusion_fault(scores.confusion, images)
                if fault:
                    raise ValueError(fault)
        if any(n > self.test_images.get(c, 0) for c, n in self.held_back.items()):
            raise ValueError("more images held back than were tested")
        return self

    @property
    def few(self) -> tuple[str, ...]:
        """Classes with too few test images to show a figure."""
        return tuple(c for c in self.relevant if too_few(self.test_images.get(c, 0)))

    @property
    def shown_images(self) -> dict[str, str]:
        """Class to its number of test images as it may be told.

        Those of the test split are told elsewhere: with both, the number of held-back ones could be reckoned.
        """
        return {c: self._shown_images(c, n) for c, n in self.test_images.items()}

    def _shown_images(self, name: str, images: int) -> str:
        held = self.held_back.get(name, 0)
        told = shown_total(images, (held, images - held))
        return told if isinstance(told, str) else shown_count(images)
