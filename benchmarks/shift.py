"""How far the images of hospitals lie apart, and whether that tells which teachers help and need adaptation.

``python -m benchmarks.shift --run FOLDER (--sites FOLDER | --data FILE.npz) [--seeds 0 1 2]``

``FOLDER`` holds a run of ``qkt benchmark`` on the same data. Every teacher answers the val images of every
other hospital, among the classes that both have: as it was sent, with half and with all of the statistics
measured there, and with the share that adaptation chooses. Test images are not looked at.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.tables import Row, markdown
from qkt_clinical.benchmark.runner import RESULT, federations_of
from qkt_clinical.benchmark.settings import BenchmarkSettings
from qkt_clinical.benchmark.simulate import LabelledImages
from qkt_clinical.benchmark.sites import site_files
from qkt_clinical.benchmark.store import ResultStore
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.params import TrainParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.models.image_statistics import image_statistics
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.adaptation import SHARES, adapt_teachers, measure_statistics, shift, with_statistics
from qkt_clinical.qkt.panel import Teacher
from qkt_clinical.qkt.planning import image_shift
from qkt_clinical.task import Task

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pair:
    """A teacher before another hospital's val images; accuracies are means of recalls over shared classes."""

    hospital: str
    teacher: str
    image_shift: float
    shift: float
    """As the teacher's layers see it."""
    share: float
    """That adaptation chooses."""
    own: float
    """Of the hospital's own network."""
    accuracies: dict[float, float]
    """Of the teacher, by the share taken up."""

    @property
    def chosen(self) -> float:
        """Accuracy with the share that adaptation chooses."""
        return self.accuracies[self.share]


def how_trained(run: Path) -> TrainParams:
    """How the networks of a finished benchmark were trained: one network a site, or two."""
    found = json.loads((run / RESULT).read_text(encoding="utf-8"))
    return TrainParams.model_validate(found["settings"]["train"])


def accuracy(network: Classifier, images: LabelledImages, shared: Sequence[int], task: Task) -> float:
    """Mean of recalls over the shared classes, which alone can be answered."""
    scores = torch.full((len(images), network.spec.classes), -torch.inf)
    scores[:, list(shared)] = predict(network, to_input(images.images), CPU)[:, list(shared)]
    recalls = task.recall(task.answer(scores), torch.from_numpy(images.labels))
    return sum(recalls.values()) / len(recalls)


def pairs(store: ResultStore) -> Iterator[Pair]:
    """Every teacher before every other hospital, where both have two classes or more in common."""
    federation = store.federation
    for hospital, other in permutations(federation.hospitals, 2):
        shared = sorted({*hospital.held} & {*other.held})
        own = store.bundle(f"full/{hospital.name}").network
        sent = store.bundle(f"{store.settings.trained_as('sent')}/{other.name}").network
        mine = federation.val_of(hospital)
        judging = mine[np.isin(federation.val.labels[mine], shared)]
        if len(shared) < 2 or not len(judging):
            continue
        inputs = to_input(hospital.train.images)
        val = federation.val.take(judging)
        seed = derive(federation.seed, "benchmark", "shift", hospital.name)

        held_out = to_input(hospital.calibration.images), torch.from_numpy(hospital.calibration.labels)
        _, results = adapt_teachers(
            [Teacher(other.name, sent, tuple(other.held))],
            inputs,
            torch.from_numpy(hospital.train.labels),
            held_out,
            hospital.held,
            task=store.task,
            seed=seed,
            device=CPU,
        )
        if not results:
            continue  # a network whose layers hold no statistics
        statistics = measure_statistics(sent, inputs, seed=seed, device=CPU)
        apart = image_shift(*(image_statistics(h.train.images, "unit") for h in (hospital, other)))
        assert apart is not None
        yield Pair(
            hospital.name,
            other.name,
            apart,
            shift(sent, statistics),
            results[0].share,
            accuracy(own, val, shared, store.task),
            {
                share: accuracy(with_statistics(sent, statistics, share), val, shared, store.task)
                for share in SHARES
            },
        )


def table(found: Sequence[Pair]) -> list[Row]:
    """One row per pair of hospitals, means over seeds; accuracies in percent."""
    rows: list[Row] = []
    for names in dict.fromkeys((p.hospital, p.teacher) for p in found):
        same = [p for p in found if (p.hospital, p.teacher) == names]

        def mean(values: Sequence[float]) -> float:
            return sum(values) / len(values)

        rows.append(
            {
                "hospital": names[0],
                "teacher of": names[1],
                "image shift": mean([p.image_shift for p in same]),
                "shift": mean([p.shift for p in same]),
                "own network": f"{100 * mean([p.own for p in same]):.1f}",
                "as sent": f"{100 * mean([p.accuracies[0.0] for p in same]):.1f}",
                "half": f"{100 * mean([p.accuracies[0.5] for p in same]):.1f}",
                "all": f"{100 * mean([p.accuracies[1.0] for p in same]):.1f}",
                "chosen": f"{100 * mean([p.chosen for p in same]):.1f}",
                "share": mean([p.share for p in same]),
            }
        )
    return rows


def correlations(found: Sequence[Pair]) -> list[Row]:
    """Spearman's rank correlation of either shift with what a teacher lacks and what adaptation gives."""
    lacks = [p.own - p.accuracies[0.0] for p in found]
    gains = [p.accuracies[1.0] - p.accuracies[0.0] for p in found]
    remains = [p.own - p.chosen for p in found]
    return [
        {
            "": name,
            "lacks as sent": float(spearmanr(values, lacks).statistic),
            "gains by all of the statistics": float(spearmanr(values, gains).statistic),
            "lacks after adaptation": float(spearmanr(values, remains).statistic),
            "pairs": len(found),
        }
        for name, values in (
            ("image shift", [p.image_shift for p in found]),
            ("shift", [p.shift for p in found]),
        )
    ]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--sites", type=Path, help="folder of one npz a site")
    source.add_argument("--data", type=Path, help="npz of one centre, divided among simulated hospitals")
    parser.add_argument("--run", type=Path, required=True, help="folder of a benchmark")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    sites = options.sites is not None
    settings = BenchmarkSettings(device="cpu", sites=sites, train=how_trained(options.run))
    files = [options.data] if options.sites is None else site_files([options.sites])
    federation = federations_of(files, settings)
    found = [
        pair
        for seed in options.seeds
        for pair in pairs(ResultStore(options.run / "work" / f"seed-{seed}", federation(seed), settings, CPU))
    ]
    print(markdown(table(found)), "\n\n", markdown(correlations(found)), sep="", flush=True)


if __name__ == "__main__":
    main()
