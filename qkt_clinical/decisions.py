"""Decisions about models: which is in use, who said so, and what spoke against it.

Decisions of people cannot be made again from outputs, so each is kept beside the hospital that it concerns,
in ``hospitals/<site>/decisions.json``, by the digest of the bundle. ``track`` sets the alias ``champion`` by
it, also in an empty MLflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from qkt_clinical.config import NAME, GateParams
from qkt_clinical.errors import OutputsError, QktError
from qkt_clinical.files import write_json

NONE = "none"
CHAMPION = "champion"
"""Alias of the version that is in use."""


class RegistryError(QktError):
    """A version cannot be put into use, or taken back, as asked."""

    code = "registry"


class Decision(BaseModel):
    """One decision about a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    digest: str
    """Of the bundle that is the champion from then on."""
    decision: Literal["promoted", "rolled back"]
    by: str
    """``gate``, or the reviewer's name."""
    reason: str | None
    overridden: tuple[str, ...] = ()
    """What spoke against it."""


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


def _file(root: Path, site: str) -> Path:
    # A reviewer's workspace need not hold the hospital itself.
    return root / "hospitals" / site / "decisions.json"


def read_decisions(root: Path, site: str) -> tuple[Decision, ...]:
    """A hospital's decisions, the oldest first.

    Raises:
        OutputsError: the file is malformed.
    """
    path = _file(root, site)
    if not path.is_file():
        return ()
    try:
        return TypeAdapter(tuple[Decision, ...]).validate_json(path.read_bytes())
    except ValidationError:
        raise OutputsError(
            "decisions that cannot be read", remedy="Take it back from git.", file=path, site=site
        ) from None


def keep_decision(root: Path, decision: Decision) -> None:
    """Add a decision to its hospital's."""
    site = site_of(decision.model)
    kept = (*read_decisions(root, site), decision)
    write_json(_file(root, site), [d.model_dump(mode="json") for d in kept])


def champions(decisions: Sequence[Decision], model: str) -> list[str]:
    """Digests of a model's champions that stand, the present one last: a rollback takes the last away."""
    stack: list[str] = []
    for decision in decisions:
        if decision.model != model:
            continue
        if decision.decision == "promoted":
            stack.append(decision.digest)
        elif stack:
            stack.pop()
    return stack


def objections(
    candidate: Mapping[str, str], champion: Mapping[str, str] | None, params: GateParams
) -> tuple[str, ...]:
    """What speaks against putting a version into use, in words.

    Args:
        candidate, champion: tags of both versions, see :func:`qkt_clinical.tracking.track`.
        params: thresholds.
    """
    against = []
    verdict = candidate.get("qkt.gate", "not judged")
    if verdict != "passed":
        unmet = candidate.get("qkt.gate_unmet", NONE)
        against.append(f"the gate: {verdict}{'' if unmet == NONE else f' ({unmet})'}")
    if champion is not None and champion.get("qkt.digest") != candidate.get("qkt.digest"):
        if champion.get("qkt.data") != candidate.get("qkt.data"):
            against.append("it was measured on other data than the champion")
        now, then = (float(tags.get("qkt.balanced_accuracy", "nan")) for tags in (candidate, champion))
        if not now >= then - params.worse_than_champion:
            against.append(f"balanced accuracy {now:.3f}, the champion's is {then:.3f}")
    return tuple(against)
