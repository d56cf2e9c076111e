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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qkt_clinical.catalog import Method
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.params import TransferParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Images, Labels
from qkt_clinical.errors import QueryError
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.consensus import consensus, own_weight
from qkt_clinical.qkt.distillation import learn_head, learn_jointly, merge_by_distillation
from qkt_clinical.qkt.losses import balanced_cross_entropy
from qkt_clinical.qkt.low_rank_merge import amalgam, transplant, whole
from qkt_clinical.qkt.operating_point import decide, given_away, kept_today, offset_for_budget, query_scores
from qkt_clinical.qkt.panel import Panel, PhaseSettings, Teacher, head_of, phase_record
from qkt_clinical.qkt.prediction import hear
from qkt_clinical.qkt.teacher_screening import Verdict, judge_teachers
from qkt_clinical.records.card import Decision
from qkt_clinical.training.augment import augment
from qkt_clinical.training.loop import Checkpoint

REFINED = 1000
"""Local images at most on which a head is refined, of every class as many: of 20 classes all rare ones."""

MOST_TEACHERS = 64

LAYER = "layer number"
"""Axis of a transplant's curves; no hospital can be called so."""


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


def _transplanted(
    panel: Panel, images: Tensor, rank: float, run: PhaseSettings
) -> tuple[Classifier, dict[str, Any]]:
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
    record = {**phase_record("transplant", 1, panel, curves), "rank": rank}
    return amalgam(panel.networks[0], parts, panel.rows), record


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
        logits = [F.linear(f, *head_of(n)) for n, f in zip(networks, heard, strict=True)]
    if params.trust:
        verdicts = _judge(teachers, logits[1:], local, calibration_labels)
        teachers, places = _believed(teachers, verdicts, local, query, rivals=method != "qkt-light")
        heard, logits = [heard[i] for i in (0, *places)], [logits[i] for i in (0, *places)]
    panel = Panel(
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

    run = PhaseSettings(params, seed, device, checkpoint, progress)

    match (method, params.phase1):
        case ("routed", _) if refined:
            network = amalgam(student, [whole(n) for n in panel.networks], panel.rows)
        case ("routed", _):
            pass
        case ("qkt", "none"):
            network, first = learn_head(panel, inputs, run)
        case ("qkt", "joint"):
            network, first = learn_jointly(panel, inputs, labels, run)
        case ("qkt", "distill"):
            network, first = merge_by_distillation(panel, inputs, run)
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
        said = F.linear(torch.cat(heard, dim=1), *head_of(network))
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
