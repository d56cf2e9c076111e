"""``reports/evaluation/<hospital>/<query>.json``: figures on held-out images, before and after."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from qkt_clinical.common.disclosure import too_few

Fraction = Annotated[float, Field(ge=0, le=1)]

Number = Annotated[int, Field(ge=0, le=10**15)]


class View(BaseModel):
    """The part of a JSON file that is shown; other keys may be there. Numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Interval(View):
    """A difference of fractions with its bootstrap interval."""

    value: Annotated[float, Field(ge=-1, le=1)]
    low: Annotated[float, Field(ge=-1, le=1)]
    high: Annotated[float, Field(ge=-1, le=1)]


class Share(Interval):
    """A fraction with its bootstrap interval."""

    value: Fraction
    low: Fraction
    high: Fraction


class Bin(View):
    """Images of like confidence: how sure the model was of them, and how often it was right."""

    confidence: Fraction
    accuracy: Fraction
    images: Number


class Scores(View):
    """Figures of one model on held-out images; None where there is none or it may not be told.

    ``confusion`` has truth in rows, ordered as ``relevant``.
    """

    query_accuracy: Share
    retained_accuracy: Share
    balanced_accuracy: Share
    auroc: Share | None = None
    ece: Share
    recall: dict[str, Share | None]
    precision: dict[str, Share | None]
    class_auroc: dict[str, Share | None]
    class_auprc: dict[str, Share | None]
    class_ece: dict[str, Fraction | None] = {}
    class_reliability: dict[str, tuple[Bin, ...] | None] = {}
    macro_precision: Share | None = None
    macro_auroc: Share | None = None
    macro_auprc: Share | None = None
    confusion: tuple[tuple[Number, ...] | None, ...]
    reliability: tuple[Bin, ...] = ()


class Flip(View):
    """A test image that one model has right and the other wrong; ``index`` into the prepared arrays."""

    site: str
    index: Number
    actual: str
    before: str
    after: str

    @property
    def gained(self) -> bool:
        """Wrong before, right after."""
        return self.after == self.actual


class GroupScores(View):
    """Figures of a group of patients; None where too few stand behind one."""

    query_accuracy: Share | None
    retained_accuracy: Share | None
    balanced_accuracy: Share | None


class Group(View):
    """One group of a column such as sex or scanner; counts as they may be shown."""

    images: Number | str
    patients: Number | str
    before: GroupScores
    after: GroupScores


class OperatingPoint(View):
    """The query's offsets, and what they give away of the hospital's own images of its own classes."""

    offsets: dict[str, float]
    budget: Fraction
    given_away_calibration: Fraction | None
    calibration_images: Number | str
    given_away_test: Share | None
    test_images: Number | str


class Evaluation(View):
    """``reports/evaluation/<site>/<query>.json``."""

    format: str = "qkt-evaluation/1"
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
    test_sites: tuple[str, ...] = ()
    test_data: str | None = None
    passes_per_prediction: Number
    before: Scores
    after: Scores
    gain: Interval
    forgetting: Interval
    query_gain: Interval
    gain_p: Fraction | None = None
    class_forgetting: dict[str, Interval | None]
    flips: tuple[Flip, ...] = ()
    operating_point: OperatingPoint | None = None
    subgroups: dict[str, dict[str, Group]] = {}
    """Column to group, of hospitals whose site.yaml names the column."""

    @property
    def few(self) -> tuple[str, ...]:
        """Classes of whose test images too few are here to tell a figure."""
        return tuple(c for c in self.relevant if too_few(self.test_images.get(c, 0)))
