"""Chains that begin in noise."""

from __future__ import annotations

from typing import ClassVar

from jobs.kinds.generate import GenerateSpec
from jobs.store.started import Started
from worker.engine.tasks import Start
from worker.kinds.chains import ChainFlight


class GenerateFlight(ChainFlight[GenerateSpec]):
    """The reverse chain from x_T."""

    from_noise: ClassVar[bool] = True

    def fresh_starts(self, started: Started) -> list[Start]:
        """In noise, each in its own."""
        return [Start(i, class_label=self.spec.class_label) for i in range(self.spec.count)]
