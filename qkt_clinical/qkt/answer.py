"""The core of Query-based Knowledge Transfer: ``qkt``, ``qkt-light``, ``routed`` and ``qkt-statistics``.

A reconstruction (the paper's equations are not all known to us). An answer takes six steps, one function
each:

1. :func:`validate` holds the question against the hospital's data and the teachers' claims.
2. :func:`adapt` brings the teachers to the hospital's images (:mod:`qkt_clinical.qkt.adaptation`).
3. :func:`screen` decides which teachers are included. Networks without usable answers are set aside
   (:mod:`qkt_clinical.qkt.soundness`), then those whose claims, labels or views of the own images do not
   stand up to a look at those images (:mod:`qkt_clinical.qkt.teacher_screening`). **Masks** say which
   networks know a class of R, the local classes and the query; for every class the mean margin of the
   networks that know it is their *consensus*. Teachers that know no query class but a local one count too: an
   image of the query is strange to them. The local model weight is chosen on the hospital's calibration
   images.
4. :func:`merge`, phase 1, makes one network of them: the teachers' extractors are taken up side by side,
   reduced layer by layer on the hospital's own images (in ``qkt`` not those whose images look unlike them).
   No label is taught again: that would wash out the own network's surprise at images of the query.
   ``qkt-light`` takes up only the teachers that know the query, reduced further. ``routed`` keeps the
   teachers themselves as experts at prediction time, and shows them mirror images too; where there is a
   head to refine, they are put side by side as they are.
5. :func:`qkt_clinical.qkt.head.refine`, phase 2, works on the head alone. For absent query classes it takes
   up what discriminant analysis says of the student's features (:mod:`qkt_clinical.qkt.discriminant`); for
   rare ones it is refined on their few samples.
   ``qkt-statistics`` puts a frozen encoder that all hospitals have beside the merged network, with the
   discriminants of the teachers' class means over its features.
6. :func:`set_operating_point` sets the query's offset from the budget, on calibration and training images.

What each step leaves to the next are the records of :mod:`qkt_clinical.qkt.steps`. Nothing here does I/O;
images are the asking hospital's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.nn import functional as F

from qkt_clinical.catalog import ENCODED_METHODS, Method
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.params import TransferParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Labels
from qkt_clinical.errors import QueryError
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.adaptation import MIN_IMAGES, adapt_teachers
from qkt_clinical.qkt.consensus import (
    GUARDING_WEIGHTS,
    LOCAL_WEIGHTS,
    consensus,
    forgotten,
    local_weight,
)
from qkt_clinical.qkt.head import balanced_sample, has_head_to_refine, refine
from qkt_clinical.qkt.low_rank_merge import full_rank, merge_networks, reduce_extractor
from qkt_clinical.qkt.operating_point import (
    allowed,
    as_if_held_out,
    false_query_rate,
    kept_today,
    offsets_for_budget,
    query_scores,
)
from qkt_clinical.qkt.panel import Panel, PhaseSettings, Teacher, head_of, phase_record, same_extractor
from qkt_clinical.qkt.soundness import NetworkOutputs, defect, observe
from qkt_clinical.qkt.steps import (
    Adapted,
    Answer,
    LocalData,
    Merged,
    OperatingPoint,
    OwnImages,
    Refined,
    Screened,
    ValidQuery,
)
from qkt_clinical.qkt.teacher_screening import ScreeningResult, screen_teachers
from qkt_clinical.records.card import Branch, DecisionRule
from qkt_clinical.records.phases import MERGE_KIND
from qkt_clinical.task import Task
from qkt_clinical.training.augment import augment

MAX_TEACHERS = 64

LAYER = "layer number"
"""Axis of a merge's curves; no hospital can be called so."""
LEAVE_OUT = "Ask those hospitals, or leave them out by exclude_teachers in the query file."


def _split(labels: Labels, query: Sequence[int], classes: int) -> tuple[tuple[int, ...], dict[int, int]]:
    """Local classes, and the number of training images of each rare query class."""
    present = {c: int((labels == c).sum()) for c in range(classes)}
    local = tuple(c for c in range(classes) if present[c] and c not in query)
    return local, {q: present[q] for q in query if present[q]}


# --- 1. validate ----------------------------------------------------------------------------------


def validate(
    student: Classifier,
    teachers: Sequence[Teacher],
    data: LocalData,
    query: Sequence[int],
    *,
    method: Method,
    budget: float,
) -> ValidQuery:
    """Check a query against the hospital's data and the teachers' claims.

    Raises:
        QueryError: see :func:`answer_query`.
    """
    teachers = sorted(teachers, key=lambda t: t.site)  # sums then do not depend on the order given
    query = tuple(sorted(query))
    local, rare = _split(data.train[1], query, student.spec.classes)
    if len(teachers) > MAX_TEACHERS:
        raise QueryError(f"more than {MAX_TEACHERS} teachers", remedy="Set max_teachers in the query file.")
    untaught = [q for q in query if not any(q in t.claimed for t in teachers)]
    if untaught:
        raise QueryError(
            f"no teacher knows query class {untaught[0]}", remedy="Plan the query again.", code="uncovered"
        )
    if not local:
        raise QueryError("no local class beside the query", remedy="Add images of another class.")
    calibration = to_input(data.calibration[0], data.normalisation)
    kept = torch.from_numpy(~np.isin(data.calibration[1], query))
    if not bool(kept.any()):
        raise QueryError(
            "no calibration image of a local class, so the budget cannot be kept",
            remedy="Raise ingest.splits.calibration in params.yaml or add patients.",
            code="no-calibration",
        )
    encoded = data.encoded if method in ENCODED_METHODS else None
    if encoded is not None:
        encoded = replace(encoded, calibration=encoded.calibration[kept])
    if method == "qkt-light":
        teachers = [t for t in teachers if set(t.claimed) & set(query)]
    return ValidQuery(
        student=copy.deepcopy(student).cpu().eval(),
        teachers=tuple(teachers),
        query=query,
        local=local,
        rare=rare,
        inputs=to_input(data.train[0], data.normalisation),
        labels=data.train[1],
        calibration=calibration[kept],
        calibration_labels=torch.from_numpy(data.calibration[1])[kept],
        method=method,
        budget=budget,
        encoded=encoded,
    )


# --- 2. adapt -------------------------------------------------------------------------------------


def adapt(question: ValidQuery, settings: PhaseSettings) -> Adapted:
    """Bring each teacher to the hospital's images as far as its held-out images speak for it.

    Teachers without statistics, those that give no usable answers, and those whose extractor is the
    hospital's own, a frozen encoder, stay as they are.
    """
    if not settings.params.adaptation or len(question.inputs) < MIN_IMAGES:
        return Adapted(question)
    others = [t for t in question.teachers if not same_extractor(t.network, question.student)]
    adapted, results = adapt_teachers(
        others,
        question.inputs,
        torch.from_numpy(question.labels),
        (question.calibration, question.calibration_labels),
        question.local,
        task=settings.task,
        seed=settings.seed,
        device=settings.device,
    )
    brought = {t.site: t for t in adapted}
    teachers = tuple(brought.get(t.site, t) for t in question.teachers)
    return Adapted(replace(question, teachers=teachers), results)


# --- 3. screen ------------------------------------------------------------------------------------


def screen(question: ValidQuery, settings: PhaseSettings) -> Screened:
    """Decide which teachers are included, and set the local model weight.

    Raises:
        QueryError: the own network gives no usable answers (``unsound-network``), or no teacher of a query
            class is left (``untrusted``).
    """
    flips = question.method == "routed" and settings.params.flips
    networks = [question.student, *(t.network for t in question.teachers)]
    outputs = [observe(n, question.calibration, flips, settings.device) for n in networks]
    varied = bool((question.calibration != question.calibration[:1]).any())
    own, *defects = [defect(n, o, varied=varied) for n, o in zip(networks, outputs, strict=True)]
    _refuse_unsound(own)
    results = _results(question, outputs[1:], defects, settings)
    teachers, places = _included(question, results)
    outputs = [outputs[i] for i in (0, *places)]
    panel = Panel(
        (question.student, *(t.network for t in teachers)),
        ((*question.local, *question.rare), *(t.claimed for t in teachers)),
        question.relevant,
        tuple(t.site for t in teachers),
    )
    if question.method != "qkt-light":
        logits = [o.logits for o in outputs]
        weight = local_weight(
            logits,
            panel.known,
            question.local,
            question.calibration_labels,
            task=settings.task,
            budget=question.budget,
            weights=LOCAL_WEIGHTS if question.rare else (*LOCAL_WEIGHTS, *GUARDING_WEIGHTS),
        )
        panel = replace(panel, local_weight=weight)
    told = tuple(results) if settings.params.screening or any(defects) else ()
    return Screened(panel, tuple(teachers), told, tuple(outputs), flips)


def _refuse_unsound(own: str) -> None:
    """Refuse an own network with a defect."""
    if own:
        raise QueryError(
            f"the hospital's own network gives no usable answers: {own}",
            remedy="Run 'qkt train' and 'qkt mask' for the hospital again.",
            code="unsound-network",
        )


def own_alone(question: ValidQuery, settings: PhaseSettings) -> Screened:
    """No network but the hospital's own takes part; teachers count by what else they say.

    Raises:
        QueryError: the own network gives no usable answers (``unsound-network``).
    """
    outputs = observe(question.student, question.calibration, False, settings.device)
    varied = bool((question.calibration != question.calibration[:1]).any())
    _refuse_unsound(defect(question.student, outputs, varied=varied))
    panel = Panel((question.student,), ((*question.local, *question.rare),), question.relevant, ())
    return Screened(panel, question.teachers, (), (outputs,), False)


def _results(
    question: ValidQuery, outputs: Sequence[NetworkOutputs], defects: Sequence[str], settings: PhaseSettings
) -> list[ScreeningResult]:
    """One result per teacher, in their order; without ``screening`` for defects alone."""
    pairs = list(zip(question.teachers, outputs, strict=True))
    sound = [pair for pair, why in zip(pairs, defects, strict=True) if not why]
    if settings.params.screening:
        screened = screen_teachers(
            [t.site for t, _ in sound],
            [o.logits for _, o in sound],
            [t.claimed for t, _ in sound],
            [t.verified for t, _ in sound],
            question.local,
            question.calibration_labels,
            task=settings.task,
            unlike=[t.unlike for t, _ in sound],
        )
    else:
        screened = [ScreeningResult(t.site, included=True, reason="not screened") for t, _ in sound]
    rest = iter(screened)
    return [
        ScreeningResult(teacher.site, included=False, reason=why) if why else next(rest)
        for teacher, why in zip(question.teachers, defects, strict=True)
    ]


def _included(question: ValidQuery, results: Sequence[ScreeningResult]) -> tuple[list[Teacher], list[int]]:
    """The teachers that are included, each with the classes that count, and their places.

    Returns:
        Places count from 1, the hospital's own network being 0.

    Raises:
        QueryError: a query class is left to nobody.
    """
    wanted = {*question.query, *(question.local if question.method != "qkt-light" else ())}
    included, places = [], []
    for place, (teacher, result) in enumerate(zip(question.teachers, results, strict=True), start=1):
        claimed = tuple(c for c in teacher.claimed if c not in {*result.unverified, *result.misnamed})
        if result.included and set(claimed) & wanted:
            included.append(replace(teacher, claimed=claimed))
            places.append(place)
    left = [q for q in question.query if not any(q in t.claimed for t in included)]
    if left:
        why = "; ".join(
            f"{r.site} {'claims classes that its network does not show' if r.included else r.reason}"
            for t, r in zip(question.teachers, results, strict=True)
            if left[0] in t.claimed
        )
        raise QueryError(
            f"no teacher of query class {left[0]} can be used: {why}", remedy=LEAVE_OUT, code="untrusted"
        )
    return included, places


# --- 4. merge -------------------------------------------------------------------------------------


def merge(question: ValidQuery, screened: Screened, settings: PhaseSettings) -> Merged:
    """Phase 1: merge the included networks into one; ``routed`` keeps its own network with the experts."""
    panel, params = screened.panel, settings.params
    if question.method == "routed" and not has_head_to_refine(question, screened, settings):
        return Merged(copy.deepcopy(question.student), experts=panel.sites)
    if question.method == "routed":
        whole = [full_rank(panel.networks[part[0]]) for part in panel.parts]
        return Merged(merge_networks(question.student, whole, panel.part_rows))
    rank = params.light_rank if question.method == "qkt-light" else params.rank
    sample = balanced_sample(question.labels, params.images, settings.seed)
    # What a teacher makes of images unlike its own is not seen on the hospital's: it is kept whole.
    unlike = {t.site for t in screened.teachers if t.unlike and question.method != "qkt-light"}
    return _merge_at_rank(panel, question.inputs[sample], rank, unlike, settings)


def _merge_at_rank(
    panel: Panel, images: Tensor, rank: float, whole: Container[str], settings: PhaseSettings
) -> Merged:
    """A merged low-rank network, made on one view of each image; some teachers are not reduced."""
    view = augment(images, settings.params.augment, generator(settings.seed, "view", "1"))
    parts: list[tuple[nn.Module, Branch]] = []
    lost: dict[str, list[float]] = {}
    for number, *_ in panel.parts:
        site, source = ("", *panel.sites)[number], panel.networks[number]
        # The own extractor stays as it is: nothing of what the hospital knows is given up for room.
        share = 1.0 if not number or site in whole else rank
        # "transplant" is the stream of the first version: answers keep their bytes.
        draw = derive(settings.seed, "transplant", site)
        extractor, branch, losses = _reduced(source, share, view, draw, site, settings)
        parts.append((extractor, branch))
        if number:
            lost[site] = losses
        if settings.progress:
            settings.progress(number + 1, len(panel.networks))
    layers = range(max(map(len, lost.values()), default=0))
    # Per teacher the share of a layer's output that is lost on the views.
    curves = tuple({LAYER: i + 1.0, **{s: v[i] for s, v in lost.items() if i < len(v)}} for i in layers)
    network = merge_networks(panel.networks[0], parts, panel.part_rows)
    return Merged(network, phase_record(MERGE_KIND, 1, panel, curves, rank=rank))


def _reduced(
    source: Classifier, share: float, view: Tensor, draw: int, site: str, settings: PhaseSettings
) -> tuple[nn.Module, Branch, list[float]]:
    """:func:`reduce_extractor`, with the hospital's name where it cannot be done.

    Raises:
        QueryError: the linear systems have no finite solution.
    """
    try:
        reduced = reduce_extractor(source, share, view, seed=draw, device=settings.device)
    except LinAlgError:
        reduced = None
    if reduced is None or not all(bool(torch.isfinite(t).all()) for t in reduced[0].state_dict().values()):
        raise QueryError(
            "the network's layers cannot be reduced in finite numbers",
            remedy=LEAVE_OUT,
            code="unsound-network",
            site=site or None,
        )
    return reduced


# --- 6. operating point ---------------------------------------------------------------------------


def held_out_images(question: ValidQuery, screened: Screened) -> OwnImages:
    """The calibration images, which no network was trained on."""
    encoded = None if question.encoded is None else question.encoded.calibration
    return OwnImages(question.calibration, question.calibration_labels, encoded, screened.outputs)


def learned_images(question: ValidQuery, settings: PhaseSettings) -> OwnImages:
    """Training images drawn at random, in the proportions that the hospital sees its classes in."""
    labels = torch.from_numpy(question.labels)
    local = torch.isin(labels, torch.tensor(question.local)).nonzero().flatten()
    order = torch.randperm(len(local), generator=generator(settings.seed, "operating-point"))
    drawn = local[order[: settings.params.images].sort().values]
    encoded = None if question.encoded is None else question.encoded.train[drawn]
    return OwnImages(question.inputs[drawn], labels[drawn], encoded)


def set_operating_point(
    question: ValidQuery,
    screened: Screened,
    merged: Merged,
    refined: Refined,
    settings: PhaseSettings,
    *,
    on_training: bool = True,
) -> OperatingPoint:
    """Set the offset that keeps the budget on the hospital's own images.

    On calibration images, and on training images brought to their level: where the scores of a few dozen
    images end is chance, and these are several times as many.

    For a rare class the budget also holds if images of small classes weigh more: some own classes are about
    as rare as the query there, and a share of all images would be paid by these alone.

    Args:
        on_training: whether on training images too. What the own network alone says of these is not what it
            says of others.

    Raises:
        QueryError: the student's answers are not finite (``unsound-network``).
    """
    held_out = held_out_images(question, screened)
    logits = student_logits(question, screened, merged, refined, held_out, settings)
    scores, labels = scores_to_keep(question, held_out, logits, settings)
    both, of = scores, labels
    if on_training:
        learned = learned_images(question, settings)
        more = student_logits(question, screened, merged, refined, learned, settings)
        trained, classes = scores_to_keep(question, learned, more, settings)
        both = torch.cat([scores, as_if_held_out(trained, classes, scores, labels)])
        of = torch.cat([labels, classes])
    by_class = of if question.rare else None
    lost = forgotten(screened.outputs[0].logits, logits, question.local, held_out.labels, task=settings.task)
    share = lost / len(held_out.labels)
    offsets = offsets_for_budget(both, question.budget, lost=share, labels=by_class)
    point = operating_point_at(question, screened, merged, both, offsets)
    return replace(
        point, labels=by_class, lost=share, within_budget=lost <= allowed(question.budget, len(scores))
    )


def student_logits(
    question: ValidQuery,
    screened: Screened,
    merged: Merged,
    refined: Refined,
    images: OwnImages,
    settings: PhaseSettings,
) -> Tensor:
    """The student's logits (N, C) on some of the hospital's own images.

    Raises:
        QueryError: they are not finite (``unsound-network``).
    """
    panel, device = screened.panel, settings.device
    if question.method == "routed":
        outputs = images.outputs or tuple(
            observe(network, images.inputs, screened.flips, device) for network in panel.networks
        )
        if merged.experts:
            logits = consensus([o.logits for o in outputs], panel.known, panel.relevant, panel.local_weight)
        else:
            features = torch.cat([outputs[part[0]].features for part in panel.parts], dim=1)
            logits = F.linear(features, *head_of(refined.network))
    else:
        logits = predict(refined.network, images.inputs, device)
    if refined.encoded is not None:
        assert images.encoded is not None
        logits = logits + refined.encoded.logits(images.encoded)
    if not bool(torch.isfinite(logits).all()):
        raise QueryError(
            f"the student of the networks of {', '.join(panel.sites)} gives answers that are not finite",
            remedy="Leave one of them after the other out by exclude_teachers in the query file.",
            code="unsound-network",
        )
    return logits


def scores_to_keep(
    question: ValidQuery, images: OwnImages, logits: Tensor, settings: PhaseSettings
) -> tuple[Tensor, Tensor]:
    """Query scores (M, Q) and labels (M,) of the images that the own model does not take for the query.

    Args:
        logits: from :func:`student_logits` of the images.
    """
    scores, labels = query_scores(logits, question.local, question.query), images.labels
    if question.rare:
        today = predict(question.student, images.inputs, settings.device)
        kept = kept_today(today, question.local, question.query, task=settings.task)
        return scores[kept], labels[kept]
    return scores, labels


def operating_point_at(
    question: ValidQuery, screened: Screened, merged: Merged, scores: Tensor, offsets: Tensor
) -> OperatingPoint:
    """The decision rule with an offset for each query class.

    Args:
        scores: of the images that it is set on.
        offsets: (Q,).
    """
    decision = DecisionRule(
        method=question.method,
        local=question.local,
        query=question.query,
        rare=tuple(question.rare),
        offsets=tuple(float(o) for o in offsets),
        budget=question.budget,
        own_weight=screened.panel.local_weight,
        experts=merged.experts,
        flips=screened.flips,
    )
    return OperatingPoint(
        decision, len(scores), round(false_query_rate(scores, offsets) * len(scores)), scores
    )


# --- the whole ------------------------------------------------------------------------------------


def answer_query(
    student: Classifier,
    teachers: Sequence[Teacher],
    data: LocalData,
    query: Sequence[int],
    *,
    task: Task,
    method: Method = "qkt",
    budget: float = 0.02,
    params: TransferParams | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Answer:
    """Answer a query: ``qkt`` (one network), ``qkt-light`` (seconds) or ``routed`` (experts).

    ``qkt-means`` is :func:`qkt_clinical.qkt.by_means.answer_by_means`.

    Args:
        student: the asking hospital's own network; left as it is.
        teachers: relevant teachers only, those that know a class of the query or a local one; each query
            class is known by at least one.
        data: the asking hospital's own images.
        query: class indices.
        method: one of ``BY_NETWORKS``.
        budget: at most this share of the hospital's own images may go to the query.

    Raises:
        QueryError: no teacher or too many, a query class that no teacher knows or none of whose teachers can
            be used, no local class, no calibration image, or an own network without usable answers.
    """
    settings = PhaseSettings(task, params or TransferParams(), seed, device or torch.device("cpu"), progress)
    asked = validate(student, teachers, data, query, method=method, budget=budget)
    adapted = adapt(asked, settings)
    question = adapted.question
    screened = screen(question, settings)
    merged = merge(question, screened, settings)
    refined = refine(question, screened, merged, settings)
    point = set_operating_point(question, screened, merged, refined, settings)
    return answer_of(adapted, screened, merged, refined, point)


def answer_of(
    adapted: Adapted, screened: Screened, merged: Merged, refined: Refined, point: OperatingPoint
) -> Answer:
    """The answer that results from the six steps."""
    return Answer(
        teachers=screened.teachers,
        adaptation=adapted.results,
        screening=screened.results,
        phase1=merged.record,
        refined=refined,
        rare=adapted.question.rare,
        operating_point=point,
    )
