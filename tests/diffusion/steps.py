"""One step of a sampler table from a given ε̂, in the precision of x."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.parameterization import to_x_start
from diffusion.schedule import Schedule
from diffusion.table import SamplerTable, clip_x_start, update


def one_step(
    schedule: Schedule,
    table: SamplerTable,
    row: int | Tensor,
    x: Tensor,
    eps: Tensor,
    *,
    z: Tensor | None = None,
    x_start_prev: Tensor | None = None,
    x_start_older: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x̂_0 as clipped, the next x) after a row for all samples, or one a sample ([N])."""
    at = torch.as_tensor(row).expand(len(x))
    t = torch.from_numpy(table.t)[at]
    rows = torch.from_numpy(table.coefficients).to(x.dtype)[at]
    x_start = clip_x_start(rows, to_x_start(schedule, "epsilon", x_t=x, t=t, out=eps))
    zero = torch.zeros_like(x)
    x_next = update(
        rows,
        x,
        x_start=x_start,
        eps=eps,
        x_start_prev=zero if x_start_prev is None else x_start_prev,
        z=zero if z is None else z,
        x_start_older=x_start_older,
    )
    return x_start, x_next
