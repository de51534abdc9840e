"""The device that networks run on."""

from __future__ import annotations

import torch


class DeviceError(ValueError):
    """A device that this machine does not have."""


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name; None, or `auto`: the first GPU, else the CPU. Raises DeviceError."""
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DeviceError(f"device = {name!r}: cannot be used here: {reason}") from error
    return device
