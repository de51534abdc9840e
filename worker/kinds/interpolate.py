"""Chains that begin between two noised images."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.encoding import slerp
from jobs.kinds.interpolate import InterpolateSpec
from jobs.store.started import Started
from worker.engine.tasks import Start
from worker.kinds.chains import ChainFlight, noised
from worker.kinds.inputs import given_x_t, uploaded


class InterpolateFlight(ChainFlight[InterpolateSpec]):
    """One chain a λ."""

    def fresh_starts(self, started: Started) -> list[Start]:
        """In x̄_t of each λ."""
        spec = self.spec
        first, second = self._ends(started)
        between = slerp if spec.path == "sphere" else torch.lerp
        # One noise for all: two images differ by their λ, and by nothing else.
        return [
            Start(
                i,
                x_t=between(first, second, share),
                class_label=spec.class_label,
                noise_index=0,
            )
            for i, share in enumerate(spec.lambdas)
        ]

    def _ends(self, started: Started) -> tuple[Tensor, Tensor]:
        """Two pictures noised to t, or two x_t of another job. Raises MissingInput."""
        model, spec = self.served.model, self.spec
        if spec.input == "x_t":
            first, second = given_x_t(started).view(2, *model.shape)
        else:
            first, second = noised(model.schedule, uploaded(started), t=spec.t, seed=self.seed)
        return first, second
