"""The one training loop, used by teachers, students and baselines.

A run is a pure function of its inputs: every epoch draws from a generator of its own, derived from the
seed and the epoch's number, so that a run resumed from a checkpoint ends in the same weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkt_clinical.common.files import digest_bytes, passing_file
from qkt_clinical.models.encoder_network import EncoderExtractor
from qkt_clinical.training.processes import processes


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
    """History of a training run; ``curves`` holds one row per epoch."""

    curves: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    stopped_early: bool = False
    privacy: dict[str, float | str] = field(default_factory=dict)
    """What differential privacy was reached, as the card says it; empty: none."""


@dataclass(frozen=True)
class Checkpoint:
    """A run's state on disk between epochs; ``key`` is a digest of everything the run depends on."""

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

        data = save(tensors)
        for path, content in (
            (self.weights, data),
            (self.state, json.dumps({**state, "sha256": digest_bytes(data)}).encode()),
        ):
            with passing_file(path) as temporary:
                temporary.write_bytes(content)

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


PRETRAINED_SHARE = 0.1
"""Of the learning rate, for what was trained elsewhere: at the whole of it that would be forgotten."""


def _parameter_groups(modules: nn.Module) -> list[dict[str, Any]]:
    """What the optimiser changes, each group with its share of the learning rate."""
    encoders = [m for m in modules.modules() if isinstance(m, EncoderExtractor)]
    pretrained = {id(p): p for e in encoders for p in e.parameters()}
    learnt = {id(p): p for e in encoders for p in e.learnt()}
    for number, parameter in pretrained.items():
        parameter.requires_grad_(number in learnt)
    new = [p for p in modules.parameters() if p.requires_grad and id(p) not in pretrained]
    groups = [{"params": new, "share": 1.0}]
    return groups + ([{"params": list(learnt.values()), "share": PRETRAINED_SHARE}] if learnt else [])


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
    """Train ``modules`` in place, alone or as one of several :mod:`.processes`.

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
    optimizer = torch.optim.AdamW(
        _parameter_groups(modules), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    steps = schedule.epochs * steps_per_epoch
    here = processes()
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
                factor = learning_rate_factor(step, steps, schedule.warmup)
                group["lr"] = schedule.learning_rate * factor * group["share"]
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype=half, enabled=amp):
                value = loss(batch)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            if after_step is not None:
                after_step(optimizer.param_groups[0]["lr"])
            total += value.detach().float()
        row = {"epoch": float(epoch), "loss": float(here.mean(total)) / steps_per_epoch}
        if score is not None:
            modules.eval()
            row["score"] = here.as_first(score(), device)
            if row["score"] > best_score:
                best_score, history.best_epoch = row["score"], epoch
                best = {k: v.detach().cpu().clone() for k, v in modules.state_dict().items()}
            elif schedule.patience and epoch - history.best_epoch >= schedule.patience:
                history.stopped_early = True
        history.curves.append(row)
        if checkpoint and here.first:
            state = {
                "done": epoch,
                "curves": history.curves,
                "best_epoch": history.best_epoch,
                "best_score": best_score if math.isfinite(best_score) else -1e30,
                "stopped_early": history.stopped_early,
                "scaler": scaler.state_dict(),
            }
            checkpoint.save(_pack(modules, optimizer, best), state)
        if progress and here.first:
            progress(epoch, schedule.epochs)
    if best is not None:
        modules.load_state_dict(best)
    else:
        history.best_epoch = len(history.curves)
    modules.eval()
    if checkpoint and here.first:
        checkpoint.clear()
    return history


def shuffled(
    count: int, batch_size: int, draw: torch.Generator, least: int = 1, smallest: int = 2
) -> Iterator[Tensor]:
    """Index batches over ``count`` items in random order; a last batch of one joins the one before.

    (A batch of one has no batch statistics.) Where that makes fewer than ``least`` batches, the items come
    again in another order, as often as it takes.

    Args:
        smallest: items of a last batch that stays alone.
    """
    for _ in range(_passes(count, batch_size, least, smallest)):
        order = torch.randperm(count, generator=draw)
        parts = list(order.split(batch_size))
        if len(parts) > 1 and len(parts[-1]) < smallest:
            parts[-2:] = [torch.cat(parts[-2:])]
        yield from parts


def _batches(count: int, batch_size: int, smallest: int) -> int:
    whole, rest = divmod(count, batch_size)
    return max(1, whole + (rest >= smallest or (rest > 0 and whole == 0)))


def _passes(count: int, batch_size: int, least: int, smallest: int) -> int:
    return max(1, math.ceil(least / _batches(count, batch_size, smallest)))


def batches_per_epoch(count: int, batch_size: int, least: int = 1, smallest: int = 2) -> int:
    """Number of batches that :func:`shuffled` yields."""
    return _batches(count, batch_size, smallest) * _passes(count, batch_size, least, smallest)
