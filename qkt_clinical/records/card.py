"""Cards: the JSON description of a bundle. Free of torch, so that planning needs no framework import."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from qkt_clinical.catalog import EncoderMode, EncoderName, Estimator, Method, Network
from qkt_clinical.common.files import TooLarge, digest_bytes, read_plain, to_json
from qkt_clinical.config.base import Classes, Name, Names, Sha256, Strict
from qkt_clinical.config.encoder_specs import ENCODERS
from qkt_clinical.config.params import EncoderFile
from qkt_clinical.errors import BundleError, typed

CARD, WEIGHTS, MASK, REFERENCE = "bundle.json", "weights.safetensors", "mask.json", "reference.json"
MEANS = "means.safetensors"
"""Class means over the features of a shared encoder; empty where there is none."""
MAX_JSON_BYTES, MAX_MEANS_BYTES = 4_000_000, 8_000_000
REMEDY = "Ask the site that made it to send it again; nothing of it was used."

MIRRORS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))
"""Axes along which an image is mirrored at prediction: the flips that training has seen."""

Index = Annotated[int, Field(ge=0, lt=1000)]


MERGED = "amalgam"
"""The name of a merged low-rank network in cards, as the first version wrote it."""
ENCODER = "encoder"
"""The name of a network whose extractor is a pretrained one."""


class EncoderPart(Strict):
    """A pretrained network in the place of an extractor."""

    name: EncoderName
    side: Annotated[int, Field(ge=16, le=518)]
    """Pixels along an edge to which images are enlarged or reduced."""
    mode: EncoderMode
    """What of it was trained."""
    unit_length: bool = False
    """Whether its features are brought to length 1, as a shared encoder's are."""


class _Later(Strict):
    """A record whose later fields are left out of JSON where they are None: older files keep their bytes."""

    LATER: ClassVar[tuple[str, ...]]

    @model_serializer(mode="wrap")
    def _plain(self, plainly: SerializerFunctionWrapHandler) -> dict[str, Any]:
        said: dict[str, Any] = plainly(self)
        return {key: value for key, value in said.items() if key not in self.LATER or value is not None}


class _Built(_Later):
    """What is built by name."""

    LATER = ("encoder",)
    name: str
    encoder: EncoderPart | None = None
    """Of a network called ``encoder``."""

    @model_validator(mode="after")
    def _one_extractor(self) -> Self:
        if (self.name == ENCODER) != (self.encoder is not None):
            raise ValueError("a network called encoder names the pretrained one, other networks none")
        return self


class Branch(_Built):
    """One extractor in a merged network: its architecture, and the share of its convolutions' rank kept."""

    name: Network | Literal["encoder"]
    rank: Annotated[float, Field(gt=0.0, le=1.0)]


class NetworkSpec(_Built):
    """Specification to build a network; nothing in it can run code."""

    name: Network | Literal["encoder", "amalgam"]
    spatial_dims: Literal[2, 3]
    in_channels: Annotated[int, Field(ge=1, le=16)]
    classes: Annotated[int, Field(ge=2, le=1000)]
    branches: tuple[Branch, ...] = Field(default=(), max_length=66)
    """Of a merged network: extractors side by side under one head.

    The own one, 64 teachers' at most, and an encoder.
    """

    @model_validator(mode="after")
    def _consistent(self) -> NetworkSpec:
        if (self.name == MERGED) != bool(self.branches):
            raise ValueError("a merged network has branches, other networks have none")
        for encoder in self.encoders:
            takes = ENCODERS[encoder.name]
            if takes.spatial_dims != self.spatial_dims or self.in_channels not in (1, takes.channels):
                raise ValueError(f"{encoder.name} takes images of other dimensions or channels")
        return self

    @property
    def encoders(self) -> tuple[EncoderPart, ...]:
        """The pretrained networks in it."""
        return tuple(e for e in (self.encoder, *(b.encoder for b in self.branches)) if e is not None)


class Mask(Strict):
    """A mask, ``mask.json``."""

    format: Literal["qkt-mask/1"] = "qkt-mask/1"
    estimator: Estimator
    probes: int
    seed: int
    classes: Classes
    scores: tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...]
    """Per class of the label space, the largest 1."""
    threshold: float
    """lambda: scores at or above it count as known."""
    automatic: bool
    """Whether the threshold came from the gap in the scores."""
    known: tuple[bool, ...]

    def knows(self, class_name: str) -> bool:
        """Whether the teacher knows the class."""
        return class_name in self.classes and self.known[self.classes.index(class_name)]


class Reference(Strict):
    """``reference.json``: first-layer statistics of the training images. Other hospitals do not fetch it.

    Per filter the mean of its responses over an image and their spread, the means of all filters first.
    """

    format: Literal["qkt-reference/1"] = "qkt-reference/1"
    weights: Sha256
    """Of the network that it belongs to."""
    mean: tuple[float, ...] = Field(min_length=2, max_length=4096)
    """Over the training images."""
    spread: tuple[Annotated[float, Field(gt=0.0)], ...] = Field(min_length=2, max_length=4096)
    """Standard deviation over the training images."""
    threshold: Annotated[float, Field(ge=0.0)] | None
    """An image with a higher score is out of distribution. None where there was no calibration image."""

    @model_validator(mode="after")
    def _consistent(self) -> Reference:
        if len(self.mean) != len(self.spread) or len(self.mean) % 2:
            raise ValueError("mean and spread do not match")
        return self


class InputSpec(Strict):
    """Input of the network: shape (C, H, W) or (C, D, H, W) and how images are normalised."""

    shape: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field(min_length=3, max_length=4)
    normalisation: Literal["unit", "zscore"]
    spacing_mm: tuple[float, ...] | None


Moment = Annotated[float, Field(ge=-1000.0, le=1000.0)]
"""Of network inputs, which lie about [-1, 1]."""


class ImageStatistics(Strict):
    """What a site's training images look like, per channel of the network's input, over all of them.

    It tells how far the images of two hospitals lie apart before any weights are fetched.
    """

    mean: tuple[Moment, ...] = Field(min_length=1, max_length=16)
    spread: tuple[Annotated[Moment, Field(ge=0.0)], ...]
    """Standard deviation of the pixels."""
    gradient: tuple[Annotated[Moment, Field(ge=0.0)], ...]
    """Root mean square of the difference between neighbouring pixels: sharpness and noise."""

    @model_validator(mode="after")
    def _consistent(self) -> ImageStatistics:
        if not len(self.mean) == len(self.spread) == len(self.gradient):
            raise ValueError("mean, spread and gradient do not match")
        return self


class SharedEncoder(Strict):
    """A frozen encoder that hospitals have in common."""

    name: EncoderName
    digest: Sha256
    """Of its weights file."""
    side: Annotated[int, Field(ge=16, le=518)]
    """Pixels along an edge to which images are enlarged or reduced."""

    @classmethod
    def of(cls, file: EncoderFile | None) -> SharedEncoder | None:
        """That of ``params.yaml``, where there is one."""
        return None if file is None else cls(name=file.name, digest=file.digest, side=file.side)


class Weights(Strict):
    """A file of tensors that belongs to the card."""

    bytes: Annotated[int, Field(ge=1)]
    sha256: Sha256


class DecisionRule(Strict):
    """How a student's logits become an answer over the relevant label space R.

    Local classes keep their logits, query classes have their offset added, and the answer is the class of
    the highest score. The offset is the operating point, set so that at most ``budget`` of the hospital's
    own held-out images become false queries.
    """

    method: Method
    local: tuple[Index, ...] = Field(min_length=1)
    query: tuple[Index, ...] = Field(min_length=1)
    rare: tuple[Index, ...] = ()
    """Query classes of which the hospital has a few images: its own network counts among those who know."""
    offsets: tuple[float, ...]
    """One per query class, in the order of ``query``."""
    budget: float
    own_weight: float = Field(gt=0, le=1000)
    """The local model weight: weight of the own network in the consensus, relative to a teacher's 1."""
    experts: Names = ()
    """Sites whose networks answer along (``routed``)."""
    flips: bool = False
    """Whether every network sees an image and its mirror images, and the mean counts (``routed``)."""

    @model_validator(mode="after")
    def _consistent(self) -> DecisionRule:
        if set(self.local) & set(self.query) or not set(self.rare) <= set(self.query):
            raise ValueError("local and query overlap, or a rare class is not in the query")
        if len(self.offsets) != len(self.query):
            raise ValueError("offsets do not match query")
        return self

    @property
    def passes(self) -> int:
        """Network passes per prediction."""
        return (1 + len(self.experts)) * (len(MIRRORS) if self.flips else 1)

    @property
    def relevant(self) -> tuple[int, ...]:
        """R, the local and query classes, sorted."""
        return tuple(sorted({*self.local, *self.query}))


class Card(_Later):
    """``bundle.json``: description of a bundle. No class counts, paths or persons."""

    LATER = ("packed", "without_encoder", "shared_encoder", "encoder_means", "network_kept")
    format: Literal["qkt-bundle/1", "qkt-bundle/2", "qkt-bundle/3"] = "qkt-bundle/3"
    """The first has no ``image_statistics``, the first two have no ``class_means``."""
    kind: Literal["teacher", "student"]
    site: Name
    query: Name | None = None
    network: NetworkSpec
    classes: Classes
    input: InputSpec
    training: dict[str, float | int | str | bool | None]
    weights: Weights
    packed: Literal[True] | None = None
    """Whether the file of weights holds a byte for each; see :mod:`.models.packed_weights`."""
    decision: DecisionRule | None = None
    image_statistics: ImageStatistics | None = None
    """None where the bundle is older, of a student, or trained with differential privacy."""
    class_means: bool = False
    """Whether the weights file holds mean features of classes; see :mod:`.models.class_means`.

    Of which is not said here: who is shown a card need not be given the weights.
    """
    without_encoder: Sha256 | None = None
    """Digest of the encoder's file, whose tensors the weights file goes without where training left them.

    Whoever reads the network needs that file too.
    """
    shared_encoder: SharedEncoder | None = None
    """Over whose features there are class means too."""
    encoder_means: Weights | None = None
    """The file of these; None where there are none, or where the weights file of an older bundle has them."""
    network_kept: Literal[True] | None = None
    """Of a teacher whose site sends these means and keeps the network, whose weights the card still names."""

    @model_validator(mode="after")
    def _consistent(self) -> Card:
        if len(self.classes) != self.network.classes:
            raise ValueError(
                f"{len(self.classes)} class names for a network of {self.network.classes} classes"
            )
        if (
            self.input.shape[0] != self.network.in_channels
            or len(self.input.shape) != self.network.spatial_dims + 1
        ):
            raise ValueError("input shape does not fit the network")
        if self.image_statistics and len(self.image_statistics.mean) != self.network.in_channels:
            raise ValueError("statistics of images of other channels")
        left = self.network.encoder is not None and self.network.encoder.mode != "finetune"
        if self.without_encoder and not (left and self.kind == "teacher"):
            raise ValueError("only a teacher over a frozen or adapted encoder goes without it")
        if self.encoder_means and not self.shared_encoder:
            raise ValueError("class means of an encoder that is not named")
        if self.network_kept and (not self.encoder_means or self.class_means):
            raise ValueError("without the network there are class means of a shared encoder, and no others")
        if (self.class_means or self.shared_encoder) and self.kind == "student":
            raise ValueError("a student has no class means")
        if (self.kind == "student") != (self.decision is not None):
            raise ValueError("a student has a decision, a teacher has none")
        if self.kind == "teacher" and self.network.branches:
            raise ValueError("a teacher is no merged network")
        if self.decision and max(self.decision.relevant) >= len(self.classes):
            raise ValueError("the decision names a class that is not there")
        return self


def most_bytes(card: Card, name: str) -> int:
    """Bytes that a file of a card's bundle may have."""
    files = {WEIGHTS: card.weights, MEANS: card.encoder_means}
    if name not in files:
        return MAX_JSON_BYTES
    file = files[name]
    return 0 if file is None else file.bytes


def told_epsilon(card: Card, key: str) -> float | None:
    """The epsilon of the noise on class means, as a card's ``training`` says; None: none, or nothing usable.

    The card may be another hospital's: its word may be a text, or a number beyond all bounds.
    """
    said = card.training.get(key)
    usable = isinstance(said, int | float) and not isinstance(said, bool) and 0 < said <= 1000
    return float(said) if usable and said is not None else None


class Read(NamedTuple):
    """A JSON file of a bundle, parsed from the same bytes that were measured and hashed."""

    data: Any
    bytes: int
    digest: str


def _read_json(path: Path, site: str | None) -> Read:
    try:
        content = read_plain(path, MAX_JSON_BYTES)
    except TooLarge:
        raise BundleError(
            f"larger than {MAX_JSON_BYTES} bytes", remedy=REMEDY, file=path, site=site
        ) from None
    except FileNotFoundError:
        raise BundleError(
            "is not there",
            remedy=f"Run 'qkt train {site}', or put the site's bundle there.",
            file=path,
            site=site,
            code="bundle-missing",
        ) from None
    except OSError as error:
        raise cannot_be_read(error, path, site) from None
    try:
        data = json.loads(content.decode())
        to_json(data).encode()  # NaN and lone surrogates could not be written into a plan again
    except (ValueError, RecursionError):
        raise BundleError("not JSON", remedy=REMEDY, file=path, site=site, code="bundle-card") from None
    return Read(data, len(content), digest_bytes(content))


def cannot_be_read(error: OSError, path: Path, site: str | None) -> BundleError:
    """The error for a bundle's file that cannot be opened, or is a link, a folder, a pipe or a device."""
    return BundleError(
        f"cannot be read as a plain file: {typed(error).message}",
        remedy="Put the file itself there, with permission to read it; links are not followed.",
        file=path,
        site=site,
        code="bundle-missing",
    )


class CardFile(NamedTuple):
    """A card with size and digest of its file."""

    card: Card
    bytes: int
    digest: str


def read_card(folder: Path) -> Card:
    """The card of :func:`read_card_file` alone."""
    return read_card_file(folder).card


def read_card_file(folder: Path) -> CardFile:
    """Read and validate ``bundle.json`` alone; no tensor is touched.

    Raises:
        BundleError: absent, no plain file, too large, not JSON, or not a card.
    """
    path = folder / CARD
    read = _read_json(path, folder.name)
    try:
        return CardFile(Card.model_validate(read.data), read.bytes, read.digest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(p) for p in first["loc"])
        raise BundleError(
            f"not a bundle card: {where[:200]} {first['msg'][:200]}".strip(),
            remedy=REMEDY,
            file=path,
            site=folder.name,
            code="bundle-card",
        ) from None


def read_mask(folder: Path, card: Card) -> Mask | None:
    """The mask beside a card, or None.

    Raises:
        BundleError: not a mask, or of another label space.
    """
    found = read_mask_file(folder, card)
    return None if found is None else found.mask


class MaskFile(NamedTuple):
    """A mask with the size of its file."""

    mask: Mask
    bytes: int


def read_mask_file(folder: Path, card: Card) -> MaskFile | None:
    """As :func:`read_mask`."""
    path = folder / MASK
    if not os.path.lexists(path):
        return None
    read = _read_json(path, card.site)
    try:
        mask = Mask.model_validate(read.data)
    except ValidationError:
        raise BundleError(
            "not a mask", remedy=REMEDY, file=path, site=card.site, code="bundle-mask"
        ) from None
    count = len(card.classes)
    if mask.classes != card.classes or len(mask.scores) != count or len(mask.known) != count:
        raise BundleError(
            "mask and network have other classes",
            remedy=REMEDY,
            file=path,
            site=card.site,
            code="bundle-mask",
        )
    return MaskFile(mask, read.bytes)


def read_reference(folder: Path, card: Card) -> Reference | None:
    """The reference beside a card, or None.

    Raises:
        BundleError: not a reference, or that of other weights.
    """
    path = folder / REFERENCE
    if not os.path.lexists(path):
        return None
    remedy = "Run 'qkt train' or 'qkt transfer' again, or remove the file; answers then carry no flag."
    try:
        reference = Reference.model_validate(_read_json(path, card.site).data)
    except ValidationError:
        raise BundleError(
            "not a reference", remedy=remedy, file=path, site=card.site, code="bundle-reference"
        ) from None
    if reference.weights != card.weights.sha256:
        raise BundleError(
            "a reference of other weights", remedy=remedy, file=path, site=card.site, code="bundle-reference"
        )
    return reference
