"""What made a job's outputs, for its record and its pictures."""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import numpy as np
import torch

from diffusion import noise
from jobs.kinds.common import JobSpec
from jobs.version import VERSION
from worker.kinds.table import FLIGHTS
from worker.models import Served
from worker.network.network import Network


def provenance(served: Served, spec: JobSpec, network: Network | None) -> dict[str, Any]:
    """Beside the request: model, schedule, software, device, and what the network runs as.

    network: None for a job that asks none. Its code is that of the start: where a job is not
    deterministic, code that has been compiled meanwhile is swapped in.
    """
    model = served.model
    config = model.config
    schedule = config.schedule.to_dict()
    schedule.pop("betas", None)  # a long list; the digest stands for it
    made: dict[str, Any] = {
        "model": served.name,
        "model_digest": model.digest,
        "schedule": schedule,
        "prediction": config.prediction,
        "device": _device_name(model.device),
        "versions": versions(),
        "noise": noise.VERSION,
    }
    if network is not None:
        made |= network.provenance()
    return made | FLIGHTS[spec.kind].provenance(served, spec)


@cache
def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"


@cache
def versions() -> dict[str, str]:
    """Of this software, and of what its numbers come from."""
    return {
        "ddpm-serve": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
