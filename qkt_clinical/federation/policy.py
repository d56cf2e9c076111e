"""What may leave a site, and whose queries it answers, by :class:`~qkt_clinical.config.policy.Policy`.

Closed by default: without a readable policy nothing is sent, and otherwise only what it names.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from qkt_clinical.config.policy import POLICY, Policy
from qkt_clinical.errors import BundleError, PolicyError, QueryError
from qkt_clinical.federation.messages import Answered, Contributed, Offered, TeacherRequest, cut, read_reply
from qkt_clinical.federation.parcel import read_offer_files, unpack_student, unpack_teacher
from qkt_clinical.records.card import Card, Mask


def refusal(policy: Policy, question: TeacherRequest, helped: int) -> str | None:
    """Reason why the site refuses to help with a query, or None.

    Args:
        helped: queries that it has helped to answer within the last 24 hours.
    """
    if not (policy.share.teacher or policy.share.statistics):
        return "shares no teacher"
    if question.hospital in policy.refuse_requesters:
        return f"does not answer {question.hospital}"
    if refused := [c for c in question.classes if c in policy.refuse_classes]:
        return cut(f"answers nobody about {', '.join(refused)}")
    if helped >= policy.queries_per_day:
        return too_many(policy)
    return None


def too_many(policy: Policy) -> str:
    """Reason to refuse further requests today."""
    return f"helps with {policy.queries_per_day} queries a day at most"


def shown_mask(mask: Mask, policy: Policy, question: TeacherRequest) -> Mask:
    """The mask as the policy shows it to the asking hospital and the server."""
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


def holds_means(card: Card) -> bool:
    """Whether class means are in the teacher's weights file."""
    return card.class_means or card.shared_encoder is not None


def check_outbound(policy: Policy, task: str, said: Any, site: str) -> None:
    """Check that a reply contains only what the policy allows.

    Every field is one of :mod:`~qkt_clinical.federation.messages`, nothing is shared that the policy keeps,
    and every bundle is one that its receiver would accept.

    Raises:
        PolicyError: it may not leave.
    """

    def stop(what: str) -> PolicyError:
        return PolicyError(
            f"{what} may not leave, so nothing was sent",
            remedy=f"Allow it in hospitals/{site}/{POLICY}, or leave it as it is.",
            site=site,
        )

    try:
        reply = read_reply(said, task, site)
        cards = [read_offer_files(reply.files, site)[0]] if isinstance(reply, Offered) else []
        with tempfile.TemporaryDirectory(prefix="qkt-") as temporary:
            folder = Path(temporary) / site
            folder.mkdir()
            if isinstance(reply, Contributed):
                cards.append(unpack_teacher(reply.files, site, folder))
            if not policy.share.teacher and not all(card.network_kept for card in cards):
                raise stop("the teacher")
            if any(map(holds_means, cards)) and not policy.share.statistics:
                raise stop("class means")
            if isinstance(reply, Answered) and reply.student is not None:
                if not policy.share.student:
                    raise stop("the student")
                unpack_student(reply.student, site, folder)
        if isinstance(reply, Answered) and reply.figures is not None and not policy.share.metrics:
            raise stop("figures")
    except (BundleError, QueryError) as error:
        raise stop(f"what was made for {task} ({error.message})") from None
