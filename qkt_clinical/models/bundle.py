"""Teacher and student files: safetensors + JSON.

A bundle is another organisation's file: nothing in it is run, and sizes, names, shapes, dtypes, digests and
finiteness are checked before a tensor is used.

A bundle is a folder with ``bundle.json`` (:class:`Card`), ``weights.safetensors``, of a teacher
``means.safetensors`` (class means over a shared encoder's features, in half precision) and, beside them, what
stages add: ``mask.json`` and ``metrics.json`` for a teacher; ``query.json``, ``plan.json``, ``phases.json``
and, for method ``routed``, ``experts/<site>/`` for a student; ``reference.json``, which serving reads and
other hospitals do not fetch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qkt_clinical.common.files import copy_plain, digest_file, write_json
from qkt_clinical.config.encoder_specs import ENCODERS
from qkt_clinical.errors import BundleError
from qkt_clinical.models.encoder_network import EncoderExtractor
from qkt_clinical.models.encoders import Encoder, FindEncoder, no_encoder
from qkt_clinical.models.networks import Classifier, outline, tensor_specs
from qkt_clinical.models.packed_weights import pack, packed_specs, unpack
from qkt_clinical.models.tensor_file import Specs, read_tensors
from qkt_clinical.records.card import (
    CARD,
    MEANS,
    REMEDY,
    WEIGHTS,
    Card,
    Mask,
    SharedEncoder,
    Weights,
    cannot_be_read,
    most_bytes,
    read_card,
    read_card_file,
    read_mask,
)

CLASS_MEANS = "class_means"
"""The tensor that holds them, beside the network's own: (C, F), zeros for classes that have none."""
ENCODER_MEANS = "encoder_means"
"""The same over the features of the card's shared encoder, in a file of its own."""
EXTRACTOR = "extractor.network."
"""How the names of a pretrained encoder's tensors begin in a network over it."""
MEANS_PRIVACY = ("means_epsilon", "means_delta", "shared_epsilon", "shared_delta")
"""What a card's ``training`` says of the noise on class means."""


@dataclass(frozen=True)
class Bundle:
    """A validated bundle with its network, on the CPU in evaluation mode."""

    folder: Path
    card: Card
    network: Classifier
    class_means: Mapping[int, Tensor]
    """Class to its mean features (F,) over the site's training images; see :mod:`.class_means`."""
    encoder_means: Mapping[int, Tensor]
    """The same over the features of the card's shared encoder; empty where that file was not sent along."""
    mask: Mask | None
    experts: Mapping[str, Bundle]
    digest: str
    """SHA-256 of the card, which holds the weights' own; of the bytes that were parsed."""


@dataclass(frozen=True)
class SharedMeans:
    """What a teacher says without its network: card, mask and class means."""

    card: Card
    mask: Mask | None
    encoder_means: Mapping[int, Tensor]
    """As in :class:`Bundle`."""
    digest: str
    """As in :class:`Bundle`."""


def write_bundle(
    folder: Path,
    network: Classifier,
    card: Mapping[str, Any],
    class_means: Mapping[int, Tensor] = MappingProxyType({}),
    encoder_means: Mapping[int, Tensor] = MappingProxyType({}),
    encoder: Encoder | None = None,
    *,
    packed: bool = False,
) -> Card:
    """Write weights and card into an existing folder.

    Args:
        card: lacks only ``weights``, ``packed``, ``class_means``, ``encoder_means`` and ``without_encoder``.
        class_means: class to its mean features (F,), of a teacher.
        encoder_means: the same over the features of the shared encoder that the card names.
        encoder: with which the network of a teacher started. The file goes without the tensors that training
            left as they were, by the mode: all of a frozen one's, those outside normalisation layers of an
            adapted one's.
        packed: whether weights are stored in a byte each, see :func:`packed_network`.

    Raises:
        BundleError: a weight is not finite; nothing is written.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    known = _known(state, network, encoder)
    state = {name: tensor for name, tensor in state.items() if name not in known}
    if class_means:
        state[CLASS_MEANS] = torch.zeros(network.head.weight.shape)
        for label, mean in class_means.items():
            state[CLASS_MEANS][label] = mean
    shared = SharedEncoder.model_validate(card["shared_encoder"]) if card.get("shared_encoder") else None
    means = {}
    if shared is not None:
        means[ENCODER_MEANS] = torch.zeros(_means_shape(shared, network.spec.classes), dtype=torch.float16)
        for label, mean in encoder_means.items():
            means[ENCODER_MEANS][label] = mean
    for name, tensor in (state | means).items():
        if not bool(torch.isfinite(tensor).all()):
            raise BundleError(
                f"tensor {name} is not finite",
                remedy="Training diverged: lower learning_rate in params.yaml and run again.",
                site=card.get("site"),
            )
    made: dict[str, Any] = {
        "network": network.spec,
        "without_encoder": encoder.digest if encoder and known else None,
        "weights": _saved(pack(state) if packed else state, folder / WEIGHTS),
        "packed": packed or None,
        "class_means": bool(class_means),
    }
    if card["kind"] == "teacher":
        file = _saved(means, folder / MEANS)
        made["encoder_means"] = file if means else None
    full = Card.model_validate({**card, **made})
    write_json(folder / CARD, full.model_dump(mode="json"))
    return full


def packed_network(network: Classifier, encoder: Encoder | None = None) -> Classifier:
    """A copy of a network, on the CPU in evaluation mode, with the weights that a packed bundle gives others.

    Args:
        encoder: as in :func:`write_bundle`; its tensors are not part of the bundle and stay as they are.
    """
    state = {k: v.detach().cpu() for k, v in network.state_dict().items()}
    known = _known(state, network, encoder)
    copy = deepcopy(network).cpu().eval()
    packed = unpack(pack({name: tensor for name, tensor in state.items() if name not in known}))
    copy.load_state_dict(state | packed)
    return copy


def _means_shape(encoder: SharedEncoder, classes: int) -> tuple[int, int]:
    return classes, ENCODERS[encoder.name].features


def _saved(tensors: Mapping[str, Tensor], path: Path) -> Weights:
    """A file of tensors, written."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path)
    return Weights(bytes=path.stat().st_size, sha256=digest_file(path))


def _known(state: Mapping[str, Tensor], network: Classifier, encoder: Encoder | None) -> set[str]:
    """Tensors of a network's state that its encoder's file holds too, all that may be left out or none."""
    if encoder is None:
        return set()
    held, left_out = _tensors_of(encoder), _left_out(network)
    return left_out if all(torch.equal(state[name], held[name]) for name in left_out) else set()


def _left_out(network: Classifier) -> set[str]:
    """Tensors of a network's state that its encoder's training left as they were."""
    extractor = network.extractor
    names = extractor.unchanged() if isinstance(extractor, EncoderExtractor) else ()
    return {EXTRACTOR + name for name in names}


def _tensors_of(encoder: Encoder) -> dict[str, Tensor]:
    """An encoder's tensors by the names that they have in a network over it."""
    return {EXTRACTOR + name: tensor for name, tensor in encoder.network.state_dict().items()}


def write_without_means(source: Path, folder: Path) -> Card:
    """Write a teacher's bundle into an existing folder without the class means that it holds.

    Raises:
        BundleError: see :func:`read_bundle`.
    """
    stored = read_bundle(source)
    training = {k: v for k, v in stored.card.training.items() if k not in MEANS_PRIVACY}
    written = stored.card.model_copy(
        update={
            "training": training,
            "weights": _saved(pack(stored.state) if stored.card.packed else stored.state, folder / WEIGHTS),
            "class_means": False,
            "shared_encoder": None,
            "encoder_means": None,
        }
    )
    write_json(folder / CARD, written.model_dump(mode="json"))
    return written


def write_without_network(source: Path, folder: Path) -> Card:
    """Write what a teacher says without its network into an existing folder: card and class means.

    Raises:
        BundleError: see :func:`load_shared_means`.
    """
    card = load_shared_means(source).card.model_copy(update={"class_means": False, "network_kept": True})
    training = {k: v for k, v in card.training.items() if not k.startswith("means_")}
    copy_plain(source / MEANS, folder / MEANS, most_bytes(card, MEANS))
    card = card.model_copy(update={"training": training})
    write_json(folder / CARD, card.model_dump(mode="json"))
    return card


def _read_file(path: Path, card: Card, file: Weights, wanted: Specs, what: str) -> dict[str, Tensor]:
    """Tensors of a file of the card, checked before allocation and hashed while parsed.

    Raises:
        BundleError: no plain file, or not of the card's size, names, shapes, types or digest, or a number in
            it is not finite.
    """

    def refuse(what: str, code: str) -> BundleError:
        return BundleError(what, remedy=REMEDY, file=path, site=card.site, code=f"bundle-{code}")

    try:
        found, _ = read_tensors(path, wanted, refuse, what=what, size=file.bytes, digest=file.sha256)
    except OSError as error:
        raise cannot_be_read(error, path, card.site) from None
    for name, tensor in found.items():
        if not bool(torch.isfinite(tensor).all()):
            raise refuse(f"tensor {name} is not finite", "values")
    return found


def _wanted(card: Card) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The tensors of a card's weights file."""
    wanted = tensor_specs(card.network)
    if card.without_encoder:
        left_out = _left_out(outline(card.network))
        wanted = {name: spec for name, spec in wanted.items() if name not in left_out}
    if card.class_means:
        wanted[CLASS_MEANS] = wanted["head.weight"]
    if card.shared_encoder is not None and card.encoder_means is None:  # an older bundle
        wanted[ENCODER_MEANS] = (_means_shape(card.shared_encoder, card.network.classes), torch.float32)
    return packed_specs(wanted) if card.packed else wanted


def _read_means(folder: Path, card: Card) -> Tensor:
    """Class means over the features of the card's shared encoder, (C, F) in single precision."""
    assert card.encoder_means is not None
    assert card.shared_encoder is not None, "the card was checked"
    shape = _means_shape(card.shared_encoder, card.network.classes)
    wanted = {ENCODER_MEANS: (shape, torch.float16)}
    found = _read_file(folder / MEANS, card, card.encoder_means, wanted, "class means of the card")
    return found[ENCODER_MEANS].float()


def _by_class(means: Tensor | tuple[()]) -> dict[int, Tensor]:
    """Those of classes that have one."""
    return {c: mean for c, mean in enumerate(means) if bool(mean.any())}


def load_shared_means(folder: Path) -> SharedMeans:
    """Load what a teacher says without its network, after every check.

    Raises:
        BundleError: as :func:`load_bundle`; also where there are no class means apart from the weights.
    """
    card, _, digest = read_card_file(folder)
    if card.encoder_means is None:
        raise BundleError(
            "no class means apart from the network",
            remedy="Ask the site to train again with shared_encoder in params.yaml.",
            file=folder / CARD,
            site=card.site,
            code="bundle-missing",
        )
    return SharedMeans(card, read_mask(folder, card), _by_class(_read_means(folder, card)), digest)


@dataclass(frozen=True)
class StoredBundle:
    """The files of a bundle after every check, of which no network is built yet."""

    card: Card
    state: dict[str, Tensor]
    """The network's, in single precision.

    Without the tensors of an encoder that the card names by ``without_encoder``.
    """
    class_means: Mapping[int, Tensor]
    encoder_means: Mapping[int, Tensor]
    mask: Mask | None
    digest: str
    """These four as in :class:`Bundle`."""


def read_bundle(folder: Path) -> StoredBundle:
    """Read a bundle and check all of it but its experts.

    Raises:
        BundleError: naming the file and what is wrong; codes ``bundle-missing``, ``bundle-card``,
            ``bundle-mask``, ``bundle-size``, ``bundle-format``, ``bundle-tensors``, ``bundle-digest``,
            ``bundle-values``.
    """
    card, _, digest = read_card_file(folder)
    if card.network_kept:
        raise BundleError(
            "its site keeps the network, and shares class means alone",
            remedy="Set method: qkt-means in the query file, which takes them (docs/encoders.md).",
            file=folder / CARD,
            site=card.site,
            code="bundle-missing",
        )
    path = folder / WEIGHTS
    state = unpack(_read_file(path, card, card.weights, _wanted(card), f"{card.network.name} of the card"))
    for name, tensor in state.items():
        wrong = None
        if name.endswith("running_var") and bool((tensor < 0).any()):
            wrong = "holds a negative variance"
        elif not bool(torch.isfinite(tensor).all()):
            wrong = "is not finite when unpacked"
        if wrong:
            raise BundleError(
                f"tensor {name} {wrong}", remedy=REMEDY, file=path, site=card.site, code="bundle-values"
            )
    means, encoder_means = (_by_class(state.pop(name, ())) for name in (CLASS_MEANS, ENCODER_MEANS))
    if card.encoder_means is not None and os.path.lexists(folder / MEANS):
        encoder_means = _by_class(_read_means(folder, card))
    return StoredBundle(card, state, means, encoder_means, read_mask(folder, card), digest)


def _encoder_tensors(card: Card, folder: Path, find: FindEncoder) -> dict[str, Tensor]:
    """The tensors of the encoder that a weights file goes without, by the hospital's own file of it."""
    part, digest = card.network.encoder, card.without_encoder
    if part is None or digest is None:
        return {}
    encoder = find(part.name, digest)
    if encoder is None:
        raise BundleError(
            f"its network reads the features of an encoder that is not here: {part.name}, {digest[:8]}",
            remedy="Set train.encoder or shared_encoder in params.yaml to that file (docs/encoders.md).",
            file=folder / CARD,
            site=card.site,
            code="bundle-encoder",
        )
    return {name: tensor.clone() for name, tensor in _tensors_of(encoder).items()}


def load_bundle(folder: Path, encoders: FindEncoder = no_encoder) -> Bundle:
    """Load a bundle after every check.

    Args:
        encoders: those that are here, for teachers that go without theirs.

    Raises:
        BundleError: see :func:`read_bundle`; ``bundle-encoder`` if an encoder is missing.
        EncoderError: the encoder's file that is here cannot be used.
    """
    stored = read_bundle(folder)
    card = stored.card
    network = outline(card.network)
    # What the bundle holds goes before what the encoder's file holds.
    network.load_state_dict(_encoder_tensors(card, folder, encoders) | stored.state, assign=True)
    network.requires_grad_(True).eval()
    experts = {name: _expert(folder, name, card) for name in (card.decision.experts if card.decision else ())}
    said = (stored.class_means, stored.encoder_means, stored.mask)
    return Bundle(folder, card, network, *said, experts, stored.digest)


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
