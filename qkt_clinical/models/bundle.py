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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkt_clinical.common.files import digest_file, write_json
from qkt_clinical.errors import BundleError
from qkt_clinical.models.networks import Classifier, build, tensor_specs
from qkt_clinical.records.card import CARD, REMEDY, WEIGHTS, Card, Mask, Weights, read_card, read_mask

HEADER_BYTES, HEADER_BYTES_PER_TENSOR = 10_000, 300
"""What a header may take: for all, and for a tensor beside its name."""
DTYPES = {"F32": torch.float32, "I64": torch.int64}


@dataclass(frozen=True)
class Bundle:
    """A validated bundle with its network, on the CPU in evaluation mode."""

    folder: Path
    card: Card
    network: Classifier
    mask: Mask | None
    experts: Mapping[str, Bundle]

    @property
    def digest(self) -> str:
        """SHA-256 of the card, which holds the weights' own."""
        return digest_file(self.folder / CARD)


def write_bundle(folder: Path, network: Classifier, card: Mapping[str, Any]) -> Card:
    """Write weights and card into an existing folder; ``card`` lacks only ``weights``.

    Raises:
        BundleError: a weight is not finite; nothing is written.
    """
    from safetensors.torch import save_file

    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
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
    full = Card.model_validate({**card, "network": network.spec, "weights": weights})
    write_json(folder / CARD, full.model_dump(mode="json"))
    return full


def _check_header(path: Path, card: Card) -> None:
    """Compare the declared tensors with those that the network needs, before any is allocated."""

    def refuse(what: str, code: str) -> BundleError:
        return BundleError(what, remedy=REMEDY, file=path, site=card.site, code=code)

    wanted = tensor_specs(card.network)
    longest = HEADER_BYTES + sum(len(name) + HEADER_BYTES_PER_TENSOR for name in wanted)
    room = sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in wanted.values())
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size != card.weights.bytes:
                what = f"the file has {size} bytes, {card.weights.bytes} by the card"
                raise refuse(what, "bundle-size")
            if not 2 <= length <= longest:
                what = f"a header of {length} bytes, not of 2 to {longest}"
                raise refuse(what, "bundle-size")
            if size != 8 + length + room:
                what = f"the file has {size} bytes; {card.network.name} of the card needs {8 + length + room}"
                raise refuse(what, "bundle-size")
            header = json.loads(stream.read(length))
    except OSError:
        raise refuse("cannot be read", "bundle-missing") from None
    except (ValueError, RecursionError):
        raise refuse("not a safetensors file", "bundle-format") from None
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
    if digest_file(path) != card.weights.sha256:
        raise refuse("digest differs from the card's", "bundle-digest")


def load_bundle(folder: Path) -> Bundle:
    """Load a bundle after every check.

    Raises:
        BundleError: naming the file and what is wrong; codes ``bundle-missing``, ``bundle-card``,
            ``bundle-mask``, ``bundle-size``, ``bundle-format``, ``bundle-tensors``, ``bundle-digest``,
            ``bundle-values``.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    card = read_card(folder)
    path = folder / WEIGHTS
    _check_header(path, card)
    try:
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError):
        raise BundleError(
            "not a safetensors file", remedy=REMEDY, file=path, site=card.site, code="bundle-format"
        ) from None
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
    with torch.device("meta"):
        network = build(card.network)
    network.load_state_dict(state, assign=True)
    network.requires_grad_(True).eval()
    experts: dict[str, Bundle] = {}
    for name in card.decision.experts if card.decision else ():
        expert = load_bundle(folder / "experts" / name)
        if expert.card.kind != "teacher" or expert.card.classes != card.classes:
            raise BundleError(
                f"expert {name} is no teacher of the same classes",
                remedy=REMEDY,
                file=folder,
                site=card.site,
                code="bundle-card",
            )
        experts[name] = expert
    return Bundle(folder, card, network, read_mask(folder, card), experts)
