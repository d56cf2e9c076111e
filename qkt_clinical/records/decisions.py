"""Decisions about models: which is in use, who said so, and what spoke against it.

Decisions of people cannot be made again from outputs, so each is kept, by the digest of the bundle, in
``decisions/<site>.json``. ``gate`` holds answers against the champion by it, and ``track`` sets the alias
``champion``, also in an empty MLflow. The folder is committed and always there, unlike a file of a hospital
that never decided: DVC refuses a stage whose dependency does not exist, and sees every decision this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, RootModel

from qkt_clinical.common.locks import lock
from qkt_clinical.config.base import NAME, Strict
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.errors import QktError
from qkt_clinical.records.reading import read_record, write_record
from qkt_clinical.records.verdict import Champion, Measured

FOLDER = "decisions"
NONE = "none"
CHAMPION = "champion"
"""Alias of the version that is in use."""


class RegistryError(QktError):
    """A version cannot be put into use, or taken back, as asked."""

    code = "registry"


class Decision(Strict):
    """One decision about a model. Unlike a record it refuses other keys: the file is rewritten with each."""

    model: str
    digest: str
    """Of the bundle that is the champion from then on."""
    decision: Literal["promoted", "rolled back"]
    by: str
    """``gate``, or the reviewer's name."""
    reason: str | None
    overridden: tuple[str, ...] = ()
    """What spoke against it."""
    measured: Measured | None = None
    """Figures of a promoted version at that time; what is to replace it is held against them."""


class Decisions(RootModel[tuple[Decision, ...]]):
    """``decisions/<site>.json``, the oldest first."""

    model_config = ConfigDict(frozen=True)


def site_of(model: str) -> str:
    """Hospital of ``teacher.<site>`` or ``student.<site>.<query>``.

    Raises:
        RegistryError: another name.
    """
    parts = model.split(".")
    sound = all(NAME.fullmatch(part) for part in parts)
    if not sound or (parts[0], len(parts)) not in {("teacher", 2), ("student", 3)}:
        raise RegistryError(
            f"{model!r} is no model's name", remedy="Name one as 'qkt registry list' does.", code="no-model"
        )
    return parts[1]


def decisions_file(root: Path, site: str) -> Path:
    """Where a hospital's decisions are kept; a reviewer's workspace need not hold the hospital itself."""
    return root / FOLDER / f"{site}.json"


def read_decisions(root: Path, site: str) -> tuple[Decision, ...]:
    """A hospital's decisions, the oldest first.

    Raises:
        OutputsError: the file is malformed.
    """
    path = decisions_file(root, site)
    if not path.is_file():
        return ()
    what = "decisions that cannot be read"
    return read_record(Decisions, path, site=site, what=what, remedy="Take it back from git.").root


def keep_decision(root: Path, decision: Decision) -> None:
    """Add a decision to its hospital's.

    Raises:
        OutputsError: those that there are cannot be read.
    """
    site = site_of(decision.model)
    # Two reviewers may decide at the same moment. The lock is no part of the folder, which is committed.
    with lock(Workspace(root).scratch / f"decisions.{site}.lock"):
        kept = (*read_decisions(root, site), decision)
        write_record(decisions_file(root, site), Decisions(kept))


def standing(decisions: Sequence[Decision], model: str) -> list[Decision]:
    """Promotions of a model that stand, the present champion's last: a rollback takes the last away."""
    stack: list[Decision] = []
    for decision in decisions:
        if decision.model != model:
            continue
        if decision.decision == "promoted":
            stack.append(decision)
        elif stack:
            stack.pop()
    return stack


def champions(decisions: Sequence[Decision], model: str) -> list[str]:
    """Digests of a model's champions that stand, the present one last."""
    return [decision.digest for decision in standing(decisions, model)]


def champion_of(root: Path, model: str) -> Champion | None:
    """The version of a model that is in use by what was decided.

    Raises:
        OutputsError: the decisions are malformed.
    """
    stack = standing(read_decisions(root, site_of(model)), model)
    return Champion(digest=stack[-1].digest, measured=stack[-1].measured) if stack else None
