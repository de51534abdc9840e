"""Chains that begin between two noised images."""

from __future__ import annotations

from jobs.kinds.interpolate import InterpolateSpec
from jobs.store.writer import Started
from worker.engine.tasks import Start
from worker.kinds.chains import ChainFlight, noised
from worker.kinds.inputs import uploaded


class InterpolateFlight(ChainFlight[InterpolateSpec]):
    """One chain a λ."""

    def fresh_starts(self, started: Started) -> list[Start]:
        """In x̄_t of each λ."""
        spec, schedule = self.spec, self.served.model.schedule
        first, second = noised(schedule, uploaded(started), t=spec.t, seed=self.seed)
        # One noise for all: two images differ by their λ, and by nothing else.
        return [
            Start(
                i,
                x_t=(1 - share) * first + share * second,
                class_label=spec.class_label,
                noise_index=0,
            )
            for i, share in enumerate(spec.lambdas)
        ]
