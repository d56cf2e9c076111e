"""Decisions about models: which version is in use, who decided it, and which rules it did not meet.

Decisions of people cannot be made again from outputs, so each is kept, by the digest of the bundle, in
``decisions/<site>.json``. ``gate`` holds answers against the champion by it, and ``track`` sets the alias
``champion``, also in an empty MLflow. The folder is committed and always there, unlike a file of a hospital
that never decided: DVC refuses a stage whose dependency does not exist, and sees every decision this way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, RootModel

from qkt_clinical.common.files import read_plain
from qkt_clinical.common.locks import lock
from qkt_clinical.config.base import NAME, Strict
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.errors import OutputsError, QktError, refused_by_system
from qkt_clinical.records.reading import write_record
from qkt_clinical.records.verdict import Champion, Measured

FOLDER = "decisions"
NONE = "none"
CHAMPION = "champion"
"""Alias of the version that is in use."""
MAX_BYTES = 16_000_000
"""Of a hospital's decisions: some ten thousand."""
DecisionText = Annotated[str, Field(max_length=10_000)]


class RegistryError(QktError):
    """A version cannot be promoted or rolled back as requested."""

    code = "registry"


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


def _named(model: str) -> str:
    """Return the name if it is a valid model name: it becomes a part of paths and of searches."""
    try:
        site_of(model)
    except RegistryError as error:
        raise ValueError(error.message) from None
    return model


class Decision(Strict):
    """One decision about a model. Unlike a record it refuses other keys: the file is rewritten with each."""

    model: Annotated[str, AfterValidator(_named)]
    digest: Annotated[str, Field(pattern="^[0-9A-Za-z_-]{1,64}$")]
    """Of the bundle that is the champion from then on."""
    decision: Literal["promoted", "rolled back"]
    by: DecisionText
    """``gate``, or the reviewer's name."""
    reason: DecisionText | None
    overridden: tuple[str, ...] = ()
    """Rules that it did not meet."""
    measured: Measured | None = None
    """Figures of a promoted version at that time; what is to replace it is held against them."""


class Decisions(RootModel[tuple[Decision, ...]]):
    """``decisions/<site>.json``, the oldest first."""

    model_config = ConfigDict(frozen=True)


def decisions_file(root: Path, site: str) -> Path:
    """Where a hospital's decisions are kept; a reviewer's workspace need not hold the hospital itself."""
    return root / FOLDER / f"{site}.json"


def read_decisions(root: Path, site: str) -> tuple[Decision, ...]:
    """A hospital's decisions, the oldest first.

    Raises:
        OutputsError: the file is no plain one, too large, malformed, or speaks of another hospital's models.
    """
    path = decisions_file(root, site)
    try:
        found = json.loads(read_plain(path, MAX_BYTES), object_pairs_hook=_each_once)
        decisions = Decisions.model_validate(found).root
        if any(site_of(d.model) != site for d in decisions):
            raise ValueError("another hospital's model")
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError):  # pydantic's and JSON's own are ValueErrors
        raise OutputsError(
            "decisions that cannot be read", remedy="Take it back from git.", file=path, site=site
        ) from None
    return decisions


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated names, of which readers would pick one or the other."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that stands twice")
    return found


def keep_decision(root: Path, decision: Decision) -> None:
    """Add a decision to the file of its hospital.

    Raises:
        OutputsError: those that there are cannot be read.
        QktError: the disk refuses, codes ``disk-full`` and ``system``.
    """
    site = site_of(decision.model)
    # Two reviewers may decide at the same moment. The lock is no part of the folder, which is committed.
    with lock(Workspace(root).scratch / f"decisions.{site}.lock"):
        kept = (*read_decisions(root, site), decision)
        try:
            write_record(decisions_file(root, site), Decisions(kept))
        except OSError as error:
            raise refused_by_system(error) from error


def standing(decisions: Sequence[Decision], model: str) -> list[Decision]:
    """Promotions of a model that are in force, the present champion's last; a rollback removes the last."""
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
    """Digests of a model's champions that are in force, the present one last."""
    return [decision.digest for decision in standing(decisions, model)]


def champion_of(root: Path, model: str) -> Champion | None:
    """The version of a model that is in use according to the decisions.

    Raises:
        OutputsError: the decisions are malformed.
    """
    stack = standing(read_decisions(root, site_of(model)), model)
    return Champion(digest=stack[-1].digest, measured=stack[-1].measured) if stack else None
