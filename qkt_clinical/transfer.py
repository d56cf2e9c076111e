"""The core of Query-based Knowledge Transfer: phase 1, phase 2, and the variants ``qkt-light``, ``routed``.

A reconstruction (the paper's equations are not all known to us), with these choices:

- **Phase 1** amalgamates. The student's own network is treated as one more teacher: one network learns,
  through one linear map per source, the features of its own model and of the relevant teachers on
  augmented local images, and on each teacher's sub-space of known classes its logits. No label is taught
  again: that would wash out the student's surprise at images of the query.
- **Phase 2** works on the head alone, on cached features. Rows are carried through the maps into the
  student's head: local rows from its own, query rows from the teachers' margins. Absent query classes
  get their offset from the budget on calibration images; rare ones are refined on their few samples.
- **Light** skips phase 1: the student keeps extractor and local rows, the query's rows are a ridge
  regression from its features to the teachers' margins.
- **Routed** keeps the teachers themselves as experts for the query at prediction time.

Nothing here does I/O; images are the asking hospital's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qkt_clinical.augment import augment
from qkt_clinical.bundle import Bundle
from qkt_clinical.card import Decision
from qkt_clinical.catalog import Method
from qkt_clinical.config import TransferParams
from qkt_clinical.data import Images, Labels
from qkt_clinical.errors import QueryError
from qkt_clinical.networks import Classifier, fast_layout
from qkt_clinical.objectives import (
    balanced_cross_entropy,
    decide,
    feature_loss,
    logit_loss,
    margin,
    margin_row,
    offsets_for_budget,
    query_scores,
    ridge,
)
from qkt_clinical.seeding import derive
from qkt_clinical.training import (
    Checkpoint,
    Schedule,
    batches_per_epoch,
    fit,
    generator,
    predict,
    shuffled,
    to_input,
)

VIEW_BATCH = 512


@dataclass(frozen=True)
class Teacher:
    """Another hospital's network and the classes that its mask says it knows."""

    site: str
    network: Classifier
    known: tuple[int, ...]

    @classmethod
    def of(cls, bundle: Bundle) -> Teacher:
        """From a validated bundle.

        Raises:
            QueryError: the bundle has no mask.
        """
        if bundle.mask is None:
            raise QueryError("teacher without a mask", remedy="Plan the query again.", site=bundle.card.site)
        known = tuple(i for i, k in enumerate(bundle.mask.known) if k)
        return cls(bundle.card.site, bundle.network, known)


@dataclass(frozen=True)
class LocalData:
    """The asking hospital's own images: for learning, and held out for the operating point."""

    train: tuple[Images, Labels]
    calibration: tuple[Images, Labels]
    normalisation: str = "unit"


@dataclass(frozen=True)
class Answer:
    """A student: one network, how it decides, and what the phases went through."""

    network: Classifier
    decision: Decision
    phases: dict[str, Any]


@dataclass(frozen=True)
class _Source:
    """What phase 1 learns from one network: its features and logits on every view, computed once."""

    network: Classifier
    known: tuple[int, ...]
    weight: float
    features: Tensor
    """(views, N, F)."""
    logits: Tensor
    """(views, N, classes)."""

    @property
    def variance(self) -> float:
        """Mean variance of the features over all views."""
        return float(self.features.flatten(0, 1).var(dim=0).mean().clamp(min=1e-8))

    @property
    def spread(self) -> float:
        """Standard deviation of the logits of known classes over all views."""
        return float(self.logits[:, :, list(self.known)].std().clamp(min=1e-4))


def make_views(inputs: Tensor, count: int, strength: float, seed: int, device: torch.device) -> Tensor:
    """The images themselves and ``count - 1`` random views of each: (count, N, C, *spatial)."""
    views = [inputs]
    for number in range(1, count):
        draw = generator(seed, "view", str(number))
        parts = [augment(part.to(device), strength, draw).cpu() for part in inputs.split(VIEW_BATCH)]
        views.append(torch.cat(parts))
    return torch.stack(views)


def _observe(network: Classifier, views: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features and logits of a frozen network on every view: one pass per view, never repeated."""
    features = torch.stack([predict(network, view, device, features=True) for view in views])
    weight, bias = network.head.weight.detach().cpu(), network.head.bias.detach().cpu()
    return features, features @ weight.T + bias


def _align(student: Tensor, target: Tensor) -> nn.Linear:
    """A linear map (F to G) that starts at the ridge solution between two networks' features."""
    linear = nn.Linear(student.shape[1], target.shape[1])
    weight, bias = ridge(student, target, 1e-2)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return linear


def phase1(
    student: Classifier,
    sources: Sequence[_Source],
    views: Tensor,
    params: TransferParams,
    *,
    seed: int,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Classifier, list[nn.Linear], list[dict[str, float]]]:
    """Query-focused learning: one network takes up the features and logits of all sources.

    Args:
        student: the hospital's own network; left as it is.
        sources: the own model first, then the relevant teachers.
        views: of the local training images, (views, N, C, *spatial), on the CPU.

    Returns:
        The new network (its head still the old one), one linear map per source from its features to the
        source's, and one row per epoch.
    """
    network = fast_layout(copy.deepcopy(student).to(device))
    start = sources[0].features[0]
    linears = [_align(start, source.features[0]).to(device) for source in sources]
    heads = [
        (s.network.head.weight.detach().to(device), s.network.head.bias.detach().to(device)) for s in sources
    ]
    variances, spreads = [s.variance for s in sources], [s.spread for s in sources]
    count = views.shape[1]
    modules = nn.ModuleDict({"extractor": network.extractor, "maps": nn.ModuleList(linears)})

    def batches(epoch: int) -> Iterator[tuple[Tensor, list[Tensor], list[Tensor]]]:
        draw = generator(seed, "phase1", str(epoch))
        # Every image in a view of its own, not a whole epoch in one: batch statistics then cover all views.
        chosen = torch.randint(len(views), (count,), generator=draw)
        for index in shuffled(count, params.batch_size, draw):
            view = chosen[index]
            yield (
                views[view, index].to(device),
                [s.features[view, index].to(device) for s in sources],
                [s.logits[view, index].to(device) for s in sources],
            )

    def loss(batch: tuple[Tensor, list[Tensor], list[Tensor]]) -> Tensor:
        images, wanted, answers = batch
        own = network.features(images).float()
        total = own.new_zeros(())
        for i, source in enumerate(sources):
            mapped = linears[i](own).float()
            known = list(source.known)
            produced = mapped @ heads[i][0][known].T + heads[i][1][known]
            total = total + source.weight * (
                feature_loss(mapped, wanted[i], variances[i])
                + logit_loss(produced, answers[i][:, known], spreads[i])
            )
        return total

    history = fit(
        modules,
        batches,
        batches_per_epoch(count, params.batch_size),
        loss,
        Schedule(params.epochs, params.learning_rate, params.weight_decay),
        device=device,
        checkpoint=checkpoint,
        progress=progress,
    )
    return network.cpu(), [linear.cpu() for linear in linears], history.curves


def _carried(weight: Tensor, bias: Tensor, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Rows (K, G) over a source's features as rows (K, F) over the student's, through its map."""
    return weight @ linear.weight, weight @ linear.bias + bias


@torch.no_grad()
def carry_rows(
    network: Classifier,
    own: Classifier,
    teachers: Sequence[Teacher],
    maps: Sequence[nn.Linear],
    query: Sequence[int],
    rare: Sequence[int] = (),
    own_weight: float = 1.0,
) -> None:
    """Write the student's head: its own rows through the own map, query rows from the teachers' margins.

    Args:
        network: changed in place, its head only.
        own: the hospital's own model, whose rows are carried.
        maps: the own map first, then one per teacher.
        rare: query classes whose own row is added to the margin, ``own_weight`` times.
    """
    weight, bias = _carried(own.head.weight, own.head.bias, maps[0])
    for q in query:
        rows = []
        for teacher, linear in zip(teachers, maps[1:], strict=True):
            if q in teacher.known:
                head = teacher.network.head
                row, shift = margin_row(head.weight, head.bias, q, teacher.known)
                rows.append(_carried(row[None], shift[None], linear))
        kept = own_weight if q in rare else 0.0
        weight[q] = torch.cat([w for w, _ in rows]).mean(dim=0) + kept * weight[q]
        bias[q] = torch.cat([b for _, b in rows]).mean() + kept * bias[q]
    network.head.weight.copy_(weight)
    network.head.bias.copy_(bias)


def refine_head(
    network: Classifier,
    features: Tensor,
    labels: Tensor,
    local: Sequence[int],
    query: Sequence[int],
    surprise: Sequence[float],
    *,
    steps: int = 300,
    learning_rate: float = 1e-2,
    pull: float = 1e-2,
) -> list[dict[str, float]]:
    """Phase 2 for rare query classes: class-balanced refinement of the head on cached features.

    Full-batch Adam on the head's rows, pulled towards where they started, so that a handful of samples
    corrects the rows more than it rewrites them. The offsets are set afterwards, by the budget.

    Args:
        features: (N, F) of views of the local training images; labels: (N,).

    Returns:
        The loss every 10 steps. The head is changed in place, the extractor is not used.
    """
    weight = network.head.weight.detach().clone().requires_grad_(True)
    bias = network.head.bias.detach().clone().requires_grad_(True)
    start, start_bias = weight.detach().clone(), bias.detach().clone()
    scale = start.norm(dim=1).mean() ** 2
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
    relevant = sorted({*local, *query})
    none = torch.zeros(len(query))
    curves = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        logits = features @ weight.T + bias
        scores = decide(logits, logits[:, list(query)], local, query, surprise, none)
        drift = ((weight - start) ** 2).sum() / scale + ((bias - start_bias) ** 2).sum() / scale
        value = balanced_cross_entropy(scores, labels, relevant) + pull * drift
        value.backward()
        optimizer.step()
        if step % 10 == 0:
            curves.append({"epoch": float(step), "loss": float(value.detach())})
    with torch.no_grad():
        network.head.weight.copy_(weight)
        network.head.bias.copy_(bias)
    return curves


def expert_margins(
    teachers: Sequence[Teacher], inputs: Tensor, query: Sequence[int], device: torch.device
) -> Tensor:
    """Mean margin (N, Q) of the teachers that know each query class; one pass per teacher."""
    logits = {t.site: predict(t.network, inputs, device) for t in teachers}
    columns = []
    for q in query:
        each = [margin(logits[t.site], q, t.known) for t in teachers if q in t.known]
        columns.append(torch.stack(each).mean(dim=0))
    return torch.stack(columns, dim=1)


def routed_logits(
    own: Tensor, experts: Sequence[Teacher], inputs: Tensor, decision: Decision, device: torch.device
) -> Tensor:
    """Query logits (N, Q) of method ``routed``: the experts' mean margin.

    For a rare class the own logit is added, weighed like the own model's confidence against it.
    """
    asked = expert_margins(experts, inputs, decision.query, device)
    pairs = zip(decision.query, decision.surprise, strict=True)
    shares = torch.tensor([surprise if q in decision.rare else 0.0 for q, surprise in pairs])
    return asked + shares * own[:, list(decision.query)]


def _split(labels: Labels, query: Sequence[int], classes: int) -> tuple[tuple[int, ...], dict[int, int]]:
    """Local classes, and the number of training images of each rare query class."""
    present = {c: int((labels == c).sum()) for c in range(classes)}
    local = tuple(c for c in range(classes) if present[c] and c not in query)
    return local, {q: present[q] for q in query if present[q]}


def answer_query(
    student: Classifier,
    teachers: Sequence[Teacher],
    data: LocalData,
    query: Sequence[int],
    *,
    method: Method = "qkt",
    budget: float = 0.02,
    params: TransferParams | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Answer:
    """Answer a query: ``qkt`` (one network), ``qkt-light`` (seconds) or ``routed`` (experts).

    Args:
        student: the asking hospital's own network; left as it is.
        teachers: relevant teachers only; each query class is known by at least one.
        data: the asking hospital's own images.
        query: class indices.
        budget: at most this share of the hospital's calibration images may go to the query.

    Raises:
        QueryError: no teacher, a query class that no teacher knows, no local class, or no calibration
            image.
    """
    params = params or TransferParams()
    device = device or torch.device("cpu")
    teachers = sorted(teachers, key=lambda t: t.site)  # sums then do not depend on the order given
    query = tuple(sorted(query))
    local, rare = _split(data.train[1], query, student.spec.classes)
    untaught = [q for q in query if not any(q in t.known for t in teachers)]
    if untaught:
        raise QueryError(
            f"no teacher knows query class {untaught[0]}", remedy="Plan the query again.", code="uncovered"
        )
    if not local:
        raise QueryError("no local class beside the query", remedy="Add images of another class.")
    calibration = to_input(data.calibration[0], data.normalisation)
    kept = torch.from_numpy(~np.isin(data.calibration[1], query))
    calibration = calibration[kept]
    if len(calibration) == 0:
        raise QueryError(
            "no calibration image of a local class, so the budget cannot be kept",
            remedy="Raise ingest.splits.calibration in params.yaml or add patients.",
            code="no-calibration",
        )
    inputs, labels = to_input(data.train[0], data.normalisation), torch.from_numpy(data.train[1])
    network, student = copy.deepcopy(student).cpu(), copy.deepcopy(student).cpu()
    surprise = [params.own if q in rare else params.surprise for q in query]
    first: dict[str, Any] | None = None
    curves: list[dict[str, float]] = []

    if method == "qkt":
        views = make_views(inputs, params.views, params.augment, seed, device)
        own_known = (*local, *rare)
        sources = [_Source(student, own_known, 1.0, *_observe(student, views, device))]
        for teacher in teachers:
            seen = _observe(teacher.network, views, device)
            sources.append(_Source(teacher.network, teacher.known, 1.0 / len(teachers), *seen))
        network, maps, rows = phase1(
            student,
            sources,
            views,
            params,
            seed=seed,
            device=device,
            checkpoint=checkpoint,
            progress=progress,
        )
        carry_rows(network, student, teachers, maps, query, list(rare), params.own)
        first = {"curves": rows, "views": params.views, "teacher_passes": params.views * len(teachers)}
    elif method == "qkt-light":
        views = make_views(inputs, params.views, params.augment, seed, device)
        features = torch.cat([predict(student, v, device, features=True) for v in views])
        targets = torch.cat([expert_margins(teachers, v, query, device) for v in views])
        weight, bias = ridge(features, targets, params.ridge)
        with torch.no_grad():
            for i, q in enumerate(query):
                share = params.own if q in rare else 0.0
                network.head.weight[q] = weight[i] + share * network.head.weight[q]
                network.head.bias[q] = bias[i] + share * network.head.bias[q]

    if rare and method != "routed":
        # Several views of every image, so that a handful of samples is not learned by heart.
        few = make_views(inputs, min(4, params.views), params.augment, derive(seed, "phase2"), device)
        cached = torch.cat([predict(network, view, device, features=True) for view in few])
        curves = refine_head(network, cached, labels.repeat(len(few)), local, query, surprise)
    draft = Decision(
        method=method,
        local=local,
        query=query,
        rare=tuple(rare),
        surprise=tuple(surprise),
        offsets=(0.0,) * len(query),
        budget=budget,
        experts=tuple(t.site for t in teachers) if method == "routed" else (),
    )
    own, asked = _logits_of(network, draft, teachers, calibration, device)
    offsets, given_away = offsets_for_budget(query_scores(own, local, asked, surprise), budget)
    decision = draft.model_copy(update={"offsets": tuple(float(o) for o in offsets)})
    second = {
        "offsets": {str(q): float(o) for q, o in zip(query, offsets, strict=True)},
        "budget": budget,
        "given_away": given_away,
        "calibration_images": len(calibration),
        "rare": {str(q): n for q, n in rare.items()},
        "curves": curves,
    }
    return Answer(network, decision, {"method": method, "phase1": first, "phase2": second})


def predict_scores(bundle: Bundle, inputs: Tensor, device: torch.device | None = None) -> Tensor:
    """A student's scores (N, C), minus infinity outside the relevant classes; the answer is the argmax.

    Args:
        bundle: of a student.
        inputs: from :func:`qkt_clinical.training.to_input`.

    Raises:
        QueryError: the bundle is a teacher's.
    """
    device = device or torch.device("cpu")
    decision = bundle.card.decision
    if decision is None:
        raise QueryError("a teacher answers no query", remedy="Give a student bundle.", site=bundle.card.site)
    experts = [Teacher.of(bundle.experts[name]) for name in decision.experts]
    return scores_of(bundle.network, decision, experts, inputs, device)


def scores_of(
    network: Classifier, decision: Decision, experts: Sequence[Teacher], inputs: Tensor, device: torch.device
) -> Tensor:
    """Like :func:`predict_scores`, from the parts."""
    logits, asked = _logits_of(network, decision, experts, inputs, device)
    offsets = torch.tensor(decision.offsets)
    return decide(logits, asked, decision.local, decision.query, decision.surprise, offsets)


def _logits_of(
    network: Classifier, decision: Decision, experts: Sequence[Teacher], inputs: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The student's logits (N, C) and the query's (N, Q)."""
    logits = predict(network, inputs, device)
    if decision.method == "routed":
        return logits, routed_logits(logits, experts, inputs, decision, device)
    return logits, logits[:, list(decision.query)]
