"""Networks trained once per seed and shared by all methods and queries: teachers, masks, global models.

Every network is a bundle in a folder of its own under the seed's, written in one step, beside its logits
on the images that figures are computed on, so that most baselines cost no pass at all. A network is named by
its folder: ``full/h1`` is hospital h1's own network, ``sent/h1`` its teacher where that is another one,
``fedavg/20`` a global model after 20 rounds, ``finetune/h1`` and ``distill-all/h1`` what h1 makes of its own
network, whatever it will ask. Of real hospitals, ``full/h1~3`` is the network of h1 from which class 3 is
hidden, ``fedavg/20-h1~3`` and ``pooled/h1~3`` what all hospitals train while it is, ``pooled/all`` while
nothing is hidden.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qkt_clinical.baselines.distill import distill_all
from qkt_clinical.baselines.federated import Participant
from qkt_clinical.baselines.finetune import finetune
from qkt_clinical.benchmark.features import FeatureBank
from qkt_clinical.benchmark.mask_estimators import estimate_mask
from qkt_clinical.benchmark.metrics import balanced_accuracy
from qkt_clinical.benchmark.settings import (
    DISTILLED,
    FEDERATED,
    FINETUNE,
    TEACHERS,
    BenchmarkSettings,
    Variant,
)
from qkt_clinical.benchmark.simulate import (
    LabelledImages,
    SimulatedFederation,
    SimulatedHospital,
    SimulatedQuery,
    together,
)
from qkt_clinical.benchmark.variants import vary
from qkt_clinical.catalog import DEFAULT_ESTIMATOR, DEFAULT_TASK, ESTIMATORS, POOLED, EncoderName
from qkt_clinical.common.files import new_folder, write_json
from qkt_clinical.common.seeding import derive
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Labels
from qkt_clinical.models.bundle import Bundle, load_bundle, packed_network, write_bundle
from qkt_clinical.models.class_means import class_means
from qkt_clinical.models.encoder_network import EncoderExtractor
from qkt_clinical.models.encoders import Encoder
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.masks import verified_classes
from qkt_clinical.qkt.prediction import predict_logits
from qkt_clinical.records.card import MASK, InputSpec, Mask
from qkt_clinical.records.plan import SHARED
from qkt_clinical.task import task_of
from qkt_clinical.training.classifier import appearance_of, at_home, train_teacher
from qkt_clinical.training.loop import Checkpoint

LOGITS, MASKS, SECONDS, TRAFFIC = "logits.safetensors", "masks.json", "seconds.json", "traffic.json"
FEDERATIONS = "federations"
"""Where federations run, each in a folder that is removed afterwards."""
CACHED_BUNDLES = 16
"""Bundles cached in a process's memory."""
CACHED_CALIBRATION = 128
"""Pairs of a network and a hospital whose logits are."""


def global_name(algorithm: str, rounds: int, asks_as: str = "") -> str:
    """Name of a global model, of a federation of its own where a class is hidden from a hospital."""
    return f"{algorithm}/{rounds}-{asks_as}" if asks_as else f"{algorithm}/{rounds}"


def pooled_name(asks_as: str = "") -> str:
    """Name of the network of everybody's images."""
    return f"{POOLED}/{asks_as or 'all'}"


class ResultStore:
    """The trained networks of one seed.

    Args:
        folder: of this seed; need not exist.
        federation: of the same seed.
        device: where networks are trained and evaluated.
        features: of the encoder, where there is one.
        encoder: that the features are of.
        pretrained: with whose weights networks start, where ``settings.train`` has an encoder.
    """

    def __init__(
        self,
        folder: Path,
        federation: SimulatedFederation,
        settings: BenchmarkSettings,
        device: torch.device,
        features: FeatureBank | None = None,
        pretrained: Encoder | None = None,
        encoder: EncoderExtractor | None = None,
    ):
        self.folder = folder
        self.federation = federation
        self.settings = settings
        self.device = device
        self.features = features
        self.pretrained = pretrained
        self.encoder = encoder
        self.task = task_of(DEFAULT_TASK)
        self.bundle: Callable[[str], Bundle] = lru_cache(CACHED_BUNDLES)(self._bundle)
        self.logits: Callable[[str], dict[str, Tensor]] = lru_cache(CACHED_BUNDLES)(self._logits)
        self.routed_logits: Callable[[str, bool], Tensor] = lru_cache(CACHED_BUNDLES)(self._routed_logits)
        self.calibration_logits: Callable[[str, str], Tensor] = lru_cache(CACHED_CALIBRATION)(
            self._calibration_logits
        )
        self.verified: Callable[[str], tuple[int, ...]] = lru_cache(CACHED_BUNDLES)(self._verified)

    def train(self, name: str) -> None:
        """Train the network of that name and write it."""
        kind, which = name.split("/")
        if kind in FEDERATED:
            rounds, _, asks_as = which.partition("-")
            self._train_global(kind, int(rounds), asks_as)
        elif kind == POOLED:
            self._train_pooled("" if which == "all" else which)
        elif kind == FINETUNE:
            self._finetune(which)
        elif kind == DISTILLED:
            self._distill(which)
        else:
            self._train_teacher(cast(Variant, kind), which)

    def data(self, hospital: str, variant: Variant = "full") -> SimulatedHospital:
        """A hospital's images, as the variant has them."""
        return vary(
            self.federation.hospital(hospital),
            variant,
            budget=self.settings.budget,
            seed=self.federation.seed,
        )

    @property
    def evaluation(self) -> LabelledImages:
        """The images that the figures are computed on."""
        return self.federation.test if self.settings.split == "test" else self.federation.val

    def bytes(self, name: str, files: Sequence[str] = SHARED) -> int:
        """Bytes to transfer when a teacher is fetched: card, weights and mask."""
        return sum((self.folder / name / file).stat().st_size for file in files)

    def traffic(self, name: str) -> tuple[int, int]:
        """Rounds of a federation and bytes that it moved."""
        found = json.loads((self.folder / name / TRAFFIC).read_text(encoding="utf-8"))
        return int(found["rounds"]), int(found["bytes_moved"])

    def masks(self, name: str) -> dict[str, Mask]:
        """A teacher's mask by every estimator."""
        data = self._mask_file(name)["masks"]
        return {estimator: Mask.model_validate(mask) for estimator, mask in data.items()}

    def verify(self, network: Classifier) -> tuple[int, ...]:
        """Verified classes of a network, as an asking hospital computes them again."""
        return verified_classes(
            network,
            self.evaluation.images.shape[1:],
            threshold=self.settings.mask.threshold,
            probes=self.settings.mask.probes,
            seed=derive(self.federation.seed, "mask"),
        )

    def truth(self, name: str, kind: str) -> tuple[bool, ...]:
        """Per class, whether a teacher was trained on it (``held``) or ``recalled`` it: recall above 0.5.

        Recall is over all classes on the validation images of all hospitals, or of a real hospital's own.
        """
        return tuple(self._mask_file(name)[kind])

    def seconds(self, name: str) -> float:
        """Duration of training."""
        return float(json.loads((self.folder / name / SECONDS).read_text(encoding="utf-8")))

    def best_rounds(self, algorithm: str, question: SimulatedQuery | None = None) -> int:
        """The number of rounds after which a global model answers best on validation images.

        Args:
            question: of a real hospital, for which alone the model is chosen; None: all questions.
        """
        val, asks_as = self.federation.val, question.asks_as if question else ""
        questions = [question] if question else self.federation.questions

        def judge(rounds: int) -> float:
            logits = self.logits(global_name(algorithm, rounds, asks_as))["val"].numpy()
            values = []
            for question in questions:
                relevant = self.federation.relevant(question)
                index = self.federation.choosing(question)
                values.append(balanced_accuracy(logits[index], val.labels[index], relevant, task=self.task))
            return float(np.mean(values))

        return max(sorted(self.settings.rounds), key=judge)

    def _bundle(self, name: str) -> Bundle:
        return load_bundle(self.folder / name, self._encoder)

    def _encoder(self, name: EncoderName, digest: str) -> Encoder | None:
        """That of which teachers' bundles go without, where it was frozen."""
        alike = self.pretrained is not None and self.pretrained.digest == digest
        return self.pretrained if alike else None

    def _logits(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return dict(load_file(self.folder / name / LOGITS))

    def _routed_logits(self, name: str, flips: bool) -> Tensor:
        inputs = to_input(self.evaluation.images)
        return predict_logits(self.bundle(name).network, inputs, flips, self.device)

    def _calibration_logits(self, name: str, hospital: str) -> Tensor:
        inputs = to_input(self.data(hospital).calibration.images)
        return predict(self.bundle(name).network, inputs, self.device)

    def _verified(self, name: str) -> tuple[int, ...]:
        return self.verify(self.bundle(name).network)

    def _mask_file(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / name / MASKS).read_text(encoding="utf-8"))
        return found

    def _train_teacher(self, variant: Variant, hospital: str) -> None:
        name, data, start = f"{variant}/{hospital}", self.data(hospital, variant), time.perf_counter()
        train, own = self.settings.train, self.folder / "full" / hospital
        if variant == "sent" and not appearance_of(train, "unit", len(data.train)) and own.exists():
            with new_folder(self.folder / name) as folder:  # a site of few images has one network for both
                shutil.copytree(own, folder, dirs_exist_ok=True)
            return
        network, history = train_teacher(
            self.federation.spec,
            data.train.pair,
            data.val.pair,
            train if variant in TEACHERS else at_home(train),
            task=self.task,
            seed=derive(self.federation.seed, "benchmark", "teacher"),
            site=data.site,
            device=self.device,
            checkpoint=Checkpoint(self.folder / "checkpoints", f"{variant}-{hospital}"),
            pretrained=self.pretrained,
        )
        seconds = time.perf_counter() - start
        network = packed_network(network, self.pretrained) if train.packed else network.cpu()
        with new_folder(self.folder / name) as folder:
            draw = generator(self.federation.seed, "benchmark", "class-means", name)
            means = class_means(network, *data.train.pair, "unit", self.device, train.class_means, draw)
            logits = self._write(
                folder, network, data.site, seconds, len(history.curves), means, packed=train.packed
            )
            masks = self._compute_masks(network)
            write_json(folder / MASK, masks[DEFAULT_ESTIMATOR].model_dump(mode="json"))
            index, labels = self.federation.val_of(data), self.federation.val.labels
            right = self.task.answer(logits["val"]).numpy() == labels
            recall = _recalls(right[index], labels[index], self.federation.spec.classes)
            judged = {
                "masks": {e: mask.model_dump(mode="json") for e, mask in masks.items()},
                "held": [c in data.held for c in range(self.federation.spec.classes)],
                "recalled": [r > 0.5 for r in recall],
            }
            write_json(folder / MASKS, judged)

    def _compute_masks(self, network: Classifier) -> dict[str, Mask]:
        """By every estimator; the default one with the threshold of the settings, all others automatic."""
        default = self.settings.mask
        shape = self.evaluation.images.shape[1:]
        return {
            estimator: estimate_mask(
                network,
                shape,
                self.federation.classes,
                estimator=estimator,  # type: ignore[arg-type]
                threshold=default.threshold if estimator == DEFAULT_ESTIMATOR else "auto",
                probes=default.probes,
                seed=derive(self.federation.seed, "mask"),
            )
            for estimator in ESTIMATORS
        }

    def _train_global(self, algorithm: str, rounds: int, asks_as: str) -> None:
        from qkt_clinical.federation.peers import run_federation

        start, baselines = time.perf_counter(), self.settings.baselines
        name = global_name(algorithm, rounds, asks_as)
        found = run_federation(
            [Participant(h.site, h.train.pair) for h in self.federation.members(asks_as)],
            self.federation.spec,
            baselines.scaffold if algorithm == "scaffold" else baselines.federated,
            algorithm=algorithm,  # type: ignore[arg-type]
            rounds=rounds,
            proximal=baselines.proximal,
            seed=derive(self.federation.seed, "benchmark", "federated"),
            device=self.device,
            work=self.folder / FEDERATIONS / name.replace("/", "-"),
            pretrained=self.pretrained,
        )
        seconds = time.perf_counter() - start
        with new_folder(self.folder / name) as folder:
            self._write(folder, found.network, f"{algorithm}-{rounds}", seconds, rounds)
            write_json(folder / TRAFFIC, {"rounds": found.rounds, "bytes_moved": found.bytes_moved})

    def _train_pooled(self, asks_as: str) -> None:
        start, members = time.perf_counter(), self.federation.members(asks_as)
        network, history = train_teacher(
            self.federation.spec,
            together([h.train for h in members]).pair,
            together([h.val for h in members]).pair,
            self.settings.train,
            task=self.task,
            seed=derive(self.federation.seed, "benchmark", POOLED),
            site=POOLED,
            device=self.device,
            pretrained=self.pretrained,
        )
        seconds = time.perf_counter() - start
        with new_folder(self.folder / pooled_name(asks_as)) as folder:
            self._write(folder, network.cpu(), POOLED, seconds, len(history.curves))

    def _finetune(self, hospital: str) -> None:
        start, data = time.perf_counter(), self.data(hospital)
        network = finetune(
            self.bundle(f"full/{hospital}").network,
            data.train.pair,
            data.val.pair,
            range(self.federation.spec.classes),
            self.settings.baselines.finetune,
            task=self.task,
            seed=derive(self.federation.seed, "benchmark", "finetune", hospital),
            name=hospital,
            device=self.device,
        )
        seconds = time.perf_counter() - start
        with new_folder(self.folder / FINETUNE / hospital) as folder:
            self._write(folder, network, data.site, seconds, self.settings.baselines.finetune.epochs)

    def _distill(self, hospital: str) -> None:
        start = time.perf_counter()
        data = self.data(hospital)
        names = [h.name for h in self.federation.members(hospital)]
        kind = self.settings.trained_as("sent")
        networks = {
            name: self.bundle(f"{'full' if name == hospital else kind}/{name}").network for name in names
        }
        network = distill_all(
            networks[hospital],
            list(networks.values()),
            data.train.images,
            self.settings.baselines.distill,
            task=self.task,
            seed=derive(self.federation.seed, "benchmark", "distill", hospital),
            device=self.device,
        )
        seconds = time.perf_counter() - start
        with new_folder(self.folder / DISTILLED / hospital) as folder:
            self._write(folder, network, data.site, seconds, self.settings.baselines.distill.epochs)

    def _write(
        self,
        folder: Path,
        network: Classifier,
        site: str,
        seconds: float,
        epochs: int,
        means: Mapping[int, Tensor] = MappingProxyType({}),
        *,
        packed: bool = False,
    ) -> dict[str, Tensor]:
        """Bundle and logits of a trained network; returns the logits by split.

        Args:
            means: class means of a teacher.
            packed: whether its weights are stored in a byte each, as they are already rounded.
        """
        from safetensors.torch import save_file

        shape = self.evaluation.images.shape[1:]
        write_json(folder / SECONDS, round(seconds, 3))  # not on the card: a bundle's bytes are figures too
        write_bundle(
            folder,
            network,
            {
                "kind": "teacher",
                "site": site,
                "classes": self.federation.classes,
                "input": InputSpec(shape=shape, normalisation="unit", spacing_mm=None),
                "training": {"epochs": epochs, "seed": self.federation.seed},
            },
            means,
            encoder=self.pretrained,
            packed=packed,
        )
        splits = {"val": self.federation.val, self.settings.split: self.evaluation}
        logits: dict[str, Tensor] = {
            name: predict(network, to_input(s.images), self.device) for name, s in splits.items()
        }
        save_file(logits, folder / LOGITS)
        return logits


def _recalls(right: NDArray[np.bool_], labels: Labels, classes: int) -> list[float]:
    """Recall of every class, 0 where it has no image."""
    return [float(right[labels == c].mean()) if (labels == c).any() else 0.0 for c in range(classes)]
