"""Networks trained once per seed and shared by all methods and queries: teachers, masks, global models.

Every network is a bundle in a folder of its own under the seed's, written in one step, beside its logits
on the images that figures are computed on, so that most baselines cost no pass at all. A network is named by
its folder: ``full/h1`` is the teacher of hospital h1, ``fedavg/20`` a global model after 20 rounds,
``finetune/h1`` and ``distill-all/h1`` what h1 makes of its teacher, whatever it will ask.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qkt_clinical.baselines.distill import distill_all
from qkt_clinical.baselines.federated import Participant
from qkt_clinical.baselines.finetune import finetune
from qkt_clinical.benchmark.mask_estimators import estimate_mask
from qkt_clinical.benchmark.metrics import figures
from qkt_clinical.benchmark.settings import DISTILLED, FEDERATED, FINETUNE, BenchmarkSettings, Variant
from qkt_clinical.benchmark.simulate import LabelledImages, SimulatedFederation, SimulatedHospital
from qkt_clinical.benchmark.variants import vary
from qkt_clinical.catalog import DEFAULT_ESTIMATOR, DEFAULT_TASK, ESTIMATORS
from qkt_clinical.common.files import new_folder, write_json
from qkt_clinical.common.seeding import derive
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Labels
from qkt_clinical.models.bundle import Bundle, load_bundle, write_bundle
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.masks import verified_classes
from qkt_clinical.qkt.prediction import predict_logits
from qkt_clinical.records.card import MASK, InputSpec, Mask
from qkt_clinical.records.plan import SHARED
from qkt_clinical.task import task_of
from qkt_clinical.training.classifier import train_teacher
from qkt_clinical.training.loop import Checkpoint

LOGITS, MASKS, SECONDS, TRAFFIC = "logits.safetensors", "masks.json", "seconds.json", "traffic.json"
FEDERATIONS = "federations"
"""Where federations run, each in a folder that is removed afterwards."""
CACHED_BUNDLES = 16
"""Bundles cached in a process's memory."""


class ResultStore:
    """The trained networks of one seed.

    Args:
        folder: of this seed; need not exist.
        federation: of the same seed.
        device: where networks are trained and evaluated.
    """

    def __init__(
        self, folder: Path, federation: SimulatedFederation, settings: BenchmarkSettings, device: torch.device
    ):
        self.folder = folder
        self.federation = federation
        self.settings = settings
        self.device = device
        self.task = task_of(DEFAULT_TASK)
        self.bundle: Callable[[str], Bundle] = lru_cache(CACHED_BUNDLES)(self._bundle)
        self.logits: Callable[[str], dict[str, Tensor]] = lru_cache(CACHED_BUNDLES)(self._logits)
        self.routed_logits: Callable[[str, bool], Tensor] = lru_cache(CACHED_BUNDLES)(self._routed_logits)
        self.verified: Callable[[str], tuple[int, ...]] = lru_cache(CACHED_BUNDLES)(self._verified)

    def train(self, name: str) -> None:
        """Train the network of that name and write it."""
        kind, which = name.split("/")
        if kind in FEDERATED:
            self._train_global(kind, int(which))
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

    def bytes(self, name: str) -> int:
        """Bytes to transfer when a teacher is fetched: card, weights and mask."""
        return sum((self.folder / name / file).stat().st_size for file in SHARED)

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

        Recall is over all classes on the validation images of all hospitals.
        """
        return tuple(self._mask_file(name)[kind])

    def seconds(self, name: str) -> float:
        """Duration of training."""
        return float(json.loads((self.folder / name / SECONDS).read_text(encoding="utf-8")))

    def best_rounds(self, algorithm: str) -> int:
        """The number of rounds after which a global model answers the questions best on validation images."""
        val = self.federation.val

        def judge(rounds: int) -> float:
            logits = self.logits(f"{algorithm}/{rounds}")["val"].numpy()
            values = []
            for question in self.federation.questions:
                relevant = self.federation.relevant(question)
                index = np.flatnonzero(np.isin(val.labels, relevant))
                found = figures(logits[index], val.labels[index], relevant, question.query, task=self.task)
                values.append(found["balanced_accuracy"])
            return float(np.mean(values))

        return max(sorted(self.settings.rounds), key=judge)

    def _bundle(self, name: str) -> Bundle:
        return load_bundle(self.folder / name)

    def _logits(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return dict(load_file(self.folder / name / LOGITS))

    def _routed_logits(self, name: str, flips: bool) -> Tensor:
        inputs = to_input(self.evaluation.images)
        return predict_logits(self.bundle(name).network, inputs, flips, self.device)

    def _verified(self, name: str) -> tuple[int, ...]:
        return self.verify(self.bundle(name).network)

    def _mask_file(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / name / MASKS).read_text(encoding="utf-8"))
        return found

    def _train_teacher(self, variant: Variant, hospital: str) -> None:
        name, data, start = f"{variant}/{hospital}", self.data(hospital, variant), time.perf_counter()
        network, history = train_teacher(
            self.federation.spec,
            data.train.pair,
            data.val.pair,
            self.settings.train,
            task=self.task,
            seed=derive(self.federation.seed, "benchmark", "teacher"),
            site=hospital,
            device=self.device,
            checkpoint=Checkpoint(self.folder / "checkpoints", f"{variant}-{hospital}"),
        )
        seconds = time.perf_counter() - start
        network = network.cpu()
        with new_folder(self.folder / name) as folder:
            logits = self._write(folder, network, hospital, seconds, len(history.curves))
            masks = self._compute_masks(network)
            write_json(folder / MASK, masks[DEFAULT_ESTIMATOR].model_dump(mode="json"))
            right = self.task.answer(logits["val"]).numpy() == self.federation.val.labels
            recall = _recalls(right, self.federation.val.labels, self.federation.spec.classes)
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

    def _train_global(self, algorithm: str, rounds: int) -> None:
        from qkt_clinical.federation.peers import run_federation

        start, baselines = time.perf_counter(), self.settings.baselines
        found = run_federation(
            [Participant(h.name, h.train.pair) for h in self.federation.hospitals],
            self.federation.spec,
            baselines.scaffold if algorithm == "scaffold" else baselines.federated,
            algorithm=algorithm,  # type: ignore[arg-type]
            rounds=rounds,
            proximal=baselines.proximal,
            seed=derive(self.federation.seed, "benchmark", "federated"),
            device=self.device,
            work=self.folder / FEDERATIONS / f"{algorithm}-{rounds}",
        )
        seconds = time.perf_counter() - start
        with new_folder(self.folder / algorithm / str(rounds)) as folder:
            self._write(folder, found.network, f"{algorithm}-{rounds}", seconds, rounds)
            write_json(folder / TRAFFIC, {"rounds": found.rounds, "bytes_moved": found.bytes_moved})

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
            self._write(folder, network, hospital, seconds, self.settings.baselines.finetune.epochs)

    def _distill(self, hospital: str) -> None:
        start = time.perf_counter()
        names = [h.name for h in self.federation.hospitals]
        networks = {name: self.bundle(f"full/{name}").network for name in names}
        network = distill_all(
            networks[hospital],
            list(networks.values()),
            self.data(hospital).train.images,
            self.settings.baselines.distill,
            task=self.task,
            seed=derive(self.federation.seed, "benchmark", "distill", hospital),
            device=self.device,
        )
        seconds = time.perf_counter() - start
        with new_folder(self.folder / DISTILLED / hospital) as folder:
            self._write(folder, network, hospital, seconds, self.settings.baselines.distill.epochs)

    def _write(
        self, folder: Path, network: Classifier, site: str, seconds: float, epochs: int
    ) -> dict[str, Tensor]:
        """Bundle and logits of a trained network; returns the logits by split."""
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
