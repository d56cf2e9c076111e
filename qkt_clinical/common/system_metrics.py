"""System metrics: the processor and memory that a stage uses, for MLflow's pages.

They lie outside the stage's outputs, since they differ from run to run. They are switched on as in MLflow
itself, by
``MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=true``. MLflow's own monitor needs an open run; here runs are mirrored
when the stages are done.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from qkt_clinical.common.files import read_plain, write_json

SWITCH, EVERY = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
EVERY_S, MAX_SAMPLES = 1.0, 10_000
"""Seconds between two samples unless said otherwise; samples kept at most."""

MetricsSample = dict[str, Annotated[float, Field(allow_inf_nan=False)]]
SAMPLES = TypeAdapter(list[MetricsSample])
MAX_BYTES = 20_000_000


def asked() -> bool:
    """Whether the environment asks for system metrics."""
    return os.environ.get(SWITCH, "").lower() in ("1", "true")


def _every() -> float:
    try:
        return max(float(os.environ.get(EVERY, "")), 0.05)
    except ValueError:
        return EVERY_S


def _sample() -> MetricsSample:
    import psutil

    memory = psutil.virtual_memory()
    taken = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": round(memory.used / 1e6, 1),
        "system_memory_usage_percentage": memory.percent,
        "process_memory_usage_megabytes": round(psutil.Process().memory_info().rss / 1e6, 1),
    }
    import torch

    for i in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        free, total = torch.cuda.mem_get_info(i)
        taken[f"gpu_{i}_memory_usage_megabytes"] = round((total - free) / 1e6, 1)
        taken[f"gpu_{i}_memory_usage_percentage"] = round(100 * (total - free) / total, 1)
    return taken


@contextmanager
def sample_system_metrics() -> Iterator[list[MetricsSample]]:
    """Sample processor, memory and GPU memory at intervals while the block runs.

    The list is complete after the block, and stays empty where system metrics are switched off.
    """
    samples: list[MetricsSample] = []
    if not asked():
        yield samples
        return
    import psutil

    psutil.cpu_percent()  # the first call has nothing to compare with
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_every()) and len(samples) < MAX_SAMPLES:
            samples.append(_sample())

    watcher = threading.Thread(target=watch, name="system-metrics", daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        done.set()
        watcher.join()
        samples.append(_sample())


def _file(scratch: Path, bundle: str) -> Path:
    return scratch / "system-metrics" / f"{bundle}.json"


def write_system_metrics(scratch: Path, bundle: str, samples: list[MetricsSample]) -> None:
    """Write the samples taken while a bundle was made, if there are any.

    Args:
        bundle: digest of its card, so that the samples are never attributed to another model.
    """
    if samples:
        with suppress(OSError):  # what was made is whole without them
            write_json(_file(scratch, bundle), samples)


def read_system_metrics(scratch: Path, bundle: str) -> list[MetricsSample]:
    """The samples taken while a bundle was made, in order of time; empty where there are none."""
    from pydantic import FiniteFloat, TypeAdapter

    try:
        samples = TypeAdapter(list[dict[str, FiniteFloat]])
        return samples.validate_json(read_plain(_file(scratch, bundle), MAX_BYTES))
    except (OSError, ValueError):  # scratch may be removed or torn at any time
        return []
