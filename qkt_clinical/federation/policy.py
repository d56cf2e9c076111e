"""What may leave a site, and whose questions it hears: ``hospitals/<site>/policy.yaml``.

Closed unless open: without a readable policy nothing is sent, and of what is sent only what is named here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from qkt_clinical.card import Mask
from qkt_clinical.config import Name, Strict, parse, read_yaml, site_folder
from qkt_clinical.errors import BundleError, ConfigError, PolicyError, QueryError
from qkt_clinical.federation.messages import Answered, Contributed, Offered, Question, read_reply
from qkt_clinical.federation.parcel import read_offer_files, unpack_student, unpack_teacher

FILE = "policy.yaml"
OPEN = """\
# What may leave this hospital, and whose questions it hears; what is not said is refused.
share:
  teacher: true # its network and what it knows, for other hospitals' queries
  metrics: true # figures of its own students, with intervals, without counts
  student: false # its own students
mask: all # all | query: others see whether we know the classes asked for and the asking hospital's own
refuse_classes: []
refuse_requesters: []
queries_per_day: 100
"""
"""What generated and simulated hospitals begin with."""


class Share(Strict):
    """What leaves the site at all."""

    teacher: bool = False
    """Its bundle and mask, to the server and through it to hospitals whose queries it may answer."""
    metrics: bool = False
    """Figures of its own students, with intervals and without counts."""
    student: bool = False
    """Its own students' bundles."""


class Policy(Strict):
    """``policy.yaml``: what is not said is refused."""

    share: Share = Share()
    mask: Literal["all", "query"] = "query"
    """Whether others see the mask of every class, or of those asked for and the asking hospital's own."""
    refuse_classes: tuple[str, ...] = ()
    """Classes about which the site answers nobody."""
    refuse_requesters: tuple[Name, ...] = ()
    """Hospitals that the site does not answer."""
    queries_per_day: Annotated[int, Field(ge=0)] = 0
    """Queries that the site helps to answer at most within any 24 hours."""


def load_policy(root: Path, site: str) -> Policy:
    """Read a site's policy.

    Raises:
        PolicyError: absent or not a policy; nothing may be sent then.
    """
    try:
        path = site_folder(root, site) / FILE
        return parse(Policy, read_yaml(path), file=path, site=site)
    except ConfigError as error:
        raise PolicyError(
            f"no valid policy, so nothing is sent: {error.message}",
            remedy=f"Correct hospitals/{site}/{FILE}; docs/federation.md shows one.",
            file=error.where.file,
            site=site,
        ) from None


def refusal(policy: Policy, question: Question, helped: int) -> str | None:
    """Why the site does not help to answer a question, or None.

    Args:
        helped: queries that it has helped to answer within the last 24 hours.
    """
    if not policy.share.teacher:
        return "shares no teacher"
    if question.hospital in policy.refuse_requesters:
        return f"does not answer {question.hospital}"
    if refused := [c for c in question.classes if c in policy.refuse_classes]:
        return f"answers nobody about {', '.join(refused)}"
    if helped >= policy.queries_per_day:
        return f"helps with {policy.queries_per_day} queries a day at most"
    return None


def shown_mask(mask: Mask, policy: Policy, question: Question) -> Mask:
    """The mask as the asking hospital and the server may see it."""
    if policy.mask == "all":
        return mask
    seen = {*question.classes, *question.held}
    hidden = [c not in seen for c in mask.classes]
    return mask.model_copy(
        update={
            "scores": tuple(0.0 if h else s for h, s in zip(hidden, mask.scores, strict=True)),
            "known": tuple(k and not h for h, k in zip(hidden, mask.known, strict=True)),
        }
    )


def check_outbound(policy: Policy, task: str, said: Any, site: str) -> None:
    """Let a reply pass that says and holds nothing but what it may.

    Every field is one of :mod:`~qkt_clinical.federation.messages`, nothing is shared that the policy keeps,
    and every bundle is one that its receiver would accept.

    Raises:
        PolicyError: it may not leave.
    """

    def stop(what: str) -> PolicyError:
        return PolicyError(
            f"{what} may not leave, so nothing was sent",
            remedy=f"Allow it in hospitals/{site}/{FILE}, or leave it as it is.",
            site=site,
        )

    try:
        reply = read_reply(said, task, site)
        if isinstance(reply, Contributed | Offered) and not policy.share.teacher:
            raise stop("the teacher")
        if isinstance(reply, Offered):
            read_offer_files(reply.files, site)
        with tempfile.TemporaryDirectory(prefix="qkt-") as temporary:
            folder = Path(temporary) / site
            folder.mkdir()
            if isinstance(reply, Contributed):
                unpack_teacher(reply.files, site, folder)
            if isinstance(reply, Answered) and reply.student is not None:
                if not policy.share.student:
                    raise stop("the student")
                unpack_student(reply.student, site, folder)
        if isinstance(reply, Answered) and reply.figures is not None and not policy.share.metrics:
            raise stop("figures")
    except (BundleError, QueryError) as error:
        raise stop(f"what was made for {task} ({error.message})") from None
