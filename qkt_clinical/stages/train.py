"""Stage ``train``: a hospital's networks, from its own prepared images alone.

The *teacher* is what other hospitals get. It is trained on images of changing appearance, so that it reads
theirs; that costs it some of the hospital's own. So the hospital's *own network*, with which its questions
start, is trained without, and stays where it is. Where appearance is not changed, as at a site of few images,
one network is both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qkt_clinical import __version__
from qkt_clinical.catalog import DEFAULT_TASK
from qkt_clinical.common.disclosure import SMALLEST_COUNT, suppress
from qkt_clinical.common.files import (
    digest_bytes,
    digest_file,
    digest_folder,
    new_folder,
    passing_folder,
    sweep,
    write_json,
)
from qkt_clinical.common.system_metrics import sample_system_metrics, write_system_metrics
from qkt_clinical.config.params import Params, SharedEncoderParams, TrainParams
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import PreparedSite, load_prepared
from qkt_clinical.errors import SourceError
from qkt_clinical.models.bundle import packed_network, write_bundle
from qkt_clinical.models.class_means import class_means, mean_features
from qkt_clinical.models.encoders import load_encoder
from qkt_clinical.models.generator import generator
from qkt_clinical.models.image_statistics import image_statistics
from qkt_clinical.models.inference import predict
from qkt_clinical.models.networks import Classifier, begin_computing
from qkt_clinical.models.out_of_distribution import make_reference
from qkt_clinical.models.private_means import private_means
from qkt_clinical.records.card import CARD, MEANS, REFERENCE, WEIGHTS, InputSpec, SharedEncoder
from qkt_clinical.records.reading import write_record
from qkt_clinical.records.training import TeacherMetrics, TrainingCurves
from qkt_clinical.stages.encoding import SiteEncoder
from qkt_clinical.stages.recipe import prepared_digest, train_recipe
from qkt_clinical.task import Task, task_of
from qkt_clinical.training.classifier import appearance_of, at_home, network_spec, train_teacher
from qkt_clinical.training.loop import Checkpoint, History
from qkt_clinical.training.private import train_private
from qkt_clinical.training.processes import processes

METRICS, CURVES = "metrics.json", "curves.json"
MADE = (METRICS, CURVES, REFERENCE, MEANS, WEIGHTS, CARD)
"""The stage's files; the card last, it names the weights."""


def _secret(site: PreparedSite) -> str:
    """A reproducible secret of the hospital, derived from its salted patient ids.

    The seed is no secret, it stands on every card.
    """
    return digest_bytes(b"noise" + "\0".join(site.groups.tolist()).encode())


def _metrics(
    site: PreparedSite, logits: torch.Tensor, labels: torch.Tensor, history: History, task: Task
) -> TeacherMetrics:
    found = task.recall(task.answer(logits), labels)
    recall = {site.manifest.classes[c]: round(share, 6) for c, share in found.items()}
    return TeacherMetrics(
        balanced_accuracy=round(sum(recall.values()) / len(recall), 6) if recall else None,
        recall=suppress(recall, site.manifest.counts["val"]),
        epochs=len(history.curves),
        best_epoch=history.best_epoch,
        stopped_early=history.stopped_early,
    )


class _Halves:
    """Progress of two trainings of equal length, one after the other, as of one."""

    def __init__(self, tell: Callable[[int, int], None]) -> None:
        self.tell = tell
        self.before = self.last = 0

    def __call__(self, done: int, total: int) -> None:
        if done < self.last:  # the second begins
            self.before = total
        self.last = done
        self.tell(self.before + done, 2 * total)


def _encoder_means(encoder: SiteEncoder, shared: SharedEncoderParams, seed: int) -> dict[int, torch.Tensor]:
    """Class to its mean features by the shared encoder, of every class of enough images."""
    features, labels = encoder.features("train"), torch.from_numpy(encoder.prepared.part("train")[1])
    if shared.epsilon is None:
        return mean_features(features, labels, SMALLEST_COUNT)
    # Other noise for whatever is another release: the same twice, at two epsilons or of two versions of the
    # data, would cancel.
    chosen = shared.model_dump_json(exclude={"weights", "licence"})
    release = prepared_digest(encoder.prepared.manifest) + chosen
    site = encoder.prepared.manifest.site
    draw = generator(seed, "encoder-means", site, _secret(encoder.prepared), release)
    return private_means(
        features, labels, epsilon=shared.epsilon, delta=shared.delta, least=SMALLEST_COUNT, draw=draw
    )


def trained_digest(space: Workspace, site: str) -> str:
    """SHA-256 of what the stage wrote for a site."""
    return digest_bytes((digest_folder(space.teacher(site), MADE) + digest_folder(space.own(site))).encode())


def train_site(
    root: Path,
    site: str,
    params: Params,
    *,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train a site's networks: ``models/teachers/<site>/`` and ``models/own/<site>/``.

    Returns:
        The teacher's metrics on validation images, as in ``metrics.json``; of several processes only in the
        first, which writes.

    Raises:
        ConfigError: images that the network cannot take.
        EncoderError: the encoder's weights cannot be used, see :func:`.encoders.load_encoder`.
        SourceError: fewer than two classes, or too few images, to train on, or none to validate with
            (``split-empty``).
        QktError: differential privacy is asked for and cannot be had, see :func:`~.private.train_private`.
    """
    space, task = Workspace(root), task_of(DEFAULT_TASK)
    prepared = load_prepared(space.prepared(site))
    images, labels = prepared.part("train")
    classes = prepared.local_classes()
    if len(classes) < 2:
        raise SourceError(
            f"training images of {len(classes)} class",
            remedy="A teacher needs at least two classes; check label_map in site.yaml.",
            site=site,
            stage="train",
        )
    if len(prepared.splits["val"]) == 0:
        raise SourceError(
            "no validation images",
            remedy="Every split but test needs a patient: add patients, correct patient in site.yaml, or "
            "give val a share in ingest.splits.",
            code="split-empty",
            site=site,
            stage="train",
        )
    spec = network_spec(params.train, prepared.manifest.shape, len(prepared.manifest.classes))
    encoder = params.train.encoder
    pretrained = load_encoder(encoder.name, root / encoder.weights, encoder.digest) if encoder else None
    shared = params.shared_encoder if params.train.privacy is None else None
    where = begin_computing(device or params.device, params.threads)
    normalisation = prepared.manifest.normalisation
    privacy, means = params.train.privacy, params.train.class_means
    made_of = train_recipe(params, prepared.manifest, where.type)
    travels = appearance_of(params.train, normalisation, len(labels)) > 0
    parts = _Halves(progress) if travels and progress else progress

    def trained(train: TrainParams, kind: str) -> tuple[Classifier, History]:
        return train_teacher(
            spec,
            (images, labels),
            prepared.part("val"),
            train,
            task=task,
            seed=params.seed,
            site=site,
            normalisation=normalisation,
            device=where,
            checkpoint=Checkpoint(space.scratch / "train", f"{site}-{kind}-{made_of.digest[:16]}"),
            progress=parts,
            pretrained=pretrained,
        )

    with sample_system_metrics() as samples:
        if privacy is not None:
            network, history = train_private(
                spec,
                (images, labels),
                params.train,
                privacy,
                task=task,
                seed=params.seed,
                secret=_secret(prepared),
                site=site,
                normalisation=normalisation,
                device=where,
                progress=progress,
            )
        else:
            network, history = trained(params.train, "teacher")
        own = trained(at_home(params.train), "own") if travels else (network, history)
    if not processes().first:
        return {}
    if params.train.packed:  # what is said of the teacher is said of what others get
        network = packed_network(network, pretrained)
    val_images, val_labels = prepared.part("val")
    logits = predict(network, to_input(val_images, normalisation), where)
    metrics = _metrics(prepared, logits, torch.from_numpy(val_labels), history, task)

    def noise_of_means() -> torch.Generator:
        # Other noise for whatever is another release: of the same, differences would tell what it hides.
        return generator(params.seed, "class-means", site, _secret(prepared), made_of.digest)

    def described(history: History, kind: str) -> dict[str, Any]:
        statistics = None if history.privacy else image_statistics(images, normalisation)
        leaves = kind == "teacher" and not history.privacy
        return {
            "kind": "teacher",
            "site": site,
            "classes": prepared.manifest.classes,
            "input": InputSpec(
                shape=prepared.manifest.shape,
                normalisation=normalisation,
                spacing_mm=prepared.manifest.spacing_mm,
            ),
            "image_statistics": statistics,
            "shared_encoder": SharedEncoder.of(shared) if kind == "teacher" else None,
            "training": {
                "epochs": len(history.curves),
                "best_epoch": history.best_epoch,
                "seed": params.seed,
                "version": __version__,
                **({"means_epsilon": means.epsilon, "means_delta": means.delta} if leaves else {}),
                **({"shared_epsilon": shared.epsilon, "shared_delta": shared.delta} if shared else {}),
                **({"encoder": encoder.digest, "encoder_licence": encoder.licence} if encoder else {}),
                **history.privacy,
            },
        }

    with new_folder(space.root / "models" / "own" / site) as part:
        write_bundle(part, own[0], described(own[1], "own"))
    folder = space.teacher(site)
    sweep(folder)
    with passing_folder(folder) as part:
        card = write_bundle(
            part,
            network,
            described(history, "teacher"),
            {}
            if history.privacy
            else class_means(network, images, labels, normalisation, where, means, noise_of_means()),
            _encoder_means(SiteEncoder(root, shared, prepared, where), shared, params.seed) if shared else {},
            pretrained,
            packed=params.train.packed,
        )
        reference = make_reference(network, card, images, prepared.part("calibration")[0], normalisation)
        write_json(part / REFERENCE, reference.model_dump(mode="json"))
        write_record(part / METRICS, metrics)
        write_record(part / CURVES, TrainingCurves(tuple(history.curves)))
        folder.mkdir(parents=True, exist_ok=True)
        # One by one, since mask.json in the same folder is another stage's; the card last, it names the rest.
        for name in MADE:
            (part / name).replace(folder / name)
    write_system_metrics(space.scratch, digest_file(folder / CARD), samples)
    return metrics.model_dump(mode="json")
