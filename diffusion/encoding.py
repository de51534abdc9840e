"""From an image to its x_T and back: the probability flow, up and down, as tables.

Up is the same step as DDIM's with η = 0, in ascending order (Song et al. 2021): with ε̂ found at t,

    x_s = √(ᾱ_s/ᾱ_t) x_t + (√(1−ᾱ_s) − √(ᾱ_s/ᾱ_t)√(1−ᾱ_t)) ε̂,   s > t.

The step down from s asks for ε̂ at s instead. Iterations mend that: the step is made again from x_t
with the ε̂ found at x_s; where that settles, the step down from x_s leads to x_t exactly. For
Gaussian data it contracts by 1 − σ̃_t/σ̃_s or better, σ̃² = (1−ᾱ)/ᾱ.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.checks import check_images, check_range, check_whole
from diffusion.model import Model, check_model
from diffusion.multistep import dpmpp_2m
from diffusion.noise import Purpose
from diffusion.samplers import FewStepsWarning, ddim, few_steps
from diffusion.sampling import ClassLabel, Step, chain, check_guidance, class_labels
from diffusion.schedule import Schedule
from diffusion.spacings import spaced_timesteps
from diffusion.speed import fast_dtype, prepare
from diffusion.table import Memory, SamplerError, SamplerTable, empty_rows, put

STEPS = 100
ITERATIONS = 1
MOST_ITERATIONS = 100
ORDERS = (1, 2)
FURTHEST = 100.0  # no x_T reaches it: standard normals stay below 6


def encoding_table(
    schedule: Schedule, timesteps: Sequence[int], *, order: int = 1, iterations: int = 0
) -> SamplerTable:
    """Rows from the image up to the last of ascending timesteps; no noise, no clipping.

    order: 2 goes through x̂_0 of the row before, as DPM-Solver++(2M). iterations: rows that mend
    each step of order 1, so (1 + iterations) rows a timestep. Raises SamplerError.
    """
    ts = [int(t) for t in timesteps]
    if not ts or ts[0] < 0 or ts[-1] >= schedule.T or any(a >= b for a, b in pairwise(ts)):
        raise SamplerError(
            f"timesteps = {ts}: must be strictly ascending within 0..{schedule.T - 1}"
        )
    if order not in ORDERS:
        raise SamplerError(f"order = {order}: must be 1 or 2")
    check_whole("iterations", iterations, least=0, most=MOST_ITERATIONS, error=SamplerError)
    if order == 2:
        if iterations:
            raise SamplerError(f"iterations = {iterations}: mend steps of order 1, not 2")
        return _second_order(schedule, ts)
    passes = 1 + iterations
    rows = empty_rows(len(ts) * passes, clip=False)
    # The step from the image finds ε̂ at the first timestep: there is no network at 0.
    at = np.repeat(np.array(ts, np.int64), passes)
    at[passes::passes] = ts[:-1]
    memory = np.full(len(at), Memory.KEEP, np.int64)
    memory[::passes] = Memory.X_T
    for i, (t, s) in enumerate(pairwise([-1, *ts])):
        scale, along = _flow_step(schedule, t, s)
        put(rows, i * passes, b=scale, e=along)
        for k in range(1, passes):
            put(rows, i * passes + k, d=scale, e=along)
    return _table(at, rows, memory)


def _flow_step(schedule: Schedule, t: int, s: int) -> tuple[float, float]:
    """(√(ᾱ_s/ᾱ_t), the factor of ε̂) of the step t → s, either way; −1 is the image."""
    scale = math.sqrt(schedule.alpha_bar(s) / schedule.alpha_bar(t))
    noise = [math.sqrt(schedule.one_minus_alpha_bar(k)) for k in (s, t)]
    return scale, noise[0] - scale * noise[1]


def _second_order(schedule: Schedule, ts: list[int]) -> SamplerTable:
    """As `multistep.dpmpp_2m`, with h < 0; the first two rows of first order."""
    rows = empty_rows(len(ts), clip=False)
    scale, along = _flow_step(schedule, -1, ts[0])
    put(rows, 0, b=scale, e=along)
    h_prev = math.inf
    for i, (t, s) in enumerate(pairwise(ts), start=1):
        h = 0.5 * math.log(schedule.snr[s] / schedule.snr[t]) if schedule.snr[s] else -math.inf
        gain = -math.sqrt(schedule.alpha_bar(s)) * math.expm1(-h) if math.isfinite(h) else 0.0
        half = h / (2 * h_prev) if math.isfinite(h) else 0.0
        b = math.sqrt(schedule.one_minus_alpha_bar(s) / schedule.one_minus_alpha_bar(t))
        if math.isfinite(h):
            put(rows, i, a=gain * (1 + half), b=b, d=-gain * half)
        else:  # no signal is left: x_s is ε̂ alone
            put(rows, i, e=1.0)
        h_prev = h
    return _table(np.array([ts[0], *ts[:-1]], np.int64), rows, np.zeros(len(ts), np.int64))


def _table(t: np.ndarray[Any, np.dtype[np.int64]], rows: Any, memory: Any) -> SamplerTable:
    return SamplerTable(t, rows, np.full(len(t), Purpose.STEP, np.int64), memory=memory)


def decoding_table(schedule: Schedule, timesteps: Sequence[int], *, order: int = 1) -> SamplerTable:
    """Rows from the last of ascending timesteps down to the image: what encoding inverts."""
    if order not in ORDERS:
        raise SamplerError(f"order = {order}: must be 1 or 2")
    return (ddim if order == 1 else dpmpp_2m)(schedule, [*timesteps][::-1], clip=False)


def encode(
    model: Model,
    x_start: Tensor,
    *,
    steps: int | None = None,
    spacing: str = "uniform",
    order: int = 1,
    iterations: int | None = None,
    class_label: ClassLabel = None,
    guidance: float = 1.0,
    dtype: torch.dtype | None = None,
    batch_size: int = 64,
    on_step: Callable[[int, int, Step], None] | None = None,
) -> Tensor:
    """x_T of images [N, C, H, W] in [−1, 1], float32: `decode` leads back to them.

    steps: timesteps, by default 100, or all where there are fewer. spacing: one of whole timesteps:
    uniform, quadratic, leading or trailing. order: 1 or 2. iterations: that mend each step of
    order 1, by default 1. class_label, guidance, dtype, batch_size, on_step: as in `sample`. Raises
    ImagesError, SamplerError or ValueError naming the bad argument. Warns with FewStepsWarning
    where there are fewer timesteps than ddim needs.
    """
    check_model(model)
    check_images("x_start", x_start, model.shape)
    ts = _timesteps(model, steps, spacing)
    if few := few_steps("ddim", len(ts), model.schedule.T, model.schedule.T):
        warnings.warn(few, FewStepsWarning, stacklevel=2)
    mended = (ITERATIONS if order == 1 else 0) if iterations is None else iterations
    table = encoding_table(model.schedule, ts, order=order, iterations=mended)
    return _walk(
        model,
        table,
        x_start,
        class_label=class_label,
        guidance=guidance,
        dtype=dtype,
        batch_size=batch_size,
        on_step=on_step,
    )


def decode(
    model: Model,
    x_T: Tensor,
    *,
    steps: int | None = None,
    spacing: str = "uniform",
    order: int = 1,
    class_label: ClassLabel = None,
    guidance: float = 1.0,
    dtype: torch.dtype | None = None,
    batch_size: int = 64,
    on_step: Callable[[int, int, Step], None] | None = None,
) -> Tensor:
    """Images [N, C, H, W] of their x_T: the inverse of `encode` with the same steps and spacing.

    Raises as `encode`.
    """
    check_model(model)
    check_images("x_T", x_T, model.shape, bounded=False)
    check_range("x_T", x_T, most=FURTHEST)
    table = decoding_table(model.schedule, _timesteps(model, steps, spacing), order=order)
    return _walk(
        model,
        table,
        x_T,
        class_label=class_label,
        guidance=guidance,
        dtype=dtype,
        batch_size=batch_size,
        on_step=on_step,
    )


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Between a and b [..., C, H, W] on the sphere, so that the norm of noise stays that of noise.

    sin((1−λ)ω) a/sin ω + sin(λω) b/sin ω, ω the angle between them (Shoemake 1985).
    """
    flat_a, flat_b = a.flatten(-3).double(), b.flatten(-3).double()
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=-1).clamp(-1, 1)
    angle = torch.arccos(cosine)[..., None, None, None]
    sine = angle.sin()
    straight = sine < 1e-6  # the same direction, or opposite ones: a straight line
    mixed = torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b
    curved = (mixed / torch.where(straight, 1.0, sine)).to(a.dtype)
    return torch.where(straight, torch.lerp(a, b, share), curved)


def _timesteps(model: Model, steps: int | None, spacing: str) -> list[int]:
    """Ascending."""
    T = model.schedule.T
    return spaced_timesteps(T, min(STEPS, T) if steps is None else steps, spacing)[::-1]


def _walk(
    model: Model,
    table: SamplerTable,
    x: Tensor,
    *,
    class_label: ClassLabel,
    guidance: float,
    dtype: torch.dtype | None,
    batch_size: int,
    on_step: Callable[[int, int, Step], None] | None,
) -> Tensor:
    """The last x of the rows, from x [N, C, H, W]."""
    check_whole("batch_size", batch_size, least=1, error=SamplerError)
    check_guidance(guidance, class_label)
    labels = class_labels(model, class_label, len(x))
    fast = prepare(model, dtype=dtype or fast_dtype(model))
    ended = []
    for first in range(0, len(x), batch_size):
        part = x[first : first + batch_size].to(model.device, torch.float32)
        label = None if labels is None else labels[first : first + batch_size]
        for step in chain(fast, table, part, class_label=label, guidance=guidance):
            part = step.x_next
            if on_step is not None:
                on_step(first, step.row + 1, step)
        ended.append(part)
    return torch.cat(ended)
