"""How much memory a model takes, estimated before anything of it is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusion.files import NoRoomError
from diffusion.unet_config import UNetConfig

_COPIES = 3  # of the weights: as read, as loaded, and laid out for the device
_MAPS_AT_WORK = 8  # a block's input, its concatenation with a skip, and what its layers put out
_FLOAT = 4  # bytes
_GIB = 2**30


def feature_bytes(config: UNetConfig) -> int:
    """Bytes of the feature maps, float32, while one image passes through the network: those that
    wait for the way up, and those of the largest block."""
    kept, largest = 0, 0
    for i, width in enumerate(config.channels):
        values = width * (config.image_size >> i) ** 2
        kept += values * (config.res_blocks + 1)
        largest = max(largest, values)
    return _FLOAT * (kept + _MAPS_AT_WORK * largest)


def check_memory(config: UNetConfig, weights: Sequence[Path], memory: int | None) -> None:
    """Raise NoRoomError if the model needs more than `memory` bytes (None: no limit)."""
    if memory is None or not all(path.is_file() for path in weights):
        return
    parts = (_COPIES * sum(path.stat().st_size for path in weights), feature_bytes(config))
    if sum(parts) > memory:
        stored, features, free = (f"{size / _GIB:,.1f} GiB" for size in (*parts, memory))
        raise NoRoomError(
            f"too large for this machine: about {stored} for the weights and {features} for the "
            f"feature maps of one image, where {free} are free"
        )
