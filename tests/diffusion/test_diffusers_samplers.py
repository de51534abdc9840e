"""Two consecutive rows of our tables against two steps of diffusers' schedulers.

Theirs keep ᾱ in float32, so that near t = 0 their 1 − ᾱ has three digits left. So each comparison
is made twice: with their schedulers as they are, away from there; and everywhere, and far more
closely, with the same ᾱ put into them in float64.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.forward import q_sample
from diffusion.multistep import dpmpp_2m
from diffusion.samplers import ancestral, ddim
from diffusion.schedule import linear_schedule
from diffusion.table import SamplerTable, scale_noise
from tests.diffusion.steps import one_step

SCHEDULE = linear_schedule()
SHAPE = (2, 3, 4, 4)
THEIR_VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}
# How diffusers is run: dtype, largest difference, smallest t of a pair.
PRECISIONS = [(torch.float32, 1e-5, 10), (torch.float64, 1e-9, 0)]
precisions = pytest.mark.parametrize(
    ("dtype", "tolerance", "t_min"), PRECISIONS, ids=["as-it-is", "float64"]
)


def pairs(ts: list[int], t_min: int) -> list[int]:
    """Rows at which a pair of steps begins: first, middle and last ones."""
    n = len(ts)
    candidates = {0, 1, n // 3, n // 2, n - 4, n - 3, n - 2}
    chosen = sorted(i for i in candidates if ts[i + 1] >= t_min)
    assert len(chosen) >= 4
    return chosen


def state(t: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """x_t of images partly outside [−1, 1], and two outputs of an imperfect network."""
    generator = torch.Generator().manual_seed(1000 * seed + t)
    x_start, eps, *errors = torch.randn(4, *SHAPE, generator=generator).to(dtype)
    x = q_sample(SCHEDULE, 0.7 * x_start, torch.full((SHAPE[0],), t), eps)
    return x, [eps + 0.1 * error for error in errors]


def draw(seed: int, dtype: torch.dtype) -> Tensor:
    """What a scheduler draws first from a generator with this seed."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def v(i: int, dtype: torch.dtype) -> Tensor:
    """Where a network that learned Σ puts each pixel's variance, from −1 (small) to 1 (large)."""
    return torch.tanh(draw(100 + i, dtype))


def two_rows(
    table: SamplerTable, start: int, x: Tensor, outs: list[Tensor], prev: Tensor | None = None
) -> list[Tensor]:
    """x after row `start` and after the next; their noises are `draw(0)` and `draw(1)`.

    The network's second half, where the table reads one, is `v(0)` and `v(1)`.
    """
    spread, found = torch.from_numpy(table.spread).to(x.dtype), []
    for i in range(2):
        z = scale_noise(spread[start + i].expand(SHAPE[0]), v(i, x.dtype), draw(i, x.dtype))
        prev, x = one_step(SCHEDULE, table, start + i, x, outs[i], z=z, x_start_prev=prev)
        found.append(x)
    return found


def largest_difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True))


def exact_tables(scheduler: Any, dtype: torch.dtype) -> Any:
    """The scheduler, its ᾱ replaced by the float64 one if that is the dtype."""
    if dtype == torch.float64:
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=dtype)
        scheduler.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    return scheduler


@precisions
@pytest.mark.parametrize(
    ("steps", "spacing"), [(1000, "leading"), (50, "linspace"), (40, "leading"), (8, "linspace")]
)
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
@pytest.mark.parametrize("clip", [True, False])
def test_ddpm(
    diffusers: ModuleType,
    clip: bool,
    variance: str,
    steps: int,
    spacing: str,
    dtype: torch.dtype,
    tolerance: float,
    t_min: int,
) -> None:
    scheduler = diffusers.DDPMScheduler(
        variance_type=THEIR_VARIANCES[variance], clip_sample=clip, timestep_spacing=spacing
    )
    exact_tables(scheduler, dtype).set_timesteps(steps)
    ts = scheduler.timesteps.tolist()
    table = ancestral(SCHEDULE, ts, variance=variance, clip=clip)
    for start in pairs(ts, t_min):
        x, outs = state(ts[start], dtype)
        wanted = [x]
        for i in range(2):
            generator = torch.Generator().manual_seed(i)
            out = torch.cat([outs[i], v(i, dtype)], dim=1) if variance == "learned" else outs[i]
            step = scheduler.step(out, ts[start + i], wanted[-1], generator=generator)
            wanted.append(step.prev_sample)
        assert largest_difference(two_rows(table, start, x, outs), wanted[1:]) <= tolerance


@precisions
@pytest.mark.parametrize(
    ("steps", "spacing"), [(1000, "leading"), (50, "leading"), (20, "trailing")]
)
@pytest.mark.parametrize("eta", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("clip", [True, False])
def test_ddim(
    diffusers: ModuleType,
    clip: bool,
    eta: float,
    steps: int,
    spacing: str,
    dtype: torch.dtype,
    tolerance: float,
    t_min: int,
) -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=clip, timestep_spacing=spacing)
    exact_tables(scheduler, dtype).set_timesteps(steps)
    ts = scheduler.timesteps.tolist()
    table = ddim(SCHEDULE, ts, eta=eta, clip=clip)
    for start in pairs(ts, t_min):
        x, outs = state(ts[start], dtype)
        wanted = [x]
        for i in range(2):
            step = scheduler.step(
                outs[i],
                ts[start + i],
                wanted[-1],
                eta=eta,
                use_clipped_model_output=True,
                variance_noise=draw(i, dtype),
            )
            wanted.append(step.prev_sample)
        assert largest_difference(two_rows(table, start, x, outs), wanted[1:]) <= tolerance


@precisions
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs
@pytest.mark.parametrize(
    ("steps", "spacing"), [(999, "linspace"), (50, "linspace"), (10, "trailing")]
)
def test_dpm_solver(
    diffusers: ModuleType,
    steps: int,
    spacing: str,
    dtype: torch.dtype,
    tolerance: float,
    t_min: int,
) -> None:
    """Theirs computes in float32 even from tables in float64."""
    tolerance = max(tolerance, 1e-5)

    def build() -> Any:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            solver_order=2,
            algorithm_type="dpmsolver++",
            solver_type="midpoint",
            final_sigmas_type="zero",
            timestep_spacing=spacing,
        )
        exact_tables(scheduler, dtype).set_timesteps(steps)
        return scheduler

    ts = build().timesteps.tolist()
    table = dpmpp_2m(SCHEDULE, ts, clip=False)
    for start in pairs(ts, t_min):
        scheduler = build()
        scheduler.set_begin_index(start)
        x, outs = state(ts[start], torch.float32)
        prev = torch.zeros_like(x)
        if start > 0:  # as if it had come all the way: it remembers x̂_0 of the row before
            prev = x + 0.2 * state(ts[start], torch.float32, seed=1)[0]
            scheduler.model_outputs[-1] = prev
            scheduler.lower_order_nums = 1
        wanted = [x]
        for i in range(2):
            wanted.append(scheduler.step(outs[i], ts[start + i], wanted[-1]).prev_sample)
        assert largest_difference(two_rows(table, start, x, outs, prev), wanted[1:]) <= tolerance
