"""Teacher and student files: safetensors + JSON.

A bundle is another organisation's file: nothing in it is run, and sizes, names, shapes, dtypes, digests and
finiteness are checked before a tensor is used.

A bundle is a folder with ``bundle.json`` (:class:`Card`), ``weights.safetensors`` and, beside them, what
stages add: ``mask.json`` and ``metrics.json`` for a teacher; ``query.json``, ``plan.json``, ``phases.json``
and, for method ``routed``, ``experts/<site>/`` for a student; ``reference.json``, which serving reads and
other hospitals do not fetch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qkt_clinical.common.files import digest_bytes, digest_file, plain_file, write_json
from qkt_clinical.errors import BundleError
from qkt_clinical.models.networks import Classifier, outline, tensor_specs
from qkt_clinical.records.card import (
    CARD,
    REMEDY,
    WEIGHTS,
    Card,
    Mask,
    Weights,
    cannot_be_read,
    read_card,
    read_card_file,
    read_mask,
)

HEADER_BYTES, HEADER_BYTES_PER_TENSOR = 10_000, 300
"""What a header may take: for all, and for a tensor beside its name."""
CLASS_MEANS = "class_means"
"""The tensor that holds them, beside the network's own: (C, F), zeros for classes that have none."""
DTYPES = {"F32": torch.float32, "I64": torch.int64}

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensor to shape and type."""
Refuse = Callable[[str, str], BundleError]
"""Of what is wrong and its code."""


@dataclass(frozen=True)
class Bundle:
    """A validated bundle with its network, on the CPU in evaluation mode."""

    folder: Path
    card: Card
    network: Classifier
    class_means: Mapping[int, Tensor]
    """Class to its mean features (F,) over the site's training images; see :mod:`.class_means`."""
    mask: Mask | None
    experts: Mapping[str, Bundle]
    digest: str
    """SHA-256 of the card, which holds the weights' own; of the bytes that were parsed."""


def write_bundle(
    folder: Path,
    network: Classifier,
    card: Mapping[str, Any],
    class_means: Mapping[int, Tensor] = MappingProxyType({}),
) -> Card:
    """Write weights and card into an existing folder.

    Args:
        card: lacks only ``weights`` and ``class_means``.
        class_means: class to its mean features (F,), of a teacher.

    Raises:
        BundleError: a weight is not finite; nothing is written.
    """
    from safetensors.torch import save_file

    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    if class_means:
        state[CLASS_MEANS] = torch.zeros(network.head.weight.shape)
        for label, mean in class_means.items():
            state[CLASS_MEANS][label] = mean
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BundleError(
                f"tensor {name} is not finite",
                remedy="Training diverged: lower learning_rate in params.yaml and run again.",
                site=card.get("site"),
            )
    path = folder / WEIGHTS
    save_file(state, path)
    weights = Weights(bytes=path.stat().st_size, sha256=digest_file(path))
    made = {"network": network.spec, "weights": weights, "class_means": bool(class_means)}
    full = Card.model_validate({**card, **made})
    write_json(folder / CARD, full.model_dump(mode="json"))
    return full


def _read_weights(path: Path, card: Card) -> dict[str, Tensor]:
    """Tensors of the card's weights file, checked before allocation and hashed while parsed.

    Raises:
        BundleError: no plain file, or not of the card's size, names, shapes, types or digest.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    def refuse(what: str, code: str) -> BundleError:
        return BundleError(what, remedy=REMEDY, file=path, site=card.site, code=code)

    wanted = _wanted(card)
    try:
        with plain_file(path) as stream:
            content = _bounded(stream, card, wanted, refuse)
    except OSError as error:
        raise cannot_be_read(error, path, card.site) from None
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        raise refuse("not a safetensors file", "bundle-format") from None
    _check_header(header, card, wanted, refuse)
    if digest_bytes(content) != card.weights.sha256:
        raise refuse("digest differs from the card's", "bundle-digest")
    try:
        # Copied into torch's own memory, which is aligned as that of a network that was trained here.
        return {name: tensor.clone() for name, tensor in load(content).items()}
    except (SafetensorError, ValueError):
        raise refuse("not a safetensors file", "bundle-format") from None


def _wanted(card: Card) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The tensors that belong to a card."""
    wanted = tensor_specs(card.network)
    if card.class_means:
        wanted[CLASS_MEANS] = wanted["head.weight"]
    return wanted


def _bounded(stream: BinaryIO, card: Card, wanted: Specs, refuse: Refuse) -> bytes:
    """The file's content, read only if it has the size that follows from network and card."""
    longest = HEADER_BYTES + sum(len(name) + HEADER_BYTES_PER_TENSOR for name in wanted)
    room = sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in wanted.values())
    size = os.fstat(stream.fileno()).st_size
    first = stream.read(8)
    length = int.from_bytes(first, "little")
    if size != card.weights.bytes:
        raise refuse(f"the file has {size} bytes, {card.weights.bytes} by the card", "bundle-size")
    if not 2 <= length <= longest:
        raise refuse(f"a header of {length} bytes, not of 2 to {longest}", "bundle-size")
    if size != 8 + length + room:
        raise refuse(
            f"the file has {size} bytes; {card.network.name} of the card needs {8 + length + room}",
            "bundle-size",
        )
    content = first + stream.read(size - 8)
    if len(content) != size:
        raise refuse("the file was cut while it was read", "bundle-size")
    return content


def _check_header(header: Any, card: Card, wanted: Specs, refuse: Refuse) -> None:
    if not isinstance(header, dict):
        raise refuse("not a safetensors file", "bundle-format")
    header.pop("__metadata__", None)
    if set(header) != set(wanted):
        raise refuse(f"tensors are not those of {card.network.name}", "bundle-tensors")
    for name, (shape, dtype) in wanted.items():
        entry = header[name]
        if (
            not isinstance(entry, dict)
            or entry.get("shape") != list(shape)
            or DTYPES.get(str(entry.get("dtype"))) != dtype
        ):
            raise refuse(f"tensor {name}: {entry} against {list(shape)} {dtype}"[:200], "bundle-tensors")


def load_bundle(folder: Path) -> Bundle:
    """Load a bundle after every check.

    Raises:
        BundleError: naming the file and what is wrong; codes ``bundle-missing``, ``bundle-card``,
            ``bundle-mask``, ``bundle-size``, ``bundle-format``, ``bundle-tensors``, ``bundle-digest``,
            ``bundle-values``.
    """
    card, _, digest = read_card_file(folder)
    path = folder / WEIGHTS
    state = _read_weights(path, card)
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BundleError(
                f"tensor {name} is not finite", remedy=REMEDY, file=path, site=card.site, code="bundle-values"
            )
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise BundleError(
                f"tensor {name} holds a negative variance",
                remedy=REMEDY,
                file=path,
                site=card.site,
                code="bundle-values",
            )
    means = {c: mean for c, mean in enumerate(state.pop(CLASS_MEANS, ())) if bool(mean.any())}
    network = outline(card.network)
    network.load_state_dict(state, assign=True)
    network.requires_grad_(True).eval()
    experts = {name: _expert(folder, name, card) for name in (card.decision.experts if card.decision else ())}
    return Bundle(folder, card, network, means, read_mask(folder, card), experts, digest)


def _expert(folder: Path, name: str, student: Card) -> Bundle:
    """Load an expert of a routed student, after its card was checked to be that of a teacher."""
    place = folder / "experts" / name
    links = place.is_symlink() or place.parent.is_symlink()
    card = None if links else read_card(place)
    if card is None or card.kind != "teacher" or card.classes != student.classes:
        raise BundleError(
            f"expert {name} is no teacher of the same classes",
            remedy=REMEDY,
            file=folder,
            site=student.site,
            code="bundle-card",
        )
    return load_bundle(place)
