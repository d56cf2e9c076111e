"""Teacher and student files: safetensors + JSON.

A bundle is another organisation's file: nothing in it is run, and sizes, names, shapes, dtypes, digests and
finiteness are checked before a tensor is used.

A bundle is a folder with ``bundle.json`` (:class:`Card`), ``weights.safetensors`` and, beside them, what
stages add: ``mask.json`` and ``metrics.json`` for a teacher; ``query.json``, ``plan.json``, ``phases.json``
and, for method ``routed``, ``experts/<site>/`` for a student; ``reference.json``, which serving reads and
other hospitals do not fetch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qkt_clinical.common.files import digest_file, write_json
from qkt_clinical.config.encoder_specs import ENCODERS
from qkt_clinical.errors import BundleError
from qkt_clinical.models.networks import Classifier, outline, tensor_specs
from qkt_clinical.models.tensor_file import read_tensors
from qkt_clinical.records.card import (
    CARD,
    REMEDY,
    WEIGHTS,
    Card,
    Mask,
    SharedEncoder,
    Weights,
    cannot_be_read,
    read_card,
    read_card_file,
    read_mask,
)

CLASS_MEANS = "class_means"
MEANS_PRIVACY = ("means_epsilon", "means_delta", "shared_epsilon", "shared_delta")
"""What a card's ``training`` says of the noise on class means."""
"""The tensor that holds them, beside the network's own: (C, F), zeros for classes that have none."""
ENCODER_MEANS = "encoder_means"
"""The same over the features of the card's shared encoder."""


@dataclass(frozen=True)
class Bundle:
    """A validated bundle with its network, on the CPU in evaluation mode."""

    folder: Path
    card: Card
    network: Classifier
    class_means: Mapping[int, Tensor]
    """Class to its mean features (F,) over the site's training images; see :mod:`.class_means`."""
    encoder_means: Mapping[int, Tensor]
    """The same over the features of the card's shared encoder."""
    mask: Mask | None
    experts: Mapping[str, Bundle]
    digest: str
    """SHA-256 of the card, which holds the weights' own; of the bytes that were parsed."""


def write_bundle(
    folder: Path,
    network: Classifier,
    card: Mapping[str, Any],
    class_means: Mapping[int, Tensor] = MappingProxyType({}),
    encoder_means: Mapping[int, Tensor] = MappingProxyType({}),
) -> Card:
    """Write weights and card into an existing folder.

    Args:
        card: lacks only ``weights`` and ``class_means``.
        class_means: class to its mean features (F,), of a teacher.
        encoder_means: the same over the features of the shared encoder that the card names.

    Raises:
        BundleError: a weight is not finite; nothing is written.
    """
    from safetensors.torch import save_file

    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    if class_means:
        state[CLASS_MEANS] = torch.zeros(network.head.weight.shape)
        for label, mean in class_means.items():
            state[CLASS_MEANS][label] = mean
    shared = SharedEncoder.model_validate(card["shared_encoder"]) if card.get("shared_encoder") else None
    if shared is not None:
        state[ENCODER_MEANS] = torch.zeros(network.spec.classes, ENCODERS[shared.name].features)
        for label, mean in encoder_means.items():
            state[ENCODER_MEANS][label] = mean
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


def write_without_means(source: Path, folder: Path) -> Card:
    """Write a teacher's bundle into an existing folder without the class means that it holds.

    Raises:
        BundleError: see :func:`load_bundle`.
    """
    bundle = load_bundle(source)
    card = bundle.card.model_dump(
        mode="json", exclude={"network", "weights", "class_means", "shared_encoder"}
    )
    training = {k: v for k, v in card["training"].items() if k not in MEANS_PRIVACY}
    return write_bundle(folder, bundle.network, {**card, "training": training})


def _read_weights(path: Path, card: Card) -> dict[str, Tensor]:
    """Tensors of the card's weights file, checked before allocation and hashed while parsed.

    Raises:
        BundleError: no plain file, or not of the card's size, names, shapes, types or digest.
    """

    def refuse(what: str, code: str) -> BundleError:
        return BundleError(what, remedy=REMEDY, file=path, site=card.site, code=f"bundle-{code}")

    named, weights = f"{card.network.name} of the card", card.weights
    try:
        return read_tensors(
            path, _wanted(card), refuse, what=named, size=weights.bytes, digest=weights.sha256
        )[0]
    except OSError as error:
        raise cannot_be_read(error, path, card.site) from None


def _wanted(card: Card) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The tensors that belong to a card."""
    wanted = tensor_specs(card.network)
    if card.class_means:
        wanted[CLASS_MEANS] = wanted["head.weight"]
    if card.shared_encoder is not None:
        shape = (card.network.classes, ENCODERS[card.shared_encoder.name].features)
        wanted[ENCODER_MEANS] = (shape, torch.float32)
    return wanted


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
    means, encoder_means = (
        {c: mean for c, mean in enumerate(state.pop(name, ())) if bool(mean.any())}
        for name in (CLASS_MEANS, ENCODER_MEANS)
    )
    network = outline(card.network)
    network.load_state_dict(state, assign=True)
    network.requires_grad_(True).eval()
    experts = {name: _expert(folder, name, card) for name in (card.decision.experts if card.decision else ())}
    return Bundle(folder, card, network, means, encoder_means, read_mask(folder, card), experts, digest)


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
