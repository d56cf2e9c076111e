"""The one training loop, used by teachers, students and peers; and the training of a teacher.

A run is a pure function of its inputs: every epoch draws from a generator of its own, derived from the
seed and the epoch's number, so that a run resumed from a checkpoint ends in the same weights.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkt_clinical.augment import augment
from qkt_clinical.card import NetworkSpec
from qkt_clinical.config import TrainParams
from qkt_clinical.data import Images, Labels
from qkt_clinical.errors import ConfigError
from qkt_clinical.files import digest_bytes
from qkt_clinical.networks import Classifier, build, fast_layout
from qkt_clinical.seeding import derive

MEAN, STD = 0.5, 0.5
"""Of images in [0, 1]; fixed, so that every site's network takes every site's images alike."""

IMAGES_PER_BATCH = 512


def to_input(images: Images, normalisation: str = "unit") -> Tensor:
    """Prepared images to network input: uint8 0..255 or float32 to (N, C, *spatial) float32.

    ``unit`` images end in [-1, 1]; ``zscore`` images are used as they are.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    if tensor.dtype == torch.uint8:
        tensor = tensor.float().div_(255.0)
    return tensor if normalisation == "zscore" else (tensor - MEAN) / STD


def generator(seed: int, *names: str) -> torch.Generator:
    """A CPU generator whose stream depends on the seed and the names alone."""
    return torch.Generator().manual_seed(derive(seed, *names))


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    epochs: int
    learning_rate: float
    weight_decay: float
    patience: int | None = None
    warmup: float = 0.1
    """Share of all steps in which the learning rate rises; then it falls along a cosine to zero."""


@dataclass
class History:
    """What a run went through. ``curves`` holds one row per epoch."""

    curves: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    stopped_early: bool = False
    privacy: dict[str, float | str] = field(default_factory=dict)
    """What differential privacy was reached, as the card says it; empty: none."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a run's state is kept between epochs; ``key`` names everything the run depends on."""

    folder: Path
    key: str

    @property
    def weights(self) -> Path:
        """Tensors: network, optimizer, best weights so far."""
        return self.folder / f"{self.key}.safetensors"

    @property
    def state(self) -> Path:
        """Epoch and curves."""
        return self.folder / f"{self.key}.json"

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write both files; the state, written last, names the digest of the tensors it belongs to."""
        from safetensors.torch import save

        self.folder.mkdir(parents=True, exist_ok=True)
        data = save(tensors)
        for path, content in (
            (self.weights, data),
            (self.state, json.dumps({**state, "sha256": digest_bytes(data)}).encode()),
        ):
            temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
            temporary.write_bytes(content)
            temporary.replace(path)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last complete state, or None where there is none (a torn pair counts as none)."""
        from safetensors.torch import load

        try:
            data, state = self.weights.read_bytes(), json.loads(self.state.read_text())
        except (OSError, ValueError):
            return None
        return (load(data), state) if state.pop("sha256", None) == digest_bytes(data) else None

    def clear(self) -> None:
        """Remove both files."""
        self.weights.unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero; ``step`` counts from 0."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _pack(
    modules: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    tensors = {f"network.{k}": v.detach().cpu().contiguous() for k, v in modules.state_dict().items()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v.detach().cpu().contiguous() for k, v in entry.items()}
    return tensors | {f"best.{k}": v.contiguous() for k, v in (best or {}).items()}


def _unpack(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def fit(
    modules: nn.Module,
    batches: Callable[[int], Iterator[Any]],
    steps_per_epoch: int,
    loss: Callable[[Any], Tensor],
    schedule: Schedule,
    *,
    device: torch.device,
    after_step: Callable[[float], None] | None = None,
    score: Callable[[], float] | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> History:
    """Train ``modules`` in place.

    Args:
        modules: everything with parameters to train; already on ``device``.
        batches: epoch number (from 1) to an iterator of ``steps_per_epoch`` batches.
        loss: batch to a scalar. Runs under automatic mixed precision on CUDA.
        after_step: called after every step with its learning rate.
        score: called after each epoch in evaluation mode, higher is better; the weights of the best
            epoch are kept, and training stops after ``schedule.patience`` epochs without a rise.
            Without it the last weights are kept.
        checkpoint: saved after every epoch and removed at the end.
        progress: called with (epochs done, epochs in all).
    """
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    steps = schedule.epochs * steps_per_epoch
    amp = device.type == "cuda"
    half = torch.bfloat16 if amp and torch.cuda.is_bf16_supported() else torch.float16
    scaler = torch.amp.GradScaler("cuda", enabled=amp and half is torch.float16)
    history, best, best_score, done = History(), None, -math.inf, 0
    saved = checkpoint.load() if checkpoint else None
    if saved:
        tensors, state = saved
        modules.load_state_dict(_unpack(tensors, "network."))
        entries: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _unpack(tensors, "optimizer.").items():
            index, key = name.split(".", 1)
            entries.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
        best = _unpack(tensors, "best.") or None
        history = History(state["curves"], state["best_epoch"], state["stopped_early"])
        best_score, done = state["best_score"], state["done"]
        scaler.load_state_dict(state["scaler"])
    for epoch in range(done + 1, schedule.epochs + 1):
        if history.stopped_early:
            break
        modules.train()
        total = torch.zeros((), device=device)
        for number, batch in enumerate(batches(epoch)):
            step = (epoch - 1) * steps_per_epoch + number
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * learning_rate_factor(step, steps, schedule.warmup)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype=half, enabled=amp):
                value = loss(batch)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            if after_step is not None:
                after_step(optimizer.param_groups[0]["lr"])
            total += value.detach().float()
        row = {"epoch": float(epoch), "loss": float(total) / steps_per_epoch}
        if score is not None:
            modules.eval()
            row["score"] = score()
            if row["score"] > best_score:
                best_score, history.best_epoch = row["score"], epoch
                best = {k: v.detach().cpu().clone() for k, v in modules.state_dict().items()}
            elif schedule.patience and epoch - history.best_epoch >= schedule.patience:
                history.stopped_early = True
        history.curves.append(row)
        if checkpoint:
            state = {
                "done": epoch,
                "curves": history.curves,
                "best_epoch": history.best_epoch,
                "best_score": best_score if math.isfinite(best_score) else -1e30,
                "stopped_early": history.stopped_early,
                "scaler": scaler.state_dict(),
            }
            checkpoint.save(_pack(modules, optimizer, best), state)
        if progress:
            progress(epoch, schedule.epochs)
    if best is not None:
        modules.load_state_dict(best)
    else:
        history.best_epoch = len(history.curves)
    modules.eval()
    if checkpoint:
        checkpoint.clear()
    return history


@torch.no_grad()
def predict(network: nn.Module, inputs: Tensor, device: torch.device, *, features: bool = False) -> Tensor:
    """Logits (N, classes), or features (N, F), in evaluation mode, float32 on the CPU.

    Computed on ``device``; the network is left where and as it was.
    """
    was_training, home = network.training, next(network.parameters()).device
    network.eval().to(device)
    call: Any = network.features if features else network
    outputs = [call(part.to(device)).float().cpu() for part in inputs.split(IMAGES_PER_BATCH)]
    network.train(was_training).to(home)
    return torch.cat(outputs)


def balanced_sample_weights(labels: Labels, classes: Sequence[int]) -> Tensor:
    """Weight per class, (max class + 1,), so that every class present counts alike; mean 1 over images."""
    counts = np.bincount(labels, minlength=max(classes) + 1).astype(np.float64)
    weights = np.where(counts > 0, len(labels) / np.maximum(counts, 1) / max(1, (counts > 0).sum()), 0.0)
    return torch.from_numpy(weights).float()


def mean_recall(predicted: Tensor, labels: Tensor) -> float:
    """Mean over the classes present in ``labels`` of the share predicted right."""
    recalls = [float((predicted[labels == c] == c).float().mean()) for c in labels.unique()]
    return sum(recalls) / len(recalls)


def shuffled(count: int, batch_size: int, draw: torch.Generator) -> Iterator[Tensor]:
    """Index batches over ``count`` items in random order; a last batch of one joins the one before.

    (A batch of one has no batch statistics.)
    """
    order = torch.randperm(count, generator=draw)
    parts = list(order.split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    yield from parts


def batches_per_epoch(count: int, batch_size: int) -> int:
    """Number of batches that :func:`shuffled` yields."""
    whole, rest = divmod(count, batch_size)
    return max(1, whole + (rest > 1 or (rest == 1 and whole == 0)))


def augmented_batches(
    inputs: Tensor,
    labels: Tensor,
    batch_size: int,
    strength: float,
    draw: torch.Generator,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order over inputs (N, C, *spatial) and labels (N,): a random view per image."""
    for index in shuffled(len(labels), batch_size, draw):
        yield augment(inputs[index].to(device), strength, draw), labels[index].to(device)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy of logits (N, C), every image weighed by its class.

    Args:
        labels: (N,).
        weights: (C,) from :func:`balanced_sample_weights`, over all of the hospital's images: a rare class
            is missing from many a batch.
    """
    each = F.cross_entropy(logits.float(), labels, reduction="none")
    return (each * weights[labels]).mean()


def train_network(
    network: Classifier,
    train: tuple[Images, Labels],
    val: tuple[Images, Labels],
    params: TrainParams,
    *,
    seed: int,
    site: str,
    normalisation: str = "unit",
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> History:
    """Train a network on ``device``, in place, on a site's images with class-balanced cross-entropy.

    The softmax runs over all the federation's classes: the rows of classes that the site never saw only
    ever fall, which is what masks read later.

    Raises:
        ConfigError: differential privacy is asked for, which only ``qkt_clinical.private`` gives.
    """
    if params.privacy is not None:
        raise ConfigError(
            "differential privacy is not possible here",
            remedy="Leave train.privacy out; 'qkt train' trains teachers with it.",
            code="privacy-unavailable",
        )
    inputs, labels = to_input(train[0], normalisation), torch.from_numpy(train[1])
    weights = balanced_sample_weights(train[1], range(network.spec.classes)).to(device)
    val_inputs, val_labels = to_input(val[0], normalisation), torch.from_numpy(val[1])

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        draw = generator(seed, "train", site, str(epoch))
        return augmented_batches(inputs, labels, params.batch_size, params.augment, draw, device)

    def score() -> float:
        logits = predict(network, val_inputs, device)
        recall = mean_recall(logits.argmax(1), val_labels)
        # Small validation sets give the same recall for many epochs; the loss decides among them.
        return recall - 1e-3 * float(F.cross_entropy(logits, val_labels))

    return fit(
        network,
        batches,
        batches_per_epoch(len(labels), params.batch_size),
        lambda batch: weighted_cross_entropy(network(batch[0]), batch[1], weights),
        Schedule(params.epochs, params.learning_rate, params.weight_decay, params.patience),
        device=device,
        score=score if len(val_labels) else None,
        checkpoint=checkpoint,
        progress=progress,
    )


def train_teacher(
    spec: NetworkSpec,
    train: tuple[Images, Labels],
    val: tuple[Images, Labels],
    params: TrainParams,
    *,
    seed: int,
    site: str,
    normalisation: str = "unit",
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Classifier, History]:
    """Build a site's network and train it; see :func:`train_network`."""
    network = fast_layout(build(spec, seed=derive(seed, "train", site)).to(device))
    history = train_network(
        network,
        train,
        val,
        params,
        seed=seed,
        site=site,
        normalisation=normalisation,
        device=device,
        checkpoint=checkpoint,
        progress=progress,
    )
    return network, history
