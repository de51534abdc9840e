"""Chains that begin in one x_t."""

from __future__ import annotations

from jobs.kinds.reconstruct import ReconstructSpec
from jobs.store.started import Started
from worker.engine.tasks import Start
from worker.kinds.chains import ChainFlight, noised
from worker.kinds.inputs import given_x_t, uploaded


class ReconstructFlight(ChainFlight[ReconstructSpec]):
    """Samples of p_θ(x_0|x_t)."""

    def fresh_starts(self, started: Started) -> list[Start]:
        """All in the one x_t: a picture noised to t, or what was given."""
        spec = self.spec
        if spec.input == "x_t":
            x_t = given_x_t(started)
        else:
            assert spec.t is not None  # filled at admission
            schedule = self.served.model.schedule
            x_t = noised(schedule, uploaded(started), t=spec.t, seed=self.seed)[0]
        return [Start(i, x_t=x_t, class_label=spec.class_label) for i in range(spec.count)]
