"""What the class means in a teacher's bundle tell of the images.

*Membership*: an attacker holds an image and other images of the same class, which is more than most have, and
asks whether the image was one of those whose mean left: by how far it lies where the mean lies away from the
others' mean, in units of their covariance. *Reconstruction*: an attacker holds all images of the class but
one, and their number, subtracts them, and looks which of 100 images the rest is most like.

With the features of an encoder that everybody has, and with those of the networks of a benchmark's run (first
seed), which everybody has who is given the bundle.

    python -m benchmarks.class_means --data pbc28.npz --encoder-weights lite0.safetensors
    python -m benchmarks.class_means --data pbc28.npz --run runs/absent [--attack reconstruction]
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from sklearn.metrics import roc_auc_score
from torch import Tensor

from qkt_clinical.benchmark.runner import WORK, federations_of
from qkt_clinical.benchmark.settings import BenchmarkSettings
from qkt_clinical.benchmark.simulate import channels_first
from qkt_clinical.catalog import EncoderName
from qkt_clinical.common.disclosure import SMALLEST_COUNT
from qkt_clinical.config.params import MeansPrivacy
from qkt_clinical.data.inputs import to_input
from qkt_clinical.datasets.medmnist_file import read_medmnist
from qkt_clinical.models.bundle import load_bundle
from qkt_clinical.models.class_means import feature_bound, noisy_means
from qkt_clinical.models.encoders import encode, load_encoder, shared_features
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier

COUNTS = (5, 20, 50, 100, 200)
OTHERS = 200
"""Images of the class that were not among them."""
SHRINKAGE = 0.1
FALSE_ALARMS = 0.01
EPSILONS = (None, 40.0, 8.0)
CANDIDATES, MISSING = 100, 20
"""Images among which the missing one is looked for; how many take their turn at missing, at most."""
CPU = torch.device("cpu")

Pool = tuple[Tensor, Tensor, float]
"""Features (N, F) of a class's images at one hospital and elsewhere, in random order, and their bound."""


def noisy_mean(members: Tensor, bound: float, epsilon: float | None, *names: object) -> Tensor:
    """The mean (F,) that leaves of features (N, F); of noise that hides that there are any, zeros."""
    if epsilon is None:
        return members.mean(dim=0)
    labels, draw = torch.zeros(len(members), dtype=torch.long), generator(0, "noise", *map(str, names))
    found = noisy_means(members, labels, bound, MeansPrivacy(epsilon=epsilon), 1, draw)
    return found.get(0, torch.zeros(members.shape[1])).double()


def membership(pool: Pool, count: int, epsilon: float | None, number: int) -> tuple[float, float]:
    """AUC, and the share of members found where 1 % of the others are taken for some."""
    here, there, bound = pool
    members, others, known = here[:count], there[:OTHERS], there[OTHERS:]
    return attack(noisy_mean(members, bound, epsilon, number, count), members, others, known)


def reconstruction(pool: Pool, count: int, epsilon: float | None, number: int) -> tuple[float, float]:
    """How like the missing image the rest is, as a cosine about the known ones' mean; how often it is found.

    Found: more like the rest than 99 other images of the class are.
    """
    here, there, bound = pool
    members, others = here[:count], there[: CANDIDATES - 1]
    told = []
    for place in range(min(count, MISSING)):
        known = torch.cat([members[:place], members[place + 1 :]])
        rest = count * noisy_mean(members, bound, epsilon, number, count, place) - known.sum(dim=0)
        away = torch.cat([members[place : place + 1], others]) - known.mean(dim=0)
        alike = torch.nn.functional.cosine_similarity(away, rest - known.mean(dim=0), dim=1)
        told.append((float(alike[0]), float(alike.argmax() == 0)))
    cosine, found = np.mean(told, axis=0)
    return float(cosine), float(found)


def attack(mean: Tensor, members: Tensor, others: Tensor, known: Tensor) -> tuple[float, float]:
    """AUC, and the share of members found where 1 % of the others are taken for some.

    Args:
        mean: (F,) that left; all other arguments (N, F) features.
        known: what the attacker compares with.
    """
    centre, covariance = known.mean(dim=0), torch.cov(known.T)
    level = covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)
    away = torch.linalg.solve((1 - SHRINKAGE) * covariance + SHRINKAGE * level, mean - centre)
    inside, outside = ((part - centre) @ away for part in (members, others))
    truth = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
    auc = float(roc_auc_score(truth, torch.cat([inside, outside]).numpy()))
    return auc, float((inside > outside.quantile(1 - FALSE_ALARMS)).double().mean())


def shuffled(features: Tensor, *names: str) -> Tensor:
    """In random order."""
    return features[torch.randperm(len(features), generator=generator(0, "attack", *names))].double()


def by_encoder(data: Path, name: EncoderName, weights: Path, side: int, images: int) -> Iterator[Pool]:
    """One for each class: the first half of its images is the hospital's."""
    loaded, part = load_encoder(name, weights), read_medmnist(data)["train"]
    for label in np.unique(part.labels):
        index = np.flatnonzero(part.labels == label)[:images]
        found = shared_features(encode(loaded, channels_first(part.images[index]), side, CPU))
        order = shuffled(found, str(label))
        yield order[: len(order) // 2], order[len(order) // 2 :], 1.0


def by_networks(data: Path, run: Path) -> Iterator[Pool]:
    """One for each class of each hospital, by the features of its own network."""
    federation = federations_of([data], BenchmarkSettings())(0)
    for hospital in federation.hospitals:
        network = load_bundle(run / WORK / "seed-0" / "full" / hospital.name).network
        bound = feature_bound(network, hospital.train.images, "unit", CPU)
        others = [h.train for h in federation.hospitals if h is not hospital]

        def features(images: np.ndarray, network: Classifier = network) -> Tensor:
            return predict(network, to_input(images), CPU, features=True)

        for label in hospital.held:
            here = features(hospital.train.images[hospital.train.labels == label])
            there = features(np.concatenate([part.images[part.labels == label] for part in others]))
            names = hospital.name, str(label)
            yield shuffled(here, *names), shuffled(there, *names), bound


def main(
    data: Annotated[Path, typer.Option(help="Labelled npz in MedMNIST's layout.")],
    encoder_weights: Annotated[Path | None, typer.Option(help="From 'qkt encoder import'.")] = None,
    run: Annotated[Path | None, typer.Option(help="Of 'qkt benchmark' on the same file.")] = None,
    encoder: EncoderName = "efficientnet-lite0",
    side: int = 112,
    images: Annotated[int, typer.Option(help="Of a class, at most, with an encoder.")] = 900,
    kind: Annotated[Literal["membership", "reconstruction"], typer.Option("--attack")] = "membership",
) -> None:
    """Print a table: images of a class and what an attack finds, of exact means and with noise."""
    if (encoder_weights is None) == (run is None):
        raise typer.BadParameter("give --encoder-weights or --run")
    pools = list(
        by_networks(data, run) if run else by_encoder(data, encoder, encoder_weights or Path(), side, images)
    )
    judge, *shown = {
        "membership": (membership, "AUC", "found at 1 %"),
        "reconstruction": (reconstruction, "likeness", f"found of {CANDIDATES}"),
    }[kind]
    names = [n for e in EPSILONS for n in (f"{shown[0]}, {f'epsilon {e:g}' if e else 'exact'}", shown[1])]
    print("| images of the class | means | " + " | ".join(names) + " |")
    print("| --- " * (2 + len(names)) + "|")
    for count in COUNTS:
        usable = [p for p in pools if len(p[0]) >= count and len(p[1]) >= 2 * OTHERS]
        row = []
        for epsilon in EPSILONS:
            figures = [judge(pool, count, epsilon, number) for number, pool in enumerate(usable)]
            row += [f"{value:.2f}" for value in np.mean(figures, axis=0)]
        print(f"| {count} | {len(usable)} | " + " | ".join(row) + " |", flush=True)
    print(f"\nA class of fewer than {SMALLEST_COUNT} images has no mean in a bundle.")


if __name__ == "__main__":
    typer.run(main)
