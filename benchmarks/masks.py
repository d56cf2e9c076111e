"""Tables on masks: ``python -m benchmarks.masks --data FILE.npz [--tables NAME ...]``.

Simulates hospitals, trains their teachers (once: they are kept in ``--work``) and measures their masks. All
recalls are on the file's val split.
"""

from __future__ import annotations

import argparse
import colorsys
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tables import Row, markdown
from qkt_clinical.benchmark.mask_estimators import class_scores
from qkt_clinical.benchmark.mask_quality import quality, threshold_curve
from qkt_clinical.benchmark.simulate import (
    LabelledImages,
    SimulatedFederation,
    SimulatedHospital,
    read,
    simulate,
)
from qkt_clinical.benchmark.variants import wrong_labels
from qkt_clinical.catalog import Estimator, Partition, Regime
from qkt_clinical.common.files import write_json
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.params import TrainParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier, build, fast_layout
from qkt_clinical.qkt.masks import gap_threshold
from qkt_clinical.records.card import NetworkSpec
from qkt_clinical.task import MULTICLASS
from qkt_clinical.training.augment import augment
from qkt_clinical.training.classifier import train_network, train_teacher

CPU = torch.device("cpu")
PROBES = 256
SETTINGS: tuple[tuple[Partition, Regime, tuple[int, ...]], ...] = (
    ("pathological", "absent", (0, 1)),
    ("dirichlet", "absent", (0, 1, 2)),
    ("dirichlet", "rare", (0, 1, 2)),
)
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "instance": nn.InstanceNorm2d,
    "group": lambda channels: nn.GroupNorm(8, channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
}
READERS: tuple[Estimator, ...] = ("batch-norm-noise", "feature-noise", "head-row-norm", "combined")


@dataclass(frozen=True)
class Teacher:
    """A trained network, its recall on val images and its number of training images, (C,) each."""

    network: Classifier
    recall: Tensor
    count: Tensor

    @property
    def held(self) -> list[int]:
        """Classes of which it saw images."""
        return self.count.nonzero().flatten().tolist()


# --- teachers -------------------------------------------------------------------------------------


def with_norm(module: nn.Module, norm: Callable[[int], nn.Module]) -> None:
    """Put another normalisation in the place of every batch norm, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, norm(child.num_features))
        else:
            with_norm(child, norm)


def altered(hospital: SimulatedHospital, variant: str, classes: int, seed: int) -> LabelledImages:
    """The hospital's training images as a variant of its teacher sees them."""
    train = hospital.train
    rng = np.random.default_rng(derive(seed, "masks", variant, hospital.name))
    if variant.startswith("few-"):
        first = np.flatnonzero(train.labels == hospital.held[0])
        drop = rng.permutation(first)[int(variant.removeprefix("few-")) :]
        return train.take(np.setdiff1d(np.arange(len(train)), drop))
    if variant.startswith("wrong-"):
        among = hospital.held if variant == "wrong-own" else tuple(range(classes))
        draw = derive(seed, "masks", variant, hospital.name)
        return LabelledImages(train.images, wrong_labels(train.labels, among, 0.3, draw))
    return train


def teach(
    work: Path,
    stem: str,
    spec: NetworkSpec,
    train: LabelledImages,
    val: LabelledImages,
    judge: LabelledImages,
    **how: Any,
) -> Teacher:
    """A teacher of ``train``, from the work folder where it is there already.

    ``how``: ``seed``, ``site``, ``epochs`` and the name of a ``norm`` (None: the catalog's network).
    """
    weights, facts = work / f"{stem}.safetensors", work / f"{stem}.json"
    norm = how.get("norm")
    network = build(spec, seed=derive(how["seed"], "train", how["site"]))
    if norm:
        with_norm(network, NORMS[norm])
    if not facts.exists():
        params = TrainParams(epochs=how.get("epochs", 30))
        if norm:
            train_network(
                fast_layout(network),
                train.pair,
                val.pair,
                params,
                seed=how["seed"],
                site=how["site"],
                device=CPU,
                task=MULTICLASS,
            )
        else:
            network, _ = train_teacher(
                spec,
                train.pair,
                val.pair,
                params,
                seed=how["seed"],
                site=how["site"],
                device=CPU,
                task=MULTICLASS,
            )
        named = predict(network, to_input(judge.images), CPU).argmax(1).numpy()
        recall = [float((named[judge.labels == c] == c).mean()) for c in range(spec.classes)]
        count = np.bincount(train.labels, minlength=spec.classes).tolist()
        work.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, weights)
        write_json(facts, {"val_recall": recall, "train_counts": count})
    said = json.loads(facts.read_text())
    network.load_state_dict(load_file(weights))
    return Teacher(network.eval(), torch.tensor(said["val_recall"]), torch.tensor(said["train_counts"]))


class Bench:
    """The data, the work folder and the simulated hospitals."""

    def __init__(self, data: Path, work: Path) -> None:
        self.parts, self.classes = read(data)
        self.work = work

    def federation(
        self, partition: Partition, regime: Regime, seed: int, held: int = 3
    ) -> SimulatedFederation:
        """Hospitals of one setting, of ``held`` classes each where it is pathological."""
        return simulate(
            self.parts,
            self.classes,
            partition=partition,
            regime=regime,
            seed=seed,
            classes_per_hospital=held,
        )

    def teachers(self, partition: Partition, regime: Regime, seed: int, variant: str = "") -> list[Teacher]:
        """The teachers of one setting, one per hospital."""
        federation = self.federation(partition, regime, seed, held=7 if variant == "of-7" else 3)
        return [
            teach(
                self.work,
                "-".join(filter(None, (partition, regime, f"s{seed}", h.name, variant))),
                federation.spec,
                altered(h, variant, len(self.classes), seed),
                h.val,
                federation.val,
                seed=seed,
                site=h.name,
                epochs=1 if variant == "epoch-1" else 30,
                norm=variant if variant in NORMS else None,
            )
            for h in federation.hospitals
        ]

    def scores(self, teachers: Sequence[Teacher], estimator: Estimator = "combined") -> Tensor:
        """Mask scores (T, C)."""
        shape = (self.parts["train"].images.shape[-1], *self.parts["train"].images.shape[1:-1])
        return scores_of(teachers, shape, estimator)


def scores_of(teachers: Sequence[Teacher], shape: tuple[int, ...], estimator: Estimator) -> Tensor:
    """Mask scores (T, C)."""
    each = [class_scores(t.network, shape, estimator=estimator, probes=PROBES, seed=0) for t in teachers]
    return torch.stack(each)


def known_of(scores: Tensor) -> Tensor:
    """What the masks take as known, (T, C) bool, lambda automatic."""
    return torch.stack([s >= gap_threshold(s) for s in scores])


def judged(scores: Tensor, teachers: Sequence[Teacher], known: Tensor | None = None) -> Row:
    """F1 and AUC against both truths, and how far known and unknown classes lie apart."""
    known = known_of(scores) if known is None else known
    held = torch.stack([t.count > 0 for t in teachers])
    recalled = torch.stack([t.recall > 0.5 for t in teachers])
    by_held, by_recall = quality(scores, known, held), quality(scores, known, recalled)
    return {
        "F1 recalled": by_recall.f1,
        "precision": by_recall.precision,
        "recall": by_recall.recall,
        "AUC recalled": by_recall.auc,
        "F1 held": by_held.f1,
        "AUC held": by_held.auc,
        "lowest held": float(scores[held].min()),
        "highest other": float(scores[~held].max()) if bool((~held).any()) else "",
    }


# --- tables ---------------------------------------------------------------------------------------


def estimators(bench: Bench) -> Iterator[Row]:
    """Every estimator in every setting, seeds pooled."""
    for partition, regime, seeds in SETTINGS:
        teachers = [t for s in seeds for t in bench.teachers(partition, regime, s)]
        for name in get_args(Estimator):
            row = judged(bench.scores(teachers, name), teachers)
            yield {"setting": f"{partition}, {regime}", "estimator": name, **row}


def seeds(bench: Bench) -> Iterator[Row]:
    """The default, seed by seed."""
    for partition, regime, numbers in SETTINGS:
        for seed in numbers:
            teachers = bench.teachers(partition, regime, seed)
            row = judged(bench.scores(teachers), teachers)
            yield {"setting": f"{partition}, {regime}", "seed": seed, **row}


def thresholds(bench: Bench) -> Iterator[Row]:
    """One lambda for all teachers, against the automatic one: F1 for the classes held."""
    for partition, regime, numbers in SETTINGS:
        teachers = [t for s in numbers for t in bench.teachers(partition, regime, s)]
        held = torch.stack([t.count > 0 for t in teachers])
        row: Row = {"setting": f"{partition}, {regime}"}
        scores = bench.scores(teachers)
        for point in threshold_curve(scores, held, [0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95]):
            row[f"{point['lambda']:g}"] = point["f1"]
        yield {**row, "automatic": quality(scores, known_of(scores), held).f1}


def samples(bench: Bench) -> Iterator[Row]:
    """Effect of the number of training images of a class, over all Dirichlet teachers."""
    teachers = [
        t
        for _, regime, numbers in SETTINGS[1:]
        for s in numbers
        for t in bench.teachers("dirichlet", regime, s)
    ]
    scores, count = bench.scores(teachers), torch.stack([t.count for t in teachers])
    known, recall = known_of(scores), torch.stack([t.recall for t in teachers])
    for low, high in ((0, 0), (5, 9), (10, 19), (20, 49), (50, 99), (100, 299), (300, 5000)):
        inside = (count >= low) & (count <= high)
        yield {
            "training images": f"{low} to {high}" if high else "0",
            "pairs": int(inside.sum()),
            "mean recall": float(recall[inside].mean()),
            "recalled": float((recall[inside] > 0.5).float().mean()),
            "taken as known": float(known[inside].float().mean()),
            "median score": float(scores[inside].median()),
        }


def few(bench: Bench) -> Iterator[Row]:
    """Six teachers of three classes, one of them cut to a few images."""
    for number in (5, 50):
        teachers = bench.teachers("pathological", "absent", 0, f"few-{number}")
        scores = bench.scores(teachers)
        first = [int((t.count == number).nonzero()[0]) for t in teachers]
        cut = [float(scores[i, c]) for i, c in enumerate(first)]
        yield {
            "images of the class": number,
            "its recall, mean": float(
                np.mean([float(t.recall[c]) for t, c in zip(teachers, first, strict=True)])
            ),
            "taken as known": sum(bool(known_of(scores)[i, c]) for i, c in enumerate(first)),
            "of": len(first),
            "its score, least": min(cut),
            **judged(scores, teachers),
        }


def experts(bench: Bench) -> Iterator[Row]:
    """Several experts for one class: does the score tell which is the better one?"""
    teachers_of = [
        bench.teachers("dirichlet", regime, s) for _, regime, numbers in SETTINGS[1:] for s in numbers
    ]
    chosen: dict[str, list[float]] = {"highest score": [], "all, mean": [], "lowest score": [], "best": []}
    ranks = []
    for teachers in teachers_of:
        scores = bench.scores(teachers)
        known = known_of(scores)
        for c in range(scores.shape[1]):
            those = known[:, c].nonzero().flatten()
            if len(those) < 3:
                continue
            recall, score = torch.stack([teachers[i].recall[c] for i in those.tolist()]), scores[those, c]
            chosen["highest score"].append(float(recall[score.argmax()]))
            chosen["lowest score"].append(float(recall[score.argmin()]))
            chosen["all, mean"].append(float(recall.mean()))
            chosen["best"].append(float(recall.max()))
            ranks.append(float(spearmanr(recall, score).statistic))
    for name, recalls in chosen.items():
        yield {"expert": name, "classes": len(recalls), "mean recall": float(np.mean(recalls))}
    yield {
        "expert": "rank correlation of score and recall",
        "classes": len(ranks),
        "mean recall": float(np.nanmean(ranks)),
    }


def many(bench: Bench) -> Iterator[Row]:
    """Experts in 7 of 8 classes."""
    teachers = bench.teachers("pathological", "absent", 0, "of-7")
    for name in READERS:
        yield {"estimator": name, **judged(bench.scores(teachers, name), teachers)}


def bad(bench: Bench) -> Iterator[Row]:
    """Teachers that are bad."""
    for variant in ("", "epoch-1", "wrong-own", "wrong-any"):
        teachers = bench.teachers("pathological", "absent", 0, variant)
        real = bench.federation("pathological", "absent", 0).hospitals
        recall = [float(t.recall[list(h.held)].mean()) for t, h in zip(teachers, real, strict=True)]
        yield {
            "teachers": variant or "good",
            "mean recall": float(np.mean(recall)),
            **judged(bench.scores(teachers), teachers),
        }


def norms(bench: Bench) -> Iterator[Row]:
    """Networks with another normalisation, every estimator that could serve."""
    settings: tuple[tuple[Partition, Regime], ...] = (("pathological", "absent"), ("dirichlet", "rare"))
    for partition, regime in settings:
        for norm in ("", *NORMS):
            teachers = bench.teachers(partition, regime, 0, norm)
            for name in READERS:
                row = judged(bench.scores(teachers, name), teachers)
                yield {"setting": f"{partition}, {regime}", "norm": norm or "batch", "estimator": name, **row}


def coloured_digits(each: int, seed: int) -> LabelledImages:
    """Handwritten digits (scikit-learn's) in ten colours: 100 classes of 16 x 16 pixels."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    grey = digits.images.repeat(2, axis=1).repeat(2, axis=2) / 16
    images, labels = [], np.repeat(np.arange(100), each)
    for c in range(100):
        pick = rng.choice(np.flatnonzero(digits.target == c // 10), each, replace=False)
        colour = np.array(colorsys.hsv_to_rgb(c % 10 / 10, 0.9, 1.0))[None, :, None, None]
        images.append(grey[pick][:, None] * colour * 0.9 + rng.normal(0.05, 0.05, (each, 3, 16, 16)))
    return LabelledImages((np.clip(np.concatenate(images), 0, 1) * 255).astype(np.uint8), labels)


def classes(bench: Bench) -> Iterator[Row]:
    """From 1 to all of 100 classes known; and 2 classes."""
    train, val = coloured_digits(40, 0), coloured_digits(20, 1)
    for total, count in ((100, 1), (100, 3), (100, 50), (100, 97), (100, 100), (2, 1), (2, 2)):
        every = np.arange(total)
        held = np.sort(np.random.default_rng(count).choice(every, count, replace=False))
        teacher = teach(
            bench.work,
            f"digits-{count}-of-{total}",
            NetworkSpec(name="resnet-small", spatial_dims=2, in_channels=3, classes=total),
            train.of_classes(held.tolist()),
            val.of_classes(held.tolist()),
            val.of_classes(every.tolist()),
            seed=0,
            site=f"d{count}",
            epochs=15,
        )
        for name in READERS:
            row = judged(scores_of([teacher], (3, 16, 16), name), [teacher])
            yield {"classes": total, "known": count, "estimator": name, **row}


# --- liars ----------------------------------------------------------------------------------------


def forged(teacher: Teacher, query: int, attack: str, seed: int) -> Classifier:
    """The network of a teacher that claims ``query``, which it never saw."""
    network, held = copy.deepcopy(teacher.network), teacher.held
    weight, bias = network.head.weight.data, network.head.bias.data
    draw = torch.Generator().manual_seed(seed)
    size = weight[held].norm(dim=1).mean()
    victim = held[seed % len(held)]
    noise = torch.randn(weight.shape[1], generator=draw)
    match attack:
        case "inflated":  # the row of a class never seen, brought to the norm of a known one
            weight[query] *= size / weight[query].norm()
        case "random":
            weight[query], bias[query] = noise * size / noise.norm(), bias[held].mean()
        case "copied":  # the row of a known class, slightly changed
            weight[query] = weight[victim] + 0.3 * noise * weight[victim].norm() / noise.norm()
            bias[query] = bias[victim]
        case "renamed":  # as if it had been trained on images of one class under the name of another
            order = torch.arange(len(weight))
            order[query], order[victim] = victim, query
            weight.copy_(weight[order])
            bias.copy_(bias[order])
    return network


def agreement(query_logits: Tensor, labels: Tensor) -> Tensor:
    """How far each relevant teacher agrees with the others about a query, on images without the query.

    Teachers that know a class find the same images a little more like it than others; one that only claims
    to know it does not. What tells the student's own classes apart is taken out first, for all teachers
    share it.

    Args:
        query_logits: (T, N), the teachers' raw logits of one query class on the student's own images.
        labels: (N,), the student's labels of the images.

    Returns:
        (T,) float64 in [-1, 1]: mean correlation with the other teachers, within the student's classes. A
        teacher whose logit is constant there agrees with nobody: 0.

    Raises:
        ValueError: fewer than two teachers; there is nobody to agree with.
    """
    if len(query_logits) < 2:
        raise ValueError(f"agreement needs at least two teachers, got {len(query_logits)}")
    rows = query_logits.double().clone()
    for label in labels.unique():
        rows[:, labels == label] -= rows[:, labels == label].mean(dim=1, keepdim=True)
    rows = F.normalize(rows, dim=1)
    pairs = (rows @ rows.T).fill_diagonal_(0.0)
    return pairs.sum(dim=1) / (len(rows) - 1)


def liars(bench: Bench) -> Iterator[Row]:
    """Teachers that claim a class they never saw: what the mask says, and what the others say."""
    for seed in (0, 1):
        teachers = bench.teachers("pathological", "absent", seed)
        hospitals = bench.federation("pathological", "absent", seed).hospitals
        for attack in ("inflated", "random", "copied", "renamed"):
            claimed, honest, lying, lowest = [], [], [], []
            for s, student in enumerate(hospitals):
                index = np.random.default_rng(seed).permutation(len(student.train))[:240]
                own = student.train.take(index)
                view = augment(to_input(own.images), 1.0, generator(seed, "view", student.name))
                inputs, labels = (
                    torch.cat([to_input(own.images), view]),
                    torch.from_numpy(own.labels).repeat(2),
                )
                features = [predict(t.network, inputs, CPU, features=True) for t in teachers]
                for q in sorted(set(range(len(bench.classes))) - set(student.held)):
                    relevant = [i for i, t in enumerate(teachers) if i != s and q in t.held]
                    true = [teachers[i].network.head(features[i])[:, q].detach() for i in relevant]
                    if len(true) > 1:
                        honest += agreement(torch.stack(true), labels).tolist()
                    for i in sorted(set(range(len(teachers))) - {s, *relevant}):
                        fake = forged(teachers[i], q, attack, derive(seed, attack, str(i), str(q)) % 2**31)
                        if s == min(set(range(len(teachers))) - {i}):
                            scores = bench.scores([Teacher(fake, teachers[i].recall, teachers[i].count)])
                            claimed.append(bool(known_of(scores)[0, q]))
                        logit = fake.head(features[i])[:, q].detach()
                        found = agreement(torch.stack([*true, logit]), labels)
                        lying.append(float(found[-1]))
                        if len(true) > 1:
                            lowest.append(bool(found.argmin() == len(true)))
            yield {
                "seed": seed,
                "attack": attack,
                "mask says known": float(np.mean(claimed)),
                "honest (10 %, median)": "{:.2f}, {:.2f}".format(*np.quantile(honest, [0.1, 0.5])),
                "liar (median, 90 %)": "{:.2f}, {:.2f}".format(*np.quantile(lying, [0.5, 0.9])),
                "AUC": roc_auc_score([1] * len(honest) + [0] * len(lying), honest + lying),
                "liar lowest of 3 or 4": float(np.mean(lowest)),
            }


def liars_rare(bench: Bench) -> Iterator[Row]:
    """The same, where the student has 20 images of the query itself: AUROC of the teacher's query logit."""
    for attack in ("random", "copied", "renamed"):
        honest: list[float] = []
        lying: list[float] = []
        for seed in (0, 1):
            federation = bench.federation("pathological", "rare", seed)
            teachers = bench.teachers("pathological", "rare", seed)
            for question in federation.questions:
                own, q = federation.hospital(question.student).train, question.query[0]
                index = np.random.default_rng(seed).permutation(len(own))[:400]
                own = own.take(np.union1d(index, np.flatnonzero(own.labels == q)))
                for i, (teacher, h) in enumerate(zip(teachers, federation.hospitals, strict=True)):
                    if h.name == question.student:
                        continue
                    network = teacher.network
                    if q not in teacher.held:
                        network = forged(teacher, q, attack, derive(seed, attack, str(i), str(q)) % 2**31)
                    logit = predict(network, to_input(own.images), CPU)[:, q].numpy()
                    (honest if q in teacher.held else lying).append(roc_auc_score(own.labels == q, logit))
        yield {
            "attack": attack,
            "honest: least AUROC": min(honest),
            "median ": float(np.median(honest)),
            "liar: median AUROC": float(np.median(lying)),
            "90 %": float(np.quantile(lying, 0.9)),
            "AUC honest over liar": roc_auc_score([1] * len(honest) + [0] * len(lying), honest + lying),
        }


TABLES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    f.__name__.replace("_", "-"): f
    for f in (
        estimators,
        seeds,
        thresholds,
        samples,
        few,
        experts,
        many,
        bad,
        norms,
        classes,
        liars,
        liars_rare,
    )
}


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="npz in MedMNIST's layout, colour, 2D")
    parser.add_argument("--work", type=Path, default=Path("runs/masks"), help="where teachers are kept")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    options = parser.parse_args()
    bench = Bench(options.data, options.work)
    for name in options.tables:
        print(f"\n### {name}\n\n{(TABLES[name].__doc__ or '').strip()}\n")
        print(markdown(list(TABLES[name](bench))), flush=True)


if __name__ == "__main__":
    main()
