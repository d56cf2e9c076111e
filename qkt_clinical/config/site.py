"""``site.yaml``: where a hospital's files are, and what they mean."""

from __future__ import annotations

import math
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from qkt_clinical.config.base import Name, Strict

# --- site.yaml ---------------------------------------------------------------------------------


class Source(Strict):
    """Location and kind of a site's images.

    ``path`` is relative to the site's folder and stays inside it (a symbolic link may lead out), so
    that DVC can watch ``hospitals/<site>/data``.
    """

    kind: Name
    """Which kinds there are, ingest knows: they may be added to."""
    path: str = "data"

    @field_validator("path")
    @classmethod
    def _below_data(cls, value: str) -> str:
        parts = Path(value).parts
        if not parts or parts[0] != "data" or ".." in parts:
            raise ValueError("must be 'data' or below it; link data/ to the folder where your files are")
        return value


class Column(Strict):
    """A value per file taken from the class folder, a CSV column, a DICOM tag or the npz file.

    - ``folder``: name of the folder that holds the file (below the source path); ``level`` counts
      from the source path, 0 is the outermost folder.
    - ``csv``: ``column`` of ``file`` (relative to the source path), in the row whose ``key`` column
      holds the file's path relative to the source path, its name, or its name without extensions; for a
      DICOM series its folder's path or name, or its UID.
    - ``tag``: DICOM keyword, such as ``PatientID``.
    - ``npz``: the labels (or ``*_groups``) arrays of the npz file.
    - ``none`` (patients only): every file is a patient of its own.
    """

    source: Literal["folder", "csv", "tag", "npz", "none"] = Field(alias="from")
    level: int = Field(default=0, ge=0, le=16)
    file: str | None = None
    column: str | None = None
    key: str | None = None
    tag: str | None = None

    model_config = ConfigDict(populate_by_name=True)

    @model_validator(mode="after")
    def _complete(self) -> Column:
        if self.source == "csv" and not (self.file and self.column and self.key):
            raise ValueError("'from: csv' needs file, column and key")
        if self.source == "tag" and not self.tag:
            raise ValueError("'from: tag' needs tag")
        return self


AGE = re.compile(r"(?:^|[ _-])(?:patient)?[ _-]?age(?:$|[ _-])", re.IGNORECASE)

OLDEST_BAND = 90
"""Years; no band begins later, so that nobody's age over 89 shows."""


class Subgroup(Column):
    """A column whose groups get separate figures, such as sex or scanner.

    ``bands`` are rising whole edges that turn numbers, or DICOM ages, into ``<40``, ``40-59``, ``60+``; a
    column of ages needs them.
    """

    bands: tuple[Annotated[int, Field(ge=1, le=1_000_000)], ...] | None = Field(
        default=None, min_length=1, max_length=19
    )

    @model_validator(mode="after")
    def _coarse(self) -> Subgroup:
        if self.source in ("npz", "none"):
            raise ValueError("comes from csv, tag or folder")
        if self.bands is not None and list(self.bands) != sorted(set(self.bands)):
            raise ValueError("bands must rise")
        return self


class Window(Strict):
    """Intensity window in the modality's units (CT: Hounsfield)."""

    center: float
    width: Annotated[float, Field(gt=0)]


MAX_IMAGE_VALUES = 200_000_000
"""Values of one prepared image at most (800 MB as float32): the scratch file of ingest holds no larger."""


class ImageSpec(Strict):
    """Target format of every image of a site.

    ``size`` in pixels, (H, W) or (D, H, W); ``spacing_mm`` of the same length, or null to resize
    without regard to spacing; ``channels`` 1 or 3. ``window`` maps intensities to [0, 1] (null: the
    display window of the DICOM file where it has one, the stored type's range for 8-bit images, else the
    image's own 0.5 to 99.5 percentiles);
    ``normalisation``: ``unit`` keeps [0, 1], ``zscore`` centres and scales every image by itself.
    ``volume`` is the one to take, from 0, of NIfTI files that hold several (null: such files are refused).
    """

    size: tuple[Annotated[int, Field(ge=4, le=1024)], ...] = Field(min_length=2, max_length=3)
    spacing_mm: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    channels: Literal[1, 3] = 3
    window: Window | None = None
    normalisation: Literal["unit", "zscore"] = "unit"
    volume: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _same_length(self) -> ImageSpec:
        if self.spacing_mm is not None and len(self.spacing_mm) != len(self.size):
            raise ValueError("spacing_mm needs as many numbers as size")
        if math.prod(self.size) * self.channels > MAX_IMAGE_VALUES:
            raise ValueError(f"size and channels make more than {MAX_IMAGE_VALUES:,} values")
        return self


class SiteConfig(Strict):
    """One hospital: ``hospitals/<site>/site.yaml``."""

    name: Name
    source: Source
    label: Column
    patient: Column
    label_map: dict[str, str] = Field(default_factory=dict)
    """From the site's own words to the federation's classes; words not listed map to themselves."""
    image: ImageSpec
    burned_in: Literal["quarantine", "accept"] = "quarantine"
    """What becomes of DICOM files whose header lets one suspect writing in the pixels. ``accept`` only after
    somebody has looked."""
    subgroups: dict[Name, Subgroup] = Field(default_factory=dict, max_length=8)
    """Columns by which figures are shown apart, by name: sex, age, scanner."""
    splits: Literal["patient", "given"] = "patient"
    """``given`` (npz only): keep the file's train/val/test; calibration is carved out of train."""
    held_back: str | None = None
    """Folder below the source path (beside the file, where the source is one) with images for ``evaluate``
    alone. It is read like a source of its own; nothing trains, calibrates or plans with it."""
    pictures: bool = False
    """Consent that reports show test images of this hospital; other hospitals may read these reports."""

    @model_validator(mode="after")
    def _no_exact_age(self) -> SiteConfig:
        for name, column in self.subgroups.items():
            if any(AGE.search(word) for word in (name, column.column or "", column.tag or "")):
                if column.bands is None:
                    raise ValueError(f"subgroups.{name}: ages need bands, such as [40, 60, 80]")
                if max(column.bands) > OLDEST_BAND:
                    raise ValueError(f"subgroups.{name}: no band of ages may begin after {OLDEST_BAND}")
        return self

    @field_validator("held_back")
    @classmethod
    def _below_source(cls, value: str | None) -> str | None:
        if value is None:
            return None
        path = PurePosixPath(value)
        strange = "\\" in value or not value.isprintable()
        if strange or path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError("must be a folder below the source path, such as held-back")
        return path.as_posix()

    @field_validator("label_map", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): v for k, v in value.items()}
        return value
