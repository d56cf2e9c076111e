"""Images that a site keeps for evaluation alone: which files they are, and which of them count.

They are read like a source of their own. What comes of them never bears on the rest of the site, which is the
same bytes with and without them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.config.site import SiteConfig
from qkt_clinical.errors import SourceError
from qkt_clinical.ingest.codes import reject
from qkt_clinical.ingest.deidentify import salted
from qkt_clinical.ingest.identity import PLACEHOLDERS
from qkt_clinical.ingest.listing import Listing, list_files
from qkt_clinical.ingest.source import Ready, SourceFile
from qkt_clinical.ingest.subgroups import OTHER, UNKNOWN


def held_back_folder(config: SiteConfig, source: Path, *, whole: bool) -> Path | None:
    """Where a site's held-back files lie; None if it names none.

    Args:
        config: of the site.
        source: the folder from which names of files count.
        whole: whether that folder is the source, or one file in it.

    Raises:
        SourceError: no such folder, one that is not below ``data``, or links lead to another one.
    """
    if config.held_back is None:
        return None
    folder = source / config.held_back
    try:
        straight = folder.is_dir() and folder.resolve() == source.resolve() / config.held_back
    except (OSError, RuntimeError):  # a name too long, a link in a circle
        straight = False
    if straight and (whole or Path(config.source.path) != Path("data")):
        return folder
    raise SourceError(
        f"no folder {config.held_back} below the source, as held_back names it",
        remedy="Put the files there, without a link, or take held_back out of site.yaml.",
        code="no-held-back",
        stage="ingest",
        site=config.name,
        file=Path("hospitals") / config.name / "site.yaml",
    )


def list_held_back(folder: Path, name: str, kind: str) -> Listing:
    """The held-back files, named from the source folder as all others are.

    Args:
        folder: where they lie.
        name: of the folder in site.yaml.
        kind: of the source.
    """
    found = list_files(folder, kind)

    def named(file: SourceFile) -> SourceFile:
        return SourceFile(f"{name}/{file.name}", file.place)

    refused = [replace(r, files=tuple(map(named, r.files))) for r in found.refused]
    return Listing([named(file) for file in found.files], refused)


@dataclass(frozen=True)
class HeldBackCheck:
    """Refuses held-back images that the rest of the site could have told of."""

    patients: Collection[str]
    """Ids of all other images of the site, as columns give them."""
    labels: Mapping[str, int]
    """Class of each fingerprint of the other files' pixels."""
    pixels: Collection[int]
    """Hashes of the other prepared images' pixels."""
    nobody: Collection[str]
    """Ids that stand for any patient."""

    @classmethod
    def of(
        cls,
        config: SiteConfig,
        salt: bytes,
        *,
        patients: Collection[str],
        labels: Mapping[str, int],
        pixels: Collection[int],
    ) -> HeldBackCheck:
        """Of a site's other images."""
        tag = config.patient.source == "tag"
        nobody = {salted(salt, "value", word) if tag else word for word in PLACEHOLDERS}
        return cls(frozenset(patients), labels, frozenset(pixels) - {0}, nobody)

    def __call__(self, found: Ready, kind: int, patient: str) -> None:
        """Judge one image.

        Raises:
            FileRejected: ``patient-missing`` where an anonymiser's word stands for the patient,
                ``held-back-patient``, ``duplicate``, ``duplicate-conflict``.
        """
        if patient in self.nobody:
            raise reject("patient-missing")
        if patient in self.patients:
            raise reject("held-back-patient")
        if found.fingerprint in self.labels:
            raise reject("duplicate" if self.labels[found.fingerprint] == kind else "duplicate-conflict")
        if found.hashes[0] in self.pixels:
            raise reject("duplicate")


def groups_among(found: list[str], known: NDArray[np.str_], *, banded: bool) -> NDArray[np.str_]:
    """Groups (N,) of held-back images: those that other images of the site have, and ``other``.

    A value that few share would tell a patient apart; bands do not.

    Args:
        found: as the column gives them.
        known: of the other images.
        banded: whether groups are bands.
    """
    shown = set(known.tolist()) | {UNKNOWN}
    return np.array([g if banded or g in shown else OTHER for g in found], dtype=np.str_)
