"""Chains conditioned on a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from diffusion.condition import Condition, Measurement, condition
from diffusion.operators import AveragePool, Blur, Grey, Identity, Mask, Operator
from jobs.kinds.common import Shape
from jobs.kinds.operators import GREY_WEIGHTS, OperatorSpec
from jobs.kinds.restore import RestoreSpec
from jobs.store.started import Started
from worker.engine.tasks import Start
from worker.kinds.chains import ChainFlight
from worker.kinds.inputs import measured
from worker.network.networks import Mode


class RestoreFlight(ChainFlight[RestoreSpec]):
    """Samples of x_0 given y."""

    from_noise: ClassVar[bool] = True
    # ε̂ must be that of the corrected x̂_0, and a jump travels to the timestep of the next.
    own_options: ClassVar[Mapping[str, object]] = {"rederive_eps": True, "landing": "next"}

    @classmethod
    def mode(cls, spec: RestoreSpec) -> Mode:
        """By moments: products with the Jacobian."""
        return "products" if spec.method == "moment" else "chains"

    def condition_on(self, started: Started) -> Condition:
        """The measurement that came with the request."""
        model, spec = self.served.model, self.spec
        operator = operator_of(spec.operator, model.shape)
        y = measured(started)
        if isinstance(operator, Mask):
            y = operator.forward(y)  # what was sent for pixels that are not known says nothing
        measurement = Measurement(operator, y.to(model.device), spec.sigma)
        return condition(measurement, spec.method, solver_steps=spec.solver_steps or 0)

    def fresh_starts(self, started: Started) -> list[Start]:
        """In noise, each in its own."""
        return [Start(i, class_label=self.spec.class_label) for i in range(self.spec.count)]


def operator_of(spec: OperatorSpec, shape: Shape) -> Operator:
    """The operator that a request names, for images of a shape."""
    match spec.name:
        case "mask":
            return Mask(torch.from_numpy(spec.known(shape).copy()))
        case "average_pool":
            assert spec.factor is not None
            return AveragePool(spec.factor)
        case "gray":
            return Grey(spec.weights or GREY_WEIGHTS)
        case "blur" if spec.kernel is not None:
            return Blur(torch.tensor(spec.kernel, dtype=torch.float64))
        case "blur":
            assert spec.deviation is not None
            return Blur.gaussian(spec.deviation, min(shape[1:]))
        case _:
            return Identity()
