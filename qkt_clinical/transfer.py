"""The core of Query-based Knowledge Transfer: phase 1, phase 2, and the variants ``qkt-light``, ``routed``.

A reconstruction (the paper's equations are not all known to us), with these choices:

- **Masks** say which networks know a class of R, the local classes and the query. For every class the
  networks that know it are heard: their mean margin, the *consensus*. Teachers that know no query class
  but a local one speak too: an image of the query is strange to them. What the hospital's own network
  counts for among them is chosen on its calibration images.
- **Phase 1** makes one network of them. By ``transplant`` the teachers' extractors are taken up side by
  side, reduced layer by layer on the hospital's own images. By ``distill`` the own extractor learns their
  features and logits on augmented local images, one linear map per source. No label is taught again: that
  would wash out the student's surprise at images of the query.
- **Phase 2** works on the head alone: the consensus is written as one head. With rare query classes it is
  refined on their few samples. The query's offset comes from the budget on calibration images.
- **Light** takes up only the teachers that know the query, reduced further; the own network counts twice.
- **Trust.** Teachers whose claims, labels or views of the own images do not stand up to a look at those
  images are not heard (:mod:`qkt_clinical.trust`). Where all do, an answer is the same bit for bit.
- **Routed** keeps the teachers themselves as experts at prediction time, and lets them see mirror images.
  With rare classes they are put side by side as they are, so that there is one head to refine.

Nothing here does I/O; images are the asking hospital's own.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkt_clinical.amalgam import amalgam, transplant, whole
from qkt_clinical.augment import augment
from qkt_clinical.bundle import Bundle
from qkt_clinical.card import MIRRORS, Decision
from qkt_clinical.catalog import Method
from qkt_clinical.config import DistillationParams, TransferParams
from qkt_clinical.data import Images, Labels
from qkt_clinical.errors import QueryError
from qkt_clinical.networks import Classifier, fast_layout
from qkt_clinical.objectives import (
    balanced_cross_entropy,
    consensus,
    consensus_rows,
    decide,
    feature_loss,
    given_away,
    kept_today,
    logit_loss,
    offset_for_budget,
    own_weight,
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
from qkt_clinical.trust import Verdict, judge_teachers

VIEW_BATCH = 512
REFINED = 1000
"""Local images at most on which a head is refined, of every class as many: of 20 classes all rare ones."""
LIGHT_OWN_WEIGHT = 2.0
"""What the own network counts for where that is not chosen: its teachers are there for the query alone."""
MOST_TEACHERS = 64
LAYER = "layer number"
"""Axis of a transplant's curves; no hospital can be called so."""


@dataclass(frozen=True)
class Teacher:
    """Another hospital's network and the classes that its mask says it knows."""

    site: str
    network: Classifier
    known: tuple[int, ...]
    """As its mask claims."""
    shown: tuple[int, ...] | None = None
    """As its network shows, see :func:`qkt_clinical.masking.shown_classes`; None: it was not read again."""

    @classmethod
    def of(cls, bundle: Bundle, shown: tuple[int, ...] | None = None) -> Teacher:
        """From a validated bundle.

        Raises:
            QueryError: the bundle has no mask.
        """
        if bundle.mask is None:
            raise QueryError("teacher without a mask", remedy="Plan the query again.", site=bundle.card.site)
        known = tuple(i for i, k in enumerate(bundle.mask.known) if k)
        return cls(bundle.card.site, bundle.network, known, shown)


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
    teachers: tuple[Teacher, ...]
    """Those that were heard, with the classes that they were believed to know."""


@dataclass(frozen=True)
class _Source:
    """What distillation learns from one network: its features and logits on every view, computed once."""

    network: Classifier
    known: tuple[int, ...]
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


def view_batches(views: Tensor, batch_size: int, draw: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch over the images of (views, N, ...): view numbers and image numbers, each (batch,).

    Every image in a view of its own, not a whole epoch in one: batch statistics then cover all views.
    """
    count = views.shape[1]
    chosen = torch.randint(len(views), (count,), generator=draw)
    for index in shuffled(count, batch_size, draw):
        yield chosen[index], index


def _observe(network: Classifier, views: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features and logits of a frozen network on every view: one pass per view, never repeated."""
    features = torch.stack([predict(network, view, device, features=True) for view in views])
    return features, F.linear(features, *_head(network))


def _head(network: Classifier) -> tuple[Tensor, Tensor]:
    """A frozen network's head on the CPU: weight (C, F) and bias (C,)."""
    return network.head.weight.detach().cpu(), network.head.bias.detach().cpu()


def _align(student: Tensor, target: Tensor) -> nn.Linear:
    """A linear map (F to G) that starts at the ridge solution between two networks' features."""
    linear = nn.Linear(student.shape[1], target.shape[1])
    weight, bias = ridge(student, target, 1e-2)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return linear


def distill(
    student: Classifier,
    sources: Sequence[_Source],
    views: Tensor,
    params: DistillationParams,
    *,
    seed: int,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Classifier, list[nn.Linear], list[dict[str, float]]]:
    """Phase 1 by distillation: one network learns the features and logits of all sources.

    On each source's sub-space of known classes, and in its feature space through a linear map. The own
    model weighs as much as all teachers together.

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
    weights = [1.0, *(1.0 / max(1, len(sources) - 1) for _ in sources[1:])]
    count = views.shape[1]
    modules = nn.ModuleDict({"extractor": network.extractor, "maps": nn.ModuleList(linears)})

    def batches(epoch: int) -> Iterator[tuple[Tensor, list[Tensor], list[Tensor]]]:
        for view, index in view_batches(views, params.batch_size, generator(seed, "phase1", str(epoch))):
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
            total = total + weights[i] * (
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


@torch.no_grad()
def carry_rows(network: Classifier, maps: Sequence[nn.Linear], rows: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write a distilled student's head: rows over the sources' features, through their maps.

    Args:
        network: changed in place, its head only.
        maps: student features (F) to source features (G), one per source.
        rows: weight (C, G) and bias (C,) per source, see :func:`consensus_rows`.
    """
    pairs = list(zip(maps, rows, strict=True))
    network.head.weight.copy_(torch.stack([w @ m.weight for m, (w, _) in pairs]).sum(dim=0))
    network.head.bias.copy_(torch.stack([w @ m.bias + b for m, (w, b) in pairs]).sum(dim=0))


def refine_head(
    network: Classifier,
    features: Tensor,
    labels: Tensor,
    local: Sequence[int],
    query: Sequence[int],
    *,
    steps: int = 300,
    learning_rate: float = 1e-2,
    pull: float = 1e-2,
) -> list[dict[str, float]]:
    """Phase 2 for rare query classes: class-balanced refinement of the head on cached features.

    Full-batch Adam on the head's rows, pulled towards where they started, so that a handful of samples
    corrects the rows more than it rewrites them.

    Args:
        features: (N, F) of local training images; labels: (N,).
        query: the rare classes. Rows of absent ones are left alone: images that are none of them would
            push them down without end.

    Returns:
        The loss every 10 steps. The head is changed in place, the extractor is not used.
    """
    weight = network.head.weight.detach().clone().requires_grad_(True)
    bias = network.head.bias.detach().clone().requires_grad_(True)
    start, start_bias = weight.detach().clone(), bias.detach().clone()
    relevant = sorted({*local, *query})
    scale = start[relevant].norm(dim=1).mean() ** 2
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
    none = torch.zeros(len(query))
    curves = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        scores = decide(features @ weight.T + bias, local, query, none)
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


def mirrored(inputs: Tensor) -> Iterator[Tensor]:
    """The images and their mirror images."""
    for axes in MIRRORS:
        yield inputs.flip(axes) if axes else inputs


def routed_logits(
    network: Classifier, decision: Decision, experts: Sequence[Teacher], inputs: Tensor, device: torch.device
) -> Tensor:
    """Logits (N, C) of method ``routed``: the consensus of the own network and the experts."""
    heard = [hear(n, inputs, decision.flips, device) for n in (network, *(e.network for e in experts))]
    return routed_consensus(heard, decision, experts)


def routed_consensus(heard: Sequence[Tensor], decision: Decision, experts: Sequence[Teacher]) -> Tensor:
    """The same from what the own network and the experts said, (N, C) each, see :func:`hear`."""
    known = [(*decision.local, *decision.rare), *(e.known for e in experts)]
    return consensus(heard, known, decision.relevant, decision.own_weight)


def hear(
    network: Classifier, inputs: Tensor, flips: bool, device: torch.device, *, features: bool = False
) -> Tensor:
    """A network's logits (N, C) of every image, with ``flips`` the mean over it and its mirror images.

    Args:
        features: its features (N, F) instead.
    """
    views = mirrored(inputs) if flips else [inputs]
    return torch.stack([predict(network, view, device, features=features) for view in views]).mean(dim=0)


def _split(labels: Labels, query: Sequence[int], classes: int) -> tuple[tuple[int, ...], dict[int, int]]:
    """Local classes, and the number of training images of each rare query class."""
    present = {c: int((labels == c).sum()) for c in range(classes)}
    local = tuple(c for c in range(classes) if present[c] and c not in query)
    return local, {q: present[q] for q in query if present[q]}


def _some(labels: Labels, count: int, seed: int) -> Tensor:
    """Sorted numbers of at most ``count`` images, of every class as many, drawn at random."""
    order = torch.randperm(len(labels), generator=generator(seed, "images")).tolist()
    turn: dict[int, itertools.count[int]] = {}
    ranked = sorted(order, key=lambda i: next(turn.setdefault(int(labels[i]), itertools.count())))
    return torch.tensor(sorted(ranked[:count]))


@dataclass(frozen=True)
class _Panel:
    """The networks that are heard, the hospital's own first, and the classes that each knows."""

    networks: tuple[Classifier, ...]
    known: tuple[tuple[int, ...], ...]
    relevant: tuple[int, ...]
    sites: tuple[str, ...]
    """Of the teachers."""
    own_weight: float = LIGHT_OWN_WEIGHT

    @property
    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """The consensus as rows over each network's features."""
        heads = [_head(network) for network in self.networks]
        return consensus_rows(heads, self.known, self.relevant, self.own_weight)


@dataclass(frozen=True)
class _Run:
    """How a phase is run, whatever it does."""

    params: TransferParams
    seed: int
    device: torch.device
    checkpoint: Checkpoint | None
    progress: Callable[[int, int], None] | None

    def views(self, inputs: Tensor) -> Tensor:
        """For phases that are learned: (views, N, C, *spatial)."""
        count, strength = self.params.distillation.views, self.params.augment
        return make_views(inputs, count, strength, self.seed, self.device)


def _transplanted(panel: _Panel, images: Tensor, rank: float, run: _Run) -> tuple[Classifier, dict[str, Any]]:
    """Phase 1 by transplant, on one view of each image; the student and the phase's record."""
    view = augment(images, run.params.augment, generator(run.seed, "view", "1"))
    parts, lost = [], {}
    for number, (site, source) in enumerate(zip(("", *panel.sites), panel.networks, strict=True)):
        # The own extractor stays as it is: nothing of what the hospital knows is given up for room.
        share = rank if number else 1.0
        draw = derive(run.seed, "transplant", site)
        extractor, branch, losses = transplant(source, share, view, seed=draw, device=run.device)
        parts.append((extractor, branch))
        if number:
            lost[site] = losses
        if run.progress:
            run.progress(number + 1, len(panel.networks))
    layers = range(max(map(len, lost.values()), default=0))
    # Per teacher the share of a layer's output that is lost on the views.
    curves = [{LAYER: i + 1.0, **{s: v[i] for s, v in lost.items() if i < len(v)}} for i in layers]
    record = {**_record("transplant", 1, panel, curves), "rank": rank}
    return amalgam(panel.networks[0], parts, panel.rows), record


def _distilled(panel: _Panel, inputs: Tensor, run: _Run) -> tuple[Classifier, dict[str, Any]]:
    """Phase 1 by distillation; the student and the phase's record."""
    views = run.views(inputs)
    sources = [
        _Source(n, k, *_observe(n, views, run.device))
        for n, k in zip(panel.networks, panel.known, strict=True)
    ]
    network, maps, curves = distill(
        panel.networks[0],
        sources,
        views,
        run.params.distillation,
        seed=run.seed,
        device=run.device,
        checkpoint=run.checkpoint,
        progress=run.progress,
    )
    carry_rows(network, maps, panel.rows)
    return network, _record("distill", len(views), panel, curves)


def _wanted(panel: _Panel, views: Tensor, device: torch.device) -> Tensor:
    """The consensus on every view (views, N, C); one pass per network and view."""
    heard = [[predict(n, view, device) for n in panel.networks] for view in views]
    return torch.stack([consensus(logits, panel.known, panel.relevant, panel.own_weight) for logits in heard])


@torch.no_grad()
def _learn_head(panel: _Panel, inputs: Tensor, run: _Run) -> tuple[Classifier, dict[str, Any]]:
    """Without phase 1: the head learns the consensus from the own features, by ridge regression."""
    network = copy.deepcopy(panel.networks[0])
    views = run.views(inputs)
    features = torch.cat([predict(network, view, run.device, features=True) for view in views])
    weight, bias = ridge(features, _wanted(panel, views, run.device).flatten(0, 1), 1e-2)
    network.head.weight.copy_(weight)
    network.head.bias.copy_(bias)
    return network, _record("none", len(views), panel, [])


def _record(kind: str, views: int, panel: _Panel, curves: list[dict[str, float]]) -> dict[str, Any]:
    """What ``phases.json`` says of phase 1."""
    return {"kind": kind, "curves": curves, "views": views, "teacher_passes": views * len(panel.sites)}


def _learn_jointly(
    panel: _Panel, inputs: Tensor, labels: Tensor, run: _Run
) -> tuple[Classifier, dict[str, Any]]:
    """Both phases in one: extractor and head learn the consensus, and the labels among the held classes."""
    setting, device = run.params.distillation, run.device
    network = fast_layout(copy.deepcopy(panel.networks[0]).to(device))
    views = run.views(inputs)
    wanted = _wanted(panel, views, device)
    relevant, held = list(panel.relevant), sorted(panel.known[0])
    spread = float(wanted[:, :, relevant].std().clamp(min=1e-4))
    targets = torch.searchsorted(torch.tensor(held), labels)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        draw = generator(run.seed, "joint", str(epoch))
        for view, index in view_batches(views, setting.batch_size, draw):
            yield (
                views[view, index].to(device),
                wanted[view, index].to(device),
                targets[index].to(device),
            )

    def loss(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, said, target = batch
        logits = network(images).float()
        return logit_loss(logits[:, relevant], said[:, relevant], spread) + balanced_cross_entropy(
            logits[:, held], target, range(len(held))
        )

    history = fit(
        network,
        batches,
        batches_per_epoch(len(labels), setting.batch_size),
        loss,
        Schedule(setting.epochs, setting.learning_rate, setting.weight_decay),
        device=device,
        checkpoint=run.checkpoint,
        progress=run.progress,
    )
    return network.cpu(), _record("joint", len(views), panel, history.curves)


def _judge(
    teachers: Sequence[Teacher], logits: Sequence[Tensor], local: Sequence[int], labels: Tensor
) -> list[Verdict]:
    """Verdicts on all teachers, from what they say (N, C) of the hospital's own held-out images."""
    return judge_teachers(
        [t.site for t in teachers],
        logits,
        [t.known for t in teachers],
        [t.shown for t in teachers],
        local,
        labels,
    )


def _believed(
    teachers: Sequence[Teacher],
    verdicts: Sequence[Verdict],
    local: Sequence[int],
    query: Sequence[int],
    *,
    rivals: bool,
) -> tuple[list[Teacher], list[int]]:
    """The teachers that are heard, each with the classes that it is believed to know, and their places.

    Args:
        rivals: whether those that know local classes alone are heard.

    Returns:
        Places count from 1, the hospital's own network being 0.

    Raises:
        QueryError: a query class is left to nobody.
    """
    wanted = {*query, *local} if rivals else set(query)
    believed, places = [], []
    for place, (teacher, verdict) in enumerate(zip(teachers, verdicts, strict=True), start=1):
        known = tuple(c for c in teacher.known if c not in verdict.dismissed)
        if verdict.heard and set(known) & wanted:
            believed.append(replace(teacher, known=known))
            places.append(place)
    left = [q for q in query if not any(q in t.known for t in believed)]
    if left:
        why = "; ".join(
            f"{v.site} {'claims classes that its network does not show' if v.heard else v.reason}"
            for t, v in zip(teachers, verdicts, strict=True)
            if left[0] in t.known
        )
        raise QueryError(
            f"no teacher of query class {left[0]} can be trusted: {why}",
            remedy="Ask those hospitals, or leave them out by exclude_teachers in the query file.",
            code="untrusted",
        )
    return believed, places


def _told(verdict: Verdict) -> dict[str, Any]:
    """What ``phases.json`` says of a verdict; figures as shares, for counts stay in the hospital."""
    return {
        "site": verdict.site,
        "heard": verdict.heard,
        "reason": verdict.reason,
        "dismissed": [str(c) for c in verdict.dismissed],
        "recalls": {str(c): round(r, 2) for c, r in verdict.recalls.items()},
        "agreement": None if verdict.agreement is None else round(verdict.agreement, 2),
    }


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
        teachers: relevant teachers only, those that know a class of the query or a local one; each query
            class is known by at least one.
        data: the asking hospital's own images.
        query: class indices.
        budget: at most this share of the hospital's calibration images may go to the query.

    Raises:
        QueryError: no teacher or too many, a query class that no teacher knows or none that can be trusted,
            no local class, or no calibration image.
    """
    params = params or TransferParams()
    device = device or torch.device("cpu")
    teachers = sorted(teachers, key=lambda t: t.site)  # sums then do not depend on the order given
    query = tuple(sorted(query))
    local, rare = _split(data.train[1], query, student.spec.classes)
    if len(teachers) > MOST_TEACHERS:
        raise QueryError(f"more than {MOST_TEACHERS} teachers", remedy="Set max_teachers in the query file.")
    untaught = [q for q in query if not any(q in t.known for t in teachers)]
    if untaught:
        raise QueryError(
            f"no teacher knows query class {untaught[0]}", remedy="Plan the query again.", code="uncovered"
        )
    if not local:
        raise QueryError("no local class beside the query", remedy="Add images of another class.")
    calibration = to_input(data.calibration[0], data.normalisation)
    kept = torch.from_numpy(~np.isin(data.calibration[1], query))
    calibration, calibration_labels = calibration[kept], torch.from_numpy(data.calibration[1])[kept]
    if len(calibration) == 0:
        raise QueryError(
            "no calibration image of a local class, so the budget cannot be kept",
            remedy="Raise ingest.splits.calibration in params.yaml or add patients.",
            code="no-calibration",
        )
    inputs, labels = to_input(data.train[0], data.normalisation), torch.from_numpy(data.train[1])
    network, student = copy.deepcopy(student).cpu().eval(), copy.deepcopy(student).cpu().eval()
    if method == "qkt-light":
        teachers = [t for t in teachers if set(t.known) & set(query)]
    flips = method == "routed" and params.flips
    heard: list[Tensor] = []
    verdicts: list[Verdict] = []
    if method != "qkt-light" or params.trust:
        networks = [student, *(t.network for t in teachers)]
        heard = [hear(n, calibration, flips, device, features=True) for n in networks]
        logits = [F.linear(f, *_head(n)) for n, f in zip(networks, heard, strict=True)]
    if params.trust:
        verdicts = _judge(teachers, logits[1:], local, calibration_labels)
        teachers, places = _believed(teachers, verdicts, local, query, rivals=method != "qkt-light")
        heard, logits = [heard[i] for i in (0, *places)], [logits[i] for i in (0, *places)]
    panel = _Panel(
        (student, *(t.network for t in teachers)),
        ((*local, *rare), *(t.known for t in teachers)),
        tuple(sorted({*local, *query})),
        tuple(t.site for t in teachers),
    )
    if method != "qkt-light":
        panel = replace(panel, own_weight=own_weight(logits, panel.known, local, calibration_labels))
    refined = bool(rare) and params.phase2
    first: dict[str, Any] | None = None
    curves: list[dict[str, float]] = []

    run = _Run(params, seed, device, checkpoint, progress)

    match (method, params.phase1):
        case ("routed", _) if refined:
            network = amalgam(student, [whole(n) for n in panel.networks], panel.rows)
        case ("routed", _):
            pass
        case ("qkt", "none"):
            network, first = _learn_head(panel, inputs, run)
        case ("qkt", "joint"):
            network, first = _learn_jointly(panel, inputs, labels, run)
        case ("qkt", "distill"):
            network, first = _distilled(panel, inputs, run)
        case _:
            some = _some(data.train[1], params.images, seed)
            rank = params.rank if method == "qkt" else params.light_rank
            network, first = _transplanted(panel, inputs[some], rank, run)

    if refined:
        some = _some(data.train[1], REFINED, derive(seed, "phase2"))
        cached = hear(network, inputs[some], flips, device, features=True)
        curves = refine_head(network, cached, labels[some], local, tuple(rare))
    draft = Decision(
        method=method,
        local=local,
        query=query,
        rare=tuple(rare),
        offsets=(0.0,) * len(query),
        budget=budget,
        own_weight=panel.own_weight,
        experts=tuple(t.site for t in teachers) if method == "routed" and not refined else (),
        flips=flips,
    )
    if draft.experts:
        said = consensus(logits, panel.known, panel.relevant, panel.own_weight)
    elif method == "routed":
        said = F.linear(torch.cat(heard, dim=1), *_head(network))
    else:
        said = predict(network, calibration, device)
    scores = query_scores(said, local, query)
    if rare:
        own = logits[0] if method != "qkt-light" and not flips else predict(student, calibration, device)
        scores = scores[kept_today(own, local, query)]
    offset = offset_for_budget(scores, budget) if params.phase2 else 0.0
    offsets = torch.full((len(query),), offset)
    decision = draft.model_copy(update={"offsets": tuple(float(o) for o in offsets)})
    second = {
        "offsets": {str(q): float(o) for q, o in zip(query, offsets, strict=True)},
        "budget": budget,
        "given_away": given_away(scores, offsets),
        "calibration_images": len(scores),
        "own_weight": panel.own_weight,
        "rare": {str(q): n for q, n in rare.items()},
        "curves": curves,
    }
    phases = {"method": method, "trust": [_told(v) for v in verdicts], "phase1": first, "phase2": second}
    return Answer(network, decision, phases, tuple(teachers))


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
    logits = _logits_of(network, decision, experts, inputs, device)
    return decide(logits, decision.local, decision.query, torch.tensor(decision.offsets))


def _logits_of(
    network: Classifier, decision: Decision, experts: Sequence[Teacher], inputs: Tensor, device: torch.device
) -> Tensor:
    """The student's logits (N, C)."""
    if decision.experts:
        return routed_logits(network, decision, experts, inputs, device)
    return hear(network, inputs, decision.flips, device)
