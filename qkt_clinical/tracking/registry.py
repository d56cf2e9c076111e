"""What can be done with the model registry: list, show, compare, promote, roll back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from qkt_clinical.config.params import Params
from qkt_clinical.evaluation.gate import against
from qkt_clinical.records.decisions import (
    CHAMPION,
    FOLDER,
    NONE,
    Decision,
    RegistryError,
    champion_of,
    champions,
    keep_decision,
    read_decisions,
    site_of,
)
from qkt_clinical.records.verdict import Verdict
from qkt_clinical.tracking.client import find_version, registry_client, set_alias
from qkt_clinical.tracking.runs import DIGEST, GATE, VERDICT

REFUSED = "qkt.refused"
"""Tag of a version that was not promoted: the rules that it does not meet."""

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


class Registry(NamedTuple):
    """An open registry and the workspace that decides."""

    root: Path
    params: Params
    client: MlflowClient

    def models(self) -> list[dict[str, Any]]:
        """Every model with its versions, the oldest first, what the gate said of each, and its aliases."""
        found = []
        for model in sorted(self.client.search_registered_models(max_results=1000), key=lambda m: m.name):
            versions = self._versions(model.name)
            found.append(
                {
                    "name": model.name,
                    "versions": [int(v.version) for v in versions],
                    "aliases": {alias: int(number) for alias, number in sorted(model.aliases.items())},
                    "gate": [v.tags.get(GATE) for v in versions],
                }
            )
        return found

    def _versions(self, name: str) -> list[ModelVersion]:
        found = self.client.search_model_versions(f"name = '{name}'", max_results=10_000)
        return sorted(found, key=lambda v: int(v.version))

    def version(self, name: str, which: str) -> ModelVersion:
        """A version by its number or alias.

        Raises:
            RegistryError: there is none.
        """
        site_of(name)
        versions = self._versions(name)
        aliases = self.client.get_registered_model(name).aliases if versions else {}
        number = str(aliases.get(which, which))
        version = next((v for v in versions if str(v.version) == number), None)
        if version is None:
            raise RegistryError(
                f"{name} has no version {which!r}",
                remedy="'qkt registry list' names models, versions and aliases.",
                code="no-version",
            )
        return version

    def show(self, name: str, which: str) -> dict[str, Any]:
        """A version: number, aliases, description, tags, and the decisions about its model."""
        version = self.version(name, which)
        aliases = self.client.get_registered_model(name).aliases
        decisions = read_decisions(self.root, site_of(name))
        return {
            "name": name,
            "version": int(version.version),
            "aliases": sorted(a for a, n in aliases.items() if str(n) == str(version.version)),
            "description": version.description,
            "tags": dict(sorted(version.tags.items())),
            "decisions": [d.model_dump(mode="json") for d in decisions if d.model == name],
        }

    def diff(self, name: str, first: str, second: str) -> dict[str, list[str | None]]:
        """Tags in which two versions differ: name to both values."""
        one, two = self.version(name, first).tags, self.version(name, second).tags
        different = sorted(tag for tag in {*one, *two} if one.get(tag) != two.get(tag))
        return {tag: [one.get(tag), two.get(tag)] for tag in different}

    def promote(self, name: str, which: str, *, by: str | None = None, reason: str | None = None) -> Decision:
        """Make a version the champion, if nothing speaks against it or a reviewer overrides what does.

        Raises:
            RegistryError: something speaks against it, and no reviewer gives name and reason.
        """
        version = self.version(name, which)
        if DIGEST not in version.tags:
            raise RegistryError(
                f"{name} version {version.version} was not registered by 'qkt track' or 'qkt query'",
                remedy="Promote one that was.",
                code="no-version",
                site=site_of(name),
            )
        champion = champion_of(self.root, name)
        self._known_here(name, None if champion is None else champion.digest)
        if champion is not None and champion.digest == version.tags.get(DIGEST):
            raise RegistryError(
                f"{name} version {version.version} is the champion already",
                remedy="Nothing to do.",
                code="champion-already",
                site=site_of(name),
            )
        verdict = _verdict(version)
        if verdict is not None:
            # Decided by what is in use now, which the pipeline's gate may not have known.
            verdict = against(verdict, champion, self.params.gate)
        unmet = ("not judged by the gate",) if verdict is None else tuple(r.said for r in verdict.unmet)
        if unmet and not (by and reason):
            self.client.set_model_version_tag(name, str(version.version), REFUSED, "; ".join(unmet))
            raise RegistryError(
                f"{name} version {version.version} is not promoted: {'; '.join(unmet)}",
                remedy="A reviewer may override this with --reviewer NAME --reason TEXT, which are kept.",
                code="gate-not-passed",
                site=site_of(name),
            )
        decision = Decision(
            model=name,
            digest=version.tags[DIGEST],
            decision="promoted",
            by=by or "gate",
            reason=reason,
            overridden=unmet,
            measured=None if verdict is None else verdict.measured,
        )
        self._decide(decision, str(version.version))
        if REFUSED in version.tags:  # what still spoke against it stands in the decision
            self.client.delete_model_version_tag(name, str(version.version), REFUSED)
        return decision

    def _known_here(self, name: str, champion: str | None) -> None:
        """Refuse where the champion of the registry is none that the decisions kept here tell of."""
        if CHAMPION not in self.client.get_registered_model(name).aliases:
            return
        if self.version(name, CHAMPION).tags.get(DIGEST) != champion:
            raise RegistryError(
                f"the champion of {name} was decided on elsewhere",
                remedy=f"Bring {FOLDER}/{site_of(name)}.json up to date: it does not know the champion.",
                code="decisions-behind",
                site=site_of(name),
            )

    def rollback(self, name: str, *, by: str, reason: str) -> Decision:
        """Take the champion back; the one before it is the champion again.

        Raises:
            RegistryError: there is none before it, or the registry no longer holds it.
        """
        standing = champions(read_decisions(self.root, site_of(name)), name)
        number = find_version(self.client, name, standing[-2]) if len(standing) > 1 else None
        if number is None:
            raise RegistryError(
                f"the registry holds no champion of {name} before the present one",
                remedy="Promote another version instead.",
                code="no-earlier-champion",
                site=site_of(name),
            )
        decision = Decision(model=name, digest=standing[-2], decision="rolled back", by=by, reason=reason)
        self._decide(decision, number)
        return decision

    def _decide(self, decision: Decision, number: str) -> None:
        # The file first: 'qkt track' sets the alias by it if this process ends in between.
        keep_decision(self.root, decision)
        set_alias(self.client, decision.model, CHAMPION, number)
        tags = {
            "qkt.decision": f"{decision.decision} by {decision.by}",
            "qkt.reason": decision.reason or NONE,
            "qkt.overridden": "; ".join(decision.overridden) or NONE,
        }
        for tag, value in tags.items():
            self.client.set_model_version_tag(decision.model, number, tag, value)


def _verdict(version: ModelVersion) -> Verdict | None:
    """What the gate said of a version; None if nothing, as of teachers, or of another student."""
    try:
        verdict = Verdict.model_validate_json(version.tags.get(VERDICT, NONE))
    except ValidationError:
        return None
    return verdict if verdict.digest == version.tags.get(DIGEST) else None


@contextmanager
def open_registry(root: Path, params: Params) -> Iterator[Registry]:
    """The registry of a workspace.

    Raises:
        OutputsError: the database is damaged.
        QktError: MLflow cannot be reached or refuses, code ``mlflow``.
    """
    with registry_client(root, params) as client:
        yield Registry(root, params, client)
