"""One query and all that its answers share, and what a method makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from qkt_clinical.baselines.ensembles import restrict
from qkt_clinical.benchmark.settings import Variant
from qkt_clinical.benchmark.simulate import LabelledImages, SimulatedHospital, SimulatedQuery
from qkt_clinical.benchmark.store import ResultStore
from qkt_clinical.common.seeding import derive
from qkt_clinical.data.inputs import to_input
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.operating_point import as_if_held_out, decide, offsets_for_budget, query_scores


@dataclass(frozen=True)
class MethodResult:
    """An answer's scores (N, C) on the question's evaluation images, minus infinity outside R."""

    scores: Tensor
    bytes_moved: int = 0
    rounds: int | None = None
    """In which they were moved; None: one, or none where nothing was."""
    seconds: float = 0.0
    """To answer the query, teachers given; predictions are not counted."""
    passes: int = 1
    """Forward passes per prediction."""
    cost: float | None = None
    """Multiply-adds of a prediction in units of the own network's; None: as many as there are passes."""
    curve: Mapping[float, Tensor] | None = None
    """Scores at every budget of ``BUDGETS``, where the answer has one."""


@dataclass(frozen=True)
class Case:
    """One query and everything that its answers share."""

    store: ResultStore
    question: SimulatedQuery

    @property
    def student(self) -> str:
        """The asking hospital's own network."""
        return f"full/{self.question.asking}"

    @property
    def others(self) -> list[str]:
        """The teachers of all other hospitals."""
        return self.teachers("sent")

    def teachers(self, variant: Variant) -> list[str]:
        """The networks of all other hospitals that were trained so."""
        kind = self.store.settings.trained_as(variant)
        names = [h.name for h in self.store.federation.hospitals]
        return [f"{kind}/{name}" for name in names if name != self.question.student]

    @cached_property
    def relevant(self) -> tuple[int, ...]:
        """R, sorted."""
        return self.store.federation.relevant(self.question)

    @cached_property
    def index(self) -> Tensor:
        """The evaluation images that judge: of relevant classes, and of real hospitals."""
        return torch.from_numpy(self.store.federation.judging(self.question, self.store.settings.split))

    @cached_property
    def images(self) -> LabelledImages:
        """The evaluation images that judge."""
        return self.store.evaluation.take(self.index.numpy())

    @cached_property
    def inputs(self) -> Tensor:
        """The same as network input."""
        return to_input(self.images.images)

    def seed(self, *names: str) -> int:
        """For this question."""
        asked = "+".join(map(str, self.question.query))
        return derive(self.store.federation.seed, "benchmark", *names, self.question.student, asked)

    def logits(self, name: str) -> Tensor:
        """Stored logits (N, C) of a trained network on the evaluation images that judge."""
        return self.store.logits(name)[self.store.settings.split][self.index]

    def predicted(self, name: str, images: LabelledImages) -> Tensor:
        """Logits (N, C) of a trained network on any images."""
        return predict(self.store.bundle(name).network, to_input(images.images), self.store.device)

    def best_rounds(self, algorithm: str) -> int:
        """After how many rounds a federation's global model is taken."""
        alone = self.store.settings.sites
        return self.store.best_rounds(algorithm, self.question if alone else None)

    def restricted(self, network: Classifier) -> Tensor:
        """Scores of any network."""
        return restrict(predict(network, self.inputs, self.store.device), self.relevant)


@dataclass(frozen=True)
class OwnScores:
    """A baseline's scores (N, C) of the asking hospital's own images of local classes, and their labels."""

    held_out: Tensor
    labels: Tensor
    learned: Tensor
    learned_labels: Tensor


def with_budget(case: Case, scores: Tensor, own: OwnScores, local: Sequence[int]) -> Tensor:
    """A baseline's scores (N, C) with the operating point that QKT has: the same budget, images and rule."""
    query = case.question.query
    held_out, learned = (query_scores(z, local, query) for z in (own.held_out, own.learned))
    both = torch.cat([held_out, as_if_held_out(learned, own.learned_labels, held_out, own.labels)])
    rare = case.store.settings.regime == "rare"
    labels = torch.cat([own.labels, own.learned_labels]) if rare else None
    return decide(scores, local, query, offsets_for_budget(both, case.store.settings.budget, labels=labels))


def learned_of(case: Case, hospital: SimulatedHospital) -> LabelledImages:
    """Training images of local classes, as many as QKT takes for its operating point."""
    own = hospital.train
    local = np.flatnonzero(~np.isin(own.labels, case.question.query))
    draw = generator(case.seed("transfer"), "operating-point")
    order = torch.randperm(len(local), generator=draw)[: case.store.settings.transfer.images]
    return own.take(local[np.sort(order.numpy())])


def calibration_of(hospital: SimulatedHospital, query: Sequence[int]) -> LabelledImages:
    """The hospital's calibration images of local classes."""
    own = hospital.calibration
    return own.take(np.flatnonzero(~np.isin(own.labels, query)))
