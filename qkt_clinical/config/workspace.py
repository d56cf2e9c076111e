"""Paths of a workspace."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path

from qkt_clinical.config.base import NAME
from qkt_clinical.errors import ConfigError


def query_file(root: Path, site: str, query: str) -> Path:
    """``<root>/hospitals/<site>/queries/<query>.yaml``, whether it exists or not.

    Raises:
        ConfigError: a name is malformed, or there is no such hospital.
    """
    return site_folder(root, site) / "queries" / f"{check_name(query, 'query')}.yaml"


def check_name(value: str, what: str) -> str:
    """Return the name if it is a valid site or query name: it becomes a part of paths.

    Raises:
        ConfigError: it is malformed.
    """
    if not isinstance(value, str) or not NAME.fullmatch(value):
        shown = value[:80] if isinstance(value, str) else value.__class__.__name__
        raise ConfigError(
            f"{shown!r} is no {what} name",
            remedy="Use lower-case letters, digits, '-' and '_', at most 63.",
        )
    return value


def site_folder(root: Path, site: str) -> Path:
    """``<root>/hospitals/<site>``.

    Raises:
        ConfigError: the name is malformed or the folder does not exist.
    """
    folder = root / "hospitals" / check_name(site, "site")
    if not folder.is_dir():
        known = sorted(p.name for p in (root / "hospitals").glob("*") if (p / "site.yaml").is_file())
        near = difflib.get_close_matches(site, known, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        hint += f"Known sites: {', '.join(known) or 'none'}."
        raise ConfigError(f"no hospital {site!r}", remedy=hint, site=site)
    return folder


# --- where things lie -------------------------------------------------------------------------------


class Workspace:
    """Paths of a workspace: the folder with ``params.yaml``, ``dvc.yaml`` and ``hospitals/``.

    Names are checked here too, wherever they come from: a path never leads out of the workspace.

    Raises:
        ConfigError: by every method, for a name that is none.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepared(self, site: str) -> Path:
        """Prepared site: arrays, splits, manifest, integrity report."""
        return self.root / "data" / "prepared" / check_name(site, "site")

    def held_back(self, site: str) -> Path:
        """Prepared images that a site keeps for evaluation alone: no stage but ``evaluate`` takes them."""
        return self.root / "data" / "held_back" / check_name(site, "site")

    def consent(self, site: str) -> Path:
        """Consent of a site: what others may see."""
        return self.root / "data" / "consent" / f"{check_name(site, 'site')}.json"

    def teacher(self, site: str) -> Path:
        """Teacher bundle of a site."""
        return self.root / "models" / "teachers" / check_name(site, "site")

    def own(self, site: str) -> Path:
        """Bundle of a site's own network, which stays there; the teacher's where one network is both."""
        folder = self.root / "models" / "own" / check_name(site, "site")
        return folder if folder.is_dir() else self.teacher(site)

    def fetched(self, site: str, query: str) -> Path:
        """Plan of a query and the teacher bundles fetched for it."""
        return self.root / "models" / "fetched" / check_name(site, "site") / check_name(query, "query")

    def student(self, site: str, query: str) -> Path:
        """Student bundle of a query."""
        return self.root / "models" / "students" / check_name(site, "site") / check_name(query, "query")

    @property
    def scratch(self) -> Path:
        """Checkpoints and caches that survive DVC's removal of outs; never an output."""
        return self.root / ".qkt"

    @property
    def reports(self) -> Path:
        """Evaluation, plots and the HTML report."""
        return self.root / "reports"


# --- what other users of the machine may read -------------------------------------------------------

OF_DVC = (".qkt", ".dvc/cache", ".dvc/tmp")
"""Decoded images, copies of outputs, names of patients' files: DVC would let everybody write there."""
PRIVATE = (*OF_DVC, "data", "models")
"""Folders closed to other users of the machine; files that DVC takes out of its cache are not closed."""


def keep_private(root: Path) -> None:
    """Close a workspace's folders of :data:`PRIVATE`, and the hospitals' salts, to other users.

    Those that DVC would make are made before, or put right.
    """
    for name in PRIVATE:
        folder = root / name
        if name in OF_DVC and folder.parent.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_dir():
            _close(folder, 0o700)
    for salt in sorted(root.glob("hospitals/*/.salt")):
        _close(salt, 0o600)


def _close(path: Path, mode: int) -> None:
    """Remove other users' permissions, if there are any and the file is ours."""
    with suppress(PermissionError):
        if path.stat().st_mode & 0o077:
            path.chmod(mode)
