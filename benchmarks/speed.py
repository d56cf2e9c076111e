"""Training, a query, merging and bundles beside their references: ``python -m benchmarks.speed [--quick]``.

Times of one machine say little about another, so every figure is a ratio, taken in one run: the contenders
take turns, and the median over the turns counts. Beside each stands its bar; the exit code is 1 if one is
missed. With ``--quick`` everything runs once on little, and no time is judged.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.query_cost import measure
from benchmarks.tables import Row, markdown
from qkt_clinical.config.params import TrainParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.models.bundle import write_bundle
from qkt_clinical.models.inference import images_at_once
from qkt_clinical.models.networks import Classifier, build, fast_layout
from qkt_clinical.qkt import low_rank_merge
from qkt_clinical.records.card import WEIGHTS, InputSpec, NetworkSpec
from qkt_clinical.task import MULTICLASS
from qkt_clinical.training.augment import augment
from qkt_clinical.training.classifier import FEWEST_PER_BATCH, PIXELS_PER_BATCH, train_network

CPU = torch.device("cpu")
CLASSES = 8


@dataclass(frozen=True)
class Work:
    """Images of one kind, in number enough for a second or so."""

    name: str
    shape: tuple[int, ...]
    """Of an image, channels first."""
    count: int

    @property
    def spec(self) -> NetworkSpec:
        """The default network for such images."""
        return NetworkSpec(
            name="resnet-small",
            spatial_dims=len(self.shape) - 1,
            in_channels=self.shape[0],
            classes=CLASSES,
        )

    def drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, C, *spatial) uint8 and labels (N,)."""
        draw = np.random.default_rng(0)
        images = draw.integers(0, 256, (self.count, *self.shape), dtype=np.uint8)
        return images, np.arange(self.count, dtype=np.int64) % CLASSES


WORK = (
    Work("28 px", (3, 28, 28), 1024),
    Work("64 px", (3, 64, 64), 256),
    Work("224 px", (3, 224, 224), 32),
    Work("32 voxels", (1, 32, 32, 32), 64),
)


@dataclass(frozen=True)
class Bar:
    """A ratio and what it must reach."""

    name: str
    ratio: float
    least: float | None = None
    most: float | None = None

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return (self.least is None or self.ratio >= self.least) and (
            self.most is None or self.ratio <= self.most
        )

    def row(self, judged: bool) -> Row:
        """For the table."""
        bar = f"at least {self.least}" if self.least is not None else f"at most {self.most}"
        return {"ratio": self.name, "value": self.ratio, "bar": bar, "holds": _said(self.holds, judged)}


def _said(holds: bool, judged: bool) -> str:
    return ("yes" if holds else "NO") if judged else "not judged"


# --- the training loop ------------------------------------------------------------------------------


def product(work: Work, images: np.ndarray, labels: np.ndarray, params: TrainParams) -> None:
    """The product's training, without validation images."""
    nothing = (images[:0], labels[:0])
    train_network(
        fast_layout(build(work.spec, seed=0)),
        (images, labels),
        nothing,
        params,
        task=MULTICLASS,
        seed=0,
        site="bench",
        device=CPU,
    )


def _optimizer(network: nn.Module, params: TrainParams) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay)


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(network(images), labels).backward()
    optimizer.step()


def bare(work: Work, images: np.ndarray, labels: np.ndarray, params: TrainParams) -> None:
    """The loop that anybody would write: the same network, batches and views, and nothing else."""
    network = fast_layout(build(work.spec, seed=0)).train()
    inputs, targets = to_input(images, "unit"), torch.from_numpy(labels)
    optimizer, draw = _optimizer(network, params), torch.Generator().manual_seed(0)
    size = images_at_once(inputs, params.batch_size, PIXELS_PER_BATCH, FEWEST_PER_BATCH)
    for _ in range(params.epochs):
        for index in torch.randperm(len(targets), generator=draw).split(size):
            _step(network, optimizer, augment(inputs[index], params.augment, draw), targets[index])


def recipe(work: Work, images: np.ndarray, labels: np.ndarray, params: TrainParams) -> None:
    """MONAI's plain recipe: a Dataset of dictionaries, its random transforms, torch's DataLoader."""
    from monai.data import DataLoader, Dataset
    from monai.transforms import (
        Compose,
        RandAdjustContrastd,
        RandAffined,
        RandFlipd,
        RandGaussianNoised,
        RandShiftIntensityd,
        ScaleIntensityRanged,
    )

    dims = len(work.shape) - 1
    rotate = [np.pi] if dims == 2 else [np.pi, 0.0, 0.0]
    views = Compose(
        [
            ScaleIntensityRanged("image", 0, 255, -1, 1),
            *(RandFlipd("image", prob=0.5, spatial_axis=axis) for axis in range(dims)),
            RandAffined(
                "image",
                prob=1.0,
                rotate_range=rotate,
                scale_range=[0.15] * dims,
                translate_range=[0.1 * s for s in work.shape[1:]],
                padding_mode="reflection",
            ),
            RandAdjustContrastd("image", prob=1.0, gamma=(0.8, 1.25)),
            RandShiftIntensityd("image", offsets=0.15, prob=1.0),
            RandGaussianNoised("image", prob=1.0, std=0.05),
        ]
    )
    rows = [{"image": image, "label": int(label)} for image, label in zip(images, labels, strict=True)]
    size = images_at_once(torch.from_numpy(images), params.batch_size, PIXELS_PER_BATCH, FEWEST_PER_BATCH)
    loader = DataLoader(Dataset(rows, views), batch_size=size, shuffle=True, num_workers=0)
    network = fast_layout(build(work.spec, seed=0)).train()
    optimizer = _optimizer(network, params)
    for _ in range(params.epochs):
        for batch in loader:
            _step(network, optimizer, batch["image"].as_tensor(), batch["label"])


Loop = Callable[[Work, np.ndarray, np.ndarray, TrainParams], None]


def images_per_second(loops: Sequence[Loop], work: Work, turns: int, epochs: int) -> list[list[float]]:
    """Of every loop, a figure a turn; the first turn, in which everything is loaded, does not count."""
    images, labels = work.drawn()
    params = TrainParams(epochs=epochs, appearance=0.0)
    found: list[list[float]] = [[] for _ in loops]
    for turn in range(turns + 1):
        for loop, figures in zip(loops, found, strict=True):
            start = time.perf_counter()
            loop(work, images, labels, params)
            if turn:
                figures.append(len(labels) * epochs / (time.perf_counter() - start))
    return found


def training(turns: int, quick: bool) -> tuple[list[Row], list[Bar]]:
    """The product's training beside a bare loop and MONAI's recipe."""
    rows: list[Row] = []
    bars: list[Bar] = []
    for work in WORK:
        if quick:
            work = Work(work.name, work.shape, 16)
        ours, plain, monai = images_per_second((product, bare, recipe), work, turns, 1 if quick else 2)
        rows.append(
            {
                "images": work.name,
                "images/s": round(statistics.median(ours), 1),
                "bare loop": round(statistics.median(plain), 1),
                "MONAI's recipe": round(statistics.median(monai), 1),
            }
        )
        bars += [
            Bar(f"training at {work.name} over a bare loop", _median_ratio(ours, plain), least=0.95),
            Bar(f"training at {work.name} over MONAI's recipe", _median_ratio(ours, monai), least=5.0),
        ]
    return rows, bars


def _median_ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


# --- a query ----------------------------------------------------------------------------------------


def queries(turns: int, quick: bool) -> tuple[list[Row], list[Bar]]:
    """A query beside one whose teachers run at every step."""
    few, of_few = measure(3, ("qkt",), turns, quick)
    many, of_many = measure(8, ("qkt", "qkt-light"), turns, quick)
    return [*few, *many], [
        Bar("a query of 3 teachers, times faster", of_few["qkt"], least=3.0),
        Bar("a query of 8 teachers, times faster", of_many["qkt"], least=6.0),
        Bar("qkt-light of 8 teachers, times faster", of_many["qkt-light"], least=20.0),
    ]


# --- merging ----------------------------------------------------------------------------------------


def merging(turns: int, quick: bool) -> tuple[list[Row], list[Bar]]:
    """A ResNet-18 taken up by a student, beside the same with as many patches in wide layers as in others."""
    source = build(
        NetworkSpec(name="resnet18", spatial_dims=2, in_channels=3, classes=CLASSES), seed=0
    ).eval()
    views = torch.randn(8 if quick else 600, 3, 28, 28, generator=torch.Generator().manual_seed(0))

    def seconds(wide_patch: int) -> float:
        usual, low_rank_merge.WIDE_PATCH = low_rank_merge.WIDE_PATCH, wide_patch
        start = time.perf_counter()
        try:
            low_rank_merge.reduce_extractor(source, 0.5, views, seed=0, device=CPU)
        finally:
            low_rank_merge.WIDE_PATCH = usual
        return time.perf_counter() - start

    pairs = [(seconds(low_rank_merge.WIDE_PATCH), seconds(1 << 30)) for _ in range(turns)]
    ours, plain = zip(*pairs, strict=True)
    row: Row = {
        "merging a ResNet-18, seconds": round(statistics.median(ours), 1),
        "by as many patches in every layer": round(statistics.median(plain), 1),
    }
    return [row], [Bar("merging a ResNet-18, times faster", _median_ratio(plain, ours), least=3.0)]


# --- bytes ------------------------------------------------------------------------------------------


def bundle_bytes(network: Classifier, shape: tuple[int, ...]) -> Mapping[bool, int]:
    """Bytes of a teacher's weights file with class means, as it is and packed."""
    card = {
        "kind": "teacher",
        "site": "bench",
        "classes": [f"class{number}" for number in range(CLASSES)],
        "input": InputSpec(shape=shape, normalisation="unit", spacing_mm=None),
        "training": {},
    }
    means = {c: torch.ones(network.head.in_features) for c in range(CLASSES)}
    found = {}
    for packed in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            write_bundle(Path(folder), network, card, means, packed=packed)
            found[packed] = (Path(folder) / WEIGHTS).stat().st_size
    return found


def bundles() -> tuple[list[Row], list[Bar]]:
    """Packed weights beside single precision."""
    rows: list[Row] = []
    bars: list[Bar] = []
    for name in ("resnet-small", "resnet18"):
        spec = NetworkSpec(name=name, spatial_dims=2, in_channels=3, classes=CLASSES)
        found = bundle_bytes(build(spec, seed=0), (3, 28, 28))
        rows.append({"network": name, "packed, bytes": found[True], "single precision, bytes": found[False]})
        bars.append(Bar(f"bytes of a teacher, {name}", found[True] / found[False], most=0.4))
    return rows, bars


def main(arguments: Sequence[str] | None = None) -> int:
    """Print tables and bars; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    turns = 1 if given.quick else given.turns
    parts = [
        training(turns, given.quick),
        queries(turns, given.quick),
        merging(turns, given.quick),
        bundles(),
    ]
    for rows, _ in parts:
        print(markdown(rows), end="\n\n")
    timed = [bar for _, bars in parts[:-1] for bar in bars]
    sized = parts[-1][1]
    print(markdown([*(b.row(not given.quick) for b in timed), *(b.row(True) for b in sized)]))
    judged = sized if given.quick else [*timed, *sized]
    return int(not all(bar.holds for bar in judged))


if __name__ == "__main__":
    sys.exit(main())
