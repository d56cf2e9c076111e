"""Answers from a bundle, as MLflow's loader module (``pyfunc``). Free of MLflow itself.

A request holds images as they stand in a prepared site: float32 of the card's input shape (C, H, W) or
(C, D, H, W), uint8 images divided by 255. With normalisation ``unit`` values lie in [0, 1]; ``zscore``
images are used as they are.

An answer also holds the operating point that it rests on, and whether the image is unlike those that the
model was trained on, see :mod:`qkt_clinical.models.out_of_distribution`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qkt_clinical.data.inputs import to_input
from qkt_clinical.errors import InputError
from qkt_clinical.models.bundle import Bundle, load_bundle
from qkt_clinical.models.out_of_distribution import load_reference, responses, scores
from qkt_clinical.records.card import Card, Reference

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

BATCH = 256
UNLIKE_COLUMNS = ("unlike_training", "unlike_training_score", "unlike_training_threshold")
TOLERANCE = 1e-4
"""Resampling in single precision may leave [0, 1] by this much."""


def probability_column(class_name: str) -> str:
    """Column of the answer that holds a class's probability."""
    return f"probability_{class_name}"


def operating_point(card: Card) -> dict[str, float]:
    """Columns of the answer that say how a student's query classes are weighed; a teacher's has none.

    ``budget`` is the share of the hospital's own held-out images that may be given away to the query,
    ``offset_<class>`` what was added to the class's logit to keep to it.
    """
    if card.decision is None:
        return {}
    pairs = zip(card.decision.query, card.decision.offsets, strict=True)
    return {"budget": card.decision.budget} | {f"offset_{card.classes[q]}": offset for q, offset in pairs}


def check_images(data: Any, bundle: Bundle) -> NDArray[np.float32]:
    """Images (N, *card.input.shape) as float32.

    Raises:
        InputError: codes ``input-type``, ``input-shape``, ``input-values``.
    """
    spec, site = bundle.card.input, bundle.card.site
    wanted = "x".join(map(str, ("N", *spec.shape)))
    remedy = f"Send float32 images of shape {wanted}, prepared as the site's own are."
    try:
        images = np.asarray(data, dtype=np.float32)
    except (TypeError, ValueError):
        raise InputError("not an array of numbers", remedy=remedy, code="input-type", site=site) from None
    if images.ndim != len(spec.shape) + 1 or images.shape[1:] != spec.shape or len(images) == 0:
        shape = "x".join(map(str, images.shape))
        raise InputError(f"shape {shape} against {wanted}", remedy=remedy, code="input-shape", site=site)
    if not np.isfinite(images).all():
        raise InputError("values that are not finite", remedy=remedy, code="input-values", site=site)
    low, high = float(images.min()), float(images.max())
    if spec.normalisation == "unit" and not -TOLERANCE <= low <= high <= 1 + TOLERANCE:
        raise InputError(
            f"values from {low:g} to {high:g} against 0 to 1",
            remedy="Divide 8-bit images by 255.",
            code="input-values",
            site=site,
        )
    return images


def answer_scores(bundle: Bundle, inputs: Tensor) -> Tensor:
    """Scores (N, C) of network inputs; -inf for classes that the bundle does not answer for.

    A student follows its decision; a teacher answers among the classes that its mask knows (all, where it
    has no mask).
    """
    if bundle.card.decision is not None:
        from qkt_clinical.qkt.prediction import predict_scores

        return predict_scores(bundle, inputs)
    logits: Tensor = bundle.network(inputs)
    if bundle.mask is None:
        return logits
    return logits.masked_fill(~torch.tensor(bundle.mask.known), -torch.inf)


class Answerer:
    """A bundle that answers for batches of images."""

    def __init__(self, bundle: Bundle, reference: Reference | None = None) -> None:
        self.bundle = bundle
        self.reference = reference

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row per image.

        ``label``, and ``probability_<class>`` for every class of the label space; the operating point of a
        student, see :func:`operating_point`; ``unlike_training`` with its ``unlike_training_score`` and
        ``unlike_training_threshold``, all None where the bundle has no reference.

        Probabilities are the softmax of the scores, 0 for classes that the bundle does not answer for; for
        a student they follow its operating point.

        Args:
            data: images (N, *card.input.shape), see the module.
            params: none are known.

        Raises:
            InputError: see :func:`check_images`.
        """
        import pandas as pd

        if params:
            raise InputError(
                f"unknown parameters {', '.join(sorted(params))}", remedy="Send none.", code="input-params"
            )
        card = self.bundle.card
        images = check_images(data, self.bundle)
        answers: list[Tensor] = []
        unlike: list[float] = []
        with torch.inference_mode():
            for part in np.array_split(images, range(BATCH, len(images), BATCH)):
                inputs = to_input(part, card.input.normalisation)
                answers.append(answer_scores(self.bundle, inputs))
                if self.reference is not None:
                    unlike += scores(self.reference, responses(self.bundle.network, inputs)).tolist()
        said = torch.cat(answers)
        probabilities = torch.softmax(said.double(), dim=1).numpy()
        columns: dict[str, Any] = {"label": [card.classes[i] for i in said.argmax(1).tolist()]}
        columns |= {probability_column(c): probabilities[:, i] for i, c in enumerate(card.classes)}
        columns |= {name: np.full(len(images), value) for name, value in operating_point(card).items()}
        threshold = None if self.reference is None else self.reference.threshold
        flags = [None if threshold is None else score > threshold for score in unlike]
        nothing = [None] * len(images)  # objects, so that JSON has null and not NaN
        for name, values in zip(UNLIKE_COLUMNS, (flags, unlike, [threshold] * len(images)), strict=True):
            columns[name] = pd.Series(values or nothing, dtype=object)
        return pd.DataFrame(columns)


def _load_pyfunc(data_path: str) -> Answerer:
    """What MLflow calls with the bundle's folder.

    Raises:
        BundleError: the bundle fails a check.
    """
    bundle = load_bundle(Path(data_path))
    return Answerer(bundle, load_reference(bundle))
