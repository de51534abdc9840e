"""ε_θ in the form that runs fastest here: data type, memory layout, batch shapes, guidance."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion.model import Model
from diffusion.parameterization import eps_coefficients
from diffusion.speed import fast_dtype, prepare
from worker.engine.tasks import TaskError
from worker.network.costs import CostModel, Shape

# A CPU gains nothing from one more row of padding, and its kernels are set up anew for each shape.
EAGER_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
EXACT_SIZES = (8, 4, 2, 1)
WARM_UP_SIZES = (1, 4)
Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def worker_dtype(model: Model) -> torch.dtype:
    """bfloat16 where a timed probe finds it faster; a CPU without its instructions is not asked."""
    if model.device.type == "cpu" and not _cpu_has_bf16():
        return torch.float32
    return fast_dtype(model)


def _cpu_has_bf16() -> bool:
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")


@dataclass(frozen=True, eq=False)
class Inputs:
    """One network call for M samples, G of them guided: M + G rows of the batch.

    x: float32 [M, C, H, W]; t: int64 [M]; labels: int64 [M + G] or None, the last G the null
    label; guided: int64 [G], the samples that have a second row; guidance: float32 [G].
    """

    x: Tensor
    t: Tensor
    labels: Tensor | None = None
    guided: Tensor | None = None
    guidance: Tensor | None = None


class Network:
    """ε_θ of one model, ready for batches of any mix of timesteps, labels and guidance.

    dtype: of weights and activations; ε̂ comes back in float32. exact: the result of a row
    depends on neither its place nor its neighbours, to the bit: eager float32, one batch shape.
    """

    def __init__(
        self, model: Model, *, dtype: torch.dtype, max_rows: int, exact: bool = False
    ) -> None:
        self.model = model
        self.dtype = torch.float32 if exact else dtype
        self._fast = prepare(model, dtype=self.dtype)
        self._compiled: dict[int, Forward] = {}
        self.uses: Counter[int] = Counter()  # steps by their rows
        self._e_x, self._e_out = self._conversion()
        self.exact = exact
        sizes = tuple(size for size in EAGER_SIZES if size <= max_rows)
        self._sizes = (self._exact_size(),) if exact else sizes
        self.costs = CostModel()
        self._warm_up()

    def _conversion(self) -> tuple[Tensor, Tensor]:
        tables = eps_coefficients(self.model.schedule, self.model.config.prediction)
        e_x, e_out = (
            torch.from_numpy(np.ascontiguousarray(table)).to(torch.float32).to(self.model.device)
            for table in tables
        )
        return e_x, e_out

    @property
    def shapes(self) -> list[Shape]:
        """The shapes to choose from: eager ones only where there is no compiled code."""
        compiled = self._compiled
        eager = [shape for shape in self.eager_shapes if shape.rows not in compiled]
        return eager + [Shape(size, compiled=True) for size in compiled]

    @property
    def eager_shapes(self) -> list[Shape]:
        """The shapes that run whatever happens."""
        return [Shape(size) for size in self._sizes]

    def add_compiled(self, rows: int, forward: Forward) -> None:
        """Offer compiled code (x, t, labels) → raw output for batches of `rows`. Any thread."""
        self._compiled = {**self._compiled, rows: forward}  # the engine may be reading the old one

    def evaluate(self, inputs: Inputs, shape: Shape) -> tuple[Tensor, Tensor | None]:
        """ε̂, or ε_u + g(ε_c − ε_u) where guided, and v of a learned variance: [M, C, H, W].

        Raises TaskError if the rows do not fit the shape, and whatever the network raises.
        """
        x, t = inputs.x, inputs.t
        samples, channels = x.shape[:2]
        if inputs.guided is not None:
            x, t = torch.cat([x, x[inputs.guided]]), torch.cat([t, t[inputs.guided]])
        out = self.output(x, t, inputs.labels, shape)
        eps = self._eps_from_output(out[:, :channels], x, t)
        v = out[:samples, channels:] if out.shape[1] > channels else None
        if inputs.guided is None or inputs.guidance is None:
            return eps, v
        conditional, unconditional = eps[:samples], eps[samples:]
        g = inputs.guidance.view(-1, 1, 1, 1)
        mixed = unconditional + g * (conditional[inputs.guided] - unconditional)
        return conditional.index_copy(0, inputs.guided, mixed), v

    def output(self, x: Tensor, t: Tensor, labels: Tensor | None, shape: Shape) -> Tensor:
        """The raw output, float32 [N, C or 2C, H, W], of a batch padded to the shape."""
        rows = x.shape[0]
        self.uses[rows] += 1
        padding = shape.rows - rows
        if padding < 0:
            raise TaskError(f"{rows} rows do not fit a batch of {shape.rows}")
        if padding:
            x, t = _pad(x, padding), _pad(t, padding)
            labels = None if labels is None else _pad(labels, padding)
        forward = self._compiled[shape.rows] if shape.compiled else self.eager
        return forward(x.to(self.dtype), t, labels).to(torch.float32)[:rows]

    def _eps_from_output(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self.model.config.prediction == "epsilon":
            return out
        e_x, e_out = self._e_x[t].view(-1, 1, 1, 1), self._e_out[t].view(-1, 1, 1, 1)
        return e_x * x + e_out * out

    def eager(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The raw output, uncompiled, of a batch in the network's own data type."""
        out: Tensor = self._fast.network(x, t, labels)
        return out

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Run small batches, so that the first request finds kernels ready and a rate known."""
        for shape in [shape for shape in self.shapes if shape.rows in WARM_UP_SIZES or self.exact]:
            x = torch.zeros(shape.rows, *self.model.shape, device=self.model.device)
            t = torch.zeros(shape.rows, dtype=torch.long, device=self.model.device)
            labels = t if self.model.config.network.num_classes else None
            for _ in range(2):
                began = time.perf_counter()
                self.output(x, t, labels, shape).sum().item()  # waits for the device
                self.costs.record(shape, time.perf_counter() - began)

    @torch.inference_mode()
    def _exact_size(self) -> int:
        """The largest batch whose rows were found, by trial, not to depend on place or mates."""
        generator = torch.Generator().manual_seed(0)
        for size in EXACT_SIZES[:-1]:
            x = torch.randn(size, *self.model.shape, generator=generator).to(self.model.device)
            t = torch.arange(size, device=self.model.device) % self.model.schedule.T
            classes = self.model.config.network.num_classes
            labels = t % classes if classes else None
            if self._rows_stand_alone(x, t, labels):
                return size
        return EXACT_SIZES[-1]

    def _rows_stand_alone(self, x: Tensor, t: Tensor, labels: Tensor | None) -> bool:
        """Whether a turned batch gives the turned result, and row 0 does not see its mates."""
        size = x.shape[0]
        whole = self.eager(x, t, labels)
        for k in sorted({1, size // 2, size - 1}):
            turned_labels = None if labels is None else labels.roll(k)
            if not torch.equal(
                self.eager(x.roll(k, 0), t.roll(k), turned_labels), whole.roll(k, 0)
            ):
                return False
        first_labels = None if labels is None else labels[:1].expand(size)
        alone = self.eager(x[:1].repeat(size, 1, 1, 1), t[:1].expand(size), first_labels)
        return torch.equal(alone[:1], whole[:1])


def _pad(v: Tensor, rows: int) -> Tensor:
    return torch.cat([v, v[:1].expand(rows, *v.shape[1:])])
