"""FedAvg, FedProx and SCAFFOLD on NVIDIA FLARE: federated baselines, run in FLARE's simulator.

One process per hospital and one for the server, all on this machine. FLARE's own controllers send, wait
and average; what a method adds is its file among the baselines.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import psutil
import torch

from qkt_clinical.baselines.federated import Participant, global_network
from qkt_clinical.baselines.params import FederatedParams
from qkt_clinical.common.extras import require_extra
from qkt_clinical.common.files import write_json
from qkt_clinical.config.base import Names, Strict
from qkt_clinical.errors import QktError
from qkt_clinical.federation.run import PATIENT, kill
from qkt_clinical.federation.settings import FILE
from qkt_clinical.models.encoders import Encoder
from qkt_clinical.models.networks import Classifier
from qkt_clinical.records.card import NetworkSpec

Algorithm = Literal["fedavg", "fedprox", "scaffold"]
LOG, FLARE, SITES, SERVER = "flare.log", "flare", "sites", "server"
SIMULATOR = "nvflare.private.fed.app.simulator.simulator"
"""Module that is FLARE's simulator, as a job's own ``simulator_run`` starts it."""
CLASSES = ("qkt_clinical.federation.peer_job.", "qkt_clinical.baselines.")
POLL_S = 0.5
"""Interval in seconds at which sites ask for work and the server looks for replies; FLARE's default is 2."""
PATIENCE_S = 120.0
"""Seconds for which a site's process may be missing, at the start and at the end."""
STATISTICS = Path(FLARE) / SERVER / "pool_stats" / "simulator_cell_stats.json"
"""What FLARE counts: sizes, in MB of 2**20 bytes, of all messages of the server's end."""
JOB = "server.simulate_job"


class TrainingPlan(Strict):
    """Plan of a federated training."""

    algorithm: Algorithm
    sites: Names
    spec: NetworkSpec
    params: FederatedParams
    rounds: int
    proximal: float
    seed: int
    device: str
    threads: int
    normalisation: str


@dataclass(frozen=True)
class Federated:
    """Result of a federated training."""

    network: Classifier
    """The global network after the last round, on the CPU, in evaluation mode."""
    rounds: int
    """That FLARE counted, by the replies of all sites."""
    bytes_moved: int
    """Between the server's and the sites' ends, both ways, as FLARE counted: networks, control variates, and
    its own messages about them."""


def make_job(plan: TrainingPlan) -> Any:
    """The FLARE job of a plan."""
    from nvflare.job_config.api import FedJob

    from qkt_clinical.federation.peer_job import METHODS, NetworkFile, Trainer

    spec, count = plan.spec.model_dump(mode="json"), len(plan.sites)
    job = FedJob(name=plan.algorithm, min_clients=count, fail_fast=True)
    job.set_app_packages(["qkt_clinical"])  # installed at every site: no code travels
    common: dict[str, Any] = {
        "num_clients": count,
        "num_rounds": plan.rounds,
        "persistor_id": job.to_server(NetworkFile(), id="persistor"),
        "ignore_result_error": False,
        "task_check_period": POLL_S,
    }
    job.to_server({"server": {"task_request_interval": POLL_S}})
    job.to_server(METHODS[plan.algorithm]().controller(plan.proximal, **common))
    trainer = Trainer(
        plan.algorithm,
        spec,
        plan.params.model_dump(mode="json"),
        plan.seed,
        plan.device,
        plan.threads,
        plan.normalisation,
    )
    job.to_clients(trainer, tasks=["train"])
    return job


def run_federation(
    participants: Sequence[Participant],
    spec: NetworkSpec,
    params: FederatedParams,
    *,
    algorithm: Algorithm,
    rounds: int,
    proximal: float,
    seed: int,
    device: torch.device,
    work: Path,
    normalisation: str = "unit",
    pretrained: Encoder | None = None,
) -> Federated:
    """Run FedAvg (McMahan et al., 2017), FedProx (Li et al., 2020) or SCAFFOLD (Karimireddy et al., 2020).

    A round is one local epoch at every participant and the mean of their networks, running statistics
    included, weighed by their numbers of images; SCAFFOLD's control variates are weighed alike.

    Args:
        participants: in any order; names are unique. Each trains in a process of its own, with as many
            threads as torch has here.
        proximal: ``mu`` of FedProx.
        pretrained: with whose weights the global network begins, where its extractor is an encoder.
        work: folder for the run; emptied before and removed after it, but kept where FLARE fails.

    Raises:
        QktError: FLARE is not installed, code ``flare-missing``, or ended with an error, ``flare``.
    """
    from safetensors.numpy import save_file

    require_extra("nvflare")
    from qkt_clinical.federation.peer_job import FIRST_NETWORK, IMAGES, arrays_of

    participants = sorted(participants, key=lambda p: p.site)
    plan = TrainingPlan(
        algorithm=algorithm,
        sites=tuple(p.site for p in participants),
        spec=spec,
        params=params,
        rounds=rounds,
        proximal=proximal,
        seed=seed,
        device=device.type,
        threads=torch.get_num_threads(),
        normalisation=normalisation,
    )
    work = work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    keep = False
    try:
        (work / SITES / SERVER).mkdir(parents=True)
        for one in participants:
            (work / SITES / one.site).mkdir()
            images, labels = one.train
            save_file({"images": images, "labels": labels}, work / SITES / one.site / IMAGES)
        first = global_network(spec, seed, pretrained)
        save_file(arrays_of(first), work / SITES / SERVER / FIRST_NETWORK)
        _run(work, plan)
        return _result(work, plan, first)
    except QktError:
        keep = True  # its logs say what FLARE could not do
        raise
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)


def _run(work: Path, plan: TrainingPlan) -> None:
    """Run the simulator in a process of its own: it changes folder, arguments and logging of its process.

    The job is made here, since to make it takes the same packages as to run it. The simulator finds the work
    folder by a link, since it splits its own command lines at blanks.
    """
    _lay_out_flare(work)
    sites = len(plan.sites)
    with TemporaryDirectory(prefix="qkt-") as short, (work / LOG).open("wb") as log:
        link = Path(short) / "work"
        link.symlink_to(work, target_is_directory=True)
        with redirect_stdout(io.StringIO()):
            make_job(plan).export_job(short)
        command = [sys.executable, "-m", SIMULATOR, str(Path(short) / plan.algorithm)]
        command += ["-w", str(link / FLARE), "-c", ",".join(plan.sites), "-n", str(sites), "-t", str(sites)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=short,  # not a workspace, where our package is a link that FLARE does not take
            env={**os.environ, **PATIENT, "TMPDIR": short},
            start_new_session=True,  # Ctrl-C is ours alone, and ends it by the kill below
        )
        try:
            code = _wait(process, sites)
            if code is None:
                raise _failed(work, "a hospital's process was lost, perhaps for want of memory")
        finally:
            kill(process)  # if it still runs: a site is lost, or somebody has stopped us
    if code:
        raise _failed(work, f"NVIDIA FLARE ended with {code}")


def _children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def _wait(process: subprocess.Popen[bytes], sites: int) -> int | None:
    """The exit status; None where a site's process died: the simulator would wait for it for ever."""
    complete = time.monotonic()
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1)
        if sum(map(_is_site, _children(process))) == sites:
            complete = time.monotonic()
        if time.monotonic() - complete > PATIENCE_S:
            return None


def _is_site(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return any("simulator_worker" in word for word in process.cmdline())
    return False


def _failed(work: Path, what: str) -> QktError:
    return QktError(what, remedy=f"See {LOG} in the folder.", file=work, code="flare")


def _result(work: Path, plan: TrainingPlan, network: Classifier) -> Federated:
    from safetensors.numpy import load_file

    from qkt_clinical.federation.peer_job import NETWORK, set_arrays

    rounds, bytes_moved = _counted(json.loads((work / STATISTICS).read_bytes()), len(plan.sites))
    if rounds != plan.rounds:
        raise _failed(work, f"NVIDIA FLARE ended after {rounds:g} of {plan.rounds} rounds")
    set_arrays(network, load_file(work / SITES / SERVER / NETWORK))
    return Federated(network.eval(), plan.rounds, bytes_moved)


def _counted(statistics: dict[str, Any], sites: int) -> tuple[float, int]:
    """Rounds and bytes from FLARE's statistics of its messages."""

    def bins(pool: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for category, found in statistics[pool]["pool"]["cat_data"].items():
            yield from ((category, one) for one in found if one)

    both = [b for way in ("received", "sent") for b in bins(f"{way}_msg_sizes@{JOB}")]
    replies = sum(b["count"] for name, b in bins("received_stream_sizes") if name.endswith(":submit_update"))
    return replies / sites, round(sum(b["total"] for _, b in both) * 2**20)


def _lay_out_flare(work: Path) -> None:
    """Write every site's ``local/`` for FLARE: the folder of its data, and our classes in the allow-list."""
    from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

    local = work / FLARE / "local"
    write_json(local / FILE, {"workspace": str(work / SITES / "{site}")})
    allowed = [*DEFAULT_CLASS_ALLOW_LIST, *CLASSES]
    write_json(local / "resources.json", {"format_version": 2, "class_allow_list": allowed})
