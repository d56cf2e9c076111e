from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from qkt_clinical.common.extras import require_extra
from qkt_clinical.config.loading import load_params, parse
from qkt_clinical.config.params import PrivacyParams, TrainParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.errors import ConfigError, QktError
from qkt_clinical.models.networks import Classifier, build
from qkt_clinical.records.card import read_card
from qkt_clinical.stages.train import train_site
from qkt_clinical.task import MULTICLASS
from qkt_clinical.training.classifier import train_teacher
from qkt_clinical.training.loop import History
from qkt_clinical.training.private import (
    COUNTING,
    check_delta,
    log_prior,
    noisy_counts,
    set_gradients,
    train_private,
)
from tests.federation.test_federation import PARAMS as WORKSPACE
from tests.federation.test_federation import write_hospital
from tests.shapes import CPU, same, shapes, spec, state

pytestmark = pytest.mark.slow

IMAGES, LABELS = shapes((0, 1), 12, 1)
MIDDLE = IMAGES[:, :, 2:14, 2:14].copy()
"""12 x 12 pixels, on which every image's own gradient takes half the time."""
PRIVACY = PrivacyParams(epsilon=4.0, delta=1e-3)
PARAMS = TrainParams(network="resnet-small-gn", epochs=2, batch_size=8, privacy=PRIVACY)


def train(secret: str = "salt", privacy: PrivacyParams = PRIVACY) -> tuple[Classifier, History]:
    return train_private(
        spec("resnet-small-gn"),
        (MIDDLE, LABELS),
        PARAMS,
        privacy,
        seed=3,
        secret=secret,
        site="aster",
        device=CPU,
        task=MULTICLASS,
    )


@pytest.fixture(scope="module", autouse=True)
def accounted_once() -> Iterator[None]:
    """Opacus' accountant takes seconds, and finds the same of the same history of steps."""
    from opacus.accountants import PRVAccountant

    account, found = PRVAccountant.get_epsilon, dict[tuple[Any, ...], float]()

    def get_epsilon(accountant: PRVAccountant, delta: float, **more: float) -> float:
        key = (*accountant.history, delta, *sorted(more.items()))
        if key not in found:
            found[key] = account(accountant, delta, **more)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PRVAccountant, "get_epsilon", get_epsilon)
        yield


@pytest.fixture(scope="module")
def trained() -> tuple[Classifier, History]:
    return train()


def test_every_images_own_gradient() -> None:
    network = build(spec("resnet-small-gn"), seed=0)
    images, labels = shapes((0, 1, 2), 1, 2)
    inputs, truth = to_input(images), torch.from_numpy(labels)
    prior = torch.tensor([0.3, -0.5, 0.1, 0.0])[: network.spec.classes]
    total = set_gradients(network, inputs, truth, prior, task=MULTICLASS)
    for i in range(3):
        network.zero_grad()
        functional.cross_entropy(network(inputs[i : i + 1]) + prior, truth[i : i + 1]).backward()
        for parameter in network.parameters():
            assert parameter.grad is not None
            each: torch.Tensor = parameter.grad_sample  # type: ignore[attr-defined]
            assert torch.allclose(each[i], parameter.grad, atol=1e-5)
    mean = functional.cross_entropy(network(inputs) + prior, truth).item()
    assert float(total) == pytest.approx(3 * mean, rel=1e-4)
    assert float(set_gradients(network, inputs[:0], truth[:0], prior, task=MULTICLASS)) == 0.0
    weight = network.head.weight
    assert weight.grad_sample.shape == (0, *weight.shape)  # type: ignore[attr-defined]


def test_the_same_secret_gives_the_same_weights(trained: tuple[Classifier, History]) -> None:
    network, history = train()
    assert same(state(trained[0]), state(network))
    assert trained[1] == history
    assert not same(state(trained[0]), state(train(secret="another")[0]))
    assert all(bool(torch.isfinite(p).all()) for p in network.parameters())
    assert not network.training


def test_what_was_spent_is_what_another_accountant_allows(trained: tuple[Classifier, History]) -> None:
    from opacus.accountants import RDPAccountant

    said = trained[1].privacy
    assert 3.9 < float(said["epsilon"]) <= 4.0
    assert (said["delta"], said["clip"], said["protected"]) == (1e-3, 1.0, "image")
    # 24 images in batches of 8: a third of them in each of 3 steps, 2 epochs. Renyi's bound is the looser.
    other = RDPAccountant()
    other.history = [(float(said["noise_multiplier"]), 1 / 3, 6)]
    spent = float(said["epsilon"]) - COUNTING * 4.0  # the rest went into the numbers of images
    assert 0.9 * spent < other.get_epsilon(1e-3) < 1.5 * spent
    assert len(trained[1].curves) == trained[1].best_epoch == 2


def test_a_smaller_epsilon_takes_more_noise(trained: tuple[Classifier, History]) -> None:
    strict = train(privacy=PrivacyParams(epsilon=1.0, delta=1e-3))[1].privacy
    assert float(strict["epsilon"]) <= 1.0
    assert float(strict["noise_multiplier"]) > float(trained[1].privacy["noise_multiplier"])


def test_numbers_of_images_are_noisy_as_epsilon_says() -> None:
    draw = torch.Generator().manual_seed(0)
    seen = torch.stack([noisy_counts(torch.tensor([300, 0, 40, 0]), 0.4, draw) for _ in range(5_000)])
    noise = seen[:, [0, 2]] - torch.tensor([300, 40])
    # Laplace of scale 1 / 0.4: mean 0, mean distance 2.5, and as the bound on epsilon wants it, tails that
    # fall by e for every 2.5 images.
    assert noise.mean().abs() < 0.1
    assert float(noise.abs().mean()) == pytest.approx(2.5, rel=0.03)
    assert float((noise > 2.5).double().mean() / (noise > 5.0).double().mean()) == pytest.approx(
        math.e, rel=0.1
    )
    assert not seen[:, [1, 3]].any(), "classes that are not there get no noise"
    few = torch.stack([noisy_counts(torch.tensor([1, 2]), 0.1, draw) for _ in range(100)])
    assert bool((few >= 1).all()), "their logarithm is taken"


def test_the_prior_makes_up_for_numbers_of_images() -> None:
    prior = log_prior(torch.tensor([30.0, 0.0, 10.0, 20.0]))
    assert prior.tolist() == pytest.approx([math.log(1.5), 0.0, math.log(0.5), 0.0])


def test_an_epsilon_out_of_reach() -> None:
    with pytest.raises(ConfigError) as caught:
        train(privacy=PrivacyParams(epsilon=1e-9, delta=1e-9))
    assert caught.value.code == "privacy-epsilon"


def test_delta_is_below_one_over_the_images() -> None:
    check_delta(PrivacyParams(delta=0.001), 999)
    with pytest.raises(ConfigError, match="below one over"):
        check_delta(PrivacyParams(delta=0.001), 1000)


def test_without_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkt_clinical.common.extras.find_spec", lambda name: None)
    with pytest.raises(QktError, match=r"qkt-clinical\[privacy\]") as caught:
        train()
    assert caught.value.code == "opacus-missing"
    monkeypatch.setattr("qkt_clinical.common.extras.find_spec", util.find_spec)
    require_extra("opacus")


def test_batch_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match="without batch norm: resnet-small-gn"):
        parse(TrainParams, {"network": "resnet-small", "privacy": {"epsilon": 8.0}}, file="params.yaml")


def test_a_training_without_privacy_does_not_pass_for_one_with_it() -> None:
    data = shapes((0, 1), 4, 1)
    with pytest.raises(ConfigError) as caught:
        train_teacher(
            spec("resnet-small-gn"), data, data, PARAMS, seed=0, site="aster", device=CPU, task=MULTICLASS
        )
    assert caught.value.code == "privacy-unavailable"


def test_the_card_says_what_was_spent(tmp_path: Path) -> None:
    section = {"network": "resnet-small-gn", "epochs": 1, "batch_size": 8, "privacy": {"delta": 1e-3}}
    write_hospital(tmp_path, "birch", params={**WORKSPACE, "train": section})
    train_site(tmp_path, "birch", load_params(tmp_path), device="cpu")
    folder = tmp_path / "models" / "teachers" / "birch"
    card = read_card(folder)
    assert card.network.name == "resnet-small-gn"
    assert 7.9 < float(card.training["epsilon"] or math.nan) <= 8.0
    assert card.training["protected"] == "image"
    # A hospital of other patients' ids draws other noise with the same seed and images.
    ids = tmp_path / "data" / "prepared" / "birch" / "groups.npy"
    before = (folder / "weights.safetensors").read_bytes()
    np.save(ids, np.char.add(np.load(ids), "x"))
    train_site(tmp_path, "birch", load_params(tmp_path), device="cpu")
    assert (folder / "weights.safetensors").read_bytes() != before
