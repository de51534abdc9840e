"""Images that agree with a measurement: fill in, sharpen, colour, denoise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion.checks import ImagesError, check_range, check_real, check_whole
from diffusion.condition import Measurement, condition
from diffusion.model import Model, check_model
from diffusion.operators import Operator, OperatorError, furthest, measured_shape
from diffusion.sampling import sample

STEPS = 50
TRAVEL = {"projection": 5, "moment": 1}  # by default: projection needs it, moment does not
_DEVIATIONS = 10.0  # of its noise, beyond which no measurement lies


def restore(
    model: Model,
    y: Tensor,
    operator: Operator,
    num_images: int = 1,
    *,
    sigma: float = 0.0,
    method: str = "projection",
    travel: int | None = None,
    solver_steps: int | None = None,
    sampler: str = "ddim",
    steps: int | None = None,
    eta: float | None = None,
    **options: Any,
) -> Tensor:
    """Samples of x_0 given y = A x_0 + σ_y n: [num_images, C, H, W] in [−1, 1], float32.

    y: what the operator gives of one image, without the batch. sigma: σ_y, where images lie in
    [−1, 1]. method: projection or moment, with `solver_steps` (1) products a row; see
    `diffusion.condition`. travel: how often each jump is walked, by default 5 for projection and 1
    for moment. sampler: by default ddim with η = 1 and 50 steps. options: the others of `sample`.
    The mean of the samples is the best single answer, their deviation tells where they are unsure.
    Raises ImagesError, OperatorError, SamplerError or ValueError naming the bad argument,
    NotFiniteError.
    """
    check_model(model)
    check_real("sigma", sigma, least=0, error=OperatorError)
    if solver_steps is not None:
        check_whole("solver_steps", solver_steps, least=0, error=OperatorError)
        if method != "moment":
            raise OperatorError(
                f"solver_steps = {solver_steps}: is for method moment, not {method}"
            )
    check_measured(y, operator, model.shape, sigma=sigma)
    measurement = Measurement(operator, y[None].to(model.device, torch.float32), sigma)
    given = condition(measurement, method, solver_steps=1 if solver_steps is None else solver_steps)
    if method == "moment" and options.get("dtype") is None:
        options["dtype"] = torch.float32  # products with the Jacobian need its digits
    if sampler == "ddim":
        # ε̂ must be that of the corrected x̂_0, and a jump travels to the timestep of the next.
        options = {"rederive_eps": True, "landing": "next", **options}
    return sample(
        model,
        num_images,
        sampler=sampler,
        steps=min(STEPS, model.schedule.T) if steps is None else steps,
        eta=1.0 if eta is None and sampler == "ddim" else eta,
        travel=TRAVEL[method] if travel is None else travel,
        condition=given,
        **options,
    )


def check_measured(y: Any, operator: Any, shape: tuple[int, ...], *, sigma: float) -> None:
    """Raise OperatorError or ImagesError unless y is what A may give of an image [C, H, W]."""
    if not all(callable(getattr(operator, name, None)) for name in ("forward", "adjoint", "solve")):
        raise OperatorError(
            f"operator = {operator!r:.80}: must be one of diffusion.operators, such as Mask, or "
            "have forward, adjoint and solve"
        )
    expected = measured_shape(operator, shape)
    if not isinstance(y, Tensor):
        raise ImagesError(f"y: a {type(y).__name__}; must be a torch tensor {[*expected]}")
    if not y.is_floating_point():
        raise ImagesError(
            f"y: {y.dtype}; must be floating, what A makes of an image in [−1, 1]: y / 127.5 - 1 "
            "of grey levels 0..255"
        )
    if tuple(y.shape) != expected:
        raise OperatorError(f"y: its shape is {tuple(y.shape)}, and A gives {expected}")
    if not y.isfinite().all():
        raise OperatorError("y: not all of its numbers are finite")
    most = furthest(operator) + _DEVIATIONS * sigma
    check_range("y", y, most=most, slack=most)  # smaller or sharper pictures may overshoot
