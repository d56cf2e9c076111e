"""``params.yaml``: every key with its bounds and meaning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qkt_clinical.catalog import WITHOUT_BATCH_NORM, EncoderMode, EncoderName, Network, Split
from qkt_clinical.config.base import Classes, Fraction, Name, Names, Sha256, Strict
from qkt_clinical.config.query import QueryRef


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


class EncoderFile(Strict):
    """A pretrained network and the local file of its weights; see docs/encoders.md."""

    name: EncoderName
    weights: Annotated[str, Field(min_length=1)]
    """Safetensors file from ``qkt encoder import``, from the workspace on."""
    digest: Sha256
    """Of that file."""
    side: Annotated[int, Field(ge=16, le=518)] = 112
    """Pixels along an edge to which images are enlarged or reduced."""
    licence: str | None = None
    """Of the weights: what is made with them may be bound by it."""


class MeansPrivacy(Strict):
    """Noise on class means that leave with a teacher, for single images."""

    epsilon: Annotated[float, Field(gt=0.0, le=1000.0)] | None = 8.0
    """Differential privacy of the means; null: exact means, see docs/privacy.md."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-5


class ClassMeansParams(MeansPrivacy):
    """Of the features that a teacher learned; they say where its classes lie among them."""

    epsilon: Annotated[float, Field(gt=0.0, le=1000.0)] | None = 40.0
    """Chosen by the measured attack: it finds as little as with 8 over a shared encoder (docs/privacy.md)."""


class SharedEncoderParams(EncoderFile, MeansPrivacy):
    """The one that hospitals have in common, frozen: class means of its features leave with a teacher."""


class EncoderParams(EncoderFile):
    """The one with which a site's networks start."""

    mode: EncoderMode = "finetune"


class TrainParams(Strict):
    """Stage ``train``: one teacher per site."""

    network: Network = "resnet-small"
    """Trained from nothing, where there is no ``encoder``."""
    encoder: EncoderParams | None = None
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 30
    batch_size: Annotated[int, Field(ge=2, le=4096)] = 64
    """At most: of volumes a batch is of fewer, so that memory is bounded."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0)] = 5e-2
    patience: Annotated[int, Field(ge=1)] = 10
    """Stop when balanced accuracy on validation images has not risen for so many epochs."""
    augment: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    """Strength of augmentation; 0 turns it off."""
    appearance: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    """Strength of random stains and contrast, so that a network reads other hospitals' images; 1 is usual.

    Images normalised by ``zscore`` and training with differential privacy go without.
    """
    appearance_images: Annotated[int, Field(ge=1, le=1_000_000)] = 640
    """Training images that a site needs for it: by fewer its network loses more than others gain."""
    min_batches: Annotated[int, Field(ge=1, le=1000)] = 1
    """An epoch of fewer batches goes over the images again: small sites learn in as many steps as large ones.

    20 is usual. Not with differential privacy, which counts every pass.
    """
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    """That train one network together, each on a GPU of its own; each has batches of ``batch_size``."""
    packed: bool = False
    """Teachers leave with their weights in a byte each, a quarter of the size; own networks stay whole."""
    class_means: ClassMeansParams = ClassMeansParams()
    """Mean features of every class, which leave with the teacher."""
    privacy: PrivacyParams | None = None
    """Differential privacy of the weights; null: none. With it, the last epoch counts, and no means leave."""

    @model_validator(mode="after")
    def _image_by_image(self) -> TrainParams:
        if self.privacy is not None and self.processes > 1:
            raise ValueError("privacy is not possible with several processes")
        if self.privacy is not None and self.encoder is not None:
            raise ValueError("privacy is not possible with an encoder")
        if self.privacy is not None and self.network not in WITHOUT_BATCH_NORM:
            raise ValueError(f"privacy needs a network without batch norm: {', '.join(WITHOUT_BATCH_NORM)}")
        return self


class MaskParams(Strict):
    """Stage ``mask``: which classes a teacher knows, from its weights alone."""

    threshold: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """lambda of the paper: scores at or above it count as known; ``auto``: the gap in the scores."""
    probes: Annotated[int, Field(ge=8, le=100_000)] = 256


class TransferParams(Strict):
    """Stage ``transfer``: phases 1 and 2."""

    rank: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of the rank of a teacher's convolutions that ``qkt`` keeps."""
    light_rank: Annotated[float, Field(gt=0.0, le=1.0)] = 0.35
    """The same for ``qkt-light``."""
    images: Annotated[int, Field(ge=1, le=100_000)] = 400
    """Local images, one view each, on which a teacher's layers are reproduced; as many of every class."""
    augment: Annotated[float, Field(ge=0.0, le=3.0)] = 1.5
    flips: bool = True
    """Whether the networks of a ``routed`` answer see mirror images of an image too."""
    adaptation: bool = True
    """Whether teachers are brought to the hospital's images by the statistics of their layers."""
    discriminant: bool = True
    """Whether the head takes up the discriminants of the teachers' class means, where they hold them."""
    screening: bool = True
    """Whether teachers are held against the hospital's own images, and those that fail are excluded. Networks
    that give no usable answers are set aside in any case."""


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


class Params(Strict):
    """``params.yaml``."""

    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] = 2
    """Of a stage on the CPU. Networks have other last digits with another number."""
    classes: Classes = Field(min_length=2)
    """The federation's label space; its order is the order of every network's outputs."""
    sites: Names = Field(min_length=1)
    queries: dict[Name, QueryRef]
    ingest: IngestParams = IngestParams()
    shared_encoder: SharedEncoderParams | None = None
    """For ``qkt-statistics``; null: nothing of the kind leaves."""
    train: TrainParams = TrainParams()
    mask: MaskParams = MaskParams()
    transfer: TransferParams = TransferParams()
    evaluate: EvaluateParams = EvaluateParams()
    gate: GateParams = GateParams()
    track: TrackParams = TrackParams()

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        for key, ref in self.queries.items():
            if ref.hospital not in self.sites:
                raise ValueError(f"query {key} belongs to {ref.hospital!r}, which is not among sites")
        return self

    @property
    def encoder_files(self) -> tuple[EncoderFile, ...]:
        """The pretrained networks that are here."""
        return tuple(file for file in (self.train.encoder, self.shared_encoder) if file is not None)
