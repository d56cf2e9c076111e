"""Weights in a byte each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from qkt_clinical.models.packed_weights import (
    DIGITS,
    LEVELS,
    level_distances,
    pack,
    packed_specs,
    unpack,
)

WEIGHTS = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=5, max_side=4),
    elements=st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False),
)


def test_levels_by_hand() -> None:
    weights = torch.tensor([[254.0, -127.0, 1.0, 0.9], [0.0, 0.0, 0.0, 0.0], [-12.7, 6.3, 0.04, 0.06]])
    assert level_distances(weights[:2]).tolist() == [2.0, 0.0]
    packed = pack({"w": weights, "bias": torch.tensor([0.3])})
    assert packed["w"].dtype == torch.int8
    assert packed["w"].tolist() == [[127, -64, 0, 0], [0, 0, 0, 0], [-127, 63, 0, 1]]
    assert packed["w.scale"][2].item() == pytest.approx(0.1, rel=2.0 ** (1 - DIGITS))
    assert packed["bias"].tolist() == [pytest.approx(0.3)], "a vector stays as it is"
    back = unpack(packed)
    assert set(back) == {"w", "bias"}
    assert back["w"][0].tolist() == [254.0, -128.0, 0.0, 0.0]


@given(WEIGHTS)
def test_each_within_half_a_level_and_packed_again_the_same(values: np.ndarray) -> None:
    weights = torch.from_numpy(values)
    once = unpack(pack({"w": weights}))["w"]
    scale = level_distances(weights).view(-1, *(1,) * (weights.ndim - 1))
    assert bool(((once - weights).abs().double() <= 0.5 * scale.double() * (1 + 1e-6)).all())
    again = pack({"w": once})
    assert torch.equal(unpack(again)["w"], once)
    assert bool((once[weights == 0] == 0).all())
    assert int(again["w"].abs().max()) <= LEVELS


def test_what_a_file_holds_is_known_before_it_is_read() -> None:
    state: dict[str, Tensor] = {
        "conv.weight": torch.randn(4, 3, 3, 3),
        "head.weight": torch.randn(5, 4),
        "norm.running_var": torch.ones(4),
        "norm.num_batches_tracked": torch.tensor(7),
        "half": torch.randn(5, 4).half(),
    }
    specs = {name: (tuple(t.shape), t.dtype) for name, t in state.items()}
    made = {name: (tuple(t.shape), t.dtype) for name, t in pack(state).items()}
    assert packed_specs(specs) == made
    assert made["head.weight.scale"] == ((5,), torch.float32)
