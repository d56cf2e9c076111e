"""A hospital's round by each federated method, without FLARE's simulator, against the round written out."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AlgorithmConstants

from qkt_clinical.baselines.federated import Participant, global_network, round_draw, round_rate, train_round
from qkt_clinical.baselines.params import FederatedParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.federation.peer_job import METHODS
from qkt_clinical.task import MULTICLASS
from tests.federated_reference import one_round
from tests.shapes import shapes, spec

pytestmark = pytest.mark.slow

ASTER = Participant("aster", shapes((0, 1), 16, 3))
PARAMS = FederatedParams(batch_size=8)
MU = 0.5


@pytest.mark.parametrize("name", METHODS)
def test_a_round_is_the_one_written_out(name: str) -> None:
    network = global_network(spec(), 1)
    zeros = [torch.zeros_like(p) for p in network.parameters()]
    meta: dict[str, Any] = {}
    if name == "fedprox":
        meta[AlgorithmConstants.FEDPROX_MU] = MU
    if name == "scaffold":
        named = dict(network.named_parameters())
        meta[AlgorithmConstants.SCAFFOLD_CTRL_GLOBAL] = {k: np.zeros(p.shape, "f4") for k, p in named.items()}
    train = partial(
        train_round,
        network,
        to_input(ASTER.train[0]),
        torch.from_numpy(ASTER.train[1]),
        PARAMS,
        task=MULTICLASS,
        learning_rate=round_rate(PARAMS, 1, 2),
        draw=round_draw(1, ASTER.site, 1),
        device=torch.device("cpu"),
    )
    method = METHODS[name]()
    method.begin(network)
    local, sent = method.local_round(network, FLModel(params={}, meta=meta), train)
    expected, controls = one_round(
        network,
        ASTER,
        PARAMS,
        1,
        2,
        proximal=MU if name == "fedprox" else 0.0,
        controls=(zeros, zeros) if name == "scaffold" else None,
    )
    for found, wanted in zip(local.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)
    if name == "scaffold":
        changes = sent[AlgorithmConstants.SCAFFOLD_CTRL_DIFF]
        for (key, _), wanted in zip(network.named_parameters(), controls, strict=True):
            assert np.allclose(np.asarray(changes[key]), wanted.detach().numpy(), atol=1e-4)
    else:
        assert sent == {}


def test_fedprox_stays_nearer_and_fedavg_does_not() -> None:
    network = global_network(spec(), 1)
    start = [p.detach() for p in network.parameters()]

    def way(proximal: float) -> float:
        local, _ = one_round(network, ASTER, PARAMS, 1, 2, proximal=proximal)
        return float(
            sum(((p.detach() - q) ** 2).sum() for p, q in zip(local.parameters(), start, strict=True))
        )

    assert way(100.0) < way(0.0)
