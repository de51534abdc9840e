"""A likelihood as a task: independent terms of the bound, dealt out to strands."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffusion.model import Model
from diffusion.term_plan import Plan
from worker.engine.tasks import Start, check_label
from worker.network.networks import Mode

STRANDS = 64  # of a task: so many of its terms can share a batch


@dataclass(frozen=True, eq=False)
class TermTask:
    """Terms to evaluate: places (image·K + draw) of a plan [N, K] that are `left`, in order.

    Terms are dealt to strands like cards, the first places first: row r of strand s is number
    r·S + s. So a strand is to the engine a chain, whose rows do not depend on one another; where
    S does not divide the terms the first strands start at row 1.
    x_start: [N, C, H, W] on the model's device. indices: int64 [N], the keys of the noise.
    variance: as in `diffusion.likelihood.check_variance`. The rest: see `worker.engine.tasks.Task`.
    """

    id: str
    model: Model
    seed: int
    x_start: Tensor
    indices: NDArray[np.int64]
    plan: Plan
    left: NDArray[np.int64]
    variance: str
    class_label: int | None = None
    deterministic: bool = False
    urgent: bool = False
    client: str = ""

    @property
    def mode(self) -> Mode:
        """What the network is used for."""
        return "terms"

    @property
    def price(self) -> int:
        """One evaluation a term."""
        return 1

    def weight(self, left: int) -> int:
        """Its images: the strands are there to fill a batch."""
        return min(len(self.x_start), left)

    @property
    def strands(self) -> int:
        """How many terms are evaluated at once, at most."""
        return min(STRANDS, len(self.left))

    @property
    def rows(self) -> int:
        """Terms of the longest strand."""
        return -(-len(self.left) // self.strands) if self.strands else 0

    @cached_property
    def starts(self) -> tuple[Start, ...]:
        """The strands."""
        missing = self.rows * self.strands - len(self.left)
        return tuple(
            Start(strand, row=int(strand < missing), class_label=self.class_label)
            for strand in range(self.strands)
        )

    @property
    def evaluations(self) -> int:
        """Network evaluations that are left to do."""
        return len(self.left)

    @property
    def guidance(self) -> float:
        """None: the bound is that of the model itself."""
        return 1.0

    @property
    def snapshot_rows(self) -> frozenset[int]:
        """None."""
        return frozenset()

    def place(self, strand: int, row: int) -> int:
        """Which term a strand evaluates in a row."""
        missing = self.rows * self.strands - len(self.left)
        return int(self.left[row * self.strands + strand - missing])

    def check(self) -> None:
        """Raise TaskError if the model cannot run this."""
        check_label(self.model, self.class_label)
