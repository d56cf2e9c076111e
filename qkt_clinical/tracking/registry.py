"""Operations on the model registry: list, show, compare, promote, roll back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import ValidationError

from qkt_clinical.common.files import new_folder, read_plain
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.errors import OutputsError, QktError
from qkt_clinical.evaluation.gate import against
from qkt_clinical.records.card import MAX_JSON_BYTES
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
from qkt_clinical.records.registered import SHA256
from qkt_clinical.records.verdict import Champion, Measured, Verdict
from qkt_clinical.tracking.client import LISTED, VERSIONS, find_version, pages, registry_client, set_alias
from qkt_clinical.tracking.runs import DIGEST, GATE, MAX_TAG
from qkt_clinical.tracking.version_files import VersionFiles

NOT_JUDGED = "not judged by the gate"
REFUSED = "qkt.refused"
"""Tag of a version that was not promoted: the rules that it does not meet."""

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


class Registry(NamedTuple):
    """An open registry, and the workspace with the decisions."""

    root: Path
    params: Params
    client: MlflowClient

    def models(self) -> list[dict[str, Any]]:
        """Every model with its versions, oldest first, the gate's verdict on each, and its aliases.

        What is shown comes from the registry alone, where others may have written it.
        """
        versions: dict[str, list[ModelVersion]] = {}
        for version in pages(self.client.search_model_versions, "", VERSIONS):
            versions.setdefault(version.name, []).append(version)
        found = []
        models = pages(self.client.search_registered_models, "", LISTED)
        for model in sorted(models, key=lambda m: str(m.name)):
            own = sorted(versions.get(model.name, []), key=lambda v: int(v.version))
            found.append(
                {
                    "name": model.name,
                    "versions": [int(v.version) for v in own],
                    "aliases": {alias: int(number) for alias, number in sorted(model.aliases.items())},
                    "gate": [v.tags.get(GATE) for v in own],
                }
            )
        return found

    def _versions(self, name: str) -> list[ModelVersion]:
        found = pages(self.client.search_model_versions, f"name = '{name}'", VERSIONS)
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

    def fetch(self, name: str, which: str, target: Path) -> str:
        """Write a version's files to a new folder after every check, so that it can be served from there.

        Returns:
            Digest of the bundle.

        Raises:
            RegistryError: there is no such version, its files are not what was registered, or it is not the
                champion that was decided on, where that is what was asked for.
            QktError: ``target`` is there, or the disk refuses.
        """
        version = self.version(name, which)
        if which == CHAMPION:
            champion = champion_of(self.root, name)
            self._known_here(name, None if champion is None else champion.digest)
        if target.exists():
            raise QktError(
                "the folder is there already", remedy="Name a new one.", file=target, code="folder-exists"
            )
        digest = _digest(name, version)
        with new_folder(target) as folder:
            VersionFiles(self.client, name, str(version.version)).check(digest, target=folder)
        return digest

    def promote(self, name: str, which: str, *, by: str | None = None, reason: str | None = None) -> Decision:
        """Make a version the champion, if it passed the gate or a reviewer overrides the verdict.

        The version's files are fetched and checked first, which nobody can override; what the gate said is
        read from its record in the workspace, for the registry's tags can be written by others.

        Raises:
            RegistryError: something speaks against it, and no reviewer gives name and reason.
            UnsoundVersion: its files are not what was registered.
            OutputsError: the gate's record, or the decisions, cannot be read.
        """
        version = self.version(name, which)
        number, site = str(version.version), site_of(name)
        digest = _digest(name, version)
        VersionFiles(self.client, name, number).check(digest)
        champion = champion_of(self.root, name)
        self._known_here(name, None if champion is None else champion.digest)
        if champion is not None and champion.digest == digest:
            raise RegistryError(
                f"{name} version {number} is the champion already",
                remedy="Nothing to do.",
                code="champion-already",
                site=site,
            )
        verdict, unmet = self._judged(name, digest, champion)
        if unmet and not (by and reason):
            self._tag(name, number, REFUSED, "; ".join(unmet))
            raise RegistryError(
                f"{name} version {number} is not promoted: {'; '.join(unmet)}",
                remedy="A reviewer may override this with --reviewer NAME --reason TEXT, which are kept.",
                code="gate-not-passed",
                site=site,
            )
        measured = None if verdict is None else verdict.measured
        decision = _decision(name, digest, "promoted", by or "gate", reason, unmet, measured)
        self._decide(decision, number)
        if REFUSED in version.tags:  # what still spoke against it stands in the decision
            self.client.delete_model_version_tag(name, number, REFUSED)
        return decision

    def _judged(
        self, name: str, digest: str, champion: Champion | None
    ) -> tuple[Verdict | None, tuple[str, ...]]:
        """The gate's verdict on a bundle against the version in use now, and reasons against it."""
        verdict = None if name.startswith("teacher.") else read_verdict(self.root, name)
        if verdict is None:
            return None, (NOT_JUDGED,)
        if verdict.digest != digest:
            return None, (f"{NOT_JUDGED}, whose record is of another student",)
        # Decided by what is in use now, which the pipeline's gate may not have known.
        verdict = against(verdict, champion, self.params.gate)
        return verdict, tuple(rule.said for rule in verdict.unmet)

    def _known_here(self, name: str, champion: str | None) -> None:
        """Refuse if the champion of the registry is not among the decisions of this workspace."""
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
        """Roll back the champion: the one before it is the champion again.

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
        decision = _decision(name, standing[-2], "rolled back", by, reason)
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
            self._tag(decision.model, number, tag, value)

    def _tag(self, name: str, number: str, tag: str, value: str) -> None:
        self.client.set_model_version_tag(name, number, tag, value[:MAX_TAG])


def _digest(name: str, version: ModelVersion) -> str:
    """Digest of the bundle that a version claims to hold."""
    digest = str(version.tags.get(DIGEST, ""))
    if not SHA256.fullmatch(digest):
        raise RegistryError(
            f"{name} version {version.version} was not registered by 'qkt track' or 'qkt query'",
            remedy="Name one that was.",
            code="no-version",
            site=site_of(name),
        )
    return digest


def _decision(
    name: str,
    digest: str,
    decided: Literal["promoted", "rolled back"],
    by: str,
    reason: str | None,
    overridden: tuple[str, ...] = (),
    measured: Measured | None = None,
) -> Decision:
    try:
        return Decision(
            model=name,
            digest=digest,
            decision=decided,
            by=by,
            reason=reason,
            overridden=overridden,
            measured=measured,
        )
    except ValidationError:
        raise RegistryError(
            "name or reason of the reviewer cannot be kept",
            remedy="Give both as text, of at most 10,000 characters.",
            code="reviewer",
            site=site_of(name),
        ) from None


def read_verdict(root: Path, model: str) -> Verdict | None:
    """The gate's record on the student of ``student.<site>.<query>``; None where there is none.

    Raises:
        OutputsError: it cannot be read, is of another query, or contradicts itself.
    """
    _, site, query = model.split(".")
    path = Workspace(root).reports / "gate" / site / f"{query}.json"
    try:
        verdict = Verdict.model_validate_json(read_plain(path, MAX_JSON_BYTES))
        whole = bool(verdict.rules) and verdict.passed == (not verdict.unmet)
        if not whole or (verdict.hospital, verdict.query) != (site, query):
            raise ValueError("not a verdict on this query")
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise OutputsError(
            "no verdict that can be read",
            remedy=f"Run 'qkt gate {site} {query}' to make it again.",
            file=path,
            site=site,
            code="verdict",
        ) from None
    return verdict


@contextmanager
def open_registry(root: Path, params: Params) -> Iterator[Registry]:
    """The registry of a workspace.

    Raises:
        OutputsError: the database is damaged.
        QktError: MLflow cannot be reached or refuses, code ``mlflow``.
    """
    with registry_client(root, params) as client:
        yield Registry(root, params, client)
