"""Views over a frozen encoder: large images need the memory of a few, not of all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qkt_clinical.data.inputs import to_input
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import build
from qkt_clinical.training import frozen
from tests.shapes import CPU, shapes, spec


def test_views_are_made_of_a_few_images_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = build(spec("resnet-small"), seed=1).eval(), to_input(shapes((0, 1), 4, 1)[0])
    seen: list[int] = []
    plain = frozen.augment

    def augment(images: Tensor, strength: float, draw: torch.Generator) -> Tensor:
        seen.append(len(images))
        return plain(images, strength, draw)

    monkeypatch.setattr(frozen, "augment", augment)
    monkeypatch.setattr(frozen, "IMAGES_AT_ONCE", 3)
    views = frozen.feature_views(network, inputs, 1.0, generator(1, "views"), CPU)
    assert seen == [3, 3, 2] * (frozen.VIEWS - 1)
    assert views.shape == (frozen.VIEWS, 8, network.head.in_features)
    assert torch.equal(views[0], predict(network, inputs, CPU, features=True)), "the first as it is"
    away = (views[1:] - views[0]).norm(dim=2)
    assert bool((away > 0).all()), "every image of every other view is changed"
    unchanged = frozen.feature_views(network, inputs, 0.0, generator(1, "views"), CPU)
    assert all(torch.equal(view, unchanged[0]) for view in unchanged), "and in its place"
