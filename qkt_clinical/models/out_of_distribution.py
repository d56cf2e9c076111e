"""Out-of-distribution detection from the responses of the network's first convolution.

An image is described by the mean and the standard deviation of every filter's response. The *score* is the
distance of these numbers from those of the training images, in standard deviations (root mean square).
Images that were never meant for the network, such as noise, a blank frame, a negative or another modality,
lie far away. Later layers see more, but what they see is the diagnosis: a class that the hospital asked for
and has no image of would be out of distribution there. Measured in ``docs/out-of-distribution.md``.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Images
from qkt_clinical.errors import BundleError
from qkt_clinical.models.bundle import Bundle
from qkt_clinical.models.encoder_network import EncoderExtractor
from qkt_clinical.models.networks import Classifier, MergedExtractor
from qkt_clinical.records.card import REFERENCE, Card, Reference, read_reference

KNOWN_SHARE = 0.99
"""Share of the hospital's own held-out images that are not flagged."""
MAX_SCORE = 1e9
MIN_SPREAD = 1e-3
"""Of a number, as a share of all numbers' spread: one that never varies would flag everything."""
BATCH = 16


def first_convolution(network: Classifier) -> nn.Conv2d | nn.Conv3d:
    """The first convolution; in a merged network that of the hospital's own extractor."""
    return next(m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))


def load_reference(bundle: Bundle) -> Reference | None:
    """The reference in a bundle's folder, or None: bundles from other hospitals have none.

    Raises:
        BundleError: not a reference, or that of another network; code ``bundle-reference``.
    """
    reference = read_reference(bundle.folder, bundle.card)
    if reference is not None and len(reference.mean) != 2 * first_convolution(bundle.network).out_channels:
        raise BundleError(
            "a reference of another network",
            remedy="Remove the file; answers then carry no flag.",
            file=bundle.folder / REFERENCE,
            site=bundle.card.site,
            code="bundle-reference",
        )
    return reference


@torch.no_grad()
def responses(network: Classifier, inputs: Tensor) -> NDArray[np.float64]:
    """Mean and spread over space of every filter's response, (N, 2 filters), computed on the CPU.

    Args:
        network: wherever it is.
        inputs: (N, C, *spatial) from :func:`qkt_clinical.data.inputs.to_input`.
    """
    layer, found = copy.deepcopy(first_convolution(network)).cpu(), []
    own: nn.Module = network.extractor
    if isinstance(own, MergedExtractor):
        own = own.branches[0]
    for part in inputs.split(BATCH):
        out = layer(own.prepared(part) if isinstance(own, EncoderExtractor) else part).flatten(2).double()
        found.append(torch.cat([out.mean(dim=2), out.std(dim=2, correction=0)], dim=1))
    return np.asarray(torch.cat(found).numpy())


def _of_images(network: Classifier, images: Images, normalisation: str) -> NDArray[np.float64]:
    pieces = range(0, len(images), BATCH)
    return np.concatenate(
        [responses(network, to_input(images[i : i + BATCH], normalisation)) for i in pieces]
    )


def scores(reference: Reference, found: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of each row of :func:`responses` from the training images, (N,), at most ``MAX_SCORE``."""
    with np.errstate(over="ignore", invalid="ignore"):
        away = (found - np.array(reference.mean)) / np.array(reference.spread)
        score = np.sqrt((away**2).mean(axis=1))
    out: NDArray[np.float64] = np.minimum(np.nan_to_num(score, nan=MAX_SCORE, posinf=MAX_SCORE), MAX_SCORE)
    return out


def threshold_of(held_out: NDArray[np.float64]) -> float | None:
    """The score that ``KNOWN_SHARE`` of images like the held-out ones stay at or below.

    The smallest of the scores that keeps this for a further image, or the largest where there are too few
    images for that. None where there is none.
    """
    if len(held_out) == 0:
        return None
    rank = min(len(held_out), math.ceil(KNOWN_SHARE * (len(held_out) + 1)))
    return float(np.sort(held_out)[rank - 1])


def make_reference(
    network: Classifier, card: Card, training: Images, calibration: Images, normalisation: str
) -> Reference:
    """Statistics of a hospital's training images, and the threshold from its calibration images.

    Args:
        network: of the bundle that ``card`` describes.
        training, calibration: (N, C, *spatial) as prepared; training never saw the latter.
    """
    seen = _of_images(network, training, normalisation)
    spread = np.sqrt(seen.var(axis=0) + (MIN_SPREAD * seen.std()) ** 2) + 1e-12
    draft = Reference(
        weights=card.weights.sha256,
        mean=tuple(_rounded(v) for v in seen.mean(axis=0)),
        spread=tuple(_rounded(v) for v in spread),
        threshold=None,
    )
    if len(calibration) == 0:
        return draft
    threshold = threshold_of(scores(draft, _of_images(network, calibration, normalisation)))
    # A hair above, so that rounding does not flag the image that it comes from.
    above = None if threshold is None else _rounded(threshold * (1 + 1e-5))
    return draft.model_copy(update={"threshold": above})


def _rounded(value: float) -> float:
    """Round to six significant digits, above the differences between machines in summation."""
    return float(f"{value:.6g}")
