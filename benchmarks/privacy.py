"""What a teacher discloses: ``python -m benchmarks.privacy --data FILE.npz [--tables NAME ...]``.

Networks are trained once; what they say of the images is kept in ``--work``. All images of the attacks are of
the file's train split.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

from benchmarks import masks
from benchmarks.membership import auc, confidence, found_at, halves, lira, negative_loss
from benchmarks.tables import Row, markdown
from qkt_clinical.benchmark.simulate import LabelledImages, SimulatedHospital
from qkt_clinical.common.files import write_json
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.params import PrivacyParams, TrainParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.models.inference import predict
from qkt_clinical.qkt.masks import class_scores, gap_threshold
from qkt_clinical.records.card import MIRRORS
from qkt_clinical.task import MULTICLASS, mean_recall
from qkt_clinical.training.classifier import train_teacher
from qkt_clinical.training.private import train_private

CPU = torch.device("cpu")
MODELS = 16
"""Per hospital and training: each is attacked once, with the 15 others as shadow models."""
FEW = 400
"""Images of a small hospital, half of which train a model."""
TRAININGS: tuple[tuple[str, int, float], ...] = (
    *(("h1", epochs, 1.0) for epochs in (5, 15, 30, 60)),
    *(("h2", epochs, 1.0) for epochs in (15, 30, 60)),
    ("h2", 30, 0.0),
)
"""Attacked hospital, epochs and strength of augmentation."""
COUNTED = 15
"""Epochs of the teachers whose masks are held against numbers of images."""
GENTLE = TrainParams(network="resnet-small-gn", epochs=40, batch_size=64, learning_rate=1e-2, augment=0.0)
"""How teachers with differential privacy are trained; tuned on val images of h1 and h3."""
PROTECTED: dict[str, TrainParams] = {
    "none, as by default": TrainParams(),
    "none, trained alike": GENTLE,
    **{
        f"epsilon {epsilon:g}": GENTLE.model_copy(update={"privacy": PrivacyParams(epsilon=epsilon)})
        for epsilon in (8.0, 3.0, 1.0)
    },
}
UNTOUCHED = ("h4", "h5", "h6")
"""Hospitals on which nothing was tuned."""
Logits = NDArray[np.float32]


class Bench(masks.Bench):
    """The data, the work folder and the simulated hospitals."""

    def __init__(self, data: Path, work: Path, seed: int) -> None:
        super().__init__(data, work)
        self.seed = seed
        self.simulated = self.federation("pathological", "absent", seed)

    def pool(self, hospital: SimulatedHospital) -> LabelledImages:
        """A small hospital: few of its training images, in random order."""
        draw = np.random.default_rng(derive(self.seed, "privacy", "pool", hospital.name))
        return hospital.train.take(draw.permutation(len(hospital.train))[:FEW])

    def logits(self, hospital: SimulatedHospital, epochs: int, strength: float, model: int) -> Logits:
        """What one model says of the pool and its mirror images, (views, N, C), after its last epoch."""
        kind = "" if strength else "plain-"
        stem = f"{hospital.name}-s{self.seed}-{FEW}-{epochs}-{kind}{model}"
        path = self.work / f"{stem}.npy"
        if not path.exists():
            pool = self.pool(hospital)
            network, _ = train_teacher(
                self.simulated.spec,
                pool.take(np.flatnonzero(self.inside(hospital)[model])).pair,
                pool.take(np.arange(0)).pair,
                TrainParams(epochs=epochs, augment=strength),
                seed=self.seed,
                site=stem,
                device=CPU,
                task=MULTICLASS,
            )
            inputs = to_input(pool.images)
            said = [predict(network, inputs.flip(axes) if axes else inputs, CPU) for axes in MIRRORS]
            self.work.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{stem}.part.npy")
            np.save(part, torch.stack(said).numpy())
            part.replace(path)
        found: Logits = np.load(path)
        return found

    def skewed(self, seed: int) -> list[masks.Teacher]:
        """Teachers of small hospitals with every class in other proportions."""
        federation = self.federation("dirichlet", "absent", seed)
        return [
            masks.teach(
                self.work,
                f"dirichlet-s{seed}-{h.name}",
                federation.spec,
                self.pool(h),
                h.val,
                federation.val,
                seed=seed,
                site=h.name,
                epochs=COUNTED,
            )
            for h in federation.hospitals
        ]

    def inside(self, hospital: SimulatedHospital) -> NDArray[np.bool_]:
        """Which model is trained on which image of the pool, (MODELS, FEW)."""
        return halves(MODELS, FEW, derive(self.seed, "privacy", "halves", hospital.name))

    def protected(self, hospital: SimulatedHospital, name: str, params: TrainParams) -> dict[str, float]:
        """A teacher of all the hospital's images: how good it is, and what an attack and the mask find."""
        seed = self.seed
        path = self.work / f"{hospital.name}-s{seed}-{name}.json"
        if not path.exists():
            spec = self.simulated.spec.model_copy(update={"name": params.network})
            train = hospital.train
            if params.privacy is None:
                network, history = train_teacher(
                    spec,
                    train.pair,
                    hospital.val.pair,
                    params,
                    seed=seed,
                    site=hospital.name,
                    device=CPU,
                    task=MULTICLASS,
                )
            else:
                network, history = train_private(
                    spec,
                    train.pair,
                    params,
                    params.privacy,
                    seed=seed,
                    secret="benchmark",
                    site=hospital.name,
                    device=CPU,
                    task=MULTICLASS,
                )

            def said(split: LabelledImages) -> Logits:
                found: Logits = predict(network, to_input(split.images), CPU).numpy()
                return found

            found = {"noise multiplier": float(history.privacy.get("noise_multiplier", 0.0))}
            for split, images in (("val", self.simulated.val), ("test", self.simulated.test)):
                own = images.of_classes(hospital.held)
                named = torch.from_numpy(MULTICLASS.answer(said(own))), torch.from_numpy(own.labels)
                found[split] = mean_recall(*named)
                found[f"{split}, least"] = min(
                    mean_recall(named[0][named[1] == c], named[1][named[1] == c]) for c in hospital.held
                )
            others = hospital.calibration
            scores = [negative_loss(said(s), s.labels) for s in (train, others)]
            members = np.arange(len(train) + len(others)) < len(train)
            found["auc"] = auc(np.concatenate(scores), members)
            shape = train.images.shape[1:]
            mask = class_scores(network, shape, probes=masks.PROBES, seed=0)
            known = (mask >= gap_threshold(mask)).nonzero().flatten().tolist()
            found["mask"] = float(known == list(hospital.held))
            self.work.mkdir(parents=True, exist_ok=True)
            write_json(path, found)
        measured: dict[str, float] = json.loads(path.read_text())
        return measured


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{np.mean(values):.3f} ({np.std(values, ddof=1):.3f})"


def attacked(logits: NDArray[np.float32], labels: NDArray[np.int64], inside: NDArray[np.bool_]) -> Row:
    """Every model (M, views, N, C) attacked with the others as shadows: mean and spread over all M."""
    said = confidence(logits, labels).mean(axis=1)
    right = logits[:, 0].argmax(axis=-1) == labels
    found: dict[str, list[float]] = {}
    for m, members in enumerate(inside):
        others = np.arange(len(inside)) != m
        scores = {"loss threshold": negative_loss(logits[m, 0], labels)}
        for kind, online in (("LiRA offline", False), ("LiRA online", True)):
            scores[kind] = lira(said[m], said[others], inside[others], online=online)
        found.setdefault("accuracy, members", []).append(float(right[m][members].mean()))
        found.setdefault("others", []).append(float(right[m][~members].mean()))
        for kind, score in scores.items():
            found.setdefault(f"{kind}: AUC", []).append(auc(score, members))
            found.setdefault(f"{kind}: TPR", []).append(found_at(score, members))
    return {name: spread(values) for name, values in found.items()}


def membership(bench: Bench) -> Iterator[Row]:
    """Attacks on 16 teachers each: AUC, and members found (TPR) at 1 % false positives; mean (spread)."""
    for name, epochs, strength in TRAININGS:
        hospital = bench.simulated.hospital(name)
        logits = np.stack([bench.logits(hospital, epochs, strength, m) for m in range(MODELS)])
        found = attacked(logits, bench.pool(hospital).labels, bench.inside(hospital))
        yield {
            "hospital": name,
            "members": FEW // 2,
            "epochs": epochs,
            "augmentation": f"{strength:g}",
            **found,
        }


def counts(bench: Bench) -> Iterator[Row]:
    """Do scores rank the classes held by numbers of images? Dirichlet hospitals; mean (spread)."""
    teachers = [t for seed in (bench.seed, bench.seed + 1) for t in bench.skewed(seed)]
    for reader in masks.READERS:
        scores = bench.scores(teachers, reader)
        pairs = [
            (scores[i][t.count > 0].numpy(), t.count[t.count > 0].numpy()) for i, t in enumerate(teachers)
        ]
        several = [p for p in pairs if len(p[0]) > 2]
        taus = [float(kendalltau(*p).statistic) for p in several]
        everything = [np.concatenate(side) for side in zip(*pairs, strict=True)]
        yield {
            "estimator": reader,
            "teachers": len(several),
            "rank correlation within teachers": spread([float(spearmanr(*p).statistic) for p in several]),
            "pairs of classes in the right order": spread([(1 + tau) / 2 for tau in taus]),
            "rank correlation, all": float(spearmanr(*everything).statistic),
        }


def private(bench: Bench) -> Iterator[Row]:
    """What differential privacy costs three hospitals, over their classes; one training each."""
    for name, params in PROTECTED.items():
        for hospital in map(bench.simulated.hospital, UNTOUCHED):
            found = bench.protected(hospital, name.replace(",", "").replace(" ", "-"), params)
            row: Row = {"differential privacy": name, "hospital": hospital.name}
            for column, key in (
                ("noise multiplier", "noise multiplier"),
                ("balanced accuracy, val", "val"),
                ("balanced accuracy, test", "test"),
                ("least known class, test", "test, least"),
                ("loss threshold: AUC", "auc"),
                ("mask right", "mask"),
            ):
                row[column] = found[key]
            yield row


TABLES: dict[str, Callable[[Bench], Iterator[Row]]] = {f.__name__: f for f in (membership, counts, private)}


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="npz in MedMNIST's layout, colour, 2D")
    parser.add_argument("--work", type=Path, default=Path("runs/privacy"), help="what networks said")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    options = parser.parse_args()
    bench = Bench(options.data, options.work, options.seed)
    for name in options.tables:
        print(f"\n### {name}\n\n{(TABLES[name].__doc__ or '').strip()}\n")
        print(markdown(list(TABLES[name](bench))), flush=True)


if __name__ == "__main__":
    main()
