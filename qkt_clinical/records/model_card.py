"""Model cards as data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from qkt_clinical.records.base import Estimate, Record, renamed
from qkt_clinical.records.card import InputSpec, NetworkSpec

FailureKind = Literal[
    "low-recall", "forgotten", "confused", "no-gain", "few-test-images", "gate", "not-judged", "not-tested"
]


class PointEstimate(Record):
    """A figure without an interval, such as those on a teacher's validation images."""

    value: float
    low: None = None
    high: None = None


class CardFigure(Record):
    """One figure before and after the query; of a teacher only ``after``, that of its own training."""

    name: str
    class_name: str | None = None
    before: Estimate | None = None
    after: Estimate | PointEstimate | None = None
    change: Estimate | None = None
    """After less before, paired; below 0 is a loss."""


class CardData(Record):
    """Data of the hospital's own manifest, in counts that may be shown."""

    site: str
    source_kind: str
    digest: str
    images: dict[str, dict[str, str]]
    """Split to class to number of images."""
    patients: dict[str, str]
    """Split to number of patients."""


class Tested(Record):
    """The images that the figures rest on."""

    on: str
    sites: tuple[str, ...]
    images: dict[str, str]
    """Class to number of images."""
    confidence: float | None
    """Of the intervals, such as 0.95; None where there are none."""


class CardTeacher(Record):
    """A teacher that a student learnt from."""

    site: str
    digest: str
    teaches: tuple[str, ...]
    reason: str


class MethodFacts(Record):
    """How the model was made, its input and its output."""

    name: str
    words: str
    network: NetworkSpec
    settings: dict[str, float | int | str | bool | None]
    teachers: tuple[CardTeacher, ...] = ()
    input: InputSpec
    request: str = "float32 images as prepared; 8-bit images divided by 255"
    response: str = (
        "label and one probability per class, 0 for classes it does not answer for; the operating point; "
        "whether the image is out of the training distribution by colour, contrast and texture, where the "
        "bundle has a reference"
    )
    bytes: int
    passes_per_prediction: int


class Calibration(Record):
    """Calibration of the probabilities, and the operating point."""

    ece_before: Estimate | None
    ece: Estimate | None
    """Expected calibration error; None where there is no evaluation."""
    budget: float
    """Largest false-query rate on the hospital's own images."""
    given_away: float | None
    """The false-query rate on these images; None where they are too few.

    The key keeps its name, since registered model cards hold it.
    """
    own_images: str
    """Calibration and training images on which the operating point was set."""
    offsets: dict[str, float]
    """Added to the logit of each class asked for: the operating point."""

    @model_validator(mode="before")
    @classmethod
    def _from_calibration_alone(cls, data: Any) -> Any:
        return renamed(data, {"calibration_images": "own_images"})


class KnownFailure(Record):
    """A weakness of the model that a rule finds in the figures."""

    kind: FailureKind
    classes: tuple[str, ...] = ()
    figure: float | None = None
    threshold: float | None = None
    text: str


class Provenance(Record):
    """SHA-256 digests of what the model and its figures were made from, and the versions that did it."""

    bundle: str
    weights: str
    data: str | None
    """None where the hospital's data are not in this workspace."""
    teachers: dict[str, str]
    parameters: str
    evaluation: str | None
    trained_with: str | None
    described_with: str


class ModelCard(Record):
    """``model_card.json``."""

    format: Literal["qkt-model-card/3"] = "qkt-model-card/3"
    name: str
    """In the registry."""
    kind: Literal["teacher", "student"]
    site: str
    query: str | None
    intended_use: str
    not_intended: str
    answers_for: tuple[str, ...]
    asked: tuple[str, ...]
    data: CardData | None
    """None where the hospital's data are not in this workspace."""
    tested: Tested | None
    method: MethodFacts
    figures: tuple[CardFigure, ...]
    gain_p: float | None
    """Of the gain in balanced accuracy; None for a teacher."""
    calibration: Calibration | None
    gate: Literal["passed", "failed", "not judged"]
    known_failures: tuple[KnownFailure, ...]
    privacy: tuple[str, ...]
    provenance: Provenance
