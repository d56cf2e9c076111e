"""Messages between sites and server. Only the fields named here are sent.

Only plain types travel. A message of another organisation is parsed with these models before it is used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from qkt_clinical.config.base import Classes, Name
from qkt_clinical.config.query import QueryConfig
from qkt_clinical.errors import QktError, QueryError, visible
from qkt_clinical.records.base import Difference, Proportion
from qkt_clinical.records.plan import Asking

CONTRIBUTE, ASK, OFFER, ANSWER = "qkt_contribute", "qkt_ask", "qkt_offer", "qkt_answer"
"""Names of the tasks that a server gives to sites."""
TASKS = (CONTRIBUTE, ASK, OFFER, ANSWER)


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):  # pydantic would encode text
        raise ValueError("not bytes")
    return value


MAX_TEXT = 2000
Text = Annotated[str, Field(max_length=MAX_TEXT)]
FileName = Annotated[str, Field(max_length=200)]
Content = Annotated[bytes, BeforeValidator(_bytes)]
Files = Annotated[dict[FileName, Content], Field(max_length=256)]


def cut(text: str, limit: int = MAX_TEXT) -> str:
    """Text for a message or the record: one line of printable characters, at most ``limit``."""
    shown = visible(text[:limit])
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


Said = Annotated[Text, BeforeValidator(lambda text: cut(text) if isinstance(text, str) else text)]
"""Of an error or another organisation, to be kept and shown."""


class Message(BaseModel):
    """A message: its fields and no others. Files are bytes by name."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TeacherRequest(Message):
    """Server to a teacher's site: request to use its teacher for a query."""

    hospital: Name
    query: Name
    classes: Annotated[Classes, Field(min_length=1)]
    held: Classes
    """The asking hospital's own classes."""


class Refused(Message):
    """Site to server: the task failed, with the fields of :meth:`QktError.as_dict`."""

    kind: Literal["refused"] = "refused"
    code: Text
    message: Text
    remedy: Text
    stage: Text | None = None
    site: Text | None = None

    @classmethod
    def of(cls, error: QktError) -> Refused:
        """Without the file: a site's paths are its own."""
        said = {k: error.as_dict()[k] for k in ("code", "message", "remedy", "stage", "site")}
        return cls.model_validate({k: None if text is None else cut(text) for k, text in said.items()})


class Contributed(Message):
    """Site to server: its teacher."""

    kind: Literal["contributed"] = "contributed"
    files: Files
    signature: Annotated[Content, Field(max_length=64)] | None = None
    """Of the card, where the site has a key."""


class Asked(Message):
    """Site to server: its query, and its description for the plan."""

    kind: Literal["asked"] = "asked"
    query: QueryConfig
    asking: Asking


class Offered(Message):
    """Site to server: its teacher may help; card and mask as the asking hospital may see them."""

    kind: Literal["offered"] = "offered"
    files: Files


class Declined(Message):
    """Site to server: its teacher may not help with this query."""

    kind: Literal["declined"] = "declined"
    reason: Text


class Figures(Message):
    """Figures of a student as its site publishes them: no counts, nothing per class."""

    balanced_accuracy_before: Proportion
    balanced_accuracy_after: Proportion
    gain: Difference
    forgetting: Difference
    query_gain: Difference


class Answered(Message):
    """Site to server: the query is answered."""

    kind: Literal["answered"] = "answered"
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of the student's card."""
    figures: Figures | None
    """None where the site has no test images of all the classes, or keeps them to itself."""
    student: Files | None
    """None where the site keeps it."""


Reply = Contributed | Asked | Offered | Declined | Answered | Refused
KINDS: dict[str, type[Reply]] = {
    "contributed": Contributed,
    "asked": Asked,
    "offered": Offered,
    "declined": Declined,
    "answered": Answered,
    "refused": Refused,
}
EXPECTED = {CONTRIBUTE: "contributed", ASK: "asked", OFFER: "offered", ANSWER: "answered"}


def read_reply(said: Any, task: str, site: str) -> Reply:
    """A site's reply to a task.

    Raises:
        QueryError: not such a reply, code ``reply``.
    """
    allowed = {EXPECTED[task], "refused"} | ({"declined"} if task == OFFER else set())
    kind = said.get("kind") if isinstance(said, dict) else None
    try:
        if kind not in allowed:
            raise ValueError
        return KINDS[str(kind)].model_validate(said, strict=False)
    except (ValueError, ValidationError):
        raise QueryError(
            f"the site's reply to {task} cannot be understood",
            remedy="Let the site install the same version of qkt-clinical.",
            site=site,
            code="reply",
        ) from None
