"""What runs on a GPU where there is one: training under mixed precision, every method, prediction."""

from __future__ import annotations

import pytest
import torch

from qkt_clinical.benchmark.ablations import answer_ablated
from qkt_clinical.benchmark.phases import DistillationParams, Phase1Way
from qkt_clinical.catalog import METHODS, Method
from qkt_clinical.config.params import TrainParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.models.inference import predict
from qkt_clinical.qkt.panel import Teacher
from qkt_clinical.qkt.prediction import scores_of
from qkt_clinical.qkt.steps import LocalData
from qkt_clinical.task import MULTICLASS, mean_recall
from qkt_clinical.training.classifier import train_teacher
from tests.shapes import shapes, spec, teacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]


def test_a_teacher_trains() -> None:
    device = torch.device("cuda")
    train, held = shapes((0, 1, 2), 40, 1), shapes((0, 1, 2), 30, 2)
    params = TrainParams(epochs=8, batch_size=32)
    network, history = train_teacher(
        spec(), train, held, params, seed=0, site="gpu", device=device, task=MULTICLASS
    )
    assert next(network.parameters()).device.type == "cuda"
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in history.curves)
    logits = predict(network, to_input(held[0]), device)
    assert logits.device.type == "cpu"
    assert mean_recall(logits.argmax(1), torch.from_numpy(held[1])) > 0.9


DISTILLATION = DistillationParams(epochs=4, views=2, batch_size=32)


@pytest.mark.parametrize(("method", "phase1"), [*((m, "merge") for m in METHODS), ("qkt", "distill")])
def test_a_query_is_answered(method: Method, phase1: Phase1Way) -> None:
    device = torch.device("cuda")
    own = teacher((0, 1), site="asking", epochs=6)
    teachers = [Teacher("one", teacher((1, 2), site="one", epochs=6), (1, 2))]
    data = LocalData(shapes((0, 1), 40, 3), shapes((0, 1), 40, 4))
    made = answer_ablated(
        own,
        teachers,
        data,
        (2,),
        method=method,
        phase1=phase1,
        distillation=DISTILLATION,
        budget=0.1,
        device=device,
        task=MULTICLASS,
    )
    assert {p.device.type for n in (own, made.network, teachers[0].network) for p in n.parameters()} == {
        "cpu"
    }
    inputs = to_input(shapes((0, 1, 2), 20, 5)[0])
    experts = teachers if method == "routed" else []
    there, here = (
        scores_of(made.network, made.decision, experts, inputs, d) for d in (device, torch.device("cpu"))
    )
    torch.testing.assert_close(there[:, :3], here[:, :3], atol=1e-2, rtol=1e-2)
