"""The state of one chain as bytes: what a checkpoint stores and a resume reads."""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

_HEADER = struct.Struct("<4sI?")  # magic, next row, whether x̂_0 of the row before follows
_MAGIC = b"xt2\0"  # xt1 states hold noise of `diffusion.noise` version 1


class StateError(ValueError):
    """Bytes that are no state of a chain of this shape."""


def pack(row: int, x_t: Tensor, x_start_prev: Tensor | None) -> bytes:
    """row: the next row to evaluate; x_t, x_start_prev: float32 [C, H, W], on the host."""
    parts = [_HEADER.pack(_MAGIC, row, x_start_prev is not None), _floats(x_t)]
    if x_start_prev is not None:
        parts.append(_floats(x_start_prev))
    return b"".join(parts)


def unpack(raw: bytes, shape: tuple[int, int, int]) -> tuple[int, Tensor, Tensor | None]:
    """Inverse of `pack`. Raises StateError."""
    plane = 4 * int(np.prod(shape))
    planes, rest = divmod(len(raw) - _HEADER.size, plane)
    magic, row, has_memory = _HEADER.unpack_from(raw) if planes in (1, 2) else (b"", 0, False)
    if magic != _MAGIC or rest or planes != 1 + has_memory:
        raise StateError(f"{len(raw)} bytes: not the state of a chain of shape {shape}")
    values = np.frombuffer(raw, dtype="<f4", offset=_HEADER.size)
    both = torch.from_numpy(values.astype(np.float32).reshape(planes, *shape))
    return int(row), both[0], both[1] if has_memory else None


def _floats(x: Tensor) -> bytes:
    return np.ascontiguousarray(x.numpy(), dtype="<f4").tobytes()
