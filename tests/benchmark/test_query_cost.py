"""A query beside the obvious way to distil one: what the reference does, and what is measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import query_cost
from benchmarks.query_cost import LOCAL, QUERY, balanced_accuracy, draw, hospitals, measure, naive
from qkt_clinical.models.networks import Classifier


def test_balanced_accuracy_is_of_the_query_and_the_own_classes() -> None:
    labels = np.array([QUERY, QUERY, *LOCAL])
    logits = torch.full((6, 8), -9.0)
    logits[range(6), labels] = 1.0
    logits[:, 7] = 5.0  # neither asked for nor held
    assert balanced_accuracy(logits, labels, torch.zeros(1)) == 1.0
    logits[1, 1] = 1.5
    assert balanced_accuracy(logits, labels, torch.zeros(1)) == pytest.approx(0.9)
    assert balanced_accuracy(logits, labels, torch.ones(1)) == 1.0


def test_every_network_of_the_reference_runs_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    case = hospitals(2, 48, 1)
    assert [set(t.claimed) for t in case.teachers] == [{0, 1, 5}, {0, 2, 6}]
    calls: dict[int, int] = {}
    forward = Classifier.forward

    def counted(network: Classifier, images: torch.Tensor) -> torch.Tensor:
        calls[id(network)] = calls.get(id(network), 0) + len(images)
        return forward(network, images)

    monkeypatch.setattr(Classifier, "forward", counted)
    before = {k: v.clone() for k, v in case.student.state_dict().items()}
    student, offset = naive(case, 3)
    for network in (case.student, *(t.network for t in case.teachers)):
        assert calls[id(network)] == 48 * 3 * 2, "both phases, three epochs each"
    assert all(torch.equal(v, before[k]) for k, v in case.student.state_dict().items())
    assert offset.shape == (1,)
    assert not torch.equal(student.head.weight, case.student.head.weight)


def test_phase_2_leaves_the_extractor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_cost, "RATES", (0.0, 1e-2))
    case = hospitals(1, 48, 1)
    student, _ = naive(case, 2)
    moved = {k for k, v in student.named_parameters() if not torch.equal(v, case.student.get_parameter(k))}
    assert moved == {"head.weight", "head.bias"}


@pytest.mark.slow
def test_measured_on_little() -> None:
    rows, times = measure(2, ("qkt", "qkt-light"), 1, quick=True)
    assert [r["a query"] for r in rows] == [
        "qkt, 2 teachers",
        "qkt-light, 2 teachers",
        "reference, 2 epochs, 2 teachers",
    ]
    assert all(0 <= float(r["balanced"]) <= 1 for r in rows)
    assert set(times) == {"qkt", "qkt-light"}
    assert min(times.values()) > 0


def test_images_are_drawn_by_class_and_seed() -> None:
    images, labels = draw((3, 5), 6, 1)
    assert (images.shape, images.dtype, labels.tolist()) == ((6, 3, 28, 28), np.uint8, [3, 5, 3, 5, 3, 5])
    assert np.array_equal(images, draw((3, 5), 6, 1)[0])
    assert not np.array_equal(images, draw((3, 5), 6, 2)[0])
