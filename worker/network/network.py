"""ε_θ in the form that runs fastest here: data type, memory layout, batch shapes, guidance."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion import cores
from diffusion.model import Estimate, Model
from diffusion.speed import fast_dtype, prepare
from worker.network.costs import CostModel, Shape
from worker.network.out_of_memory import is_out_of_memory

# A CPU gains nothing from one more row of padding, and its kernels are set up anew for each shape.
EAGER_SIZES = (
    1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024,
)  # fmt: skip
EXACT_SIZES = (8, 4, 2, 1)
WARM_UP_SIZES = (1, 4, 16, 64)
WARM_UP_S = 0.3  # for each: a size is not tried that would take longer
WARM_UPS = 5  # the quickest counts
ANY_ROWS = 0  # of code that serves batches of all sizes
MOST_AT_ONCE = 16  # rows a call of compiled code on one core: no size is faster
Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def worker_dtype(model: Model) -> torch.dtype:
    """bfloat16 where a timed probe finds it faster; a CPU without its instructions is not asked."""
    if model.device.type == "cpu" and not _cpu_has_bf16():
        return torch.float32
    return fast_dtype(model)


def _cpu_has_bf16() -> bool:
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")


class Tile(NamedTuple):
    """Rows that a network is called with, and the CPU threads of the call: one compiled code."""

    rows: int  # or ANY_ROWS
    threads: int

    def __str__(self) -> str:
        return f"{self.rows or 'any number of'} rows at once"


class BatchError(ValueError):
    """Rows that do not fit the batch they are to be evaluated in."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """One network call for M samples, G of them guided: M + G rows of the batch.

    x: float32 [M, C, H, W]; t: int64 [M], or float64 for times between; labels: int64 [M + G] or
    None, the last G the null label; guided: int64 [G], the samples that have a second row;
    guidance: float32 [G].
    """

    x: Tensor
    t: Tensor
    labels: Tensor | None = None
    guided: Tensor | None = None
    guidance: Tensor | None = None


class Network:
    """ε_θ of one model, ready for batches of any mix of timesteps, labels and guidance.

    dtype: of weights and activations behind the first layer, which takes x_t in float32; ε̂ comes
    back in float32. exact: the result of a row
    depends on neither its place nor its neighbours, to the bit: eager float32, one batch shape, or
    each row in a call of its own where rows of no batch are so.
    in_process: compiled code is made in this process, one for batches of all sizes, and not a
    package of a size each (None: on all devices but a CPU).
    """

    def __init__(
        self,
        model: Model,
        *,
        dtype: torch.dtype,
        max_rows: int,
        exact: bool = False,
        in_process: bool | None = None,
    ) -> None:
        self.model = model
        self.in_process = model.device.type != "cpu" if in_process is None else in_process
        self.dtype = torch.float32 if exact else dtype
        self._fast = prepare(model, dtype=self.dtype)
        self._compiled: dict[Tile, Forward] = {}
        self.uses: Counter[int] = Counter()  # steps by their rows
        self.exact = exact
        sizes = tuple(size for size in EAGER_SIZES if size <= max_rows)
        exact_size = self._exact_size() if exact else 0
        self._one_by_one = exact_size == 1
        if self._one_by_one:
            self._eager = _shapes((1, 2))  # the two rows of a guided sample belong to one step
        else:
            self._eager = _shapes((exact_size,) if exact else sizes)
        self._to_compile = _shapes(sizes, compiled=True)
        if not self.in_process and not model.is_large:
            self._to_compile = [Shape(size, compiled=True) for size in _even(max_rows)]
        self.costs = CostModel()
        self._warm_up()

    @property
    def shapes(self) -> list[Shape]:
        """The shapes to choose from: eager ones only where there is no compiled code for as many
        rows, or for more than half of them."""
        code = self._compiled
        ready = [shape for shape in self._to_compile if self.tile(shape.rows) in code]
        served = {rows for shape in ready for rows in range(shape.rows, 2 * shape.rows)}
        rest = [shape for shape in self._eager if shape.rows not in served]
        return sorted(ready + rest, key=lambda shape: shape.rows)

    @property
    def eager_shapes(self) -> list[Shape]:
        """The shapes that run whatever happens."""
        return self._eager

    def provenance(self) -> dict[str, Any]:
        """All beside weights, software and device that rounding depends on; JSON."""
        made: dict[str, Any] = {"dtype": str(self.dtype).removeprefix("torch."), "code": "eager"}
        if self._compiled:
            batches = [shape.rows for shape in self.shapes if shape.compiled]
            made |= {"code": "compiled", "compiled_batches": batches}
        return made | {"threads": cores.count()}

    def tile(self, rows: int) -> Tile:
        """What compiled code is called with for a batch of `rows`, as often as it needs.

        On a GPU the whole batch, whatever its size. On a CPU of few sizes, since each takes half a
        minute to compile: 1, 2, 4, 8 and 16 rows serve all batches. From 16 a core on it is two
        calls at least, of which whichever core is done takes the next.
        """
        if self.in_process:
            return Tile(ANY_ROWS, 1)
        parts, threads = cores.deal(rows, cores.count(), large=self.model.is_large)
        if rows > 1 and not self.model.is_large:  # Python holds up no part of compiled code
            parts, threads = min(rows, cores.count()), 1
        each = 1 << (-(-rows // parts) - 1).bit_length()
        return Tile(min(each, max(8, each // 2), MOST_AT_ONCE), threads)

    def add_compiled(self, tile: Tile, forward: Forward) -> None:
        """Offer compiled code (x, t, labels) → raw output, to be called by several threads.

        Any thread may offer it.
        """
        self._compiled = {**self._compiled, tile: forward}  # the engine may be reading the old one

    def evaluate(self, inputs: Inputs, shape: Shape) -> Estimate:
        """What the network finds in each sample; with ε_u + g(ε_c − ε_u) for ε where guided.

        v of a learned variance is as with the label alone. Raises BatchError if the rows do not fit
        the shape, and whatever the network raises.
        """
        x, t = inputs.x, inputs.t
        if inputs.guided is not None:
            x, t = torch.cat([x, x[inputs.guided]]), torch.cat([t, t[inputs.guided]])
        out = self.output(x, t, inputs.labels, shape)
        if inputs.guided is None or inputs.guidance is None:
            return self.model.read(out, x, t)
        samples, channels = inputs.x.shape[:2]
        conditional, unconditional = out[:samples], out[samples:, :channels]
        g = inputs.guidance.view(-1, 1, 1, 1)
        labelled = conditional[inputs.guided, :channels]
        # All is linear in the output, so the mixed one stands for the mixed ε̂ and x̂_0.
        mixed = conditional.clone()
        mixed[inputs.guided, :channels] = unconditional + g * (labelled - unconditional)
        return self.model.read(mixed, inputs.x, inputs.t)

    def output(self, x: Tensor, t: Tensor, labels: Tensor | None, shape: Shape) -> Tensor:
        """The raw output, float32 [N, C or 2C, H, W], of a batch padded to the shape."""
        rows, t = x.shape[0], t.to(torch.float32)  # one type, for compiled code
        self.uses[rows] += 1
        if rows > shape.rows:
            raise BatchError(f"{rows} rows do not fit a batch of {shape.rows}")
        tile, wanted = self.tile(shape.rows), shape.rows
        if shape.compiled and tile.rows != ANY_ROWS:
            wanted = -(-shape.rows // tile.rows) * tile.rows
        padding = wanted - rows
        if padding:
            x, t = _pad(x, padding), _pad(t, padding)
            labels = None if labels is None else _pad(labels, padding)
        if self._one_by_one:
            calls = [
                self.eager(
                    x[i : i + 1], t[i : i + 1], None if labels is None else labels[i : i + 1]
                )
                for i in range(wanted)
            ]
            return torch.cat(calls)[:rows]
        if not shape.compiled:
            return self.eager(x, t, labels)[:rows]
        return self.compiled(x, t, labels, tile)[:rows]

    def eager(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The raw output, uncompiled, float32; x: float32."""
        return self._fast.output(x, t, labels)

    def compiled(self, x: Tensor, t: Tensor, labels: Tensor | None, tile: Tile) -> Tensor:
        """The raw output, float32, by compiled code; x: float32, of whole tiles."""
        forward = self._compiled[tile]
        if tile.rows == ANY_ROWS:
            return forward(x, t, labels).to(torch.float32)
        parts, at_once = x.shape[0] // tile.rows, max(1, cores.count() // tile.threads)
        out = cores.side_by_side(
            forward, x, t, labels, parts=parts, threads=tile.threads, at_once=at_once
        )
        return out.to(torch.float32)

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Run growing batches, so that the first request finds kernels ready, and an estimate the
        rate of full batches: that of single samples is many times too low."""
        for shape in [shape for shape in self.shapes if shape.rows in WARM_UP_SIZES or self.exact]:
            if shape.rows > WARM_UP_SIZES[1] and 2 * self.costs.seconds(shape) > WARM_UP_S:
                break
            x = torch.zeros(shape.rows, *self.model.shape, device=self.model.device)
            t = torch.zeros(shape.rows, dtype=torch.long, device=self.model.device)
            labels = t if self.model.config.network.num_classes else None
            started = time.perf_counter()
            for run in range(WARM_UPS):  # two at least: the first is not counted
                began = time.perf_counter()
                if run > 1 and began - started > WARM_UP_S:
                    break
                try:
                    self.output(x, t, labels, shape).sum().item()  # waits for the device
                except Exception as error:
                    if shape.rows > 1 and is_out_of_memory(error):
                        return  # no fault of the model: the engine halves what does not fit
                    raise
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


def _shapes(sizes: Iterable[int], *, compiled: bool = False) -> list[Shape]:
    """Powers of two, and others for those who fill them."""
    return [Shape(size, compiled, to_fit=size.bit_count() > 1) for size in sizes]


def _even(max_rows: int) -> list[int]:
    """Batches of which each core has as many rows as the others, and a power of two.

    Of 25 rows on two cores 16 at once are done at a rate that is 1.1 times that of all 25, and 1.3
    times that of 32 with padding.
    """
    n = min(cores.count(), max_rows)
    return [*range(1, n), *(n << k for k in range((max_rows // n).bit_length()))]


def example(model: Model, rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """A batch of noise at all sorts of timesteps and labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, *model.shape, generator=generator).to(model.device)
    t = torch.linspace(0, model.schedule.T - 1, rows, device=model.device)
    classes = model.config.network.num_classes
    return x, t, t.long() % classes if classes else None


def _pad(v: Tensor, rows: int) -> Tensor:
    return torch.cat([v, v[:1].expand(rows, *v.shape[1:])])
