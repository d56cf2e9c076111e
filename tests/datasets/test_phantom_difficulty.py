"""The phantom is neither trivial nor noise: what a small network recalls of it, class by class.

``pytest -m nightly tests/datasets/test_phantom_difficulty.py -s`` prints the figures.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from qkt_clinical.catalog import BLOOD_CELLS
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.params import TrainParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Images, Labels
from qkt_clinical.datasets.phantom import render_images, smear
from qkt_clinical.datasets.phantom.federation import SMEARS
from qkt_clinical.models.inference import predict
from qkt_clinical.records.card import NetworkSpec
from qkt_clinical.task import MULTICLASS
from qkt_clinical.training.classifier import train_teacher

pytestmark = pytest.mark.slow

SIDE = 32
EACH = 500
FEW = 100
"""Images of each hospital for a classifier without a network."""


def hospitals_own(seed: int, each: int = EACH) -> tuple[Images, Labels]:
    """What the six hospitals hold, pooled."""
    images, labels = [], []
    for site in SMEARS:
        drawn, held, _ = render_images(site, seed=seed, images=each)
        area = F.interpolate(torch.from_numpy(drawn).permute(0, 3, 1, 2).float(), size=SIDE, mode="area")
        images.append(area.round().byte().numpy())
        labels.append(held)
    return np.concatenate(images), np.concatenate(labels)


def all_classes_everywhere(seed: int, each: int = EACH) -> tuple[Images, Labels]:
    """All eight classes alike under each of the six stains."""
    images, labels = [], []
    for site, hospital in SMEARS.items():
        assert isinstance(hospital.look, smear.Stain)
        rng = np.random.default_rng(derive(seed, "difficulty", site))
        held = rng.integers(0, len(BLOOD_CELLS), each)
        drawn = smear.render_cells(held, rng.integers(0, 50, each), hospital.look, size=SIDE, rng=rng)
        images.append(drawn.transpose(0, 3, 1, 2))
        labels.append(held)
    return np.concatenate(images), np.concatenate(labels)


def plain_features(images: Images) -> NDArray[np.float64]:
    """Means of blocks of 4 x 4 pixels, quantiles of each colour, and a constant: (N, 241)."""
    count = len(images)
    blocks = images.reshape(count, 3, SIDE // 4, 4, SIDE // 4, 4).mean(axis=(3, 5)).reshape(count, -1)
    ordered = np.sort(images.reshape(count, 3, -1), axis=2)[:, :, ::64].reshape(count, -1)
    return np.hstack([blocks, ordered, np.full((count, 1), 255.0)]) / 255.0


@pytest.mark.parametrize(
    ("pool", "low", "high"), [(hospitals_own, 0.75, 0.91), (all_classes_everywhere, 0.72, 0.87)]
)
def test_least_squares_find_some_of_each_class_and_not_all_of_it(  # type: ignore[no-untyped-def]
    pool, low: float, high: float
) -> None:
    (images, labels), (unseen, truth) = pool(0, FEW), pool(1, FEW)
    seen, wanted = plain_features(images), np.eye(len(BLOOD_CELLS))[labels]
    weights = np.linalg.solve(seen.T @ seen + np.eye(seen.shape[1]), seen.T @ wanted)
    predicted = (plain_features(unseen) @ weights).argmax(axis=1)
    recalls = [float((predicted[truth == c] == c).mean()) for c in range(len(BLOOD_CELLS))]
    print(f"\n{pool.__name__}: {np.mean(recalls):.3f}, " + ", ".join(f"{r:.2f}" for r in recalls))
    # Under all six stains 0.8. Without any ambiguous cell it would be 0.89, without nuisance 0.88; with six
    # in ten cells ambiguous 0.56, with twice the nuisance 0.65.
    assert low < np.mean(recalls) < high
    assert min(recalls) > 0.45


@pytest.mark.nightly
@pytest.mark.parametrize("pool", [hospitals_own, all_classes_everywhere])
def test_a_small_network_recalls_085_to_097_of_each_class(pool) -> None:  # type: ignore[no-untyped-def]
    train, val = pool(0), pool(1)
    unseen = tuple(np.concatenate(parts) for parts in zip(pool(2), pool(3), strict=True))
    network, _ = train_teacher(
        NetworkSpec(name="resnet-small", spatial_dims=2, in_channels=3, classes=len(BLOOD_CELLS)),
        train,
        (val[0][::8], val[1][::8]),
        TrainParams(epochs=16),
        seed=0,
        site="all",
        device=torch.device("cpu"),
        task=MULTICLASS,
    )
    predicted = predict(network, to_input(unseen[0]), torch.device("cpu")).argmax(1).numpy()
    recall = {c: float((predicted[unseen[1] == i] == i).mean()) for i, c in enumerate(BLOOD_CELLS)}
    print(f"\n{pool.__name__}: " + ", ".join(f"{c} {r:.3f}" for c, r in recall.items()))
    assert {c: r for c, r in recall.items() if not 0.85 <= r <= 0.97} == {}
