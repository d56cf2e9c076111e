"""Settings of baselines, on validation images.

``python -m benchmarks.tuning --data FILE.npz [--tables NAME ...]``

Teachers are trained once and kept in ``--work``. Federations of whole networks run on NVIDIA FLARE. Figures
are means over all queries, on the val split.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.tables import Row, markdown
from qkt_clinical.baselines.federated import Participant
from qkt_clinical.baselines.finetune import finetune
from qkt_clinical.baselines.params import (
    AggregatorParams,
    BaselineParams,
    FederatedParams,
    FinetuneParams,
    SmallFederationParams,
)
from qkt_clinical.benchmark.case import Case, MethodResult
from qkt_clinical.benchmark.features import FeatureBank
from qkt_clinical.benchmark.head_baselines import averaged_head
from qkt_clinical.benchmark.methods import learnt_ensemble
from qkt_clinical.benchmark.metrics import figures
from qkt_clinical.benchmark.settings import BenchmarkSettings
from qkt_clinical.benchmark.simulate import SimulatedQuery, read, simulate
from qkt_clinical.benchmark.store import ResultStore
from qkt_clinical.catalog import Partition, Regime
from qkt_clinical.common.seeding import derive
from qkt_clinical.data.inputs import to_input
from qkt_clinical.federation.peers import Algorithm, run_federation
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier
from qkt_clinical.task import MULTICLASS

CPU = torch.device("cpu")
ROUNDS = 20
SHOWN = ("query_accuracy", "retained_accuracy", "balanced_accuracy")


class Bench:
    """The data, the work folder and the seed of the partition and of training."""

    def __init__(self, data: Path, work: Path, seed: int, features: Path | None) -> None:
        self.parts, self.classes = read(data)
        self.work, self.seed, self.features = work, seed, features

    def store(self, partition: Partition, regime: Regime) -> ResultStore:
        """Teachers of one setting, figures on val."""
        settings = BenchmarkSettings(split="val", device="cpu", partition=partition, regime=regime)
        federation = simulate(
            self.parts, self.classes, partition=partition, regime=regime, seed=self.seed, beta=settings.beta
        )
        return ResultStore(self.work / f"{partition}-{regime}-s{self.seed}", federation, settings, CPU)

    def judge(self, store: ResultStore, logits_of: Callable[[SimulatedQuery], Tensor]) -> Row:
        """Mean figures over all queries, of logits (N, C) on all val images."""
        val, found = store.federation.val, []
        for question in store.federation.questions:
            relevant = store.federation.relevant(question)
            index = np.flatnonzero(np.isin(val.labels, relevant))
            scores = logits_of(question)[index].numpy()
            found.append(figures(scores, val.labels[index], relevant, question.query, task=MULTICLASS))
        return {name: float(np.mean([f[name] for f in found])) for name in SHOWN}

    def judge_global(
        self, params: FederatedParams, *, algorithm: Algorithm = "fedavg", proximal: float = 0.0
    ) -> Row:
        """A federation's network after 20 rounds, on absent classes."""
        store = self.store("pathological", "absent")
        found = run_federation(
            [Participant(h.name, h.train.pair) for h in store.federation.hospitals],
            store.federation.spec,
            params,
            algorithm=algorithm,
            rounds=ROUNDS,
            proximal=proximal,
            seed=derive(self.seed, "benchmark", "federated"),
            device=CPU,
            work=self.work / "federation",
        )
        logits = predict(found.network, to_input(store.federation.val.images), CPU)
        return self.judge(store, lambda question: logits)

    def judge_method(self, answer: Callable[[Case], MethodResult], baselines: BaselineParams) -> Row:
        """A method with these settings, on absent classes."""
        store = self.store("pathological", "absent")
        store.settings = store.settings.model_copy(update={"baselines": baselines})
        store.features = FeatureBank(self.features) if self.features else None
        for hospital in store.federation.hospitals:
            self.teacher(store, hospital.name)
        found = []
        for question in store.federation.questions:
            case = Case(store, question)
            scores, labels = answer(case).scores.numpy(), case.images.labels
            found.append(figures(scores, labels, case.relevant, question.query, task=MULTICLASS))
        return {name: float(np.mean([f[name] for f in found])) for name in SHOWN}

    def teacher(self, store: ResultStore, hospital: str) -> Classifier:
        """Trained the first time."""
        name = f"full/{hospital}"
        if not (store.folder / name).is_dir():
            store.train(name)
        return store.bundle(name).network


def fedavg(bench: Bench) -> Iterator[Row]:
    """FedAvg's learning rate, 20 rounds, absent classes."""
    for rate in (1e-3, 3e-3, 1e-2):
        yield {"learning rate": f"{rate:g}", **bench.judge_global(FederatedParams(learning_rate=rate))}


def fedprox(bench: Bench) -> Iterator[Row]:
    """FedProx's mu, 20 rounds, absent classes."""
    for proximal in (0.001, 0.01, 0.1, 1.0):
        row = bench.judge_global(FederatedParams(), algorithm="fedprox", proximal=proximal)
        yield {"mu": f"{proximal:g}", **row}


def scaffold(bench: Bench) -> Iterator[Row]:
    """SCAFFOLD's learning rate, 20 rounds, absent classes."""
    for rate in (1e-3, 3e-3, 1e-2):
        row = bench.judge_global(FederatedParams(learning_rate=rate), algorithm="scaffold")
        yield {"learning rate": f"{rate:g}", **row}


def finetuned(bench: Bench) -> Iterator[Row]:
    """Fine-tuning of the own network, rare classes of Dirichlet hospitals."""
    store = bench.store("dirichlet", "rare")
    inputs = to_input(store.federation.val.images)
    asking = sorted({q.student for q in store.federation.questions})
    own = {h: predict(bench.teacher(store, h), inputs, CPU) for h in asking}
    yield {"epochs": 0, "learning rate": "", **bench.judge(store, lambda q: own[q.student])}
    for epochs, rate in ((5, 3e-4), (10, 1e-4), (10, 3e-4), (10, 1e-3), (20, 3e-4), (20, 1e-3), (40, 3e-4)):
        tuned = {}
        for hospital in asking:
            data = store.data(hospital)
            network = finetune(
                bench.teacher(store, hospital),
                data.train.pair,
                data.val.pair,
                range(store.federation.spec.classes),
                FinetuneParams(epochs=epochs, learning_rate=rate),
                seed=derive(bench.seed, "benchmark", "finetune", hospital),
                name=hospital,
                device=CPU,
                task=MULTICLASS,
            )
            tuned[hospital] = predict(network, inputs, CPU)
        row = bench.judge(store, lambda q, tuned=tuned: tuned[q.student])  # type: ignore[misc]
        yield {"epochs": epochs, "learning rate": f"{rate:g}", **row}


def fens(bench: Bench) -> Iterator[Row]:
    """FENS: the learning rate, the units and the rounds of its aggregator, absent classes."""
    grid = product((3e-3, 1e-2, 3e-2), (64, 256, 1024, 4096), (50, 100))
    for rate, hidden, rounds in (*grid, (3e-3, 16384, 50)):
        params = AggregatorParams(learning_rate=rate, hidden=hidden, rounds=rounds)
        row = bench.judge_method(learnt_ensemble, BaselineParams(aggregator=params))
        yield {"learning rate": f"{rate:g}", "units": hidden, "rounds": rounds, **row}


def federated_head(bench: Bench) -> Iterator[Row]:
    """The federated head's learning rate, weight decay and rounds, absent classes (``--features``)."""
    if bench.features is None:
        raise SystemExit("federated_head reads --features: work/features of a benchmark run with an encoder")
    for rate, decay, rounds in product((3e-4, 1e-3, 3e-3), (1e-2, 1.0), (20, 50)):
        params = SmallFederationParams(learning_rate=rate, weight_decay=decay, rounds=rounds)
        row = bench.judge_method(averaged_head, BaselineParams(head=params))
        yield {"learning rate": f"{rate:g}", "weight decay": f"{decay:g}", "rounds": rounds, **row}


TABLES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    f.__name__: f for f in (fedavg, fedprox, scaffold, finetuned, fens, federated_head)
}


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="npz in MedMNIST's layout")
    parser.add_argument("--work", type=Path, default=Path("runs/tuning"), help="where teachers are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--features", type=Path, help="work/features of a benchmark run of the same data")
    options = parser.parse_args()
    bench = Bench(options.data, options.work, options.seed, options.features)
    for name in options.tables:
        print(f"\n### {name}\n\n{(TABLES[name].__doc__ or '').strip()}\n")
        print(markdown(list(TABLES[name](bench))), flush=True)


if __name__ == "__main__":
    main()
