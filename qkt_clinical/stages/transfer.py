"""Stage ``transfer``: answer a query from the asking hospital's own images and the fetched bundles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qkt_clinical import __version__
from qkt_clinical.common.disclosure import shown_count, shown_total, too_few, withhold
from qkt_clinical.common.files import digest_file, digest_folder, new_folder, write_json
from qkt_clinical.common.seeding import derive
from qkt_clinical.common.system_metrics import keep_usage, watched
from qkt_clinical.config.loading import load_query
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import load_prepared
from qkt_clinical.errors import QueryError
from qkt_clinical.models.bundle import Bundle, load_bundle, write_bundle
from qkt_clinical.models.networks import pick_device
from qkt_clinical.models.out_of_distribution import make_reference
from qkt_clinical.qkt.answer import Answer, LocalData, answer_query
from qkt_clinical.qkt.masks import shown_classes
from qkt_clinical.qkt.panel import Teacher
from qkt_clinical.records.card import CARD, MASK, REFERENCE
from qkt_clinical.records.plan import Plan, read_plan
from qkt_clinical.stages.plan import copy_bundle
from qkt_clinical.stages.recipe import transfer_recipe
from qkt_clinical.training.loop import Checkpoint


def _fetched(folder: Path, plan: Plan, own: Bundle) -> list[Bundle]:
    """The plan's relevant bundles, each as it was when the plan was made."""
    bundles = []
    for candidate in plan.teachers:
        if not candidate.relevant:
            continue
        bundle = load_bundle(folder / "teachers" / candidate.site)
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


def _shown(bundle: Bundle, params: Params) -> tuple[int, ...]:
    """The classes that a teacher's network shows, read by the asking hospital's own settings."""
    return shown_classes(
        bundle.network,
        bundle.card.input.shape,
        estimator=params.mask.estimator,
        threshold=params.mask.threshold,
        probes=params.mask.probes,
        seed=derive(params.seed, "mask"),
    )


def correct_masks(folder: Path, bundles: Sequence[Bundle], answer: Answer) -> None:
    """Take claims that were not believed out of the masks of a student's experts."""
    sent = {bundle.card.site: bundle.mask for bundle in bundles}
    for teacher in answer.teachers:
        mask = sent[teacher.site]
        assert mask is not None, "a teacher has one"
        known = tuple(i in teacher.known for i in range(len(mask.classes)))
        if teacher.site in answer.decision.experts and known != mask.known:
            scores = tuple(
                0.0 if was and not now else s
                for was, now, s in zip(mask.known, known, mask.scores, strict=True)
            )
            corrected = mask.model_copy(update={"known": known, "scores": scores})
            write_json(folder / teacher.site / MASK, corrected.model_dump(mode="json"))


def transfer_query(
    root: Path,
    hospital: str,
    name: str,
    params: Params,
    *,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    fetched: Path | None = None,
) -> dict[str, Any]:
    """Answer a query and write its student to ``models/students/<hospital>/<query>/``.

    Reads the hospital's prepared images, its own teacher bundle and the fetched ones; no other hospital's
    folder is opened.

    Args:
        fetched: folder with plan and bundles; ``models/fetched/<hospital>/<query>/`` where none is given.

    Returns:
        The phases' record, as in ``phases.json``.
    """
    space = Workspace(root)
    query = load_query(root, hospital, name)
    prepared = load_prepared(space.prepared(hospital))
    own = load_bundle(space.teacher(hospital))
    fetched = fetched or space.fetched(hospital, name)
    plan = read_plan(fetched)
    if (plan.classes, plan.method, plan.budget) != (query.classes, query.method, query.budget):
        raise QueryError(
            "the query file was changed after the plan",
            remedy="Run 'qkt plan' for this query again.",
            code="plan-outdated",
        )
    bundles = _fetched(fetched, plan, own)
    where = pick_device(device or params.device)
    made_of = transfer_recipe(
        params,
        name,
        query,
        prepared.manifest,
        own=own.digest,
        fetched=digest_folder(fetched),
        device=where.type,
    )
    key = f"{hospital}-{name}-{made_of.digest[:16]}"
    classes = own.card.classes
    data = LocalData(prepared.part("train"), prepared.part("calibration"), prepared.manifest.normalisation)
    with watched() as samples:
        answer = answer_query(
            own.network,
            [Teacher.of(b, _shown(b, params) if params.transfer.trust else None) for b in bundles],
            data,
            [classes.index(c) for c in query.classes],
            method=query.method,
            budget=query.budget,
            params=params.transfer,
            seed=derive(params.seed, "transfer", hospital, name),
            device=where,
            checkpoint=Checkpoint(space.scratch / "transfer", key),
            progress=progress,
        )
    phases = {"format": "qkt-phases/1", **answer.phases}
    second = phases["phase2"]
    second["offsets"] = {classes[int(c)]: v for c, v in second["offsets"].items()}
    # A student goes to the registry: how few images there are is nobody's business but the hospital's.
    second["rare"] = {classes[int(c)]: shown_count(n) for c, n in second["rare"].items()}
    held, each = second["calibration_images"], np.bincount(data.calibration[1], minlength=len(classes))
    second["calibration_images"] = shown_total(held, each[list(answer.decision.local)].tolist())
    images = dict(zip(classes, each.tolist(), strict=True))
    for told in phases["trust"]:
        told["dismissed"] = [classes[int(c)] for c in told["dismissed"]]
        told["recalls"] = withhold({classes[int(c)]: r for c, r in told["recalls"].items()}, images)
    if too_few(held):
        second["given_away"] = None
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
                    "phase1": (phases["phase1"] or {"kind": None})["kind"],
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
        for expert in answer.decision.experts:
            copy_bundle(fetched / "teachers" / expert, folder / "experts" / expert, expert)
        correct_masks(folder / "experts", bundles, answer)
        write_json(
            folder / "query.json", {"hospital": hospital, "query": name, **query.model_dump(mode="json")}
        )
        write_json(folder / "plan.json", plan.model_dump(mode="json"))
        write_json(folder / "phases.json", phases)
    keep_usage(space.scratch, digest_file(space.student(hospital, name) / CARD), samples)
    return phases
