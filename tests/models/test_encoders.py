"""Pretrained encoders: files of others are checked before a tensor is used; features are the network's."""

from __future__ import annotations

import pickle
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qkt_clinical.catalog import EncoderName
from qkt_clinical.config.encoder_specs import ENCODERS, EncoderSpec
from qkt_clinical.errors import EncoderError
from qkt_clinical.models.encoders import (
    Encoder,
    digest_weights,
    encode,
    import_weights,
    load_encoder,
    match_tensors,
    outline_encoder,
    prepare,
)
from tests.places import ROOT

CPU = torch.device("cpu")
SPEC = EncoderSpec("timm", "any", 3, 4, (0.5, 0.25, 0.0), (0.5, 0.5, 2.0))
WANTED = {
    "stem.weight": ((2, 3), torch.float32),
    "bn.running_mean": ((2,), torch.float32),
    "bn.running_var": ((2,), torch.float32),
    "bn.num_batches_tracked": ((), torch.int64),
}


def tensors(**changed: Tensor | None) -> dict[str, Tensor]:
    """Those wanted, with some replaced or left out."""
    draw = torch.Generator().manual_seed(0)
    found = {
        "stem.weight": torch.randn(2, 3, generator=draw),
        "bn.running_mean": torch.randn(2, generator=draw),
        "bn.running_var": torch.rand(2, generator=draw),
        "bn.num_batches_tracked": torch.tensor(7),
    }
    every = {**found, **{k.replace("__", "."): t for k, t in changed.items()}}
    return {k: t for k, t in every.items() if t is not None}


# --- which tensor is which ------------------------------------------------------------------------


def test_tensors_are_told_by_name_whatever_their_order() -> None:
    source = dict(reversed(tensors(head__weight=torch.zeros(5, 2)).items()))
    state, matched, left_out = match_tensors(source, WANTED, "x", Path("f"))
    assert matched == "name"
    assert left_out == ("head.weight",)
    assert list(state) == list(WANTED)
    assert all(torch.equal(state[k], source[k]) for k in WANTED)


def test_tensors_of_other_names_are_told_by_order() -> None:
    source = {f"_other.{k}": t for k, t in tensors().items()} | {"_fc.weight": torch.zeros(5, 2)}
    state, matched, left_out = match_tensors(source, WANTED, "x", Path("f"))
    assert (matched, left_out) == ("order", ("_fc.weight",))
    assert all(torch.equal(state[k], source[f"_other.{k}"]) for k in WANTED)


SWAPPED = ("stem.weight", "bn.running_var", "bn.running_mean", "bn.num_batches_tracked")


@pytest.mark.parametrize(
    "source",
    [
        {f"a.{k}": t for k, t in tensors(stem__weight=torch.zeros(3, 2)).items()},
        {f"a.{k}": tensors()[k] for k in SWAPPED},  # shapes agree, what they are does not
        {f"a.{k}": t for k, t in tensors().items()} | {"a.more.weight": torch.zeros(1)},
        {f"a.{k}": t for k, t in tensors(stem__weight=None).items()},
        tensors(bn__running_var=torch.zeros(4)),
        tensors(bn__running_var=torch.zeros(2, dtype=torch.int64)),
        {},
    ],
    ids=["shape", "swapped", "more", "fewer", "named-shape", "named-type", "nothing"],
)
def test_tensors_of_another_network_are_refused(source: dict[str, Tensor]) -> None:
    with pytest.raises(EncoderError) as caught:
        match_tensors(source, WANTED, "x", Path("weights.pth"))
    assert caught.value.code == "encoder-tensors"
    assert caught.value.where.file == "weights.pth"


# --- images ---------------------------------------------------------------------------------------


def test_images_are_normalised_per_channel() -> None:
    images = np.full((1, 3, 4, 4), 255, np.uint8)
    found = prepare(images, SPEC, 4)[0, :, 0, 0]
    assert found.tolist() == pytest.approx([1.0, 1.5, 0.5])


def test_grey_images_are_repeated_and_resized() -> None:
    images = np.linspace(0, 1, 2 * 8 * 8, dtype=np.float32).reshape(2, 1, 8, 8)
    found = prepare(images, SPEC, 4)
    assert found.shape == (2, 3, 4, 4)
    grey = found * torch.tensor(SPEC.std).view(3, 1, 1) + torch.tensor(SPEC.mean).view(3, 1, 1)
    assert torch.allclose(grey[:, 0], grey[:, 2], atol=1e-6)
    assert torch.allclose(
        grey[:, 0].mean(dim=(1, 2)), torch.from_numpy(images).mean(dim=(1, 2, 3)), atol=0.01
    )
    assert prepare(images, SPEC, 16).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (1, 4, 8, 8), (1, 1, 8, 8, 8), (1, 8, 8)])
def test_images_that_an_encoder_cannot_take_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(EncoderError, match="expected 2 dimensions and 1 or 3 channels"):
        prepare(np.zeros(shape, np.uint8), SPEC, 4)


class Means(nn.Module):
    """Features that are the channels' means; images must have 4 pixels along an edge."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[2:] == (4, 4), "4 pixels along an edge"
        return images.mean(dim=(2, 3))


def test_features_are_the_networks_own_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "resnet18", SPEC)  # type: ignore[misc]
    encoder = Encoder("resnet18", Means(), "0" * 64)
    images = np.random.default_rng(0).integers(0, 256, (150, 3, 4, 4), np.uint8)
    found = encode(encoder, images, 4, CPU)
    expected = (images / 255).mean(axis=(2, 3)) - np.array(SPEC.mean)
    assert np.allclose(found.numpy(), expected / np.array(SPEC.std), atol=1e-5)
    assert encode(encoder, images[:0], 4, CPU).shape == (0, 3)
    with pytest.raises(EncoderError, match="cannot take images of 8 pixels: 4 pixels along an edge"):
        encode(encoder, images, 8, CPU)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_of_the_list_has_the_features_that_it_says(name: EncoderName) -> None:
    spec = ENCODERS[name]
    network = outline_encoder(name).eval()
    assert all(t.is_meta for t in network.state_dict().values())
    with torch.device("meta"):
        images = torch.empty(2, spec.channels, *[spec.side] * spec.spatial_dims)
        assert network(images).shape == (2, spec.features)


@pytest.mark.slow
def test_real_weights_become_a_file_that_is_read_again(lite_weights: Path, tmp_path: Path) -> None:
    encoder = load_encoder("efficientnet-lite0", lite_weights, digest_weights(lite_weights))
    assert not encoder.network.training
    assert not any(p.requires_grad for p in encoder.network.parameters())
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
    images[2] = images[0]
    features = encode(encoder, images, 64, CPU)
    assert features.shape == (3, 1280)
    assert torch.equal(features[0], features[2])
    assert (features[0] - features[1]).abs().max() > 0.1
    again = import_weights(lite_weights, "efficientnet-lite0", tmp_path / "again.safetensors")
    assert (again.matched, again.digest) == ("name", encoder.digest)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rewrite(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        state = load_file(path)
        change(state)
        save_file(state, path)

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (cut, "encoder-size"),
    "empty": (lambda p: p.write_bytes(b""), "encoder-size"),
    "text": (lambda p: p.write_text("x" * 100), "encoder-size"),
    "absent": (lambda p: p.unlink(), "encoder-missing"),
    "one-more": (rewrite(lambda s: s.update(more=torch.zeros(1))), "encoder-size"),
    "renamed": (
        rewrite(lambda s: s.update({"conv_stem.weighs": s.pop("conv_stem.weight")})),
        "encoder-tensors",
    ),
    "nan": (rewrite(lambda s: s["bn1.weight"].fill_(float("nan"))), "encoder-values"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_weights_are_refused_by_a_code(lite_weights: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(lite_weights.read_bytes())
    change, code = DAMAGE[kind]
    change(path)
    with pytest.raises(EncoderError) as caught:
        load_encoder("efficientnet-lite0", path)
    assert caught.value.code == code
    assert "qkt encoder import" in caught.value.remedy


@pytest.mark.slow
def test_weights_of_another_digest_or_architecture_are_refused(lite_weights: Path) -> None:
    with pytest.raises(EncoderError, match="digest differs"):
        load_encoder("efficientnet-lite0", lite_weights, "0" * 64)
    with pytest.raises(EncoderError) as caught:
        load_encoder("resnet18", lite_weights)
    assert caught.value.code in ("encoder-size", "encoder-tensors")


class Trap:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {self.marker}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_nothing_of_an_imported_file_is_run(tmp_path: Path, protocol: str) -> None:
    source, marker = tmp_path / "weights.pth", tmp_path / "ran"
    content = {"conv_stem.weight": torch.zeros(2), "trap": Trap(marker)}
    if protocol == "torch":
        torch.save(content, source)
    else:
        source.write_bytes(pickle.dumps(content))
    with pytest.raises(EncoderError) as caught:
        import_weights(source, "resnet18", tmp_path / "out.safetensors")
    assert caught.value.code == "encoder-format"
    assert not marker.exists()
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("kind", ["compressed", "overlapping"])
def test_archives_larger_than_their_file_are_refused_before_they_are_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plain = tmp_path / "weights.pth", tmp_path / "plain.pth"
    torch.save({"a.weight": torch.zeros(100_000)}, plain)
    with ZipFile(plain) as archive, ZipFile(source, "w", ZIP_DEFLATED) as packed:
        for part in archive.infolist():
            packed.writestr(part.filename, archive.read(part))
    if kind == "overlapping":
        content = bytearray(plain.read_bytes())
        entry = content.find(b"PK\x01\x02")
        for field in (20, 24):  # of the directory: stored and whole size of the first part
            content[entry + field : entry + field + 4] = (1 << 30).to_bytes(4, "little")
        source.write_bytes(content)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(EncoderError, match="compressed, or whose parts overlap"):
        import_weights(source, "medicalnet-resnet10", tmp_path / "out.safetensors")


def test_torch_is_one_whose_unpickler_runs_nothing() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = next(r for r in map(Requirement, project["dependencies"]) if r.name == "torch")
    assert "2.9.1" not in needed.specifier, "CVE-2026-24747"
    assert torch.__version__.split("+")[0] in needed.specifier


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_damaged_byte_ends_as_one_error(tmp_path: Path, zipped: bool) -> None:
    source, random = tmp_path / "weights.pth", np.random.default_rng(0)
    torch.save({"a.weight": torch.zeros(3)}, source, _use_new_zipfile_serialization=zipped)
    whole = np.frombuffer(source.read_bytes(), np.uint8)
    for _ in range(200):
        damaged = whole.copy()
        damaged[random.integers(len(whole), size=3)] = random.integers(256, size=3)
        source.write_bytes(damaged[: random.integers(1, len(whole) + 1)].tobytes())
        with pytest.raises(EncoderError):
            import_weights(source, "medicalnet-resnet10", tmp_path / "out.safetensors")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.write_bytes(b"\x80"),
        lambda p: p.write_bytes(b"PK\x03\x04" + bytes(200)),
        lambda p: torch.save(torch.zeros(3), p),
        lambda p: torch.save({1: torch.zeros(3)}, p),
        lambda p: torch.save({"model": {"a.weight": torch.zeros(3)}}, p),
        lambda p: p.mkdir(),
    ],
    ids=["byte", "zip", "no-names", "numbers", "of-another", "folder"],
)
def test_sources_that_are_none_end_as_one_error(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    source = tmp_path / "weights.pth"
    write(source)
    with pytest.raises(EncoderError) as caught:
        import_weights(source, "resnet18", tmp_path / "out.safetensors")
    assert caught.value.code.startswith("encoder-")
    assert list(tmp_path.iterdir()) == [source]
