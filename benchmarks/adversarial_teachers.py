"""How often screening excludes honest and adversarial teachers.

``python -m benchmarks.adversarial_teachers --data FILE.npz --run FOLDER``

``FOLDER`` holds a run of ``qkt benchmark`` on the same data. Its teachers, honest and spoilt, are screened
again on the asking hospitals' calibration images; val and test images are not looked at.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.tables import Row, markdown
from qkt_clinical.benchmark.adversarial_teachers import draw_bad, spoil
from qkt_clinical.benchmark.case import Case
from qkt_clinical.benchmark.settings import BAD, BenchmarkSettings
from qkt_clinical.benchmark.simulate import read, simulate
from qkt_clinical.benchmark.store import ResultStore
from qkt_clinical.catalog import DEFAULT_ESTIMATOR
from qkt_clinical.data.inputs import to_input
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.qkt.teacher_screening import screen_teachers
from qkt_clinical.task import MULTICLASS

CPU = torch.device("cpu")
HARDER = ("swapped-labels", "copied-row")
"""Two classes under each other's names, others right; a known class's row copied to the one asked for."""


@torch.no_grad()
def spoil_harder(
    network: Classifier, known: Sequence[int], bad: str, asked: int, seed: int
) -> tuple[Classifier, tuple[int, ...]]:
    """As :func:`spoil`, by an attack of ``HARDER``."""
    spoilt, random = copy.deepcopy(network), np.random.default_rng(seed)
    weight, bias = spoilt.head.weight, spoilt.head.bias
    if bad == "swapped-labels":
        pair = random.permutation(sorted(known))[:2].tolist()
        weight[pair], bias[pair] = weight[pair[::-1]].clone(), bias[pair[::-1]].clone()
        return spoilt, tuple(known)
    victim = int(random.choice([c for c in known if c != asked]))
    weight[asked], bias[asked] = weight[victim], bias[victim]
    return spoilt, tuple(sorted({*known, asked}))


class Screening:
    """The hospitals of one seed, each screening the others' teachers."""

    def __init__(self, store: ResultStore) -> None:
        self.store = store
        self.features: dict[tuple[str, str], Tensor] = {}
        self.read: dict[bytes, tuple[int, ...]] = {}

    def verified(self, network: Classifier) -> tuple[int, ...]:
        """Read once for each network and row of the head; biases do not count."""
        first = next(network.extractor.parameters()).detach()
        key = first.numpy().tobytes() + network.head.weight.detach().numpy().tobytes()
        if key not in self.read:
            self.read[key] = self.store.verify(network)
        return self.read[key]

    def seen(self, student: str, name: str) -> Tensor:
        """A teacher's features of a student's calibration images."""
        if (student, name) not in self.features:
            inputs = to_input(self.store.federation.hospital(student).calibration.images)
            network = self.store.bundle(name).network
            self.features[student, name] = predict(network, inputs, CPU, features=True)
        return self.features[student, name]

    def tally(self, bad: str | None, count: int) -> Counter[str]:
        """Over all questions: relevant teachers, honest and bad, and what became of them."""
        found: Counter[str] = Counter()
        for question in self.store.federation.questions:
            case, hospital = Case(self.store, question), self.store.federation.hospital(question.student)
            local = [c for c in hospital.held if c not in question.query]
            spoilt = draw_bad(case.others, count, case.seed("bad")) if bad else ()
            teachers: dict[str, tuple[Classifier, tuple[int, ...]]] = {}
            for name in case.others:
                mask = self.store.masks(name)[DEFAULT_ESTIMATOR]
                network = self.store.bundle(name).network
                known = tuple(c for c, k in enumerate(mask.known) if k)
                seed, asked = case.seed("bad", name), question.query[0]
                if name in spoilt and bad in BAD:
                    shape = hospital.train.images.shape[1:]
                    network, known, _ = spoil(network, known, {}, bad, asked, shape=shape, seed=seed)
                elif name in spoilt and bad:
                    network, known = spoil_harder(network, known, bad, asked, seed)
                if set(known) & {*question.query, *local}:
                    teachers[name] = network, known
            used = np.isin(hospital.calibration.labels, local)
            logits = [
                F.linear(
                    self.seen(question.student, name)[torch.from_numpy(used)],
                    network.head.weight.detach(),
                    network.head.bias.detach(),
                )
                for name, (network, _) in teachers.items()
            ]
            results = screen_teachers(
                list(teachers),
                logits,
                [known for _, known in teachers.values()],
                [self.verified(network) for network, _ in teachers.values()],
                local,
                torch.from_numpy(hospital.calibration.labels[used]),
                task=MULTICLASS,
            )
            for result in results:
                kind = "bad" if result.site in spoilt else "honest"
                fate = "excluded" if not result.included else "corrected" if result.unverified else "included"
                found[f"{kind} {fate}"] += 1
        return found


def outcomes(screenings: Sequence[Screening]) -> Iterator[Row]:
    """What became of bad and of honest teachers, all questions of all seeds pooled."""
    for bad, count in ((None, 0), *((bad, count) for bad in (*BAD, *HARDER) for count in (1, 2))):
        total: Counter[str] = sum((screening.tally(bad, count) for screening in screenings), Counter())
        yield {
            "bad of them": f"{count} {bad}" if bad else "none",
            "bad": sum(total[f"bad {fate}"] for fate in ("excluded", "corrected", "included")),
            "excluded": total["bad excluded"],
            "false claim struck out": total["bad corrected"],
            "missed": total["bad included"],
            "honest": sum(total[f"honest {fate}"] for fate in ("excluded", "corrected", "included")),
            "honest, excluded": total["honest excluded"],
            "honest, claim struck out": total["honest corrected"],
        }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="npz in MedMNIST's layout")
    parser.add_argument("--run", type=Path, required=True, help="folder of a benchmark")
    parser.add_argument("--partition", choices=("pathological", "dirichlet"), default="pathological")
    parser.add_argument("--regime", choices=("absent", "rare"), default="absent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = BenchmarkSettings(device="cpu", partition=options.partition, regime=options.regime)
    parts, classes = read(options.data)
    screenings = []
    for seed in options.seeds:
        federation = simulate(
            parts,
            classes,
            partition=settings.partition,
            regime=settings.regime,
            beta=settings.beta,
            seed=seed,
        )
        screenings.append(
            Screening(ResultStore(options.run / "work" / f"seed-{seed}", federation, settings, CPU))
        )
    print(markdown(list(outcomes(screenings))), flush=True)


if __name__ == "__main__":
    main()
