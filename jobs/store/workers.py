"""What a worker says of itself, as it lies in the store."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Self

from jobs.store.tolerance import number

WORKER_TTL_S = 30  # a worker unheard of for so long is not counted as alive


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker says of itself. at: Unix time of the last word."""

    name: str
    queue: str
    models: tuple[str, ...]
    device: str = "cpu"
    active: int = 0  # images in flight
    at: float = field(default_factory=time.time)

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """From the JSON of a heartbeat, a newer version's too. Raises ValueError and the like."""
        fields = json.loads(text)
        return cls(
            name=str(fields["name"]),
            queue=str(fields["queue"]),
            models=tuple(str(name) for name in fields["models"]),
            device=str(fields.get("device", "cpu")),
            active=int(fields.get("active", 0)),
            at=number(fields["at"]),
        )

    def alive(self, now: float) -> bool:
        """Whether it spoke lately."""
        return now - self.at <= WORKER_TTL_S
