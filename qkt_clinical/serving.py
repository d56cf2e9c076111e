"""Answers from a bundle, as MLflow's loader module (``pyfunc``). Free of MLflow itself.

A request holds images as they stand in a prepared site: float32 of the card's input shape (C, H, W) or
(C, D, H, W), uint8 images divided by 255. With normalisation ``unit`` values lie in [0, 1]; ``zscore``
images are used as they are.

Before a bundle is loaded, the folder of the MLflow model around it is held against what this package
registers, see :func:`check_served`. MLflow comes first, though: it has read ``MLmodel`` and imported the
loader that stands there before this module is asked, so that whose folder it is has to be settled earlier,
by ``qkt registry fetch``.

An answer also holds the operating point that it rests on, and whether the image is out of the distribution
of the training images, see :mod:`qkt_clinical.models.out_of_distribution`.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qkt_clinical.catalog import DEFAULT_TASK
from qkt_clinical.common.files import digest_folder, read_plain, to_json
from qkt_clinical.data.inputs import to_input
from qkt_clinical.errors import Boundary, InputError, QktError, refused_by_system
from qkt_clinical.models.bundle import Bundle, load_bundle
from qkt_clinical.models.out_of_distribution import load_reference, responses, scores
from qkt_clinical.records.card import Card, Reference
from qkt_clinical.records.registered import (
    CHECKS,
    DOWNLOADED,
    MAX_MLMODEL_BYTES,
    MLMODEL,
    check_beside,
    check_places,
    list_files,
    plain_entries,
    read_mlmodel,
    size_limit,
    unsound,
)
from qkt_clinical.task import task_of

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

BATCH, BATCH_NUMBERS = 256, 1 << 24
"""Images, and numbers in them, that go through the network at once."""
REQUEST_NUMBERS = 1 << 26
"""Numbers in the images of one request: 256 MiB in single precision."""
FLAG_COLUMNS = ("unlike_training", "unlike_training_score", "unlike_training_threshold")
"""Columns of out-of-distribution detection; their names stand in the signature of every registered model."""
TOLERANCE = 1e-4
"""Resampling in single precision may leave [0, 1] by this much."""


def probability_column(class_name: str) -> str:
    """Column of the answer that holds a class's probability."""
    return f"probability_{class_name}"


def operating_point(card: Card) -> dict[str, float]:
    """Columns with a student's operating point; a teacher has none.

    ``budget`` is the largest false-query rate on the hospital's own held-out images,
    ``offset_<class>`` what was added to the class's logit to keep to it.
    """
    if card.decision is None:
        return {}
    pairs = zip(card.decision.query, card.decision.offsets, strict=True)
    return {"budget": card.decision.budget} | {f"offset_{card.classes[q]}": offset for q, offset in pairs}


def check_images(data: Any, bundle: Bundle) -> NDArray[np.float32]:
    """Images (N, *card.input.shape) as float32.

    Raises:
        InputError: codes ``input-type``, ``input-shape``, ``input-size``, ``input-values``.
    """
    spec, site = bundle.card.input, bundle.card.site
    wanted = "x".join(map(str, ("N", *spec.shape)))
    remedy = f"Send float32 images of shape {wanted}, prepared as the site's own are."
    try:
        numbers = np.asarray(data)
    except (TypeError, ValueError):
        numbers = np.asarray(None)  # lists of several lengths
    if numbers.dtype.kind not in "fiu":
        raise InputError("not an array of numbers", remedy=remedy, code="input-type", site=site)
    if numbers.ndim != len(spec.shape) + 1 or numbers.shape[1:] != spec.shape or len(numbers) == 0:
        shape = "x".join(map(str, numbers.shape))
        raise InputError(f"shape {shape} against {wanted}", remedy=remedy, code="input-shape", site=site)
    most = max(1, REQUEST_NUMBERS // math.prod(spec.shape))
    if len(numbers) > most:
        raise InputError(
            f"{len(numbers)} images in one request, more than {most}",
            remedy="Send them in several requests.",
            code="input-size",
            site=site,
        )
    with np.errstate(over="ignore"):  # becomes infinite, which is refused
        images = numbers.astype(np.float32, copy=False)
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


class Predictor:
    """A bundle that answers for batches of images."""

    def __init__(self, bundle: Bundle, reference: Reference | None = None) -> None:
        self.bundle, self.task = bundle, task_of(DEFAULT_TASK)
        self.reference = reference

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row per image.

        ``label``, and ``probability_<class>`` for every class of the label space; the operating point of a
        student, see :func:`operating_point`; ``unlike_training`` with its ``unlike_training_score`` and
        ``unlike_training_threshold``, all None where the bundle has no reference.

        Probabilities are the task's, 0 for classes that the bundle does not answer for; for
        a student they follow its operating point.

        Args:
            data: images (N, *card.input.shape), see the module.
            params: none are known.

        Raises:
            InputError: see :func:`check_images`.
            QktError: something else went wrong; its words hold no path.
        """
        with Boundary() as ended:
            return self._answer(data, params)
        assert ended.error is not None
        raise _spoken(ended.error)

    def _answer(self, data: Any, params: dict[str, Any] | None) -> pd.DataFrame:
        import pandas as pd

        if params:
            raise InputError(
                f"unknown parameters {', '.join(sorted(map(str, params)))[:200]}",
                remedy="Send none.",
                code="input-params",
            )
        card = self.bundle.card
        images = check_images(data, self.bundle)
        answers: list[Tensor] = []
        distances: list[float] = []
        with torch.inference_mode():
            step = max(1, min(BATCH, BATCH_NUMBERS // math.prod(card.input.shape)))
            for part in np.array_split(images, range(step, len(images), step)):
                inputs = to_input(part, card.input.normalisation)
                answers.append(answer_scores(self.bundle, inputs))
                if self.reference is not None:
                    distances += scores(self.reference, responses(self.bundle.network, inputs)).tolist()
        said = torch.cat(answers)
        probabilities = self.task.probabilities(said.double()).numpy()
        columns: dict[str, Any] = {"label": [card.classes[i] for i in self.task.answer(said).tolist()]}
        columns |= {probability_column(c): probabilities[:, i] for i, c in enumerate(card.classes)}
        columns |= {name: np.full(len(images), value) for name, value in operating_point(card).items()}
        threshold = None if self.reference is None else self.reference.threshold
        flags = [None if threshold is None else score > threshold for score in distances]
        nothing = [None] * len(images)  # objects, so that JSON has null and not NaN
        for name, values in zip(FLAG_COLUMNS, (flags, distances, [threshold] * len(images)), strict=True):
            columns[name] = pd.Series(values or nothing, dtype=object)
        return pd.DataFrame(columns)


def _speaking(kind: type[QktError], base: type[Exception]) -> type[QktError]:
    """Make a subclass of an error that is also MLflow's; see :func:`_spoken`."""

    def serialize_as_json(self: QktError) -> str:
        status = "BAD_REQUEST" if isinstance(self, InputError) else "INTERNAL_ERROR"
        return to_json({"error_code": status, "code": self.code, "message": str(self.args[0])})

    def get_http_status_code(self: QktError) -> int:
        return 400 if isinstance(self, InputError) else 500

    own = {"serialize_as_json": serialize_as_json, "get_http_status_code": get_http_status_code}
    return type(kind.__name__, (kind, base), own)


def _spoken(error: QktError) -> QktError:
    """The error in the form that MLflow's server returns verbatim, if this process is one.

    To what is none of its own it answers with a traceback, which names folders of the server; to its own
    with a part of the request's images before the message.
    """
    mlflow = sys.modules.get("mlflow.exceptions")
    if mlflow is None:
        return error
    where = error.where
    spoken = _speaking(type(error), mlflow.MlflowException)(
        error.message, remedy=error.remedy, code=error.code, stage=where.stage, site=where.site
    )
    spoken.args = (str(spoken),)
    return spoken


def _hide_tracebacks() -> None:
    """Let MLflow's server answer requests that it cannot parse without a traceback of its own.

    It has no setting for that. Nothing is changed in processes that are no server.
    """
    server: Any = sys.modules.get("mlflow.pyfunc.scoring_server")
    answer = getattr(server, "_handle_serving_error", None)
    if answer is not None and not isinstance(answer, partial):
        server._handle_serving_error = partial(answer, include_traceback=False)


def check_served(folder: Path) -> None:
    """Check the MLflow model around a bundle's folder; a bundle outside one needs no check.

    Names, sizes, loader and requirements are those of this package, and the digest of the bundle is that
    which was written into ``MLmodel`` when it was registered (older versions hold none). All of this can be
    forged by who can write the folder: it finds what was damaged or mixed up, and a folder fetched by other
    means that is none of ours.

    Raises:
        UnsoundVersion: codes ``version-files``, ``version-loader``, ``version-digest``, ``bundle-size``,
            ``bundle-missing``.
    """
    root, data = folder.parent.parent, f"data/{folder.name}"
    if folder.parent.name != "data" or not (root / MLMODEL).exists():
        return
    listed = dict(list_files(partial(plain_entries, root), data))
    listed.pop(DOWNLOADED, None)
    check_places(listed, data)
    for name in sorted(CHECKS.keys() & listed.keys()):
        check_beside(name, read_plain(root / name, size_limit(name, data) or 0), data)
    said = (read_mlmodel(read_plain(root / MLMODEL, MAX_MLMODEL_BYTES)).get("metadata") or {}).get("digest")
    if said is not None and digest_folder(folder) != said:
        raise unsound("the bundle is not the one that was registered", "version-digest")


def _load_pyfunc(data_path: str) -> Predictor:
    """What MLflow calls with the bundle's folder.

    Raises:
        BundleError: the bundle, or the folder of the model around it, fails a check.
        QktError: the system does not let it be read.
    """
    folder = Path(data_path)
    _hide_tracebacks()
    try:
        check_served(folder)
        bundle = load_bundle(folder)
        return Predictor(bundle, load_reference(bundle))
    except OSError as error:
        raise refused_by_system(error) from error
