"""Typed ``params.yaml``, ``site.yaml`` and query files: frozen, unknown keys refused with a suggestion."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qkt_clinical.catalog import WITHOUT_BATCH_NORM, Estimator, Method, Network, SourceKind, Split
from qkt_clinical.errors import ConfigError, PolicyError

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
MAX_CONFIG_BYTES = 1_000_000

Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Strict(BaseModel):
    """A frozen model that refuses unknown keys, and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# --- site.yaml ---------------------------------------------------------------------------------


class Source(Strict):
    """Where a site's images lie.

    ``path`` is relative to the site's folder and stays inside it (a symbolic link may lead out), so
    that DVC can watch ``hospitals/<site>/data``.
    """

    kind: SourceKind
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
    """A column by which figures are shown apart, such as sex or scanner.

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


LARGEST_IMAGE = 200_000_000
"""Values of one prepared image at most (800 MB as float32): the scratch file of ingest holds no larger."""


class ImageSpec(Strict):
    """What every image of a site is brought to.

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
        if math.prod(self.size) * self.channels > LARGEST_IMAGE:
            raise ValueError(f"size and channels make more than {LARGEST_IMAGE:,} values")
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

    @field_validator("label_map", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): v for k, v in value.items()}
        return value


# --- hospitals/<site>/queries/<query>.yaml --------------------------------------------------------


class QueryConfig(Strict):
    """What a hospital asks: ``hospitals/<site>/queries/<query>.yaml``."""

    classes: tuple[str, ...] = Field(min_length=1)
    """Classes to learn, in the federation's label space."""
    method: Method = "qkt"
    budget: Annotated[float, Field(gt=0.0, le=0.5)] = 0.05
    """Give away at most this share of the images that the hospital classifies today."""
    max_teachers: Annotated[int, Field(ge=1, le=64)] | None = None
    exclude_teachers: tuple[Name, ...] = ()


# --- params.yaml ---------------------------------------------------------------------------------


PublicKey = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""Ed25519, in hexadecimal."""


class Share(Strict):
    """What leaves a site for the federation."""

    teacher: bool = False
    """Its bundle and mask, to the server and through it to hospitals whose queries it may help to answer."""
    metrics: bool = False
    """Figures of its own students, with intervals and without counts."""
    student: bool = False
    """Its own students' bundles."""


class Policy(Strict):
    """``policy.yaml``: what a site gives to a federation, and to whom; what is not said is refused."""

    share: Share = Share()
    mask: Literal["all", "query"] = "query"
    """Whether others see the mask of every class, or of those asked for and the asking hospital's own."""
    refuse_classes: tuple[str, ...] = ()
    """Classes about which the site answers nobody."""
    refuse_requesters: tuple[Name, ...] = ()
    """Hospitals that the site does not answer."""
    queries_per_day: Annotated[int, Field(ge=0)] = 0
    """Queries that the site helps to answer at most within any 24 hours."""
    keys: dict[Name, PublicKey] = Field(default_factory=dict)
    """Whose teachers are heard only if they are signed: site to its Ed25519 public key."""


POLICY = "policy.yaml"
OPEN_POLICY = """\
# What may leave this hospital for a federation, and whose questions it hears; what is not said is refused.
share:
  teacher: true # its network and what it knows, for other hospitals' queries
  metrics: true # figures of its own students, with intervals, without counts
  student: false # its own students
mask: all # all | query: others see only whether we know the classes asked for and the asking hospital's own
refuse_classes: []
refuse_requesters: []
queries_per_day: 1000
keys: {} # hospital: its public key; whoever is named is heard only if its teacher is signed
"""
"""What generated and simulated hospitals begin with."""


class SplitFractions(Strict):
    """Shares of a site's images per split; they sum to 1. Patients are never divided."""

    train: Fraction = 0.55
    calibration: Fraction = 0.15
    val: Fraction = 0.10
    test: Fraction = 0.20

    @model_validator(mode="after")
    def _sum(self) -> SplitFractions:
        total = self.train + self.calibration + self.val + self.test
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"the four shares sum to {total:g}, not 1")
        return self

    def of(self, split: Split) -> float:
        """Share of one split."""
        return float(getattr(self, split))


class IngestParams(Strict):
    """Stage ``ingest``."""

    splits: SplitFractions = SplitFractions()
    max_file_mb: Annotated[int, Field(ge=1, le=100_000)] = 2_000
    """Files whose stored or declared pixels exceed this are rejected before pixels are allocated."""


class PrivacyParams(Strict):
    """Differential privacy of a teacher (DP-SGD), for single images of the training split."""

    epsilon: Annotated[float, Field(gt=0.0, le=1000.0)] = 8.0
    """What the whole training may spend at most."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-5
    """Must be below one over the number of training images."""
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    """Norm to which every image's gradient is cut."""


class TrainParams(Strict):
    """Stage ``train``: one teacher per site."""

    network: Network = "resnet-small"
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 30
    batch_size: Annotated[int, Field(ge=2, le=4096)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0)] = 5e-2
    patience: Annotated[int, Field(ge=1)] = 10
    """Stop when balanced accuracy on validation images has not risen for so many epochs."""
    augment: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    """Strength of augmentation; 0 turns it off."""
    privacy: PrivacyParams | None = None
    """Differential privacy; null: none. With it, the last epoch counts."""

    @model_validator(mode="after")
    def _image_by_image(self) -> TrainParams:
        if self.privacy is not None and self.network not in WITHOUT_BATCH_NORM:
            raise ValueError(f"privacy needs a network without batch norm: {', '.join(WITHOUT_BATCH_NORM)}")
        return self


class MaskParams(Strict):
    """Stage ``mask``: which classes a teacher knows, from its weights alone."""

    estimator: Estimator = "combined"
    threshold: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """lambda of the paper: scores at or above it count as known; ``auto``: the gap in the scores."""
    probes: Annotated[int, Field(ge=8, le=100_000)] = 256


class DistillationParams(Strict):
    """Phase 1 where something is trained, by ``distill`` or ``joint``; ``none`` takes the views alone."""

    epochs: Annotated[int, Field(ge=1, le=10_000)] = 24
    batch_size: Annotated[int, Field(ge=2, le=4096)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    views: Annotated[int, Field(ge=1, le=64)] = 8
    """Augmented views per local image; each teacher sees each view once."""


class TransferParams(Strict):
    """Stage ``transfer``: phases 1 and 2."""

    phase1: Literal["transplant", "distill", "joint", "none"] = "transplant"
    """How the student takes up the teachers: their extractors made smaller, their features learned, their
    answers learned together with the labels, or not at all: then only the head learns."""
    phase2: bool = True
    """Whether the head is refined on rare samples and given its operating point."""
    rank: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of the rank of a teacher's convolutions that ``qkt`` keeps."""
    light_rank: Annotated[float, Field(gt=0.0, le=1.0)] = 0.35
    """The same for ``qkt-light``."""
    images: Annotated[int, Field(ge=1, le=100_000)] = 400
    """Local images, one view each, on which a teacher's layers are reproduced; as many of every class."""
    augment: Annotated[float, Field(ge=0.0, le=3.0)] = 1.5
    flips: bool = True
    """Whether the networks of a ``routed`` answer see mirror images of an image too."""
    trust: bool = True
    """Whether teachers are held against the hospital's own images, and those that fail are not heard."""
    distillation: DistillationParams = DistillationParams()


class EvaluateParams(Strict):
    """Stage ``evaluate``."""

    bootstrap: Annotated[int, Field(ge=0, le=100_000)] = 500
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95


class GateParams(Strict):
    """Stage ``gate``: what an answer must reach to pass."""

    query_recall: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Recall of every class asked for, at the lower end of its interval, at least."""
    forgetting: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Retained accuracy lost, at the upper end of its interval, at most."""
    calibration: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Expected calibration error, at the upper end of its interval, at most."""
    query_images: Annotated[int, Field(ge=0)] = 20
    """Test images of every class asked for at least: of fewer, nobody can say how good an answer is."""
    worse_than_champion: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Balanced accuracy by which a version may lie below the champion that it is to replace."""


class TrackParams(Strict):
    """Stage ``track``."""

    uri: str | None = None
    """MLflow tracking URI; null: ``sqlite:///<workspace>/mlflow.db``."""
    experiment: str = "qkt-clinical"


class QueryRef(Strict):
    """A query that the pipeline answers: ``hospitals/<hospital>/queries/<query>.yaml``."""

    hospital: Name
    query: Name


class Params(Strict):
    """``params.yaml``."""

    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    classes: tuple[str, ...] = Field(min_length=2, max_length=1000)
    """The federation's label space; its order is the order of every network's outputs."""
    sites: tuple[Name, ...] = Field(min_length=1)
    queries: dict[Name, QueryRef]
    ingest: IngestParams = IngestParams()
    train: TrainParams = TrainParams()
    mask: MaskParams = MaskParams()
    transfer: TransferParams = TransferParams()
    evaluate: EvaluateParams = EvaluateParams()
    gate: GateParams = GateParams()
    track: TrackParams = TrackParams()

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        for what, names in (("classes", self.classes), ("sites", self.sites)):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"{what} names {', '.join(twice)} twice")
        for key, ref in self.queries.items():
            if ref.hospital not in self.sites:
                raise ValueError(f"query {key} belongs to {ref.hospital!r}, which is not among sites")
        return self


# --- loading --------------------------------------------------------------------------------------

Model = TypeVar("Model", bound=BaseModel)


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Keys that the nested model at ``location`` (without its last part) accepts."""
    current: Any = model
    for part in location[:-1]:
        fields = getattr(current, "model_fields", {})
        name = next((n for n, f in fields.items() if part in (n, f.alias)), None)
        if name is None:
            return []
        current = fields[name].annotation
    return [f.alias or n for n, f in getattr(current, "model_fields", {}).items()]


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(p) for p in item["loc"]) or "the file"
        if item["type"] == "extra_forbidden":
            key = str(item["loc"][-1])
            near = difflib.get_close_matches(key, _known_keys(model, item["loc"]), n=1)
            lines.append(f"unknown key {where}" + (f", did you mean {near[0]!r}?" if near else ""))
        else:
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)


def parse(model: type[Model], data: Any, *, file: Path | str, site: str | None = None) -> Model:
    """Validate ``data`` as ``model``.

    Raises:
        ConfigError: naming every wrong key, with the nearest known key for a misspelt one.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(
            _explain(model, error), remedy="Correct the file and run again.", file=file, site=site
        ) from None


class _PlainLoader(yaml.SafeLoader):
    """The safe loader without aliases: a few hundred bytes of nested merges would fill the memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed here")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """Read a small YAML file with the safe loader, without aliases.

    Raises:
        ConfigError: absent, too large, not UTF-8 or not YAML.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(
                f"larger than {MAX_CONFIG_BYTES} bytes",
                remedy="Check that this is the right file.",
                file=path,
            )
        loader = _PlainLoader(path.read_text(encoding="utf-8"))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {error.strerror}", remedy="Check the path and its permissions.", file=path
        ) from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        # ValueError: not UTF-8, a date that does not exist, an integer of thousands of digits.
        first = str(error).splitlines()[0]
        raise ConfigError(f"not valid YAML: {first}", remedy="Correct the file.", file=path) from None


def load_params(root: Path) -> Params:
    """Read ``<root>/params.yaml``."""
    path = root / "params.yaml"
    return parse(Params, read_yaml(path), file=path)


def load_site(root: Path, site: str) -> SiteConfig:
    """Read ``<root>/hospitals/<site>/site.yaml``; its name must be the folder's."""
    path = site_folder(root, site) / "site.yaml"
    config = parse(SiteConfig, read_yaml(path), file=path, site=site)
    if config.name != site:
        raise ConfigError(
            f"name is {config.name!r} in folder {site!r}", remedy="Give both one name.", file=path, site=site
        )
    return config


def load_policy(root: Path, site: str) -> Policy:
    """Read ``<root>/hospitals/<site>/policy.yaml``.

    Raises:
        PolicyError: absent or not a policy; nothing may be sent then.
    """
    try:
        path = site_folder(root, site) / POLICY
        return parse(Policy, read_yaml(path), file=path, site=site)
    except ConfigError as error:
        raise PolicyError(
            f"no valid policy, so nothing is sent: {error.message}",
            remedy=f"Correct hospitals/{site}/{POLICY}; docs/federation.md shows one.",
            file=error.where.file,
            site=site,
        ) from None


def query_file(root: Path, site: str, query: str) -> Path:
    """``<root>/hospitals/<site>/queries/<query>.yaml``, whether it exists or not.

    Raises:
        ConfigError: a name is malformed, or there is no such hospital.
    """
    return site_folder(root, site) / "queries" / f"{check_name(query, 'query')}.yaml"


def load_query(root: Path, site: str, query: str) -> QueryConfig:
    """Read :func:`query_file`."""
    path = query_file(root, site, query)
    return parse(QueryConfig, read_yaml(path), file=path, site=site)


def check_name(value: str, what: str) -> str:
    """The name itself, if it is one of a site or query: it becomes a part of paths.

    Raises:
        ConfigError: it is malformed.
    """
    if not NAME.fullmatch(value):
        raise ConfigError(
            f"{value!r} is no {what} name",
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
    """Paths of a workspace: the folder with ``params.yaml``, ``dvc.yaml`` and ``hospitals/``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepared(self, site: str) -> Path:
        """Prepared site: arrays, splits, manifest, integrity report."""
        return self.root / "data" / "prepared" / site

    def consent(self, site: str) -> Path:
        """What a site lets others see."""
        return self.root / "data" / "consent" / f"{site}.json"

    def teacher(self, site: str) -> Path:
        """Teacher bundle of a site."""
        return self.root / "models" / "teachers" / site

    def fetched(self, site: str, query: str) -> Path:
        """Plan of a query and the teacher bundles fetched for it."""
        return self.root / "models" / "fetched" / site / query

    def student(self, site: str, query: str) -> Path:
        """Student bundle of a query."""
        return self.root / "models" / "students" / site / query

    @property
    def scratch(self) -> Path:
        """Checkpoints and caches that survive DVC's removal of outs; never an output."""
        return self.root / ".qkt"

    @property
    def reports(self) -> Path:
        """Evaluation, plots and the HTML report."""
        return self.root / "reports"
