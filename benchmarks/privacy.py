"""What a teacher gives away: ``python -m benchmarks.privacy --data FILE.npz [--tables NAME ...]``.

Networks are trained once; what they say of the images is kept in ``--work``. All images of the attacks are of
the file's train split.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

from benchmarks import masks
from benchmarks.membership import auc, confidence, found_at, halves, lira, negative_loss
from benchmarks.tables import Row, markdown
from qkt_clinical.benchmark.simulate import Hospital, Split
from qkt_clinical.card import MIRRORS
from qkt_clinical.config import TrainParams
from qkt_clinical.seeding import derive
from qkt_clinical.training import predict, to_input, train_teacher

CPU = torch.device("cpu")
MODELS = 16
"""Per hospital and training: each is attacked once, with the 15 others as shadow models."""
FEW = 400
"""Images of a small hospital, half of which train a model."""
TRAININGS: tuple[tuple[str, int | None, int], ...] = (
    *(("h1", FEW, epochs) for epochs in (5, 15, 30, 60)),
    ("h4", None, 30),
)
"""Hospital, images (None: all, trained as the product does) and epochs."""
COUNTED = 15
"""Epochs of the teachers whose masks are held against numbers of images."""
Logits = NDArray[np.float32]


class Bench(masks.Bench):
    """The data, the work folder and the simulated hospitals."""

    def __init__(self, data: Path, work: Path, seed: int) -> None:
        super().__init__(data, work)
        self.seed = seed
        self.simulated = self.federation("pathological", "absent", seed)

    def pool(self, hospital: Hospital, images: int | None) -> Split:
        """So many of the hospital's training images, in random order; None: all."""
        draw = np.random.default_rng(derive(self.seed, "privacy", "pool", hospital.name))
        return hospital.train.take(draw.permutation(len(hospital.train))[:images])

    def logits(self, hospital: Hospital, images: int | None, epochs: int, model: int) -> Logits:
        """What one model says of the pool and its mirror images, (views, N, C).

        With ``images`` the last epoch counts; of all images the best on the hospital's part of the val split,
        as the product trains.
        """
        stem = f"{hospital.name}-s{self.seed}-{images or 'all'}-{epochs}-{model}"
        path = self.work / f"{stem}.npy"
        if not path.exists():
            pool = self.pool(hospital, images)
            train = pool.take(np.flatnonzero(self.inside(hospital, images)[model]))
            val = hospital.val.take(np.arange(0)) if images else hospital.val
            network, _ = train_teacher(
                self.simulated.spec,
                train.pair,
                val.pair,
                TrainParams(epochs=epochs),
                seed=self.seed,
                site=stem,
                device=CPU,
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
                self.pool(h, FEW),
                h.val,
                federation.val,
                seed=seed,
                site=h.name,
                epochs=COUNTED,
            )
            for h in federation.hospitals
        ]

    def inside(self, hospital: Hospital, images: int | None) -> NDArray[np.bool_]:
        """Which model is trained on which image of the pool, (MODELS, N)."""
        count = images or len(hospital.train)
        return halves(MODELS, count, derive(self.seed, "privacy", "halves", hospital.name))


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
    for name, images, epochs in TRAININGS:
        hospital = bench.simulated.hospital(name)
        logits = np.stack([bench.logits(hospital, images, epochs, m) for m in range(MODELS)])
        inside = bench.inside(hospital, images)
        yield {
            "hospital": name,
            "members": inside.shape[1] // 2,
            "epochs": epochs if images else f"{epochs}, best on val",
            **attacked(logits, bench.pool(hospital, images).labels, inside),
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


TABLES: dict[str, Callable[[Bench], Iterator[Row]]] = {f.__name__: f for f in (membership, counts)}


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
