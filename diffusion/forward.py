"""The forward process q: fixed, Gaussian, Markov (Ho et al. 2020, equations 2, 4, 6, 7)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from diffusion.noise import Purpose, normals
from diffusion.schedule import Float64, Schedule

_on_devices: dict[tuple[int, torch.device], Tensor] = {}


def gather(table: Float64, t: Tensor, like: Tensor) -> Tensor:
    """table[t] in the dtype and on the device of `like` [N, ...], shaped [N, 1, 1, ...].

    A table that is read-only, as a schedule's are, is sent to the device once, and kept there for
    as long as it lives.
    """
    values = _on_device(table, like.device)[t]
    return values.to(like.dtype).view(-1, *([1] * (like.ndim - 1)))


def _on_device(table: Float64, device: torch.device) -> Tensor:
    key = (id(table), device)
    found = _on_devices.get(key)
    if found is None:
        # Copied, because torch warns of an array that is read-only.
        found = torch.as_tensor(np.array(table), device=device)
        if not table.flags.writeable:
            _on_devices[key] = found
            weakref.finalize(table, _on_devices.pop, key, None)
    return found


def alpha_bars(schedule: Schedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """ᾱ_t and 1 − ᾱ_t in the dtype of `like`, [N]. t: [N], indices, or float64 for any times."""
    tables = (schedule.alphas_cumprod, schedule.one_minus_alphas_cumprod)
    below = t if not t.is_floating_point() else t.long()
    found = [_on_device(table, t.device)[below] for table in tables]
    if t.is_floating_point():
        levels = between(schedule.half_log_snr, t)
        sides = (torch.sigmoid(2 * levels), torch.sigmoid(-2 * levels))
        found = [torch.where(below == t, a, b) for a, b in zip(found, sides, strict=True)]
    alpha_bar, rest = (values.to(like.dtype) for values in found)
    return alpha_bar, rest


def between(table: Float64, t: Tensor) -> Tensor:
    """The table at times t, float64 [N], linear from index to index; table: [..., T]."""
    values, below = _on_device(table, t.device), t.long()
    above = (below + 1).clamp(max=table.shape[-1] - 1)
    exact = values[..., below]
    return torch.where(below == t, exact, torch.lerp(exact, values[..., above], t - below))


def q_sample(schedule: Schedule, x_start: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε ~ q(x_t | x_0), equation 4.

    x_start, eps: [N, ...]; t: [N], index 0..T−1.
    """
    signal = gather(schedule.sqrt_alphas_cumprod, t, x_start)
    noise = gather(schedule.sqrt_one_minus_alphas_cumprod, t, x_start)
    return signal * x_start + noise * eps


def q_step(schedule: Schedule, x_prev: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """x_t = √(1−β_t) x_{t−1} + √β_t z ~ q(x_t | x_{t−1}), equation 2; t: [N], index 0..T−1."""
    keep = gather(schedule.sqrt_alphas, t, x_prev)
    return keep * x_prev + gather(schedule.sqrt_betas, t, x_prev) * z


def q_trajectory(
    schedule: Schedule, x_start: Tensor, *, seeds: Tensor, indices: Tensor, stop: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """The chain x_1, x_2, … step by step: yields (index t, x_t) for t = 0..stop−1 (default T).

    x_start: [N, ...]; seeds, indices: [N] int64, the key of each image's noise (row = t).
    """
    x = x_start
    for t in range(schedule.T if stop is None else stop):
        steps = torch.full((x.shape[0],), t, dtype=torch.long, device=x.device)
        z = normals(
            seeds, indices, rows=steps, purpose=Purpose.Q_SAMPLE, shape=tuple(x.shape[1:])
        ).to(x.dtype)
        x = q_step(schedule, x, steps, z)
        yield t, x


def q_posterior(
    schedule: Schedule, x_start: Tensor, x_t: Tensor, *, t: int, s: int
) -> tuple[Tensor, float]:
    """Mean [N, ...] and variance of q(x_s | x_t, x_0), equations 6 and 7, for any jump.

    t, s: indices with −1 ≤ s < t < T; s = t − 1 is the paper's single step, s = −1 the image.
    """
    jump = schedule.jump(t, s)
    return jump.coef_x_start * x_start + jump.coef_x_t * x_t, jump.variance


def q_samples_at(
    schedule: Schedule, x_start: Tensor, ts: Iterable[int], eps: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Yield (t, x_t) in closed form at many indices t, all with the same ε."""
    for t in ts:
        steps = torch.full((x_start.shape[0],), t, dtype=torch.long, device=x_start.device)
        yield t, q_sample(schedule, x_start, steps, eps)
