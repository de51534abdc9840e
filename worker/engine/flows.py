"""A likelihood by the flow as a task: a strand for each draw of each image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffusion.flow import ROW_COST, FlowTable
from diffusion.model import Model
from worker.engine.tasks import Start, TaskError, check_label
from worker.network.networks import Mode


@dataclass(frozen=True, eq=False)
class FlowTask:
    """Strands (image·draws + draw), each through all rows of the table, or the rest of them.

    x_start: [N, C, H, W] on the model's device. indices: int64 [N], the keys of the noise. starts:
    of strands; those in mid-flow have x̃ for x_t, and in `nats` what of their sum is there. The
    rest: see `worker.engine.tasks.Task`.
    """

    id: str
    model: Model
    table: FlowTable
    seed: int
    x_start: Tensor
    indices: NDArray[np.int64]
    draws: int
    starts: tuple[Start, ...]
    nats: Mapping[int, float] = field(default_factory=dict)
    deterministic: bool = False
    urgent: bool = False
    client: str = ""

    @property
    def mode(self) -> Mode:
        """What the network is used for."""
        return "flow"

    @property
    def price(self) -> int:
        """Two evaluations and a product with the Jacobian."""
        return ROW_COST

    def weight(self, left: int) -> int:
        """Its images."""
        return min(len(self.x_start), left)

    @property
    def rows(self) -> int:
        """Of a strand."""
        return len(self.table)

    @property
    def evaluations(self) -> int:
        """What is left to do, in network evaluations."""
        return sum(self.rows - start.row for start in self.starts) * self.price

    @property
    def guidance(self) -> float:
        """None: the density is that of the model itself."""
        return 1.0

    @property
    def snapshot_rows(self) -> frozenset[int]:
        """None."""
        return frozenset()

    def check(self) -> None:
        """Raise TaskError if the model cannot run this."""
        for start in self.starts:
            check_label(self.model, start.class_label)
            if not 0 <= start.row < self.rows:
                raise TaskError(f"row = {start.row}: must be 0..{self.rows - 1}")
