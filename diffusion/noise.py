"""Counter-based Gaussian noise: the same to the bit on every device, in every batch.

Philox4x32-10 (Salmon et al. 2011) keyed by the seed, with the counter (image index, row, purpose,
block). Each 128-bit block gives eight normals: its eight 16-bit halves, low half of each word
first, look up Φ⁻¹((i + ½)/65536). No logarithm or cosine is evaluated on the device, so nothing
depends on its libm. Variance 0.99998, |z| ≤ 4.33.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from numbers import Integral
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

MAX_SEED = 2**53 - 1
VERSION = 2  # of what a seed draws: 1 keyed a chain's noise by the rows of its table
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_NORMALS_A_BLOCK = 8


class Purpose(IntEnum):
    """What the noise is for: streams with the same seed, image and row never collide.

    STEP has t for its row, and CORRECTOR t + T·(number of the Langevin step at its level). So a
    chain that branches off another at x_t draws what went into x_t from no stream again. BRANCH
    is for Langevin steps at the very t where a branch begins, DROPOUT for training, with the
    position of an image for index. TRAVEL has t + T·(how often it goes down from there yet), PROBE
    and DEQUANTISE the number of a draw. 1 and 4 were keyed by table rows.
    """

    X_T = 0
    Q_SAMPLE = 2
    LIKELIHOOD = 3
    TRAINING = 5
    TRAINING_DRAWS = 6
    LIKELIHOOD_DRAWS = 7
    STEP = 8
    CORRECTOR = 9
    BRANCH = 10
    DROPOUT = 11
    TRAVEL = 12
    PROBE = 13
    DEQUANTISE = 14


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10. counter: four, key: two int64 tensors that broadcast, values 0..2³²−1."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        hi0, lo0 = _multiply(c0, _MULTIPLIERS[0])
        hi1, lo1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of x·factor, in two halves so that int64 never overflows."""
    low = x * (factor & 0xFFFF)
    high = x * (factor >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


@lru_cache(maxsize=1)
def normal_table() -> Tensor:
    """float32 [65536]: Φ⁻¹((i + ½)/65536), made exactly antisymmetric."""
    inv_cdf = NormalDist().inv_cdf
    upper = np.array([inv_cdf((i + 0.5) / 65536) for i in range(32768, 65536)])
    return torch.from_numpy(np.concatenate([-upper[::-1], upper]).astype(np.float32))


@lru_cache(maxsize=8)
def _table_on(device: torch.device) -> Tensor:
    return normal_table().to(device)


def normals(
    seeds: Tensor,
    indices: Tensor,
    *,
    rows: Tensor,
    purpose: Purpose | Tensor,
    shape: tuple[int, ...],
) -> Tensor:
    """Standard normals, float32 [N, *shape].

    seeds, indices, rows: int64 [N]: key and counter of each image. purpose: one for all, or
    int64 [N]. Element e of an image (C, H, W order) comes from block e // 8.

    Raises ValueError for a seed outside 0..2⁵³−1 when it is checked: see `check_seed`.
    """
    if not isinstance(purpose, Tensor):
        purpose = torch.full_like(indices, int(purpose))
    draw = _normals_on_cpu if seeds.device.type == "cpu" else _normals_on_device
    return draw((seeds, indices, rows, purpose), math.prod(shape)).view(-1, *shape)


def _normals_on_device(streams: tuple[Tensor, ...], count: int) -> Tensor:
    """float32 [N, count], by operations that every device has. streams: as in `normals`."""
    device = streams[0].device
    words = _words(streams, torch.arange(-(-count // _NORMALS_A_BLOCK), device=device))
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)  # [N, blocks, 4, 2]
    return _table_on(device)[halves.flatten(1)[:, :count]]


def _words(streams: tuple[Tensor, ...], block: Tensor) -> Tensor:
    """Uniform 32-bit integers, int64 [N, blocks, 4]. block: int64 [blocks].

    On a GPU as one kernel: of integers alone, it gives the same bits, and two hundred that start
    one by one take longer than a small network's evaluation.
    """
    draw = _fused() if block.is_cuda else _drawn
    return draw(streams, block)


def _drawn(streams: tuple[Tensor, ...], block: Tensor) -> Tensor:
    seeds, *counters = (stream[:, None].expand(-1, len(block)) for stream in streams)
    counter = (*counters, block.expand(len(streams[0]), -1))
    return torch.stack(philox(counter, (seeds & _MASK, seeds >> 32)), dim=-1)


@lru_cache(maxsize=1)
def _fused() -> Callable[..., Tensor]:
    """`_drawn` compiled, or as it is where nothing can be compiled for the device."""
    fused = torch.compile(_drawn, dynamic=True)
    some = torch.arange(3, device="cuda")
    try:
        fused((some, some, some, some), some)
    except Exception:  # no compiler here, or none for this version of Python
        return _drawn
    return fused


def _normals_on_cpu(streams: tuple[Tensor, ...], count: int) -> Tensor:
    """The same numbers three times as fast: NumPy has an unsigned 64-bit product."""
    seed, c0, c1, c2 = (s.numpy().astype(np.uint64)[:, None] for s in streams)
    mask, half = np.uint64(_MASK), np.uint64(32)
    m0, m1 = (np.uint64(m) for m in _MULTIPLIERS)
    w0, w1 = (np.uint64(w) for w in _WEYL)
    k0, k1 = seed & mask, seed >> half
    c3 = np.arange(-(-count // _NORMALS_A_BLOCK), dtype=np.uint64)[None, :]
    for _ in range(_ROUNDS):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & mask, (p0 >> half) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    words = np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype("<u4")
    halves = words.view("<u2").reshape(len(seed), -1)[:, :count]  # low half of each word first
    return torch.from_numpy(normal_table().numpy()[halves])


def uniform_words(seeds: Tensor, indices: Tensor, *, rows: Tensor, purpose: Purpose) -> Tensor:
    """Four uniform 32-bit integers an image, int64 [N, 4]: block 0 of its counter, as it comes."""
    streams = (seeds, indices, rows, torch.full_like(indices, int(purpose)))
    return _words(streams, torch.zeros_like(indices[:1]))[:, 0]


def check_seed(seed: int) -> int:
    """Return the seed, or raise ValueError if it is not in 0..2⁵³−1."""
    is_whole = isinstance(seed, Integral)
    if not is_whole or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed = {seed!r:.80}: must be an integer from 0 to 2**53 - 1")
    return seed


def image_normals(
    seed: int, indices: Tensor, *, row: int, purpose: Purpose, shape: tuple[int, ...]
) -> Tensor:
    """`normals` for images that share one seed and one row: float32 [N, *shape]."""
    seeds = torch.full_like(indices, check_seed(seed))
    rows = torch.full_like(indices, row)
    return normals(seeds, indices, rows=rows, purpose=purpose, shape=shape)
