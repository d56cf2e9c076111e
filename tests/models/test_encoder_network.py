"""Networks whose extractor is a pretrained encoder: what they see, what training changes, how they travel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from qkt_clinical.catalog import EncoderMode
from qkt_clinical.config.params import EncoderParams, TrainParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Images, Labels
from qkt_clinical.errors import ConfigError
from qkt_clinical.models.bundle import load_bundle, write_bundle
from qkt_clinical.models.encoder_network import EncoderExtractor
from qkt_clinical.models.encoders import Encoder, digest_weights, encode, load_encoder
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier, build
from qkt_clinical.qkt.low_rank_merge import merge_networks, reduce_extractor
from qkt_clinical.records.card import CARD, InputSpec, NetworkSpec
from qkt_clinical.records.registered import REQUIREMENT, requirements_of
from qkt_clinical.task import MULTICLASS
from qkt_clinical.training.classifier import first_network, network_spec, train_network
from qkt_clinical.training.frozen import VIEWS
from qkt_clinical.training.loop import PRETRAINED_SHARE, Schedule, fit
from tests.shapes import CLASSES, CPU, same, shapes, spec, state

pytestmark = pytest.mark.slow

SIDE = 32


@pytest.fixture(scope="module")
def lite(lite_weights: Path) -> Encoder:
    return load_encoder("efficientnet-lite0", lite_weights)


def chosen(weights: Path, mode: EncoderMode = "finetune") -> EncoderParams:
    return EncoderParams(
        name="efficientnet-lite0",
        weights=str(weights),
        digest=digest_weights(weights),
        side=SIDE,
        mode=mode,
    )


def network_of(weights: Path, lite: Encoder, mode: EncoderMode = "finetune") -> Classifier:
    made = network_spec(TrainParams(encoder=chosen(weights, mode)), (3, 16, 16), len(CLASSES))
    return first_network(made, 1, lite)


def test_its_features_are_those_of_the_encoder(lite_weights: Path, lite: Encoder) -> None:
    images, _ = shapes((0, 1, 2), 2, 1)
    network = network_of(lite_weights, lite).eval()
    found = predict(network, to_input(images), CPU, features=True)
    assert torch.allclose(found, encode(lite, images, SIDE, CPU), atol=1e-4)
    assert network(to_input(images)).shape == (6, len(CLASSES))


@pytest.mark.parametrize("mode", ["frozen", "adapters", "finetune"])
def test_training_changes_what_the_mode_says(lite_weights: Path, lite: Encoder, mode: EncoderMode) -> None:
    network = network_of(lite_weights, lite, mode)
    before = state(network)
    given = lite.network.state_dict()
    extractor = {k.removeprefix("extractor.network."): t for k, t in before.items()}
    assert all(torch.equal(extractor[k], t) for k, t in given.items())
    train_network(
        network,
        shapes((0, 1), 8, 1),
        shapes((0, 1), 3, 2),
        TrainParams(epochs=1, batch_size=8, appearance=0.0, encoder=chosen(lite_weights, mode)),
        task=MULTICLASS,
        seed=0,
        site="aster",
        device=CPU,
    )
    after = state(network)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    norms = {k for k in before if ".bn" in k}
    assert "head.weight" in changed
    if mode == "frozen":
        assert changed <= {"head.weight", "head.bias"}
    elif mode == "adapters":
        assert changed <= norms | {"head.weight", "head.bias"}
        assert {"extractor.network.bn1.weight", "extractor.network.bn1.running_mean"} <= changed
    else:
        assert {"extractor.network.conv_stem.weight", "extractor.network.bn1.weight"} <= changed


def test_a_frozen_encoder_sees_every_image_a_few_times_however_long_the_head_is_trained(
    lite_weights: Path, lite: Encoder
) -> None:
    train, val = shapes((0, 1, 2), 12, 1), shapes((0, 1, 2), 4, 2)
    params = TrainParams(
        epochs=25, batch_size=8, appearance=0.5, appearance_images=1, encoder=chosen(lite_weights, "frozen")
    )

    def trained(val: tuple[Images, Labels]) -> tuple[Classifier, int]:
        network, seen = network_of(lite_weights, lite, "frozen"), [0]

        def count(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            seen[0] += len(inputs[0])

        handle = network.extractor.register_forward_hook(count)
        train_network(network, train, val, params, task=MULTICLASS, seed=0, site="aster", device=CPU)
        handle.remove()
        return network, seen[0]

    network, seen = trained(val)
    assert seen == VIEWS * len(train[1]) + len(val[1])
    assert not network.training
    labels = torch.from_numpy(val[1])
    right = predict(network, to_input(val[0]), CPU).argmax(dim=1) == labels
    assert float(right.double().mean()) > 0.6, "three classes"
    assert same(state(trained(val)[0]), state(network)), "the same twice"
    assert trained((val[0][:0], val[1][:0]))[1] == VIEWS * len(train[1]), "without validation images"


def test_what_was_trained_elsewhere_moves_more_slowly(lite_weights: Path, lite: Encoder) -> None:
    network = network_of(lite_weights, lite)
    before = state(network)
    inputs, labels = (torch.from_numpy(a) for a in shapes((0, 1), 8, 1))

    def loss(batch: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(network(batch.float() / 127.5 - 1), labels)

    schedule = Schedule(1, 1e-3, weight_decay=0.0, warmup=0.0)
    fit(network, lambda epoch: iter([inputs]), 1, loss, schedule, device=CPU)
    # Adam's first step is as large as the learning rate wherever there is a gradient.
    moved = {k: float((state(network)[k] - before[k]).abs().max()) for k in before}
    assert moved["head.weight"] == pytest.approx(1e-3, rel=0.01)
    assert moved["extractor.network.conv_stem.weight"] == pytest.approx(PRETRAINED_SHARE * 1e-3, rel=0.01)


def card(site: str = "aster") -> dict[str, object]:
    return {
        "kind": "teacher",
        "site": site,
        "classes": CLASSES,
        "input": InputSpec(shape=(3, 16, 16), normalisation="unit", spacing_mm=None),
        "training": {},
    }


def test_a_bundle_names_the_encoder_and_is_read_without_its_file(
    lite_weights: Path, lite: Encoder, tmp_path: Path
) -> None:
    network = network_of(lite_weights, lite)
    write_bundle(tmp_path, network, card())
    said = json.loads((tmp_path / CARD).read_text(encoding="utf-8"))["network"]
    assert said["name"] == "encoder"
    assert said["encoder"] == {
        "name": "efficientnet-lite0",
        "side": SIDE,
        "mode": "finetune",
        "unit_length": False,
    }
    assert same(state(load_bundle(tmp_path).network), state(network))


def test_cards_of_other_networks_say_nothing_of_encoders(tmp_path: Path) -> None:
    write_bundle(tmp_path, build(spec(), seed=1), card())
    assert "encoder" not in (tmp_path / CARD).read_text(encoding="utf-8")


def test_an_encoder_and_a_network_from_nothing_are_merged(
    lite_weights: Path, lite: Encoder, tmp_path: Path
) -> None:
    """The sum of both networks' logits, whatever their extractors are; half of an encoder's rank is kept."""
    own, teacher = build(spec(), seed=1).eval(), network_of(lite_weights, lite).eval()
    images = to_input(shapes((0, 1, 2), 8, 1)[0])
    rows = [(n.head.weight, n.head.bias) for n in (own, teacher)]
    for share in (1.0, 0.5):
        parts = [
            reduce_extractor(n, s, images, seed=0, device=CPU)[:2] for n, s in ((own, 1.0), (teacher, share))
        ]
        merged = merge_networks(own, parts, rows)
        away = float((merged(images) - own(images) - teacher(images)).detach().abs().max())
        assert away < 1e-4 if share == 1.0 else away > 1e-4
        folder = tmp_path / str(share)
        folder.mkdir()
        decision = {
            "method": "qkt",
            "local": [0, 1],
            "query": [2],
            "offsets": [0.0],
            "budget": 0.05,
            "own_weight": 1.0,
        }
        write_bundle(folder, merged, {**card(), "kind": "student", "query": "cross", "decision": decision})
        assert same(state(load_bundle(folder).network), state(merged))


def test_images_that_it_cannot_take_are_refused(lite_weights: Path, lite: Encoder) -> None:
    params = TrainParams(encoder=chosen(lite_weights))
    for shape in ((2, 16, 16), (1, 16, 16, 16)):
        with pytest.raises(ConfigError) as caught:
            network_spec(params, shape, 4)
        assert caught.value.code == "encoder-input"
    with pytest.raises(ConfigError, match="standardised one by one"):
        train_network(
            network_of(lite_weights, lite),
            (shapes((0, 1), 8, 1)[0].astype(np.float32), shapes((0, 1), 8, 1)[1]),
            shapes((0, 1), 3, 2),
            params,
            task=MULTICLASS,
            seed=0,
            site="aster",
            normalisation="zscore",
            device=CPU,
        )


@pytest.mark.parametrize(
    "network",
    [
        {"name": "encoder"},
        {"name": "resnet-small", "encoder": {"name": "resnet18", "side": 64, "mode": "frozen"}},
        {"name": "encoder", "encoder": {"name": "resnet18", "side": 4000, "mode": "frozen"}},
        {"name": "encoder", "encoder": {"name": "other", "side": 64, "mode": "frozen"}},
        {"name": "encoder", "encoder": {"name": "resnet18", "side": 64, "mode": "frozen", "weights": "x"}},
        {"name": "encoder", "encoder": {"name": "medicalnet-resnet10", "side": 64, "mode": "frozen"}},
    ],
)
def test_a_card_with_another_encoder_is_refused(network: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        NetworkSpec.model_validate({**network, "spatial_dims": 2, "in_channels": 3, "classes": 4})


def test_grey_images_are_repeated(lite_weights: Path, lite: Encoder) -> None:
    made = network_spec(TrainParams(encoder=chosen(lite_weights)), (1, 16, 16), 4)
    network = first_network(made, 1, lite).eval()
    assert isinstance(network.extractor, EncoderExtractor)
    grey = to_input(shapes((0, 1), 2, 1)[0])[:, :1]
    coloured = network_of(lite_weights, lite).eval().features(grey.expand(-1, 3, -1, -1))
    assert torch.allclose(network.features(grey), coloured, atol=1e-5)


def test_a_registered_version_needs_timm_where_its_encoder_is_from_there(
    lite_weights: Path, lite: Encoder, tmp_path: Path
) -> None:
    with_encoder, without = tmp_path / "with", tmp_path / "without"
    with_encoder.mkdir()
    without.mkdir()
    one = write_bundle(with_encoder, network_of(lite_weights, lite), card())
    other = write_bundle(without, build(spec(), seed=1), card())
    assert set(requirements_of(one)) - set(requirements_of(other)) == {"timm"}
    assert all(REQUIREMENT.fullmatch(f"{name}==1.2.3") for name in requirements_of(one))
