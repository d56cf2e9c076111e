"""What the class means of a shared encoder's features tell of who was among the images.

An attacker holds an image and other images of the same class and hospital, which is more than most have, and
asks whether the image was one of those whose mean left: by how far it lies where the mean lies away from the
others' mean, in units of their covariance. Mean over the classes of the file.

    python -m benchmarks.encoder_means --data pbc28.npz --encoder-weights lite0.safetensors
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from sklearn.metrics import roc_auc_score
from torch import Tensor

from qkt_clinical.benchmark.simulate import channels_first
from qkt_clinical.catalog import EncoderName
from qkt_clinical.common.disclosure import SMALLEST_COUNT
from qkt_clinical.config.params import SharedEncoderParams
from qkt_clinical.datasets.medmnist_file import read_medmnist
from qkt_clinical.models.encoders import encode, load_encoder, shared_features
from qkt_clinical.models.generator import generator
from qkt_clinical.models.private_means import private_means

COUNTS = (5, 20, 50, 100, 300)
OTHERS = 200
"""Images of the class that were not among them."""
SHRINKAGE = 0.1
FALSE_ALARMS = 0.01
DELTA: float = SharedEncoderParams.model_fields["delta"].default


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


def main(
    data: Annotated[Path, typer.Option(help="Labelled npz in MedMNIST's layout.")],
    encoder_weights: Annotated[Path, typer.Option(help="From 'qkt encoder import'.")],
    encoder: EncoderName = "efficientnet-lite0",
    side: int = 112,
    images: Annotated[int, typer.Option(help="Of a class, at most.")] = 900,
) -> None:
    """Print a table: images of a class, AUC and share found, of exact means and with noise."""
    loaded, part = load_encoder(encoder, encoder_weights), read_medmnist(data)["train"]
    by_class = []
    for label in np.unique(part.labels):
        index = np.flatnonzero(part.labels == label)[:images]
        found = encode(loaded, channels_first(part.images[index]), side, torch.device("cpu"))
        by_class.append(shared_features(found).double())
    epsilons = (None, 8.0, 2.0)
    names = [n for e in epsilons for n in (f"AUC, {f'epsilon {e:g}' if e else 'exact'}", "found at 1 %")]
    print("| images of the class | " + " | ".join(names) + " |")
    print("| --- " * (1 + len(names)) + "|")
    for count in COUNTS:
        row = []
        for epsilon in epsilons:
            figures = []
            for number, features in enumerate(by_class):
                draw = generator(0, "attack", str(number), str(count))
                order = torch.randperm(len(features), generator=draw)
                members, others, known = (
                    features[order[:count]],
                    features[order[count : count + OTHERS]],
                    features[order[count + OTHERS :]],
                )
                if len(known) < OTHERS:
                    continue
                mean = members.mean(dim=0)
                if epsilon is not None:
                    labels = torch.zeros(count, dtype=torch.long)
                    means = private_means(members, labels, epsilon=epsilon, delta=DELTA, least=1, draw=draw)
                    mean = means.get(0, torch.zeros(len(mean))).double()
                figures.append(attack(mean, members, others, known))
            row += [f"{value:.2f}" for value in np.mean(figures, axis=0)]
        print(f"| {count} | " + " | ".join(row) + " |", flush=True)
    print(f"\nA class of fewer than {SMALLEST_COUNT} images has no mean in a bundle.")


if __name__ == "__main__":
    typer.run(main)
