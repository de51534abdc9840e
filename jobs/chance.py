"""Unpredictable numbers, taken from the system in blocks: a system call for each costs 25 µs."""

from __future__ import annotations

import os
import threading

_BLOCK = 4096  # bytes
_lock = threading.Lock()
_left = b""


def draw(size: int) -> bytes:
    """Random bytes as `os.urandom` gives them, each given out once."""
    global _left
    with _lock:
        if len(_left) < size:
            _left = os.urandom(max(_BLOCK, size))
        taken, _left = _left[:size], _left[size:]
        return taken


def below_power(bits: int) -> int:
    """A random number of so many bits, 0 … 2^bits − 1."""
    size = -(-bits // 8)
    return int.from_bytes(draw(size)) >> (8 * size - bits)


def _forget() -> None:
    """In a child process: it must not draw what its parent draws."""
    global _left, _lock
    _left, _lock = b"", threading.Lock()


os.register_at_fork(after_in_child=_forget)
