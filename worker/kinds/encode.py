"""Chains that go up, from images to their x_T."""

from __future__ import annotations

from typing import Any

from diffusion.encoding import encoding_table
from diffusion.spacings import spaced_timesteps
from diffusion.table import SamplerTable
from jobs.kinds.encode import EncodeSpec
from jobs.store.batch import WriteBatch
from jobs.store.started import Started
from worker.engine.tasks import Event, Images, Start
from worker.flights import on_host
from worker.kinds.chains import ChainFlight
from worker.kinds.inputs import uploaded
from worker.models import Served


class EncodeFlight(ChainFlight[EncodeSpec]):
    """The probability flow of uploaded images."""

    @classmethod
    def provenance(cls, served: Served, spec: EncodeSpec) -> dict[str, Any]:
        """Nothing is clipped on the way up."""
        return {"clip": False}

    @property
    def up_to(self) -> int | None:
        """The t that is asked for."""
        return self.spec.t

    def table_for(self, served: Served, spec: EncodeSpec) -> SamplerTable:
        """Up the timesteps that a chain of as many steps comes down."""
        assert spec.t is not None and spec.steps is not None  # filled at admission
        ts = spaced_timesteps(spec.t, spec.steps)[::-1]
        iterations = spec.iterations or 0
        return encoding_table(served.model.schedule, ts, order=spec.order, iterations=iterations)

    def fresh_starts(self, started: Started) -> list[Start]:
        """In the images."""
        images = uploaded(started)
        label = self.spec.class_label
        return [Start(i, x_t=x, class_label=label) for i, x in enumerate(images)]

    def write(self, event: Event, batch: WriteBatch) -> None:
        """What a chain ends in is the x_t that was asked for."""
        if not isinstance(event, Images):
            super().write(event, batch)
            return
        t = self.spec.t
        assert t is not None
        for i, x in zip(event.indices, on_host(event.x), strict=True):
            batch.snapshot(self.record, self.execution, t=t, kind="x_t", index=i, x=x)
