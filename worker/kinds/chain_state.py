"""The state of one chain as bytes: what a checkpoint stores and a resume reads."""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

_HEADER = struct.Struct("<4sIB")  # magic, next row, how many x̂_0 of earlier rows follow
_MAGIC = b"xt2\0"  # xt1 states hold noise of `diffusion.noise` version 1


class StateError(ValueError):
    """Bytes that are no state of a chain of this shape."""


def pack(row: int, x_t: Tensor, *earlier: Tensor) -> bytes:
    """row: the next row to evaluate; x_t, and x̂_0 of up to two rows before: float32 [C, H, W]."""
    head = _HEADER.pack(_MAGIC, row, len(earlier))
    return b"".join([head, *map(_floats, (x_t, *earlier))])


def unpack(
    raw: bytes, shape: tuple[int, int, int]
) -> tuple[int, tuple[Tensor, Tensor | None, Tensor | None]]:
    """Inverse of `pack`, with None for what is not there. Raises StateError."""
    plane = 4 * int(np.prod(shape))
    planes, rest = divmod(len(raw) - _HEADER.size, plane)
    magic, row, earlier = _HEADER.unpack_from(raw) if planes in (1, 2, 3) else (b"", 0, 0)
    if magic != _MAGIC or rest or planes != 1 + earlier:
        raise StateError(f"{len(raw)} bytes: not the state of a chain of shape {shape}")
    values = np.frombuffer(raw, dtype="<f4", offset=_HEADER.size)
    x_t, *found = torch.from_numpy(values.astype(np.float32).reshape(planes, *shape))
    prev, older = [*found, None, None][:2]
    return int(row), (x_t, prev, older)


def _floats(x: Tensor) -> bytes:
    return np.ascontiguousarray(x.numpy(), dtype="<f4").tobytes()
