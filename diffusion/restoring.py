"""Images that agree with a measurement: fill in, sharpen, colour, denoise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion.condition import Measurement, condition
from diffusion.model import Model
from diffusion.operators import Operator, OperatorError, measured_shape
from diffusion.sampling import sample

STEPS = 50
TRAVEL = {"projection": 5, "moment": 1}  # by default: projection needs it, moment does not


def restore(
    model: Model,
    y: Tensor,
    operator: Operator,
    num_images: int = 1,
    *,
    sigma: float = 0.0,
    method: str = "projection",
    travel: int | None = None,
    solver_steps: int = 1,
    sampler: str = "ddim",
    steps: int | None = None,
    eta: float | None = None,
    **options: Any,
) -> Tensor:
    """Samples of x_0 given y = A x_0 + σ_y n: [num_images, C, H, W] in [−1, 1], float32.

    y: what the operator gives of one image, without the batch. sigma: σ_y, where images lie in
    [−1, 1]. method: projection or moment, with `solver_steps` products a row; see
    `diffusion.condition`. travel: how often each jump is walked, by default 5 for projection and 1
    for moment. sampler: by default ddim with η = 1 and 50 steps. options: the others of `sample`.
    The mean of the samples is the best single answer, their deviation tells where they are unsure.
    Raises OperatorError, SamplerError or ValueError naming the bad argument, NotFiniteError.
    """
    expected = measured_shape(operator, model.shape)
    if tuple(y.shape) != expected:
        raise OperatorError(f"y: its shape is {tuple(y.shape)}, and A gives {expected}")
    if not y.isfinite().all():
        raise OperatorError("y: not all of its numbers are finite")
    if not 0 <= sigma < float("inf"):
        raise OperatorError(f"sigma = {sigma}: must be 0 or more")
    if solver_steps < 0:
        raise OperatorError(f"solver_steps = {solver_steps}: must be 0 or more")
    measurement = Measurement(operator, y[None].to(model.device, torch.float32), sigma)
    given = condition(measurement, method, solver_steps=solver_steps)
    if method == "moment" and options.get("dtype") is None:
        options["dtype"] = torch.float32  # products with the Jacobian need its digits
    return sample(
        model,
        num_images,
        sampler=sampler,
        steps=min(STEPS, model.schedule.T) if steps is None else steps,
        eta=float(sampler == "ddim") if eta is None else eta,
        rederive_eps=True,  # so that ε̂ agrees with the corrected x̂_0
        travel=TRAVEL[method] if travel is None else travel,
        condition=given,
        **options,
    )
