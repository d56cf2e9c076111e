"""Expected duration of a transfer: counted operations divided by measured speed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from qkt_clinical.catalog import BY_MEANS, ENCODED_METHODS, Method
from qkt_clinical.config.params import TransferParams
from qkt_clinical.data.prepared import Manifest
from qkt_clinical.models.low_rank import convolutions
from qkt_clinical.models.networks import build, multiply_adds
from qkt_clinical.qkt.head import MAX_REFINED
from qkt_clinical.qkt.low_rank_merge import MIN_VIEWS, WORK
from qkt_clinical.records.card import (
    ENCODER,
    MERGED,
    MIRRORS,
    Branch,
    Card,
    EncoderPart,
    NetworkSpec,
    SharedEncoder,
)

PROBED = 64
"""Images of the probe."""
BESIDE = 3.5
"""Times the passes: patches are gathered, layers solved and checked."""


def _same_frozen_encoder(own: Card, teacher: Card) -> bool:
    """Whether both are heads over one frozen encoder, which a student holds once."""
    part, key = own.network.encoder, "encoder"
    frozen = part is not None and part.mode == "frozen" and own.training.get(key) is not None
    return frozen and part == teacher.network.encoder and own.training[key] == teacher.training.get(key)


def _work(spec: NetworkSpec, shape: Sequence[int], share: float) -> tuple[int, int]:
    """Multiply-adds of an image, and the number of layers that are made smaller."""
    network = build(spec, seed=0).eval()
    return multiply_adds(network, shape), len(convolutions(network.extractor, share))


def speed(card: Card, device: torch.device) -> float:
    """Multiply-adds a second of a network like the card's, best of three passes."""
    network = build(card.network, seed=0).to(device).eval()
    images = torch.zeros((PROBED, *card.input.shape), device=device)
    best = math.inf
    with torch.inference_mode():
        for _ in range(3):
            start = time.perf_counter()
            network(images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
    return PROBED * _work(card.network, card.input.shape, 1.0)[0] / best


def expected_seconds(
    method: Method,
    own: Card,
    teachers: Sequence[Card],
    manifest: Manifest,
    params: TransferParams,
    fast: float,
) -> float:
    """Seconds of a transfer with phase 1 by a low-rank merge, within a factor of two or three.

    Args:
        own: of the hospital's own network.
        teachers: whose networks will be fetched.
        manifest: of the hospital's prepared data.
        fast: multiply-adds a second here, from :func:`speed`.
    """
    shape = manifest.shape
    calibration = sum(manifest.counts["calibration"].values())
    views = calibration * (len(MIRRORS) if method == "routed" and params.flips else 1)
    rank = params.light_rank if method == "qkt-light" else params.rank
    seen = sum(manifest.counts["train"].values())
    if params.discriminant:  # phase 2 looks at held-out and at training images once more
        views += (calibration + min(MAX_REFINED, seen)) * (views // max(1, calibration))
    if method != BY_MEANS:  # the operating point is set on training images too
        views += min(params.images, seen) * (len(MIRRORS) if method == "routed" and params.flips else 1)
    total = 0.0
    for number, card in enumerate((own, *teachers)):
        work, layers = _work(card.network, shape, rank)
        total += views * work
        if number and method != "routed" and not _same_frozen_encoder(own, card):
            prefixes = work * (layers + 1) / 2
            images = min(params.images, seen, int(WORK / prefixes))
            total += BESIDE * prefixes * max(MIN_VIEWS, images)
    return total / fast


def prediction_cost(
    method: Method,
    own: Card,
    teachers: Sequence[Card],
    params: TransferParams,
    encoder: SharedEncoder | None = None,
) -> float:
    """Multiply-adds of a prediction by the answer, in units of the own network's.

    Args:
        own: of the hospital's own network.
        teachers: whose networks will be fetched.
        encoder: the hospital's, which stands beside the networks of an answer whose method reads it.
    """
    shape = own.input.shape
    alone = _work(own.network, shape, 1.0)[0]
    if method == "routed":
        views = len(MIRRORS) if params.flips else 1
        return views * (alone + sum(_work(card.network, shape, 1.0)[0] for card in teachers)) / alone
    rank = params.light_rank if method == "qkt-light" else params.rank
    parts = [(own.network, 1.0), *((t.network, rank) for t in teachers if not _same_frozen_encoder(own, t))]
    branches = [
        Branch.model_validate({"name": network.name, "encoder": network.encoder, "rank": share})
        for network, share in parts
    ]
    if encoder is not None and method in ENCODED_METHODS:
        part = EncoderPart(name=encoder.name, side=encoder.side, mode="frozen", unit_length=True)
        branches.append(Branch.model_validate({"name": ENCODER, "encoder": part, "rank": 1.0}))
    merged = {**dict(own.network), "name": MERGED, "encoder": None, "branches": branches}
    return _work(NetworkSpec.model_validate(merged), shape, 1.0)[0] / alone
