"""One network trained by several processes: what each sees, and that the curve is that of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qkt_clinical.config.params import TrainParams
from qkt_clinical.errors import DeviceError
from qkt_clinical.models.bundle import load_bundle
from qkt_clinical.models.generator import generator
from qkt_clinical.training import processes as module
from qkt_clinical.training.loop import batches_per_epoch, shuffled
from qkt_clinical.training.processes import Processes, begin_processes, processes
from tests.federation.test_federation import PARAMS as WORKSPACE
from tests.federation.test_federation import write_hospital
from tests.places import ROOT


def test_parts_make_up_a_batch() -> None:
    batch = torch.arange(11)
    parts = [Processes(rank, 3).part(batch) for rank in range(3)]
    assert [len(p) for p in parts] == [4, 4, 3]
    assert sorted(torch.cat(parts).tolist()) == list(range(11))
    assert torch.equal(Processes().part(batch), batch)


@pytest.mark.parametrize("count", range(1, 60))
def test_every_process_has_two_images_at_least(count: int) -> None:
    parts = list(shuffled(count, 16, generator(0, "a"), smallest=8))
    assert len(parts) == batches_per_epoch(count, 16, smallest=8)
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert len(parts) == 1 or min(map(len, parts)) >= 8


def test_views_differ_between_processes_and_order_does_not() -> None:
    draws = [Processes(rank, 2).draws(generator(1, "epoch")) for rank in range(2)]
    assert torch.rand(1, generator=draws[0]) != torch.rand(1, generator=draws[1])
    alone = generator(1, "epoch")
    assert Processes().draws(alone) is alone


def test_alone_nothing_is_begun() -> None:
    with begin_processes(1, ("never.started",), "auto"):
        assert processes() == Processes()
    assert Processes().as_first(0.5, torch.device("cpu")) == 0.5
    assert Processes().mean(torch.tensor(2.0)) == 2.0


def test_no_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(DeviceError, match=r"train\.processes is 3, and there are 2 GPUs"),
        begin_processes(3, (), "auto"),
    ):
        pass
    started: list[list[str]] = []
    monkeypatch.delenv(module.LAUNCHED, raising=False)

    def execv(path: str, words: list[str]) -> None:
        started.append(words)
        raise SystemExit

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit), begin_processes(3, ("a.module", "aster"), "cpu"):
        pass
    assert started[0][-5:] == ["--nproc-per-node", "3", "-m", "a.module", "aster"]


def test_differential_privacy_counts_one_process() -> None:
    private = {"privacy": {"epsilon": 8.0, "delta": 1e-5, "clip": 1.0}, "network": "resnet-small-gn"}
    assert TrainParams.model_validate(private).processes == 1
    with pytest.raises(ValueError, match="several processes"):
        TrainParams.model_validate({**private, "processes": 2})


PROGRAM = """
import json, sys
import numpy as np, torch
from qkt_clinical.config.params import TrainParams
from qkt_clinical.models.networks import build
from qkt_clinical.records.card import NetworkSpec
from qkt_clinical.task import MULTICLASS
from qkt_clinical.training.classifier import train_network
from qkt_clinical.training.loop import Checkpoint
from qkt_clinical.training.processes import begin_processes, processes
from pathlib import Path

torch.set_num_threads(1)
count, out = int(sys.argv[1]), sys.argv[2]
draw = np.random.default_rng(0)
labels = np.arange(160) % 4
images = (draw.integers(0, 80, (160, 3, 16, 16)) + 40 * labels[:, None, None, None]).astype(np.uint8)
network = build(
    NetworkSpec(name="resnet-small-gn", spatial_dims=2, in_channels=3, classes=4), seed=0
)
params = TrainParams(epochs=6, batch_size=32 // count, augment=0.0, appearance=0.0, network="resnet-small-gn")
with begin_processes(count, ("unused",), "cpu"):
    history = train_network(
        network, (images[:128], labels[:128]), (images[128:], labels[128:]), params, task=MULTICLASS, seed=3,
        site="a", device=torch.device("cpu"), checkpoint=Checkpoint(Path(out + ".work"), "key"),
    )
    here = processes()
    total = float(sum(p.double().abs().sum() for p in network.parameters()))
    with open(f"{out}.{here.rank}", "w") as file:
        json.dump({"curves": history.curves, "best": history.best_epoch, "weights": total}, file)
"""


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one_with_batches_twice_as_large(tmp_path: Path) -> None:
    """A network without batch norm and images as they are: only the order of the sums differs."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    here = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    here.pop(module.LAUNCHED, None)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for count, words in ((1, []), (2, launch)):
        command = [sys.executable, *words, str(program), str(count), str(tmp_path / f"of{count}")]
        subprocess.run(command, env=here, check=True, capture_output=True, timeout=240)
    one, first, second = (json.loads((tmp_path / name).read_text()) for name in ("of1.0", "of2.0", "of2.1"))
    assert first == second, "all have the same network and decide alike"
    losses = [np.array([row["loss"] for row in run["curves"]]) for run in (one, first)]
    assert losses[0][-1] < 0.7 * losses[0][0]
    assert np.abs(losses[0] - losses[1]).max() < 0.02
    assert first["weights"] == pytest.approx(one["weights"], rel=1e-3)
    assert not list((tmp_path / "of2.work").glob("*")), "one checkpoint, removed at the end"


@pytest.mark.slow
def test_the_command_starts_its_processes_and_one_of_them_writes(tmp_path: Path) -> None:
    section = {"epochs": 2, "batch_size": 8, "processes": 2}
    write_hospital(tmp_path, "birch", params={**WORKSPACE, "device": "cpu", "train": section})
    here = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    here.pop(module.LAUNCHED, None)
    command = [sys.executable, "-m", "qkt_clinical.cli", "train", "birch", "-C", str(tmp_path), "--json"]
    done = subprocess.run(command, env=here, capture_output=True, text=True, check=True, timeout=240)
    said = json.loads(done.stdout)
    assert said["birch"]["epochs"] == 2, "one of them answers"
    written = json.loads((tmp_path / "models" / "teachers" / "birch" / "metrics.json").read_text())
    assert written["balanced_accuracy"] == said["birch"]["balanced_accuracy"]
    assert load_bundle(tmp_path / "models" / "own" / "birch").card.training["epochs"] == 2
