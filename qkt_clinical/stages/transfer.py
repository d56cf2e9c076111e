"""Stage ``transfer``: answer a query from the asking hospital's own images and the fetched bundles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from qkt_clinical import __version__
from qkt_clinical.catalog import BY_MEANS, DEFAULT_TASK, ENCODED_METHODS
from qkt_clinical.common.disclosure import shown_count, shown_share, shown_total
from qkt_clinical.common.files import digest_file, new_folder, write_json
from qkt_clinical.common.seeding import derive
from qkt_clinical.common.system_metrics import sample_system_metrics, write_system_metrics
from qkt_clinical.config.loading import load_query
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import Labels, PreparedSite, load_prepared
from qkt_clinical.errors import QueryError
from qkt_clinical.models.bundle import Bundle, SharedMeans, load_bundle, load_shared_means, write_bundle
from qkt_clinical.models.encoders import encoders_of
from qkt_clinical.models.networks import begin_computing
from qkt_clinical.models.out_of_distribution import make_reference
from qkt_clinical.qkt.adaptation import AdaptationResult
from qkt_clinical.qkt.answer import answer_query
from qkt_clinical.qkt.by_means import answer_by_means
from qkt_clinical.qkt.masks import verified_classes
from qkt_clinical.qkt.panel import Teacher
from qkt_clinical.qkt.steps import Answer, EncodedImages, LocalData
from qkt_clinical.qkt.teacher_screening import ScreeningResult
from qkt_clinical.records.card import CARD, MASK, REFERENCE, SharedEncoder
from qkt_clinical.records.phases import AdaptedTeacher, Phase2, Phases, ScreenedTeacher
from qkt_clinical.records.plan import Plan, read_plan
from qkt_clinical.records.query import AskedQuery
from qkt_clinical.records.reading import write_record
from qkt_clinical.stages.encoding import SiteEncoder
from qkt_clinical.stages.plan import copy_bundle
from qkt_clinical.task import Task, task_of

CARD_PHASE1 = "transplant"
"""How cards name a merged low-rank network since the first version; their bytes stay."""


Loaded = TypeVar("Loaded", Bundle, SharedMeans)


def _fetched(folder: Path, plan: Plan, own: Bundle, load: Callable[[Path], Loaded]) -> list[Loaded]:
    """Load what the plan's relevant teachers sent, and check that it is what was planned with."""
    bundles = []
    for candidate in plan.teachers:
        if not candidate.relevant:
            continue
        bundle = load(folder / "teachers" / candidate.site)
        if bundle.card.site != candidate.site or bundle.digest != candidate.digest:
            raise QueryError(
                "a fetched bundle is not the planned one",
                remedy="Run 'qkt plan' for this query again.",
                site=candidate.site,
                code="plan-outdated",
            )
        if bundle.card.classes != own.card.classes or bundle.card.input.shape != own.card.input.shape:
            raise QueryError(
                "a fetched bundle has other classes or another input than the student",
                remedy="Run 'qkt plan' for this query again.",
                site=candidate.site,
                code="plan-outdated",
            )
        bundles.append(bundle)
    return bundles


def _encoded(root: Path, prepared: PreparedSite, params: Params, device: torch.device) -> EncodedImages:
    """The hospital's images as features of the shared encoder."""
    if params.shared_encoder is None:
        raise QueryError(
            "the method takes an encoder that hospitals have in common, and none is set here",
            remedy="Set shared_encoder in params.yaml and plan the query again.",
            code="no-encoder",
        )
    site = SiteEncoder(root, params.shared_encoder, prepared, device)
    return EncodedImages(site.extractor, site.features("train"), site.features("calibration"))


def _means_of_known(said: SharedMeans, encoder: SharedEncoder | None) -> dict[int, torch.Tensor]:
    """A teacher's class means by the hospital's own encoder, of the classes that its mask says it knows.

    Raises:
        QueryError: it has no mask.
    """
    if said.mask is None:
        raise QueryError("teacher without a mask", remedy="Plan the query again.", site=said.card.site)
    if said.card.shared_encoder != encoder:
        return {}
    return {c: mean for c, mean in said.encoder_means.items() if said.mask.known[c]}


def _verified(bundle: Bundle, params: Params) -> tuple[int, ...]:
    """Verified classes of a teacher's network, computed with the asking hospital's settings."""
    return verified_classes(
        bundle.network,
        bundle.card.input.shape,
        threshold=params.mask.threshold,
        probes=params.mask.probes,
        seed=derive(params.seed, "mask"),
    )


def correct_masks(folder: Path, bundles: Sequence[Bundle], answer: Answer) -> None:
    """Remove claims that were not verified from the masks of a student's experts."""
    sent = {bundle.card.site: bundle.mask for bundle in bundles}
    for teacher in answer.teachers:
        if teacher.site not in answer.decision.experts:
            continue
        mask = sent[teacher.site]
        assert mask is not None, "a teacher has one"
        known = tuple(i in teacher.claimed for i in range(len(mask.classes)))
        if known != mask.known:
            scores = tuple(
                0.0 if was and not now else s
                for was, now, s in zip(mask.known, known, mask.scores, strict=True)
            )
            corrected = mask.model_copy(update={"known": known, "scores": scores})
            write_json(folder / teacher.site / MASK, corrected.model_dump(mode="json"))


def write_experts(folder: Path, fetched: Path, bundles: Sequence[Bundle], answer: Answer) -> None:
    """Write the experts of a routed student: as fetched, or as adapted to the hospital's images.

    The card of an adapted one says so, and keeps the digest of the weights that were sent. One that was sent
    without its encoder is written whole: a student needs no other file.
    """
    sent = {bundle.card.site: bundle for bundle in bundles}
    for teacher in answer.teachers:
        if teacher.site not in answer.decision.experts:
            continue
        source, target = fetched / "teachers" / teacher.site, folder / teacher.site
        copy_bundle(source, target, teacher.site)
        card = sent[teacher.site].card
        if teacher.share or card.without_encoder:
            said = {"adaptation_share": teacher.share, "sent_weights": card.weights.sha256}
            apart = {
                *("network", "weights", "packed", "without_encoder"),
                *("class_means", "shared_encoder", "encoder_means"),
            }
            written = card.model_dump(mode="json", exclude=apart)
            adapted = {**written, "training": {**written["training"], **said}}
            bundle = sent[teacher.site]
            write_bundle(target, teacher.network, adapted, bundle.class_means, packed=bool(card.packed))
    correct_masks(folder, bundles, answer)


def _adapted(result: AdaptationResult) -> AdaptedTeacher:
    shift = round(result.shift, 3) if math.isfinite(result.shift) else None
    return AdaptedTeacher(site=result.site, shift=shift, share=result.share)


def _screened(result: ScreeningResult, classes: Sequence[str]) -> ScreenedTeacher:
    """The screening result of a teacher without figures of few images, which would describe persons."""
    return ScreenedTeacher(
        site=result.site,
        included=result.included,
        reason=result.reason,
        unverified=tuple(classes[c] for c in result.unverified),
        misnamed=tuple(classes[c] for c in result.misnamed),
        recalls={classes[c]: shown_share(right, count) for c, (right, count) in result.named.items()},
        agreement=None if result.agreement is None else round(result.agreement, 2),
    )


def make_record(answer: Answer, classes: Sequence[str], calibration: Labels, *, task: Task) -> Phases:
    """``phases.json`` of an answer. Counts and shares of few images are suppressed for the registry.

    Args:
        calibration: the labels of the hospital's calibration images.
    """
    decision, point = answer.decision, answer.operating_point
    each = task.counts(calibration, len(classes))[list(decision.local)]
    return Phases(
        method=decision.method,
        adaptation=tuple(_adapted(result) for result in answer.adaptation),
        screening=tuple(_screened(result, classes) for result in answer.screening),
        phase1=answer.phase1,
        phase2=Phase2(
            offsets={classes[q]: o for q, o in zip(decision.query, decision.offsets, strict=True)},
            budget=decision.budget,
            false_query_rate=shown_share(point.false_queries, point.own_images),
            own_images=shown_total(point.own_images, each.tolist()),
            within_budget=point.within_budget,
            local_model_weight=decision.own_weight,
            rare={classes[c]: shown_count(n) for c, n in answer.rare.items()},
            placed_by=answer.refined.placed_by,
            encoder_placed_by=answer.refined.encoded.placed_by if answer.refined.encoded else (),
            curves=answer.refined.curves,
        ),
    )


def transfer_query(
    root: Path,
    hospital: str,
    name: str,
    params: Params,
    *,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    fetched: Path | None = None,
) -> Phases:
    """Answer a query and write its student to ``models/students/<hospital>/<query>/``.

    Reads the hospital's prepared images, its own teacher bundle and the fetched ones; no other hospital's
    folder is opened.

    Args:
        fetched: folder with plan and bundles; ``models/fetched/<hospital>/<query>/`` where none is given.

    Returns:
        The record of its phases, as in ``phases.json``.
    """
    space, task = Workspace(root), task_of(DEFAULT_TASK)
    query = load_query(root, hospital, name)
    prepared = load_prepared(space.prepared(hospital))
    own = load_bundle(space.own(hospital))
    fetched = fetched or space.fetched(hospital, name)
    plan = read_plan(fetched)
    if (plan.classes, plan.method, plan.budget) != (query.classes, query.method, query.budget):
        raise QueryError(
            "the query file was changed after the plan",
            remedy="Run 'qkt plan' for this query again.",
            code="plan-outdated",
        )
    where = begin_computing(device or params.device, params.threads)
    classes = own.card.classes
    encoded, shared = None, SharedEncoder.of(params.shared_encoder)
    if query.method in ENCODED_METHODS:
        encoded = _encoded(root, prepared, params, where)
    data = LocalData(
        prepared.part("train"), prepared.part("calibration"), prepared.manifest.normalisation, encoded
    )
    wanted = [classes.index(c) for c in query.classes]
    common: Any = {
        "task": task,
        "budget": query.budget,
        "params": params.transfer,
        "seed": derive(params.seed, "transfer", hospital, name),
        "device": where,
    }
    bundles: list[Bundle] = []
    try:
        with sample_system_metrics() as samples:
            if query.method == BY_MEANS:
                said = {
                    s.card.site: _means_of_known(s, shared)
                    for s in _fetched(fetched, plan, own, load_shared_means)
                }
                answer = answer_by_means(own.network, said, data, wanted, **common)
            else:
                encoders = encoders_of(root, params)
                bundles = _fetched(fetched, plan, own, lambda place: load_bundle(place, encoders))
                teachers = [
                    Teacher.of(b, _verified(b, params) if params.transfer.screening else None, encoder=shared)
                    for b in bundles
                ]
                answer = answer_query(
                    own.network, teachers, data, wanted, method=query.method, progress=progress, **common
                )
    except QueryError as error:
        raise error.at(stage="transfer", site=hospital) from None
    phases = make_record(answer, classes, data.calibration[1], task=task)
    with new_folder(space.student(hospital, name)) as folder:
        card = write_bundle(
            folder,
            answer.network,
            {
                "kind": "student",
                "site": hospital,
                "query": name,
                "classes": classes,
                "input": own.card.input,
                "training": {
                    "phase1": CARD_PHASE1 if phases.phase1 else None,
                    "seed": params.seed,
                    "version": __version__,
                },
                "decision": answer.decision,
            },
        )
        reference = make_reference(
            answer.network, card, data.train[0], data.calibration[0], data.normalisation
        )
        write_json(folder / REFERENCE, reference.model_dump(mode="json"))
        write_experts(folder / "experts", fetched, bundles, answer)
        asked = AskedQuery(hospital=hospital, query=name, **query.model_dump())
        write_record(folder / "query.json", asked)
        write_record(folder / "plan.json", plan)
        write_record(folder / "phases.json", phases)
    write_system_metrics(space.scratch, digest_file(space.student(hospital, name) / CARD), samples)
    return phases
