"""How much memory is free, where a model would be loaded."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")  # of a container, in which this is the whole machine


def free_bytes(device: str | torch.device) -> int | None:
    """Bytes free on the device; None where nobody says."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    known = [size for size in (_free_here(), _free_in_group()) if size is not None]
    return min(known, default=None)


def _free_here() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        (available,) = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        return 1024 * int(available)
    except (OSError, ValueError):
        return None


def _free_in_group() -> int | None:
    """What a container's limit leaves (cgroup v2); file pages that can be dropped count as free."""
    try:
        most = int((_GROUP / "memory.max").read_text())
        used = int((_GROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        return most - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):  # none, "max", or not Linux
        return None
