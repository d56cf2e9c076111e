"""Pretrained encoders by allow-listed name: frozen networks, of which only the features are used.

The architecture comes from timm or MONAI, the weights from a local safetensors file: nothing is downloaded
and no pickle is loaded. ``qkt encoder import`` makes such a file of one that torch wrote.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkt_clinical.catalog import EncoderName
from qkt_clinical.common.files import TooLarge, digest_bytes, digest_file, passing_file, read_plain
from qkt_clinical.config.encoder_specs import ENCODERS, EncoderSpec
from qkt_clinical.config.params import Params
from qkt_clinical.data.prepared import Images
from qkt_clinical.errors import EncoderError
from qkt_clinical.models.encoder_network import EncoderExtractor, encoder_architecture, encoder_input
from qkt_clinical.models.libraries import WithoutValues
from qkt_clinical.models.tensor_file import Refuse, Specs, read_tensors
from qkt_clinical.records.card import EncoderPart

IMAGES_PER_BATCH = 64
MAX_SOURCE_BYTES = 4 << 30
"""Of a file that is imported."""
HEADS = ("head", "fc", "classifier", "_fc", "conv_seg")
"""First parts of the names of tensors that an encoder has no use for: what it once told apart."""
WRAPPERS = ("state_dict", "model", "teacher", "model_state_dict")
"""Keys under which training programs keep the tensors."""
PREFIXES = ("module.", "model.", "backbone.")
DAMAGED = (
    *(RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(EOFError, OverflowError, AssertionError, MemoryError, struct.error),
)
"""What torch raises on damaged files beside its own error."""


@dataclass(frozen=True)
class Encoder:
    """An encoder with its weights, frozen."""

    name: EncoderName
    network: nn.Module
    """Images (N, channels, *spatial), normalised, to features (N, F)."""
    digest: str
    """SHA-256 of the weights file."""

    @property
    def spec(self) -> EncoderSpec:
        """Of the architecture."""
        return ENCODERS[self.name]


def outline_encoder(name: EncoderName) -> nn.Module:
    """The architecture without a byte for its weights, on the meta device."""
    with torch.device("meta"), WithoutValues():
        return encoder_architecture(name)


def _specs_of(network: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Tensor of its state to shape and type."""
    return {k: (tuple(t.shape), t.dtype) for k, t in network.state_dict().items()}


def digest_weights(weights: Path) -> str:
    """SHA-256 of a weights file.

    Raises:
        EncoderError: it cannot be read as a plain file (code ``encoder-missing``).
    """
    try:
        return digest_bytes(read_plain(weights, MAX_SOURCE_BYTES))
    except OSError:
        raise _not_of("an encoder", weights, "cannot be read as a plain file", "missing") from None


def load_encoder(name: EncoderName, weights: Path, digest: str | None = None) -> Encoder:
    """An encoder with the weights of a local safetensors file, checked before a tensor is allocated.

    Args:
        digest: SHA-256 that the file must have; None: any.

    Raises:
        EncoderError: the file is absent, is not one of this architecture, has another digest or values that
            are not finite (codes ``encoder-missing``, ``encoder-size``, ``encoder-format``,
            ``encoder-tensors``, ``encoder-digest``, ``encoder-values``).
        QktError: timm is not installed.
    """

    def refuse(what: str, code: str) -> EncoderError:
        return EncoderError(
            what,
            remedy=f"Give a safetensors file of {name}, as 'qkt encoder import' writes it.",
            file=weights,
            code=f"encoder-{code}",
        )

    network = outline_encoder(name)
    try:
        state, found = read_tensors(weights, _specs_of(network), refuse, what=name, digest=digest)
    except OSError:
        raise refuse("cannot be read as a plain file", "missing") from None
    _check_finite(state, refuse)
    network.load_state_dict(state, assign=True)
    return Encoder(name, network.requires_grad_(False).eval(), found)


FindEncoder = Callable[[EncoderName, str], Encoder | None]
"""An encoder by its name and the digest of its file; None where it is not here."""


def no_encoder(name: EncoderName, digest: str) -> Encoder | None:
    """Where there is none."""
    return None


def encoders_of(root: Path, params: Params) -> FindEncoder:
    """Those that a workspace's ``params.yaml`` names, each loaded when it is first asked for."""
    files = {file.digest: file for file in params.encoder_files}

    @cache
    def find(name: EncoderName, digest: str) -> Encoder | None:
        file = files.get(digest)
        return load_encoder(name, root / file.weights, digest) if file and file.name == name else None

    return find


def shared_extractor(encoder: Encoder, side: int) -> EncoderExtractor:
    """The encoder as part of a student, with features of length 1; see :func:`shared_features`.

    Args:
        side: pixels along an edge to which images are enlarged or reduced.
    """
    part = EncoderPart(name=encoder.name, side=side, mode="frozen", unit_length=True)
    with torch.device("meta"), WithoutValues():
        extractor = EncoderExtractor(part)
    extractor.network.load_state_dict(encoder.network.state_dict(), assign=True)
    return extractor.requires_grad_(False).eval()


def shared_features(features: Tensor) -> Tensor:
    """Features (N, F) of a shared encoder brought to length 1: what one image adds to a mean is bounded."""
    return F.normalize(features, dim=1)


def _check_finite(state: Mapping[str, Tensor], refuse: Refuse) -> None:
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise refuse(f"tensor {name} is not finite", "values")


def prepare(images: Images, spec: EncoderSpec, side: int) -> Tensor:
    """Prepared images (N, C, *spatial), uint8 or float32 in [0, 1], as the encoder expects them.

    Raises:
        EncoderError: of other dimensions or channels than it can take (code ``encoder-input``).
    """
    if images.ndim != spec.spatial_dims + 2 or images.shape[1] not in (1, spec.channels):
        shape = "x".join(map(str, images.shape[1:]))
        raise EncoderError(
            f"images of {shape}, expected {spec.spatial_dims} dimensions and 1 or {spec.channels} channels",
            remedy="Choose an encoder for such images; see 'qkt encoder list'.",
            code="encoder-input",
        )
    inputs = torch.from_numpy(np.ascontiguousarray(images))
    inputs = inputs.float() / 255.0 if inputs.dtype == torch.uint8 else inputs.float()
    return encoder_input(inputs, spec, side)


@torch.no_grad()
def encode(encoder: Encoder, images: Images, side: int, device: torch.device) -> Tensor:
    """Features (N, F), float32 on the CPU, of prepared images (N, C, *spatial).

    Args:
        side: pixels along an edge to which images are enlarged or reduced.

    Raises:
        EncoderError: see :func:`prepare`; or images too small for the network (code ``encoder-input``).
    """
    network = encoder.network.to(device)
    found = []
    for start in range(0, len(images), IMAGES_PER_BATCH):
        inputs = prepare(images[start : start + IMAGES_PER_BATCH], encoder.spec, side)
        try:
            found.append(network(inputs.to(device)).float().cpu())
        except (RuntimeError, ValueError, AssertionError) as error:
            raise EncoderError(
                f"{encoder.name} cannot take images of {side} pixels: {str(error)[:200]}",
                remedy=f"Choose another size; {encoder.spec.side} is what it was trained on.",
                code="encoder-input",
            ) from None
    return torch.cat(found) if found else torch.zeros(0, encoder.spec.features)


# --- import ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImportedWeights:
    """A weights file that was written."""

    digest: str
    bytes: int
    matched: Literal["name", "order"]
    """How tensors were told: by name, or by order and shape where names are another program's."""
    left_out: tuple[str, ...]
    """Tensors of the source that the encoder has no use for."""


def import_weights(source: Path, name: EncoderName, out: Path) -> ImportedWeights:
    """Write a safetensors file of what torch or safetensors stored; nothing of the source is run.

    Raises:
        EncoderError: the source holds more than tensors, or not those of the architecture.
    """
    wanted = _specs_of(outline_encoder(name))
    found = _tensors_of(source)
    state, matched, left_out = match_tensors(found, wanted, name, source)

    def refuse(what: str, code: str) -> EncoderError:
        return _not_of(name, source, what, code)

    _check_finite(state, refuse)
    from safetensors.torch import save_file

    with passing_file(out) as passing:
        save_file({k: t.contiguous() for k, t in state.items()}, passing)
    return ImportedWeights(digest_file(out), out.stat().st_size, matched, left_out)


def _not_of(name: str, source: Path, what: str, code: str) -> EncoderError:
    return EncoderError(
        what,
        remedy=f"Give the weights of {name} alone: tensors by name, as torch.save or safetensors store them.",
        file=source,
        code=f"encoder-{code}",
    )


def _tensors_of(source: Path) -> dict[str, Tensor]:
    """The tensors of a file, by torch's unpickler that makes nothing but tensors, or by safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        stored = read_plain(source, MAX_SOURCE_BYTES)
        if source.suffix == ".safetensors":
            return dict(load(stored))
        _check_archive(stored, source)
        content = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
    except TooLarge:
        what = f"larger than {MAX_SOURCE_BYTES} bytes"
        raise _not_of("an encoder", source, what, "size") from None
    except OSError:
        raise _not_of("an encoder", source, "cannot be read as a plain file", "missing") from None
    except UnpicklingError:
        what = "holds more than tensors, or is no such file; nothing of it was run"
        raise _not_of("an encoder", source, what, "format") from None
    except (SafetensorError, BadZipFile, *DAMAGED) as error:
        what = f"cannot be parsed: {type(error).__name__}"
        raise _not_of("an encoder", source, what, "format") from None
    return _flattened(content, source)


def _check_archive(stored: bytes, source: Path) -> None:
    """Refuse an archive whose parts are larger than itself before one is read: torch compresses none."""
    if not stored.startswith(b"PK"):
        return  # torch's older format
    with ZipFile(io.BytesIO(stored)) as archive:
        parts = archive.infolist()
    if any(p.compress_type != ZIP_STORED for p in parts) or sum(p.file_size for p in parts) > len(stored):
        what = "is an archive that is compressed, or whose parts overlap"
        raise _not_of("an encoder", source, what, "format")


def _flattened(content: Any, source: Path) -> dict[str, Tensor]:
    """Tensor by name, without the wrappers that training programs put around them."""
    while isinstance(content, Mapping):
        inner = next((w for w in WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if inner is None:
            break
        content = content[inner]
    if not isinstance(content, Mapping) or not all(isinstance(k, str) for k in content):
        raise _not_of("an encoder", source, "holds no tensors by name", "format")
    tensors = {k: t for k, t in content.items() if isinstance(t, Tensor)}
    for prefix in PREFIXES:
        if tensors and all(k.startswith(prefix) for k in tensors):
            tensors = {k.removeprefix(prefix): t for k, t in tensors.items()}
    return tensors


def match_tensors(
    found: Mapping[str, Tensor], wanted: Specs, name: str, source: Path
) -> tuple[dict[str, Tensor], Literal["name", "order"], tuple[str, ...]]:
    """The tensors that an architecture wants, how they were told, and the names of those left out.

    By name where all names are there. Else by order: programs name layers in their own way but build them one
    after the other, so that every shape and the last part of every name (``weight``, ``running_mean``) must
    agree, and nothing but a head may be left at the end.

    Raises:
        EncoderError: neither is possible (code ``encoder-tensors``).
    """

    def fits(tensor: Tensor, key: str) -> bool:
        return tuple(tensor.shape) == wanted[key][0] and tensor.dtype.is_floating_point == (
            wanted[key][1].is_floating_point
        )

    def taken(tensor: Tensor, key: str) -> Tensor:
        return tensor.detach().to(wanted[key][1]).clone()

    if set(wanted) <= set(found):
        wrong = [k for k in wanted if not fits(found[k], k)]
        if wrong:
            shapes = f"{tuple(found[wrong[0]].shape)}, expected {wanted[wrong[0]][0]}"
            raise _not_of(name, source, f"tensor {wrong[0][:100]} is {shapes}", "tensors")
        unused = tuple(k for k in found if k not in wanted)
        return {k: taken(found[k], k) for k in wanted}, "name", unused
    names, keys = list(found), list(wanted)
    body, rest = names[: len(keys)], names[len(keys) :]
    alike = len(body) == len(keys) and all(
        fits(found[a], b) and a.split(".")[-1] == b.split(".")[-1] for a, b in zip(body, keys, strict=True)
    )
    if alike and all(map(_is_head, rest)):
        return {b: taken(found[a], b) for a, b in zip(body, keys, strict=True)}, "order", tuple(rest)
    missing = [k for k in keys if k not in found]
    raise _not_of(
        name,
        source,
        f"{len(missing)} of {len(keys)} tensors of {name} are not there, such as {missing[0]}, "
        "and the order is another too",
        "tensors",
    )


def _is_head(name: str) -> bool:
    return any(part in HEADS for part in re.split(r"[./]", name))
