from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qkt_clinical.benchmark.mask_estimators import estimate_mask
from qkt_clinical.catalog import NETWORKS, Network
from qkt_clinical.common.files import digest_file, write_json
from qkt_clinical.errors import BundleError
from qkt_clinical.models.bundle import CLASS_MEANS, Bundle, load_bundle, packed_network, write_bundle
from qkt_clinical.models.networks import Classifier, build
from qkt_clinical.models.offers import read_offer
from qkt_clinical.models.tensor_file import HEADER_BYTES
from qkt_clinical.records.card import (
    CARD,
    MASK,
    MAX_JSON_BYTES,
    WEIGHTS,
    Card,
    NetworkSpec,
    read_card,
    read_mask,
)
from qkt_clinical.stages.plan import copy_bundle
from tests.shapes import CLASSES, spec

SHAPE = (3, 32, 32)
INPUT = {"shape": SHAPE, "normalisation": "unit", "spacing_mm": None}
FEATURES = build(spec("densenet-small"), seed=0).head.in_features
DECISION = {
    "method": "routed",
    "local": [0, 1],
    "query": [3],
    "offsets": [0.25],
    "budget": 0.05,
    "own_weight": 2.0,
    "experts": ["birch"],
}


def card_of(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "teacher",
        "site": "birch",
        "classes": CLASSES,
        "input": INPUT,
        "training": {"epochs": 3, "note": None, "early": True},
        **changes,
    }


def network_of(name: Network = "densenet-small", seed: int = 0) -> Classifier:
    """A network whose running statistics are not those of a new one."""
    network = build(spec(name), seed=seed).train()
    with torch.no_grad():
        network(torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(seed)))
    return network.eval()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "birch"
    folder.mkdir()
    network = network_of()
    write_bundle(folder, network, card_of())
    mask = estimate_mask(network, SHAPE, CLASSES, estimator="head-row-norm", probes=8)
    write_json(folder / MASK, mask.model_dump(mode="json"))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "birch"))


# --- what is written is what is read --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_is_bit_identical(tmp_path: Path, name: Network) -> None:
    network = network_of(name)
    written = write_bundle(tmp_path, network, card_of())
    bundle = load_bundle(tmp_path)
    assert bundle.card == written
    assert bundle.mask is None
    before, after = network.state_dict(), bundle.network.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert not any(t.is_meta for t in (*bundle.network.parameters(), *bundle.network.buffers()))
    assert not bundle.network.training
    images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(bundle.network(images), network(images))
    # A loaded network can be trained on.
    bundle.network.train()(images).sum().backward()
    assert bundle.network.head.weight.grad is not None


def test_class_means_are_read_as_they_were_written(tmp_path: Path) -> None:
    network, draw = network_of(), torch.Generator().manual_seed(0)
    means = {c: torch.randn(FEATURES, generator=draw) for c in (3, 0)}
    card = write_bundle(tmp_path, network, card_of(), means)
    assert card.class_means
    assert json.loads((tmp_path / CARD).read_text())["class_means"] is True, "not of which classes"
    bundle = load_bundle(tmp_path)
    assert sorted(bundle.class_means) == [0, 3]
    assert all(torch.equal(bundle.class_means[c], mean) for c, mean in means.items())
    assert set(bundle.network.state_dict()) == set(network.state_dict())
    assert not load_bundle_without(tmp_path).class_means


def load_bundle_without(folder: Path) -> Bundle:
    """The same network written without class means."""
    write_bundle(folder, load_bundle(folder).network, card_of())
    return load_bundle(folder)


def test_a_packed_bundle_is_a_quarter_and_says_what_was_packed(tmp_path: Path) -> None:
    network, means = network_of(), {1: torch.randn(FEATURES, generator=torch.Generator().manual_seed(0))}
    whole, small, again = (tmp_path / name for name in ("whole", "small", "again"))
    for place in (whole, small, again):
        place.mkdir()
    plain = write_bundle(whole, network, card_of(), means)
    packed = write_bundle(small, network, card_of(), means, packed=True)
    assert plain.packed is None
    assert "packed" not in json.loads((whole / CARD).read_text()), "older files keep their bytes"
    assert packed.weights.bytes < 0.36 * plain.weights.bytes, "a small network has many short tensors"
    got, wanted = load_bundle(small), packed_network(network)
    before, after = wanted.state_dict(), got.network.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert torch.allclose(got.class_means[1], means[1], atol=float(means[1].abs().max()) / 200)
    state = network.state_dict()
    assert all(torch.equal(state[k], after[k]) for k in state if state[k].ndim < 2)
    write_bundle(again, got.network, card_of(), got.class_means, packed=True)
    assert (again / WEIGHTS).read_bytes() == (small / WEIGHTS).read_bytes(), "packed once, it stays as it is"


def test_a_packed_bundle_is_checked_like_any_other(tmp_path: Path) -> None:
    write_bundle(tmp_path, network_of(), card_of(), packed=True)
    header, body = parts(tmp_path)
    start, end = header["head.weight.scale"]["data_offsets"]
    far = struct.pack("<f", 3e38)
    forge(tmp_path, header, body[:start] + far + body[start + 4 :])
    with pytest.raises(BundleError, match=r"tensor head\.weight is not finite when unpacked") as caught:
        load_bundle(tmp_path)
    assert caught.value.code == "bundle-values"
    forge(tmp_path, header, body[:start] + struct.pack("<f", float("nan")) + body[start + 4 :])
    with pytest.raises(BundleError, match="is not finite"):
        load_bundle(tmp_path)
    header["head.weight.scale"]["shape"] = [1]
    forge(tmp_path, header, body)
    with pytest.raises(BundleError) as caught:
        load_bundle(tmp_path)
    assert caught.value.code == "bundle-tensors"
    assert end - start == 4 * len(CLASSES)

    card = json.loads((tmp_path / CARD).read_text())
    del card["packed"]
    write_json(tmp_path / CARD, card)
    with pytest.raises(BundleError) as caught:
        load_bundle(tmp_path)
    assert caught.value.code == "bundle-size", "levels are no weights"


@pytest.mark.parametrize("format_", ["qkt-bundle/1", "qkt-bundle/2"])
def test_bundles_of_older_formats_are_read(folder: Path, format_: str) -> None:
    card = json.loads((folder / CARD).read_text())
    for key in ("class_means", *(("image_statistics",) if format_ == "qkt-bundle/1" else ())):
        del card[key]
    write_json(folder / CARD, card | {"format": format_})
    assert load_bundle(folder).class_means == {}


def test_same_network_same_bytes(original: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path, network_of(), card_of())
    for name in (CARD, WEIGHTS):
        assert (tmp_path / name).read_bytes() == (original / name).read_bytes()


def test_the_card_names_the_weights(original: Path) -> None:
    card = read_card(original)
    assert card.weights.bytes == (original / WEIGHTS).stat().st_size
    assert card.weights.sha256 == digest_file(original / WEIGHTS)
    assert card.network == spec("densenet-small")
    mask = load_bundle(original).mask
    assert mask is not None
    assert mask.knows(CLASSES[0]) == mask.known[0]
    assert not mask.knows("no such class")


def test_diverged_weights_are_not_written(tmp_path: Path) -> None:
    network = network_of()
    with torch.no_grad():
        network.head.bias[0] = float("nan")
    with pytest.raises(BundleError, match=r"head\.bias is not finite") as caught:
        write_bundle(tmp_path, network, card_of())
    assert "learning_rate" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_students_experts_are_loaded_and_checked(original: Path, tmp_path: Path) -> None:
    def student(**changes: Any) -> Path:
        shutil.rmtree(tmp_path / "student", ignore_errors=True)
        (tmp_path / "student").mkdir()
        card = card_of(kind="student", site="aster", query="q", decision={**DECISION, **changes})
        write_bundle(tmp_path / "student", network_of(seed=1), card)
        return tmp_path / "student"

    folder = student()
    with pytest.raises(BundleError) as caught:
        load_bundle(folder)
    assert caught.value.code == "bundle-missing"
    shutil.copytree(original, folder / "experts" / "birch")
    bundle = load_bundle(folder)
    assert bundle.card.decision is not None
    assert bundle.card.decision.relevant == (0, 1, 3)
    assert list(bundle.experts) == ["birch"]
    assert bundle.experts["birch"].digest == digest_file(original / CARD)
    # An expert that is itself a student would go on for ever.
    shutil.rmtree(folder / "experts" / "birch")
    shutil.copytree(student(experts=[]), tmp_path / "kept")
    shutil.copytree(tmp_path / "kept", student() / "experts" / "birch")
    with pytest.raises(BundleError, match="no teacher"):
        load_bundle(tmp_path / "student")


# --- adversarial bundles --------------------------------------------------------------------------


def parts(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def seal(folder: Path) -> None:
    """Make the card agree with the weights as they are now, as whoever forges them would."""
    path = folder / WEIGHTS
    edit(folder, weights={"bytes": path.stat().st_size, "sha256": digest_file(path)})


def forge(folder: Path, header: bytes | dict[str, Any], body: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + text + body)
    seal(folder)


def edit(folder: Path, **changes: Any) -> None:
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | changes))


def flipped(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def truncated(folder: Path, *, sealed: bool) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-4])
    if sealed:
        seal(folder)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def pickled(folder: Path) -> None:
    size = (folder / WEIGHTS).stat().st_size
    (folder / WEIGHTS).write_bytes(pickle.dumps(Evil()).ljust(size, b"."))
    seal(folder)


def torch_file(folder: Path) -> None:
    torch.save(network_of().state_dict(), folder / WEIGHTS)
    seal(folder)


def value(number: float, suffix: str = "head.bias") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        header, body = parts(folder)
        name = next(n for n in sorted(header) if n.endswith(suffix))
        start = header[name]["data_offsets"][0]
        forge(folder, header, body[:start] + struct.pack("<f", number) + body[start + 4 :])

    return write


def entry(name: str, **changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        header, body = parts(folder)
        header[name] = header[name] | changes
        forge(folder, header, body)

    return write


def header_of(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        header, body = parts(folder)
        forge(folder, change(header) or header, body)

    return write


def text_of(make: Callable[[str], str | bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        header, body = parts(folder)
        text = make(json.dumps(header))
        forge(folder, text if isinstance(text, bytes) else text.encode(), body)

    return write


def declared(length: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        header, body = parts(folder)
        forge(folder, header, body, length)

    return write


def card_text(text: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / CARD).write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def mask_of(**changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        mask = json.loads((folder / MASK).read_text())
        (folder / MASK).write_text(json.dumps(mask | changes))

    return write


def network_with(**changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        edit(folder, network=json.loads((folder / CARD).read_text())["network"] | changes)

    return write


def branch(rank: Any = 0.5, name: str = "densenet-small") -> dict[str, Any]:
    return {"name": name, "rank": rank}


def merged_then(attack: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A sound student of two branches, and then the attack on it."""

    def write(folder: Path) -> None:
        network = build(MERGED_SPEC, seed=0).eval()
        decision = {**DECISION, "method": "qkt", "experts": []}
        write_bundle(folder, network, card_of(kind="student", query="q", decision=decision))
        load_bundle(folder)
        attack(folder)

    return write


MERGED_SPEC = NetworkSpec.model_validate(
    {**spec().model_dump(), "name": "amalgam", "branches": [branch(1.0, "resnet-small"), branch()]}
)
NARROW = "extractor.branches.1.features.denseblock1.denselayer1.layers.conv2.0.weight"


def shape_of(name: str, change: Callable[[list[int]], list[int]]) -> Callable[[Path], None]:
    """Another shape for a tensor, of as many numbers."""

    def write(folder: Path) -> None:
        header, body = parts(folder)
        header[name]["shape"] = change(header[name]["shape"])
        forge(folder, header, body)

    return write


def another_network(folder: Path) -> None:
    write_bundle(folder, network_of("resnet-small"), card_of())
    network_with(name="densenet-small")(folder)


def duplicated(text: str) -> str:
    """The head's bias twice: once as wanted, once over other bytes."""
    other = '"head.bias": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}'
    return text[:-1] + ", " + other + "}"


def overlapping(header: dict[str, Any]) -> None:
    header["head.bias"]["data_offsets"] = header["head.weight"]["data_offsets"][:1] * 2


def swapped(header: dict[str, Any]) -> dict[str, Any]:
    return {f"x{k}": v for k, v in header.items()}


def with_means_then(attack: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A sound teacher with two class means, and then the attack on it."""

    def write(folder: Path) -> None:
        network = network_of()
        write_bundle(folder, network, card_of(), {c: torch.full((FEATURES,), c + 1.0) for c in (0, 3)})
        load_bundle(folder)
        attack(folder)

    return write


def infinite_mean(folder: Path) -> None:
    header, body = parts(folder)
    start = header[CLASS_MEANS]["data_offsets"][0]
    forge(folder, header, body[:start] + struct.pack("<f", float("inf")) + body[start + 4 :])


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    # weights
    "pickle-renamed": (pickled, "bundle-size"),
    "torch-file-renamed": (torch_file, "bundle-size"),
    "flipped-byte": (flipped, "bundle-digest"),
    "truncated": (lambda f: truncated(f, sealed=False), "bundle-size"),
    "truncated-and-sealed": (lambda f: truncated(f, sealed=True), "bundle-size"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "bundle-size"),
    "seven-bytes": (lambda f: (f / WEIGHTS).write_bytes(b"\x02" * 7), "bundle-size"),
    "appended": (lambda f: forge(f, parts(f)[0], parts(f)[1] + b"x"), "bundle-size"),
    "no-weights": (lambda f: (f / WEIGHTS).unlink(), "bundle-missing"),
    "weights-are-a-folder": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), "bundle-missing"),
    "nan": (value(float("nan")), "bundle-values"),
    "infinity": (value(float("inf")), "bundle-values"),
    "negative-variance": (value(-1.0, "running_var"), "bundle-values"),
    "header-of-2**60": (declared(2**60), "bundle-size"),
    "header-of-2**64-1": (declared(2**64 - 1), "bundle-size"),
    "header-of-zero": (declared(0), "bundle-size"),
    "header-over-the-limit": (declared(100 * HEADER_BYTES), "bundle-size"),
    "header-one-short": (lambda f: declared(len(json.dumps(parts(f)[0])) - 1)(f), "bundle-size"),
    "header-deeply-nested": (text_of(lambda t: "[" * len(t)), "bundle-format"),
    "header-of-digits": (text_of(lambda t: "9" * len(t)), "bundle-format"),
    "header-not-json": (text_of(lambda t: t[:-1] + ","), "bundle-format"),
    "header-not-utf8": (text_of(lambda t: b"\xff" * len(t)), "bundle-format"),
    "header-a-list": (text_of(lambda t: "[]".ljust(len(t))), "bundle-format"),
    "wrong-dtype": (entry("head.bias", dtype="I32"), "bundle-tensors"),
    "unknown-dtype": (entry("head.bias", dtype=["F32"]), "bundle-tensors"),
    "half-precision": (entry("head.bias", dtype="F16"), "bundle-tensors"),
    "other-shape": (entry("head.bias", shape=[2, 2]), "bundle-tensors"),
    "negative-shape": (entry("head.bias", shape=[-4]), "bundle-tensors"),
    "huge-shape": (entry("head.bias", shape=[2**62]), "bundle-tensors"),
    "float-shape": (entry("head.bias", shape=["4"]), "bundle-tensors"),
    "tensor-is-a-number": (header_of(lambda h: h | {"head.bias": 4}), "bundle-tensors"),
    "missing-tensor": (header_of(lambda h: h.pop("head.bias") and None), "bundle-tensors"),
    "extra-tensor": (header_of(lambda h: h | {"extra": h["head.bias"]}), "bundle-tensors"),
    "renamed-tensors": (header_of(swapped), "bundle-tensors"),
    "overlapping-tensors": (header_of(overlapping), "bundle-format"),
    "offsets-beyond-the-end": (entry("head.bias", data_offsets=[2**40, 2**40 + 16]), "bundle-format"),
    "negative-offsets": (entry("head.bias", data_offsets=[-16, 0]), "bundle-format"),
    "offsets-are-text": (entry("head.bias", data_offsets=["a", "b"]), "bundle-format"),
    "no-offsets": (lambda f: entry("head.bias", data_offsets=None)(f), "bundle-format"),
    "name-twice": (text_of(duplicated), "bundle-format"),
    "another-network": (another_network, "bundle-size"),
    # card
    "no-card": (lambda f: (f / CARD).unlink(), "bundle-missing"),
    "card-is-a-folder": (lambda f: ((f / CARD).unlink(), (f / CARD).mkdir()), "bundle-missing"),
    "card-not-json": (card_text("{"), "bundle-card"),
    "card-not-utf8": (card_text(b"\xff\xfe"), "bundle-card"),
    "card-deeply-nested": (card_text("[" * 100_000), "bundle-card"),
    "card-of-digits": (card_text("9" * 100_000), "bundle-card"),
    "card-a-list": (card_text("[]"), "bundle-card"),
    "card-oversize": (card_text(" " * (MAX_JSON_BYTES + 1)), "bundle"),
    "card-unknown-key": (lambda f: edit(f, code="import os"), "bundle-card"),
    "card-of-another-format": (lambda f: edit(f, format="qkt-bundle/4"), "bundle-card"),
    "class-means-announced-and-absent": (lambda f: edit(f, class_means=True), "bundle-size"),
    "class-means-of-another-width": (
        with_means_then(lambda f: entry(CLASS_MEANS, shape=[4, FEATURES // 2])(f)),
        "bundle-tensors",
    ),
    "class-means-not-announced": (with_means_then(lambda f: edit(f, class_means=False)), "bundle-size"),
    "class-means-told-by-class": (with_means_then(lambda f: edit(f, class_means=[0, 3])), "bundle-card"),
    "class-means-not-finite": (with_means_then(infinite_mean), "bundle-values"),
    "class-means-of-a-student": (merged_then(lambda f: edit(f, class_means=True)), "bundle-card"),
    "card-with-a-path-for-a-site": (lambda f: edit(f, site="../../etc"), "bundle-card"),
    "card-with-a-lone-surrogate": (lambda f: edit(f, classes=["\ud800", *CLASSES[1:]]), "bundle-card"),
    "card-with-nan": (lambda f: edit(f, training={"score": float("nan")}), "bundle-card"),
    "network-not-allowed": (network_with(name="os.system"), "bundle-card"),
    "network-of-4-dimensions": (network_with(spatial_dims=4), "bundle-card"),
    "network-of-many-channels": (network_with(in_channels=10**9), "bundle-card"),
    "network-of-many-classes": (network_with(classes=10**9), "bundle-card"),
    "merged-without-branches": (merged_then(network_with(branches=[])), "bundle-card"),
    "merged-that-says-nothing-of-branches": (network_with(name="amalgam"), "bundle-card"),
    "branches-on-a-plain-network": (network_with(branches=[branch()]), "bundle-card"),
    "teacher-that-is-merged": (network_with(name="amalgam", branches=[branch()]), "bundle-card"),
    "student-sold-as-a-teacher": (
        merged_then(lambda f: edit(f, kind="teacher", query=None, decision=None)),
        "bundle-card",
    ),
    "branch-that-is-merged": (
        merged_then(network_with(branches=[branch(1.0, "amalgam")])),
        "bundle-card",
    ),
    "branch-not-allowed": (merged_then(network_with(branches=[branch(1.0, "os.system")])), "bundle-card"),
    **{
        f"rank-of-{rank}": (merged_then(network_with(branches=[branch(rank)])), "bundle-card")
        for rank in (0, -0.5, 2, float("nan"), float("inf"), "half", None)
    },
    "67-branches": (merged_then(network_with(branches=[branch(1.0, "resnet-small")] * 67)), "bundle-card"),
    "64-branches": (merged_then(network_with(branches=[branch(1.0, "resnet-small")] * 64)), "bundle-size"),
    "tensors-of-another-rank": (
        merged_then(network_with(branches=[branch(1.0, "resnet-small"), branch(0.25)])),
        "bundle-size",
    ),
    "tensors-of-more-axes": (merged_then(shape_of(NARROW, lambda s: [1, *s])), "bundle-tensors"),
    "tensors-of-fewer-axes": (
        merged_then(shape_of(NARROW, lambda s: [s[0], s[1] * s[2] * s[3]])),
        "bundle-tensors",
    ),
    "rank-and-inputs-exchanged": (
        merged_then(shape_of(NARROW, lambda s: [s[1], s[0], *s[2:]])),
        "bundle-tensors",
    ),
    "wrong-class-count": (lambda f: edit(f, classes=[*CLASSES, "fifth"]), "bundle-card"),
    "other-class-count-throughout": (
        lambda f: (edit(f, classes=[*CLASSES, "fifth"]), network_with(classes=5)(f)),
        "bundle-size",
    ),
    "input-of-another-rank": (lambda f: edit(f, input=INPUT | {"shape": [3, 8, 8, 8]}), "bundle-card"),
    "input-of-other-channels": (lambda f: edit(f, input=INPUT | {"shape": [1, 32, 32]}), "bundle-card"),
    "input-huge": (lambda f: edit(f, input=INPUT | {"shape": [3, 2**40, 2**40]}), "bundle-card"),
    "teacher-with-a-decision": (lambda f: edit(f, decision=DECISION), "bundle-card"),
    "student-without-a-decision": (lambda f: edit(f, kind="student"), "bundle-card"),
    "decision-about-no-class": (
        lambda f: edit(f, kind="student", decision=DECISION | {"query": [9]}),
        "bundle-card",
    ),
    "decision-overlapping": (
        lambda f: edit(f, kind="student", decision=DECISION | {"query": [1]}),
        "bundle-card",
    ),
    "decision-with-nan": (
        lambda f: edit(f, kind="student", decision=DECISION | {"offsets": [float("nan")]}),
        "bundle-card",
    ),
    "own-weight-of-nan": (
        lambda f: edit(f, kind="student", decision=DECISION | {"own_weight": float("nan")}),
        "bundle-card",
    ),
    "own-weight-of-none": (
        lambda f: edit(f, kind="student", decision=DECISION | {"own_weight": 0.0}),
        "bundle-card",
    ),
    "expert-with-a-path": (
        lambda f: edit(f, kind="student", decision=DECISION | {"experts": ["../birch"]}),
        "bundle-card",
    ),
    "digest-is-a-path": (lambda f: edit(f, weights={"bytes": 10, "sha256": "../../x"}), "bundle-card"),
    # mask
    "mask-not-json": (lambda f: (f / MASK).write_text("{"), "bundle-card"),
    "mask-oversize": (lambda f: (f / MASK).write_text(" " * (MAX_JSON_BYTES + 1)), "bundle"),
    "mask-unknown-key": (mask_of(more=1), "bundle-mask"),
    "mask-of-another-label-space": (mask_of(classes=["a", "b", "c", "d"]), "bundle-mask"),
    "mask-too-short": (mask_of(known=[True]), "bundle-mask"),
    "mask-scores-above-one": (mask_of(scores=[2.0, 0.1, 0.1, 0.1]), "bundle-mask"),
    "mask-threshold-nan": (mask_of(threshold=float("nan")), "bundle-card"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_adversarial_bundle_ends_in_one_typed_error(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    attack, code = HOSTILE[name]
    attack(folder)
    with pytest.raises(BundleError) as caught:
        load_bundle(folder)
    assert caught.value.code == code
    assert caught.value.where.site
    assert caught.value.where.file
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "pwned").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, (_, code) in HOSTILE.items() if code == "bundle-size"])
def test_an_error_about_sizes_says_two_that_differ(folder: Path, name: str) -> None:
    HOSTILE[name][0](folder)
    with pytest.raises(BundleError) as caught:
        load_bundle(folder)
    said = caught.value.message
    found = re.fullmatch(
        r"the file has (\d+) bytes, (\d+) by the card"
        r"|the file has (\d+) bytes; [a-z-]+ of the card needs (\d+)"
        r"|a header of (\d+) bytes, not of 2 to (\d+)",
        said,
    )
    assert found, said
    first, second = (int(number) for number in found.groups() if number is not None)
    assert first != second
    if not said.startswith("a header"):
        assert first == (folder / WEIGHTS).stat().st_size
    assert str(caught.value.where.file).endswith(WEIGHTS)


@pytest.mark.parametrize("length", [2**20, 2**40, 2**60])
def test_memory_does_not_follow_the_declared_size(folder: Path, length: int) -> None:
    declared(length)(folder)
    with pytest.raises(BundleError) as caught:
        load_bundle(folder)
    assert caught.value.code == "bundle-size"
    tracemalloc.start()
    try:
        with pytest.raises(BundleError):
            load_bundle(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000


def test_memory_does_not_follow_the_declared_shape(folder: Path) -> None:
    header, body = parts(folder)
    for item in header.values():
        if isinstance(item.get("shape"), list):
            item["shape"] = [2**31, 2**31]
    forge(folder, header, body)
    tracemalloc.start()
    try:
        with pytest.raises(BundleError) as caught:
            load_bundle(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.code == "bundle-tensors"
    assert peak < 8_000_000


def test_a_card_is_read_without_touching_a_tensor(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    card = read_card(folder)
    assert read_mask(folder, card) is not None
    (folder / MASK).unlink()
    assert read_mask(folder, card) is None


def test_a_card_says_nothing_about_people_or_places(original: Path) -> None:
    assert set(Card.model_fields) == {
        "format", "kind", "site", "query", "network", "classes", "input", "training", "weights", "decision",
        "image_statistics", "class_means", "without_encoder", "shared_encoder",
        "encoder_means", "network_kept", "packed",
    }  # fmt: skip
    text = (original / CARD).read_text()
    assert str(original.parent) not in text
    assert not any(word in text for word in ("counts", "patients", "groups"))


# --- what stands where a file should -----------------------------------------------------------------


def in_place_of(name: str, make: Callable[[Path, Path], object]) -> Callable[[Path], None]:
    """Move a file away and put something else where it was; ``make`` gets the place and the moved file."""

    def attack(folder: Path) -> None:
        moved = folder.with_name("elsewhere")
        (folder / name).rename(moved)
        make(folder / name, moved)

    return attack


STRANGE: dict[str, Callable[[Path, Path], object]] = {
    "link": lambda place, moved: place.symlink_to(moved),
    "link-to-a-device": lambda place, moved: place.symlink_to("/dev/zero"),
    "link-to-nothing": lambda place, moved: place.symlink_to("nowhere"),
    "pipe": lambda place, moved: os.mkfifo(place),
    "folder": lambda place, moved: place.mkdir(),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", [CARD, WEIGHTS, MASK])
def test_only_plain_files_are_read_and_nobody_waits(folder: Path, name: str, kind: str) -> None:
    in_place_of(name, STRANGE[kind])(folder)
    start = time.monotonic()
    for read in (load_bundle, lambda f: copy_bundle(f, f.with_name("copy"), "birch")):
        with pytest.raises(BundleError) as caught:
            read(folder)
        assert caught.value.code == "bundle-missing"
    if name != WEIGHTS:
        with pytest.raises(BundleError):
            read_offer(folder, "birch")
    assert time.monotonic() - start < 30


def test_what_is_hashed_is_what_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are replaced between two readings: there is only one reading."""
    wanted = {k: v.clone() for k, v in load_bundle(folder).network.state_dict().items()}
    opened: list[str] = []
    real = os.open

    def replace_after(path: Any, *rest: Any, **named: Any) -> int:
        descriptor = real(path, *rest, **named)
        if Path(path).name in (CARD, WEIGHTS) and Path(path).parent == folder:
            opened.append(Path(path).name)
            Path(path).unlink()
            Path(path).write_bytes(b"another file")
        return descriptor

    monkeypatch.setattr(os, "open", replace_after)
    bundle = load_bundle(folder)
    assert sorted(opened) == [CARD, WEIGHTS], "each once"
    monkeypatch.undo()
    assert all(bool((bundle.network.state_dict()[k] == v).all()) for k, v in wanted.items())
    assert bundle.digest != digest_file(folder / CARD)


@pytest.mark.parametrize("change", [{"kind": "student"}, {"classes": ["e", "f", "g", "h"]}])
def test_nothing_of_an_expert_is_loaded_that_is_none(
    original: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    student, expert = tmp_path / "student", tmp_path / "student" / "experts" / "birch"
    shutil.copytree(original, student)
    shutil.copytree(original, expert)
    edit(student, kind="student", query="q", decision=DECISION)
    edit(expert, **change, **({"decision": DECISION} if "kind" in change else {}))
    (expert / WEIGHTS).unlink()
    with pytest.raises(BundleError, match="is no teacher of the same classes"):
        load_bundle(student)


def test_experts_behind_a_link_are_not_loaded(original: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(original, student)
    edit(student, kind="student", query="q", decision=DECISION)
    (student / "experts").mkdir()
    (student / "experts" / "birch").symlink_to(student, target_is_directory=True)
    with pytest.raises(BundleError, match="is no teacher of the same classes"):
        load_bundle(student)


NOT_CLASSES = [[*CLASSES[:3], CLASSES[0]], [*CLASSES[:3], ""], [*CLASSES[:3], "a\x1b[2J"], [*CLASSES[:3], 7]]


@pytest.mark.parametrize("classes", NOT_CLASSES, ids=str)
def test_classes_that_are_no_text_or_stand_there_twice_are_refused(folder: Path, classes: list[Any]) -> None:
    edit(folder, classes=classes)
    with pytest.raises(BundleError) as caught:
        read_card(folder)
    assert caught.value.code == "bundle-card"
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("site", ["../birch", "Birch", "", "a" * 64, "a\n", 7, None])
@pytest.mark.parametrize("what", ["site", "query", "experts"])
def test_names_on_a_card_are_names(folder: Path, what: str, site: Any) -> None:
    if what == "query" and site is None:
        site = ""
    changes = {"decision": DECISION | {"experts": [site]}} if what == "experts" else {what: site}
    edit(folder, **({"kind": "student", "decision": DECISION} | changes))
    with pytest.raises(BundleError) as caught:
        read_card(folder)
    assert caught.value.code == "bundle-card"


def test_an_expert_named_twice_is_refused(folder: Path) -> None:
    edit(folder, kind="student", decision=DECISION | {"experts": ["birch", "birch"]})
    with pytest.raises(BundleError, match="twice"):
        read_card(folder)
