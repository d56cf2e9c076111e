"""A site of the federation: it works with its own workspace and images, by the library's stages.

Every reply is a function of the workspace and of what was asked: asked twice, a site says the same, and what
it has made is not made again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qkt_clinical.common.files import (
    digest_bytes,
    digest_file,
    digest_folder,
    new_folder,
    read_plain,
    to_json,
    write_json,
)
from qkt_clinical.common.locks import hold_query
from qkt_clinical.config.base import NAME, Sha256, Strict
from qkt_clinical.config.loading import load_params, load_policy, load_query
from qkt_clinical.config.params import Params
from qkt_clinical.config.policy import Policy
from qkt_clinical.config.query import QueryRef
from qkt_clinical.config.workspace import Workspace, check_name
from qkt_clinical.data.prepared import read_manifest
from qkt_clinical.errors import Boundary, BundleError, ConfigError, QktError, QueryError
from qkt_clinical.federation.audit import RECORD, Event, count_since, record, record_within
from qkt_clinical.federation.messages import (
    ANSWER,
    ASK,
    CONTRIBUTE,
    OFFER,
    TASKS,
    Answered,
    Asked,
    Contributed,
    Declined,
    Figures,
    Offered,
    Refused,
    Reply,
    TeacherRequest,
)
from qkt_clinical.federation.parcel import pack, pack_student, unpack_moved
from qkt_clinical.federation.policy import check_outbound, refusal, shown_mask, too_many
from qkt_clinical.federation.signing import check_signature, sign
from qkt_clinical.records.card import CARD, MASK, MAX_JSON_BYTES, read_card, read_mask
from qkt_clinical.records.evaluation import Evaluation
from qkt_clinical.records.plan import Asking, Plan
from qkt_clinical.records.published import published
from qkt_clinical.records.reading import read_record
from qkt_clinical.stages.plan import write_fetched
from qkt_clinical.stages.recipe import Recipe, mask_recipe, train_recipe, transfer_recipe

DAY_S = 24 * 3600.0


class Made(Strict):
    """Record of an artefact and its recipe, in the site's scratch folder."""

    made_of: Sha256
    """Digest of its recipe."""
    content: Sha256
    """Digest of its files."""


def _about(task: Any, data: Any) -> dict[str, str]:
    """Fields of a task for the audit record: only valid names are copied from it."""
    about = {"task": task if isinstance(task, str) and task in TASKS else "unknown"}
    if isinstance(data, Mapping):
        for place in (data.get("question"), data.get("plan"), data):
            for what in ("hospital", "query"):
                name = place.get(what) if isinstance(place, Mapping) else None
                if isinstance(name, str) and NAME.fullmatch(name):
                    about.setdefault(what, name)
    return about


def reported(evaluation: Evaluation) -> Figures | None:
    """Figures of an evaluation as they may leave the hospital; None where one of them is suppressed."""
    told = published(evaluation)
    figures = {
        "balanced_accuracy_before": told.before.balanced_accuracy,
        "balanced_accuracy_after": told.after.balanced_accuracy,
        "gain": told.gain,
        "forgetting": told.forgetting,
        "query_gain": told.query_gain,
    }
    return None if None in figures.values() else Figures.model_validate(figures)


class Site:
    """One hospital in the federation.

    Args:
        root: its own workspace: params.yaml, ``hospitals/<name>/`` and what its stages make.
        signing_key: file by which it signs its teacher.
    """

    def __init__(self, root: Path, name: str, signing_key: Path | None = None) -> None:
        self.root, self.name, self.signing_key = root, name, signing_key
        self.space = Workspace(root)

    @property
    def audit(self) -> Path:
        """Where its record lies."""
        return self.root / RECORD

    def reply(self, task: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Perform a task of the server; the reply is allowed by the policy, or a refusal.

        Nothing is raised: whatever goes wrong here is a refusal with its reason, and in the record.
        """
        about = _about(task, data)
        said: dict[str, Any] = {}
        with Boundary() as end:
            said = self._said(task, data, about)
        return said if end.error is None else self._refused(end.error, about)

    def _said(self, task: str, data: Mapping[str, Any], about: dict[str, str]) -> dict[str, Any]:
        policy = load_policy(self.root, self.name)
        said = self._do(task, data, policy).model_dump(mode="python")
        check_outbound(policy, task, said, self.name)
        if said["kind"] == "offered":
            about = about | {"digest": digest_bytes(said["files"][CARD])}
            start = time.time() - DAY_S
            if record_within(self.audit, "offered", about, policy.queries_per_day, start):
                return said
            said = Declined(reason=too_many(policy)).model_dump(mode="python")
        self._note(said, about)
        return said

    def _refused(self, error: QktError, about: dict[str, str]) -> dict[str, Any]:
        event: Event = "withheld" if error.code == "policy" else "refused"
        with Boundary():  # the record itself may be what is broken or full, and nothing was done
            record(self.audit, event, about | {"code": error.code})
        return Refused.of(error.at(site=self.name)).model_dump(mode="python")

    def _note(self, said: Mapping[str, Any], about: dict[str, str]) -> None:
        kind = said["kind"]
        if kind == "answered":
            shared = [k for k in ("figures", "student") if said[k] is not None]
            about = about | {"digest": said["digest"], "sent": ", ".join(shared) or "nothing else"}
        elif "files" in said:
            about = about | {"digest": digest_bytes(said["files"][CARD])}
        elif kind == "declined":
            about = about | {"reason": said["reason"]}
        record(self.audit, kind, about)

    def _do(self, task: str, data: Mapping[str, Any], policy: Policy) -> Reply:
        if task == CONTRIBUTE:
            return self._contribute(policy)
        try:
            if task == ASK:
                query = check_name(data["query"], "query")
            elif task == OFFER:
                question = TeacherRequest.model_validate(data["question"], strict=False)
            elif task == ANSWER:
                plan, teachers = Plan.model_validate(data["plan"], strict=False), data["teachers"]
                signatures = data.get("signatures", {})
            else:
                raise KeyError
        except (LookupError, TypeError, AttributeError, ValidationError, ConfigError):
            raise QueryError(
                "the server's task cannot be understood",
                remedy="Let server and site install the same version of qkt-clinical.",
                code="task",
            ) from None
        if task == ASK:
            return self._ask(query)
        if task == OFFER:
            return self._offer(question, policy)
        return self._answer(plan, teachers, signatures, policy)

    # --- teachers ---------------------------------------------------------------------------------

    def _prepare(self, params: Params) -> None:
        if not (self.space.prepared(self.name) / "manifest.json").is_file():
            from qkt_clinical.ingest import ingest_site

            ingest_site(self.root, self.name, params)

    def _made(
        self, what: str, made_of: Recipe, content: Callable[[], str], make: Callable[[], object]
    ) -> None:
        """Make an artefact, unless it exists and was made by the same recipe.

        Args:
            what: its name among the notes of what was made.
            content: digest of what is there.
        """
        note = self.space.scratch / "federation" / f"{what}.json"
        try:
            known = Made.model_validate_json(read_plain(note, MAX_JSON_BYTES))
        except (OSError, ValidationError):
            known = None
        if known is not None and known == Made(made_of=made_of.digest, content=content()):
            return
        make()
        write_json(note, Made(made_of=made_of.digest, content=content()).model_dump(mode="json"))

    def teach(self, params: Params) -> Path:
        """Train and mask the site's teacher unless it exists, and return its folder."""
        from qkt_clinical.models.networks import pick_device
        from qkt_clinical.stages.mask import mask_site
        from qkt_clinical.stages.train import train_site, trained_digest

        self._prepare(params)
        folder, manifest = self.space.teacher(self.name), read_manifest(self.space.prepared(self.name))
        trained = train_recipe(params, manifest, pick_device(params.device).type)
        self._made(
            "teacher",
            trained,
            lambda: trained_digest(self.space, self.name),
            lambda: train_site(self.root, self.name, params),
        )
        self._made(
            "mask",
            mask_recipe(params, trained.digest),
            lambda: digest_folder(folder, (CARD, MASK)),
            lambda: mask_site(self.root, self.name, params),
        )
        return folder

    def _shared_teacher(self, policy: Policy) -> Path:
        """Folder of the teacher as it may leave: without means or network where the policy keeps them."""
        folder = self.space.teacher(self.name)
        if policy.share.statistics and policy.share.teacher:
            return folder
        from qkt_clinical.models.bundle import write_without_means, write_without_network

        without = "network" if policy.share.statistics else "means"
        made_of = digest_folder(folder, (CARD, MASK))
        kept = self.space.scratch / "federation" / f"without-{without}" / made_of[:16]
        if not kept.is_dir():
            with new_folder(kept) as part:
                (write_without_network if policy.share.statistics else write_without_means)(folder, part)
                if (folder / MASK).is_file():
                    shutil.copyfile(folder / MASK, part / MASK)
        return kept

    def _contribute(self, policy: Policy) -> Reply:
        if not (policy.share.teacher or policy.share.statistics):
            return self._keeps("the site shares no teacher", "Its policy says so.")
        self.teach(load_params(self.root))
        if not policy.share.teacher and read_card(self.space.teacher(self.name)).encoder_means is None:
            return self._keeps(
                "the site shares class means alone, and has none by a shared encoder",
                "Set shared_encoder in its params.yaml (docs/encoders.md), or share the teacher.",
            )
        files = pack(self._shared_teacher(policy))
        signature = None if self.signing_key is None else sign(self.signing_key, files[CARD])
        return Contributed(files=files, signature=signature)

    def _keeps(self, message: str, remedy: str) -> Refused:
        return Refused(code="policy", message=message, remedy=remedy, site=self.name)

    def _offer(self, question: TeacherRequest, policy: Policy) -> Reply:
        start = time.time() - DAY_S
        if reason := refusal(policy, question, count_since(self.audit, "offered", start)):
            return Declined(reason=reason)
        folder = self._shared_teacher(policy)
        card = read_card(folder)
        mask = read_mask(folder, card)
        if mask is None:
            raise BundleError("no mask", remedy="Contribute first.", site=self.name, code="bundle-mask")
        shown = shown_mask(mask, policy, question)
        content = to_json(shown.model_dump(mode="json")).encode()
        return Offered(files={CARD: read_plain(folder / CARD, MAX_JSON_BYTES), MASK: content})

    # --- queries ----------------------------------------------------------------------------------

    def _ask(self, query: str) -> Reply:
        params = load_params(self.root)
        self._prepare(params)
        manifest = read_manifest(self.space.prepared(self.name))
        asking = Asking.of(manifest, params.shared_encoder, params.train.encoder)
        return Asked(query=load_query(self.root, self.name, query), asking=asking)

    def _answer(self, plan: Plan, teachers: Any, signatures: Any, policy: Policy) -> Reply:
        """Answer with the bundles that came; the plan must be one for this site's own query as it is now."""
        params = load_params(self.root)
        query = load_query(self.root, self.name, plan.query)
        if plan.hospital != self.name or (plan.classes, plan.method, plan.budget) != (
            query.classes,
            query.method,
            query.budget,
        ):
            raise QueryError(
                "the plan is for another question", remedy="Submit the query again.", code="plan-outdated"
            )
        if not isinstance(teachers, Mapping) or set(teachers) != set(plan.relevant):
            raise QueryError(
                "the bundles are not those of the plan",
                remedy="Submit the query again.",
                code="plan-outdated",
            )

        def provide(site: str, folder: Path) -> None:
            unpack_moved(teachers[site], site, folder, plan.method)
            if (key := policy.keys.get(site)) is not None:
                signature = signatures.get(site) if isinstance(signatures, Mapping) else None
                card = read_plain(folder / CARD, MAX_JSON_BYTES)
                check_signature(key, card, signature if isinstance(signature, bytes) else None, site)

        with hold_query(self.root, self.name, plan.query):
            return self._transfer(plan, provide, params, policy)

    def _transfer(
        self, plan: Plan, provide: Callable[[str, Path], None], params: Params, policy: Policy
    ) -> Answered:
        fetched = self.space.fetched(self.name, plan.query)
        write_fetched(fetched, plan, provide)
        student = self.space.student(self.name, plan.query)
        self.teach(params)  # the student begins with the site's own network

        from qkt_clinical.models.networks import pick_device
        from qkt_clinical.stages.transfer import transfer_query

        made_of = transfer_recipe(
            params,
            plan.query,
            load_query(self.root, self.name, plan.query),
            read_manifest(self.space.prepared(self.name)),
            own=digest_file(self.space.own(self.name) / CARD),
            fetched=digest_folder(fetched),
            device=pick_device(params.device).type,
        )
        self._made(
            f"student-{plan.query}",
            made_of,
            lambda: digest_folder(student),
            lambda: transfer_query(self.root, self.name, plan.query, params),
        )
        return Answered(
            digest=digest_file(student / CARD),
            figures=self._figures(plan, params) if policy.share.metrics else None,
            student=pack_student(student) if policy.share.student else None,
        )

    def _figures(self, plan: Plan, params: Params) -> Figures | None:
        """On the site's own images, where none of the figures is suppressed."""
        from qkt_clinical.stages.evaluate import NoTestImages, evaluate_one

        ref = QueryRef(hospital=self.name, query=plan.query)
        try:
            evaluate_one(self.root, ref, params, sites=(self.name,))
        except NoTestImages:
            return None
        path = self.space.reports / "evaluation" / self.name / f"{plan.query}.json"
        return reported(read_record(Evaluation, path))
