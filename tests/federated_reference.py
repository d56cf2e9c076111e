"""Federations written out in one process, to hold what NVIDIA FLARE makes of them against."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qkt_clinical.baselines.federated import Participant, global_network, round_draw, round_rate, train_round
from qkt_clinical.baselines.params import FederatedParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.federation.peers import Algorithm, Federated
from qkt_clinical.models.networks import Classifier
from qkt_clinical.records.card import NetworkSpec
from qkt_clinical.task import MULTICLASS

Controls = list[Tensor]


@torch.no_grad()
def weighted_mean(networks: Sequence[Classifier], sizes: Sequence[int]) -> Classifier:
    """Weights and running statistics, summed in single precision in the order of the networks."""
    states = [n.state_dict() for n in networks]
    mean = copy.deepcopy(networks[0])
    for name, target in mean.state_dict().items():
        if target.is_floating_point():
            total = states[0][name] * float(sizes[0])
            for state, size in zip(states[1:], sizes[1:], strict=True):
                total = total + state[name] * float(size)
            target.copy_(total * (1.0 / sum(sizes)))
    return mean


def proximal_term(network: Classifier, start: Sequence[Tensor], proximal: float) -> Tensor:
    """``mu / 2`` times the squared distance of the network's parameters from where the round started."""
    distances = [((p - q) ** 2).sum() for p, q in zip(network.parameters(), start, strict=True)]
    return 0.5 * proximal * torch.stack(distances).sum()


def one_round(
    network: Classifier,
    participant: Participant,
    params: FederatedParams,
    number: int,
    rounds: int,
    *,
    seed: int = 1,
    proximal: float = 0.0,
    controls: tuple[Controls, Controls] | None = None,
) -> tuple[Classifier, Controls]:
    """A hospital's network after a round, and its new control variate (Karimireddy et al., option II)."""
    start = [p.detach().clone() for p in network.parameters()]
    rates: list[float] = []

    @torch.no_grad()
    def correct(local: Classifier, rate: float) -> None:
        assert controls is not None
        rates.append(rate)
        for p, everyone, own in zip(local.parameters(), *controls, strict=True):
            p -= rate * (everyone - own)

    local = train_round(
        network,
        to_input(participant.train[0]),
        torch.from_numpy(participant.train[1]),
        params,
        learning_rate=round_rate(params, number, rounds),
        draw=round_draw(seed, participant.site, number),
        device=torch.device("cpu"),
        penalty=(lambda n: proximal_term(n, start, proximal)) if proximal else None,
        after_step=None if controls is None else correct,
        task=MULTICLASS,
    )
    if controls is None:
        return local, []
    ways = [(x - y.detach()) / sum(rates) for x, y in zip(start, local.parameters(), strict=True)]
    everyone, own = controls
    return local, [o - c + way for o, c, way in zip(own, everyone, ways, strict=True)]


def reference(
    participants: Sequence[Participant],
    spec: NetworkSpec,
    params: FederatedParams,
    *,
    algorithm: Algorithm = "fedavg",
    rounds: int,
    proximal: float = 0.0,
    seed: int = 1,
) -> Classifier:
    """The global network after the last round."""
    network = global_network(spec, seed)
    sizes = [len(p.train[1]) for p in participants]
    scaffold, mu = algorithm == "scaffold", proximal if algorithm == "fedprox" else 0.0
    everyone = [torch.zeros_like(p) for p in network.parameters()]
    own = [everyone for _ in participants]
    for number in range(1, rounds + 1):
        done = [
            one_round(
                network,
                participant,
                params,
                number,
                rounds,
                seed=seed,
                proximal=mu,
                controls=(everyone, c) if scaffold else None,
            )
            for participant, c in zip(participants, own, strict=True)
        ]
        network = weighted_mean([local for local, _ in done], sizes)
        if scaffold:
            new = [c for _, c in done]
            for after, before, size in zip(new, own, sizes, strict=True):
                share = size / sum(sizes)
                everyone = [e + share * (a - b) for e, a, b in zip(everyone, after, before, strict=True)]
            own = new
    return network


def in_process(
    participants: Sequence[Participant],
    spec: NetworkSpec,
    params: FederatedParams,
    *,
    algorithm: Algorithm,
    rounds: int,
    proximal: float,
    seed: int,
    device: torch.device,
    work: Path,
    pretrained: None = None,
) -> Federated:
    """In the place of ``run_federation``, which takes half a minute to start.

    That both come to the same network is shown in tests/federation/test_peers.py.
    """
    network = reference(
        participants, spec, params, algorithm=algorithm, rounds=rounds, proximal=proximal, seed=seed
    )
    weights = sum(t.nbytes for t in network.state_dict().values())
    return Federated(network, rounds, 2 * rounds * len(participants) * weights)
