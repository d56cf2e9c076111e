"""What each step of an answer leaves to the next; :mod:`qkt_clinical.qkt.answer` names the steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional as F

from qkt_clinical.catalog import Method
from qkt_clinical.data.prepared import Images, Labels
from qkt_clinical.models.encoder_network import EncoderExtractor
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.adaptation import AdaptationResult
from qkt_clinical.qkt.low_rank_merge import beside_encoder
from qkt_clinical.qkt.panel import Panel, Teacher
from qkt_clinical.qkt.soundness import NetworkOutputs
from qkt_clinical.qkt.teacher_screening import ScreeningResult
from qkt_clinical.records.card import DecisionRule
from qkt_clinical.records.phases import Curves, Phase1


@dataclass(frozen=True)
class EncodedImages:
    """The asking hospital's own images as features of a frozen encoder that teachers have too."""

    encoder: EncoderExtractor
    train: Tensor
    """(N, F) of the training images, in their order."""
    calibration: Tensor
    """(M, F) likewise."""


@dataclass(frozen=True)
class LocalData:
    """The asking hospital's own images: for learning, and held out for the operating point."""

    train: tuple[Images, Labels]
    calibration: tuple[Images, Labels]
    normalisation: str = "unit"
    encoded: EncodedImages | None = None
    """For methods by class means over one."""


@dataclass(frozen=True)
class ValidQuery:
    """A query that can be answered, from :func:`validate`."""

    student: Classifier
    """A copy of the hospital's own network, on the CPU in evaluation mode."""
    teachers: tuple[Teacher, ...]
    """By site; of ``qkt-light`` those that claim a query class."""
    query: tuple[int, ...]
    """Sorted."""
    local: tuple[int, ...]
    rare: Mapping[int, int]
    """Query class to its number of training images, where there is one."""
    inputs: Tensor
    """Training images (N, C, *spatial) as network input."""
    labels: Labels
    """(N,)."""
    calibration: Tensor
    """Held-out images of local classes (M, C, *spatial) as network input."""
    calibration_labels: Tensor
    """(M,)."""
    method: Method
    budget: float
    encoded: EncodedImages | None = None
    """Of the same images; for methods by class means over the encoder."""

    @property
    def relevant(self) -> tuple[int, ...]:
        """R, sorted."""
        return tuple(sorted({*self.local, *self.query}))


@dataclass(frozen=True)
class Adapted:
    """The question with its teachers brought to the hospital's images, from :func:`adapt`."""

    question: ValidQuery
    results: tuple[AdaptationResult, ...] = ()
    """Of the teachers that hold statistics, by site; empty where adaptation is off."""


@dataclass(frozen=True)
class Screened:
    """Who takes part in the answer, from :func:`screen`."""

    panel: Panel
    teachers: tuple[Teacher, ...]
    """Those that are included, with the classes that count."""
    results: tuple[ScreeningResult, ...]
    """Of all teachers, by site; empty where nothing was screened."""
    outputs: tuple[NetworkOutputs, ...]
    """On the calibration images, in the panel's order."""
    flips: bool
    """Whether networks see mirror images too."""


@dataclass(frozen=True)
class Merged:
    """The student after phase 1, from :func:`merge`."""

    network: Classifier
    record: Phase1 | None = None
    experts: tuple[str, ...] = ()
    """Sites of the teachers that answer along, in the panel's order; then the network is the own one."""


@dataclass(frozen=True)
class EncodedHead:
    """Rows of the head over the features of a frozen encoder."""

    encoder: EncoderExtractor
    weight: Tensor
    """(C, F)."""
    bias: Tensor
    """(C,)."""
    placed_by: tuple[str, ...]
    """Sites whose class means over these features say where the query lies."""

    def logits(self, features: Tensor) -> Tensor:
        """(N, C), to add to the network's."""
        return F.linear(features, self.weight, self.bias)


@dataclass(frozen=True)
class Refined:
    """The student after the refinement of its head, from :func:`refine`."""

    network: Classifier
    curves: Curves = ()
    """The loss every ten steps; empty where there was no rare class."""
    placed_by: tuple[str, ...] = ()
    """Sites whose class means say where the query lies; empty where the head is that of the consensus."""
    encoded: EncodedHead | None = None
    """What a frozen encoder beside the network adds to its logits."""


@dataclass(frozen=True)
class OperatingPoint:
    """The query's offset and what it was set on, from :func:`set_operating_point`."""

    decision: DecisionRule
    own_images: int
    """Calibration and training images that it was set on; of a rare class those that the own model does not
    take for the query today: only these can become false queries."""
    false_queries: int
    """How many of them go to the query."""
    scores: Tensor = field(compare=False)
    """(N, Q) of these images, before the offset."""
    labels: Tensor | None = field(default=None, compare=False)
    """(N,) of them, where the budget holds with small classes weighing more too: for rare queries."""
    lost: float = 0.0
    """Share of the calibration images that own classes cost which change places with each other."""
    within_budget: bool = True
    """False where these alone cost more than the budget, or would have, so that the query is not answered."""

    @property
    def false_query_rate(self) -> float:
        """Their share."""
        return self.false_queries / self.own_images


@dataclass(frozen=True)
class Answer:
    """A student: its network, its decision rule and the records of the steps.

    Counts are those of the hospital's own images: what may be told of them is decided where they are written.
    """

    teachers: tuple[Teacher, ...]
    """Those that were included, with the classes that counted."""
    adaptation: tuple[AdaptationResult, ...]
    screening: tuple[ScreeningResult, ...]
    phase1: Phase1 | None
    refined: Refined
    rare: Mapping[int, int]
    """Query class to its number of training images, where there is one."""
    operating_point: OperatingPoint

    @property
    def network(self) -> Classifier:
        """The student's network, the encoder beside it included."""
        head = self.refined.encoded
        if head is None:
            return self.refined.network
        return beside_encoder(self.refined.network, head.encoder, (head.weight, head.bias))

    @property
    def decision(self) -> DecisionRule:
        """How logits become an answer."""
        return self.operating_point.decision


@dataclass(frozen=True)
class OwnImages:
    """Some of the hospital's own images of local classes."""

    inputs: Tensor
    """(N, C, *spatial)."""
    labels: Tensor
    """(N,)."""
    encoded: Tensor | None = None
    """(N, F) by the frozen encoder beside the network, where there is one."""
    outputs: tuple[NetworkOutputs, ...] = ()
    """Of the panel's networks, where they have seen the images before."""
