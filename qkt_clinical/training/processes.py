"""One network trained by several processes at once, each on a GPU of its own; ``torchrun`` starts them.

Each sees a part of every batch, and gradients are averaged (torch's DistributedDataParallel). The random
order of the images is the same in all, so that together they see what one would see in batches as large as
theirs together.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from qkt_clinical.errors import DeviceError
from qkt_clinical.models.generator import generator

LAUNCHED = "TORCHELASTIC_RUN_ID"
"""In the environment of a process that ``torchrun`` started."""


@dataclass(frozen=True)
class Processes:
    """Those that train a network, and which of them this is."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def part(self, index: Tensor) -> Tensor:
        """This one's part of a batch (N,); parts differ in length by one at most."""
        return index[self.rank :: self.count]

    def draws(self, draw: torch.Generator) -> torch.Generator:
        """What this one draws the views of its part from: ``draw``, which all have alike, where alone."""
        return draw if self.count == 1 else generator(draw.initial_seed(), "part", str(self.rank))

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a number over all."""
        if self.count > 1:
            distributed.all_reduce(value)
            value /= self.count
        return value

    def as_first(self, value: float, device: torch.device) -> float:
        """A number as the first has it: what is decided by it is decided alike in all."""
        if self.count == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64, device=device)
        distributed.broadcast(told, src=0)
        return float(told)


def processes() -> Processes:
    """As torch says; one alone where nothing was begun."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return Processes()
    return Processes(distributed.get_rank(), distributed.get_world_size())


def averaged(network: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The network, with gradients that are averaged over the processes where there are several.

    Statistics of batch norm are of each process' own part; those of the first are kept.
    """
    if processes().count == 1:
        return network
    ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(network, device_ids=ids)


@contextmanager
def begin_processes(wanted: int, program: Sequence[str], device: str) -> Iterator[None]:
    """Be one of ``wanted`` processes within the block.

    Where ``torchrun`` did not start this one, it is replaced by a ``torchrun`` that starts all of them.

    Args:
        program: module and arguments that all of them run, for ``python -m``.
        device: as in params.yaml.

    Raises:
        DeviceError: fewer GPUs than processes.
    """
    if wanted == 1:
        yield
        return
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if 0 < gpus < wanted:
        raise DeviceError(
            f"train.processes is {wanted}, and there are {gpus} GPUs",
            remedy=f"Set train.processes to {gpus} at most.",
        )
    if LAUNCHED not in os.environ:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(wanted)]
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *launch, "-m", *program])
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if gpus else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()
