"""What the engine is asked to do, and what it says of it: plain data, no Redis, no HTTP.

A task is a set of chains that share a sampler table and a seed. A chain starts from noise, or
from any x_t at any row of the table, so generation, a resumed job, reconstruction from the
middle of a chain and interpolation are the same thing to the engine. The terms of a likelihood
(`worker.engine.terms`) are independent of one another, and are dealt out to chains of their own
kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffusion.condition import Condition, Moment
from diffusion.model import Model
from diffusion.table import SamplerTable
from worker.network.networks import Mode


class EngineError(Exception):
    """Base of what the engine raises or reports.

    EngineError
    ├── TaskError      this task can never run, or ended badly; others are not touched
    │   └── NotFinite  a chain left the finite numbers
    └── EngineStopped  the engine's thread has ended; nothing can be submitted
    """


class TaskError(EngineError):
    """A task that cannot run or failed; the message says why."""


class NotFinite(TaskError):
    """A chain produced NaN or infinity."""


class EngineStopped(EngineError):
    """The engine has stopped or broken down."""


@dataclass(frozen=True, eq=False)
class Start:
    """Where one chain starts.

    index: of its image; it keys the noise too, unless noise_index does (chains with one
    noise_index share their noise). row: the first row of the table to evaluate.
    x_t: float32 [C, H, W] that enters this row; None draws x_T ~ N(0, I) from the seed.
    x_start_prev, x_start_older: x̂_0 of the row before, and of the one before that, for a table that
    reads them. class_label: None for none.
    """

    index: int
    row: int = 0
    x_t: Tensor | None = None
    x_start_prev: Tensor | None = None
    x_start_older: Tensor | None = None
    class_label: int | None = None
    noise_index: int | None = None


class Work(Protocol):
    """What the engine has to know of any task to schedule it; see Task for the meanings.

    rows: steps of a chain that starts at row 0. price: what a row of a network batch counts for,
    in network evaluations.
    """

    @property
    def id(self) -> str: ...
    @property
    def model(self) -> Model: ...
    @property
    def starts(self) -> tuple[Start, ...]: ...
    @property
    def rows(self) -> int: ...
    @property
    def guidance(self) -> float: ...
    @property
    def deterministic(self) -> bool: ...
    @property
    def urgent(self) -> bool: ...
    @property
    def client(self) -> str: ...
    @property
    def snapshot_rows(self) -> frozenset[int]: ...
    @property
    def evaluations(self) -> int: ...
    @property
    def mode(self) -> Mode: ...
    @property
    def price(self) -> int: ...
    def check(self) -> None: ...
    def weight(self, left: int) -> int: ...


@dataclass(frozen=True, eq=False)
class Task:
    """Chains to run. Image i depends on (seed, i) alone, not on its neighbours.

    guidance: g of ε_u + g(ε_c − ε_u); other than 1 costs two evaluations a row.
    deterministic: the same bytes whatever shares the batch (a lane of its own, eager float32).
    urgent: goes before what is not. client: each gets the same share of a batch.
    snapshot_rows: rows whose (x_t, x̂_0, ε) are reported.
    condition: corrects each x̂_0; its measurement is on the model's device.
    """

    id: str
    model: Model
    table: SamplerTable
    seed: int
    starts: tuple[Start, ...]
    guidance: float = 1.0
    deterministic: bool = False
    urgent: bool = False
    client: str = ""
    snapshot_rows: frozenset[int] = frozenset()
    condition: Condition | None = None

    @property
    def mode(self) -> Mode:
        """What the network is used for."""
        return "products" if isinstance(self.condition, Moment) else "chains"

    @property
    def price(self) -> int:
        """The evaluation, and the products with the Jacobian."""
        return 1 if self.condition is None else self.condition.cost

    def weight(self, left: int) -> int:
        """What counts against other lanes, with so many chains left: their network rows."""
        return left * self.evaluations_a_row

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return len(self.table)

    @property
    def evaluations_a_row(self) -> int:
        """Network evaluations that one step of one chain takes."""
        return (2 if self._guided else 1) * self.price

    @property
    def _guided(self) -> bool:
        return self.guidance != 1.0 and any(s.class_label is not None for s in self.starts)

    @property
    def evaluations(self) -> int:
        """Network evaluations that are left to do."""
        rows = sum(len(self.table) - start.row for start in self.starts)
        return rows * self.evaluations_a_row

    def check(self) -> None:
        """Raise TaskError if no batch could hold this task."""
        network = self.model.config.network
        if self._guided and network.null_label is None:
            raise TaskError(f"guidance = {self.guidance}: needs a model with a null label")
        if self.table.learned_variance and not network.learned_variance:
            raise TaskError("variance = 'learned': this model has no learned variance")
        for start in self.starts:
            if not 0 <= start.row < len(self.table):
                raise TaskError(f"row = {start.row}: must be 0..{len(self.table) - 1}")
            if start.x_t is not None and tuple(start.x_t.shape) != self.model.shape:
                shape = tuple(start.x_t.shape)
                raise TaskError(f"x_t: its shape is {shape}, and must be {self.model.shape}")
            check_label(self.model, start.class_label)


def check_label(model: Model, label: int | None) -> None:
    """Raise TaskError unless the model takes this label, or none."""
    network = model.config.network
    classes = network.num_classes
    if label is None:
        if classes and network.null_label is None:
            raise TaskError(f"class_label: missing; must be 0..{classes - 1}")
    elif not 0 <= label < classes:
        allowed = f"must be 0..{classes - 1}" if classes else "this model takes none"
        raise TaskError(f"class_label = {label}: {allowed}")


@dataclass(frozen=True, eq=False)
class States:
    """Chains of one task in flight, each between two rows: all that a resume needs.

    indices, rows: int64 [N], image index and next row; x_t, x_start_prev, x_start_older: float32
    [N, C, H, W], the last where a table looks so far back. Of a likelihood by the flow: strand and
    row; x̃, no x_start_prev, and nats, float64 [N], what of ln p_0 is there.
    """

    indices: NDArray[np.int64]
    rows: NDArray[np.int64]
    x_t: Tensor
    x_start_prev: Tensor
    x_start_older: Tensor | None = None
    nats: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Advanced:
    """A task's network evaluations so far (done of total), and the last index t it stepped at."""

    task_id: str
    done: int
    total: int
    t: int


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What entered row `row` (index t) of chains `indices`, and what was found: [N, C, H, W]."""

    task_id: str
    indices: tuple[int, ...]
    row: int
    t: int
    x_t: Tensor
    x_start: Tensor
    eps: Tensor


@dataclass(frozen=True, eq=False)
class Terms:
    """Terms of a likelihood, at positions `places` of its plan: arrays [M], float64.

    nats: the term; squared_error: mean square of x_0 − x̂_0 over the dimensions.
    """

    task_id: str
    places: NDArray[np.int64]
    nats: NDArray[np.float64]
    squared_error: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Densities:
    """Strands [M] of a likelihood by the flow that ended: ln p_0, float64 [M], nats."""

    task_id: str
    strands: NDArray[np.int64]
    nats: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Images:
    """Chains that ended: x [N, C, H, W], not yet clamped to [−1, 1]."""

    task_id: str
    indices: tuple[int, ...]
    x: Tensor


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a running task, to be kept for a resume."""

    task_id: str
    states: States


@dataclass(frozen=True)
class Finished:
    """All chains of the task ended; the last event of this task."""

    task_id: str


@dataclass(frozen=True)
class Failed:
    """The task failed alone; the last event of this task."""

    task_id: str
    error: BaseException


@dataclass(frozen=True, eq=False)
class Canceled:
    """The task was taken out between two steps, with its state; the last event of this task."""

    task_id: str
    states: States | None


Event = Advanced | Snapshot | Terms | Densities | Images | Checkpoint | Finished | Failed | Canceled
