"""Groups of patients (sex, age band, scanner) whose figures are shown apart.

A group is coarse and shared: of a DICOM header only tags on an allow-list are read, numbers may become bands,
what few patients of a site share is pooled, and a column that tells patients apart is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.common.disclosure import SMALLEST_COUNT
from qkt_clinical.errors import ConfigError
from qkt_clinical.ingest.codes import DAMAGE
from qkt_clinical.ingest.deidentify import KEPT, coarsened_age
from qkt_clinical.ingest.readers.elements import values
from qkt_clinical.ingest.source import Request

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

UNKNOWN, OTHER = "unknown", "other"
MOST = 20
"""Groups of a column at most, beside these two."""
LONGEST = 40
"""Characters of a group's name at most: what is longer is a sentence."""
TAGS = frozenset(
    {
        *("PatientSex", "PatientAge", "PatientSize", "PatientWeight"),
        *("Manufacturer", "ManufacturerModelName", "Modality", "ConvolutionKernel"),
        *("BodyPartExamined", "Laterality", "ImageLaterality", "ViewPosition", "PatientPosition"),
        *("KVP", "MagneticFieldStrength", "SliceThickness", "EchoTime", "RepetitionTime"),
    }
)
"""DICOM keywords that may name a group; none of them names a person."""


def band(number: float, edges: Sequence[int]) -> str:
    """The band of a number between rising whole edges: ``<40``, ``40-59``, ``60+``."""
    at = int(np.searchsorted(edges, number, side="right"))
    if at == 0:
        return f"<{edges[0]}"
    return f"{edges[at - 1]}+" if at == len(edges) else f"{edges[at - 1]}-{edges[at] - 1}"


def group_of(text: str, edges: Sequence[int] | None) -> str:
    """A value as a group: its band where there are edges (DICOM ages in years), else the word itself."""
    words = " ".join(text.split())
    if not words:
        return UNKNOWN
    if edges is None:
        return words if len(words) <= LONGEST and words.isprintable() else OTHER
    age = coarsened_age(words)
    try:
        number = float(words if age is None else age[:3])
    except ValueError:
        return UNKNOWN
    return band(number, edges) if math.isfinite(number) else UNKNOWN


def header_groups(data: Dataset, request: Request) -> dict[str, str]:
    """Groups that an image's header names, by column; of coded elements only the standard's own values."""
    return {name: _header_group(data, tag, edges, request.salt) for name, tag, edges in request.subgroups}


def _header_group(data: Dataset, tag: str, edges: Sequence[int] | None, salt: bytes) -> str:
    try:
        found = values(data, tag)
        if len(found) != 1:
            return UNKNOWN
        value = KEPT[tag](found[0], salt) if tag in KEPT else found[0]
    except DAMAGE:
        return UNKNOWN
    if value is None:
        return UNKNOWN if edges else OTHER
    return group_of(f"{value:g}" if isinstance(value, float) else str(value), edges)


def pooled(
    column: str, groups: Sequence[str], patients: Sequence[str], *, banded: bool, site: str
) -> NDArray[np.str_]:
    """Groups (N,) of which each is shared: rare ones, and all beyond :data:`MOST`, become ``other``.

    Args:
        column: name in site.yaml.
        groups, patients: of each image.
        banded: whether groups are bands, which say little of anybody and stay.
        site: for errors.

    Raises:
        ConfigError: ``subgroup-identifies``, where more than half of the patients have a value of their own.
    """
    owners: dict[str, set[str]] = {}
    for group, patient in zip(groups, patients, strict=True):
        owners.setdefault(group, set()).add(patient)
    if banded:
        return np.array(groups, dtype=np.str_)
    said: Mapping[str, set[str]] = {g: p for g, p in owners.items() if g not in (UNKNOWN, OTHER)}
    people = len(set().union(*said.values()))
    if len(said) >= SMALLEST_COUNT and 2 * len(said) > people:
        raise ConfigError(
            f"subgroups.{column} has {len(said)} values for {people} patients: it tells patients apart",
            remedy="Name a column of few values, or give bands.",
            code="subgroup-identifies",
            file="site.yaml",
            site=site,
            stage="ingest",
        )
    shared = sorted(
        (g for g, p in said.items() if len(p) >= SMALLEST_COUNT), key=lambda g: (-len(said[g]), g)
    )
    stay = {UNKNOWN, *shared[:MOST]}
    return np.array([g if g in stay else OTHER for g in groups], dtype=np.str_)
