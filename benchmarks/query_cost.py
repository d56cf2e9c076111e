"""What a query costs beside the obvious way to distil one: teachers that run at every step.

The hospitals hold generated blood cells of one stain. The reference keeps no features and no outputs: in
phase 1 own network and teachers name every view of every batch, and the student learns their consensus; in
phase 2 its head learns the same, and the labels, through the whole network. It has the operating point that
the product has, and as many epochs as it needs to name images as well. Where the most are not enough it is
timed with these, which says that it takes longer, not how much; what fewer reach stands in the table.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.tables import Row
from qkt_clinical.catalog import BLOOD_CELLS, Method
from qkt_clinical.config.params import TrainParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.datasets.phantom.smear import Stain, render_cells
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier, build, fast_layout
from qkt_clinical.qkt.answer import answer_query
from qkt_clinical.qkt.consensus import consensus
from qkt_clinical.qkt.operating_point import decide, offsets_for_budget, query_scores
from qkt_clinical.qkt.panel import Teacher
from qkt_clinical.qkt.steps import LocalData
from qkt_clinical.records.card import NetworkSpec
from qkt_clinical.task import MULTICLASS
from qkt_clinical.training.augment import augment
from qkt_clinical.training.classifier import train_network

CPU = torch.device("cpu")
STAIN = Stain(glass=(250, 240, 228), dyes=(1.0, 1.0, 1.0), strength=1.0, blur=0.4, noise=3.0)
QUERY = 0
LOCAL = (1, 2, 3, 4)
"""What the asking hospital holds; teacher ``i`` holds the query, one of these, and one that it does not."""
STRANGE = (5, 6, 7)
BUDGET = 0.05
AS_GOOD = 0.01
"""Of balanced accuracy, by which the reference may lie below."""
EPOCHS = (1, 2, 5, 10)
"""That the reference is tried with, in each of its phases."""
BATCH = 64
RATES = (2e-3, 1e-2)
"""Learning rates of the reference's phases: those of the benchmark's distillation and of phase 2."""

Images = tuple[np.ndarray, np.ndarray]


def draw(classes: tuple[int, ...], count: int, seed: int) -> Images:
    """Images (N, 3, 28, 28) uint8 of some classes in turn, and labels (N,)."""
    rng = np.random.default_rng(seed)
    labels = np.array(classes, dtype=np.int64)[np.arange(count) % len(classes)]
    cells = render_cells(labels, np.zeros(count, dtype=np.int64), STAIN, size=28, rng=rng)
    return np.ascontiguousarray(cells.transpose(0, 3, 1, 2)), labels


def trained(classes: tuple[int, ...], count: int, epochs: int, seed: int) -> tuple[Classifier, Images]:
    """A hospital's network, and the images that it was trained on."""
    images = draw(classes, count, seed)
    spec = NetworkSpec(name="resnet-small", spatial_dims=2, in_channels=3, classes=len(BLOOD_CELLS))
    network = fast_layout(build(spec, seed=seed))
    train_network(
        network,
        images,
        draw(classes, 64, seed + 1),
        TrainParams(epochs=epochs, appearance=0.0),
        task=MULTICLASS,
        seed=seed,
        site=f"h{seed}",
        device=CPU,
    )
    return network.eval(), images


@dataclass(frozen=True)
class Hospitals:
    """The one that asks and those that know."""

    student: Classifier
    teachers: tuple[Teacher, ...]
    data: LocalData
    test: Images
    """Of the query and of the own classes."""


def hospitals(teachers: int, count: int, epochs: int) -> Hospitals:
    """Train all networks.

    Args:
        count: training images of each hospital.
    """
    student, train = trained(LOCAL, count, epochs, 0)
    known = []
    for number in range(teachers):
        classes = (QUERY, LOCAL[number % len(LOCAL)], STRANGE[number % len(STRANGE)])
        network, (images, labels) = trained(classes, count, epochs, 100 + 10 * number)
        features = predict(network, to_input(images, "unit"), CPU, features=True)
        means = {c: features[torch.from_numpy(labels == c)].mean(dim=0) for c in classes}
        known.append(Teacher(f"t{number}", network, tuple(sorted(classes)), class_means=means))
    data = LocalData(train, draw(LOCAL, max(100, count // 4), 1000))
    return Hospitals(student, tuple(known), data, draw((QUERY, *LOCAL), max(100, count), 2000))


def balanced_accuracy(logits: Tensor, labels: np.ndarray, offsets: Tensor) -> float:
    """Mean recall of the query and the own classes."""
    named = decide(logits, LOCAL, (QUERY,), offsets).argmax(dim=1).numpy()
    return float(np.mean([(named[labels == c] == c).mean() for c in (QUERY, *LOCAL)]))


def ask(case: Hospitals, method: Method) -> tuple[Classifier, Tensor]:
    """The product's answer: student and offset."""
    answer = answer_query(
        case.student, case.teachers, case.data, (QUERY,), task=MULTICLASS, method=method, budget=BUDGET
    )
    return answer.network, torch.tensor(answer.decision.offsets)


def naive(case: Hospitals, epochs: int) -> tuple[Classifier, Tensor]:
    """The reference's answer after so many epochs of each phase: student and offset."""
    networks = [case.student, *(t.network for t in case.teachers)]
    known = [LOCAL, *(t.claimed for t in case.teachers)]
    relevant = sorted({QUERY, *LOCAL})
    inputs, labels = to_input(case.data.train[0], "unit"), torch.from_numpy(case.data.train[1])
    student = copy.deepcopy(case.student)
    views = torch.Generator().manual_seed(0)

    def steps(parameters: list[torch.nn.Parameter], rate: float, whole: bool) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=rate)
        for _ in range(epochs):
            student.train(whole)
            for index in torch.randperm(len(labels), generator=views).split(BATCH):
                view = augment(inputs[index], 1.0, views)
                with torch.no_grad():
                    told = consensus([n(view) for n in networks], known, relevant, 1.0)[:, relevant]
                logits = student(view)
                loss = F.smooth_l1_loss(logits[:, relevant], told)
                if not whole:  # phase 2: what the hospital knew is kept
                    loss = loss + F.cross_entropy(logits[:, list(LOCAL)], labels[index] - LOCAL[0])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

    steps(list(student.parameters()), RATES[0], True)
    steps(list(student.head.parameters()), RATES[1], False)
    student.eval()
    scores = query_scores(predict(student, to_input(case.data.calibration[0], "unit"), CPU), LOCAL, (QUERY,))
    return student, offsets_for_budget(scores, BUDGET)


def _result(case: Hospitals, answer: tuple[Classifier, Tensor]) -> float:
    network, offsets = answer
    return balanced_accuracy(predict(network, to_input(case.test[0], "unit"), CPU), case.test[1], offsets)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(
    teachers: int, methods: tuple[Method, ...], turns: int, quick: bool
) -> tuple[list[Row], dict[Method, float]]:
    """A row for each method, and how many times the reference takes as long.

    Args:
        methods: as good as the first of these the reference must be.
        quick: everything once on little: nothing is learnt.
    """
    case = hospitals(teachers, 64 if quick else 600, 1 if quick else 20)
    reached = {method: _result(case, ask(case, method)) for method in methods}
    tried = {}
    for epochs in EPOCHS[:1] if quick else EPOCHS:
        tried[epochs] = _result(case, naive(case, epochs))
        if tried[epochs] >= reached[methods[0]] - AS_GOOD:
            break
    taken: dict[Method, list[float]] = {method: [] for method in methods}
    references = []
    for _ in range(turns):
        references.append(_seconds(partial(naive, case, epochs)))
        for method in methods:
            taken[method].append(_seconds(partial(ask, case, method)))

    def row(who: str, seconds: str | float, balanced: float) -> Row:
        return {"a query": f"{who}, {teachers} teachers", "seconds": seconds, "balanced": round(balanced, 3)}

    rows = [row(m, round(statistics.median(taken[m]), 2), reached[m]) for m in methods]
    rows += [
        row(
            f"reference, {2 * count} epochs",
            round(statistics.median(references), 2) if count == epochs else "",
            result,
        )
        for count, result in tried.items()
    ]
    times = {
        method: statistics.median(r / t for r, t in zip(references, taken[method], strict=True))
        for method in methods
    }
    return rows, times
