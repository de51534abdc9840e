"""A model made ready for fast evaluation, and the number format that is fastest here."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import cores
from diffusion.checks import check_flags
from diffusion.graphs import Graphs
from diffusion.model import Model
from diffusion.unet import Conv3x3, UNet

CLEARLY = 0.7  # of the time in float32
TURNS = 10


class CompileError(RuntimeError):
    """Code that could not be made; the message says why."""


def prepare(model: Model, *, dtype: torch.dtype = torch.float32, compile: bool = False) -> Model:
    """A copy of the model for fast evaluation: `dtype`, channels last, compiled if asked.

    The first layer takes x_t in float32 at least, and hands on `dtype`: see `UNet`. On a GPU an
    evaluation is one launch, see `diffusion.graphs`. Compiled, its first evaluation takes a minute,
    and raises CompileError where there is no compiler that works. Raises ValueError naming a bad
    argument.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype = {dtype!r:.80}: must be a floating dtype, such as torch.bfloat16")
    check_flags(compile=compile)
    network = deepcopy(model.network).eval().requires_grad_(False)
    first = {"dtype": torch.promote_types(dtype, torch.float32)}
    conv_in = deepcopy(network.conv_in).to(**first, memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = network.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.conv_in = conv_in
    for layer in network.modules():
        if isinstance(layer, Conv3x3):
            layer.fewer_products = True
    on_cpu = model.device.type == "cpu"
    if compile:
        with compiling():
            network.compile(options=cores.compile_options() if on_cpu else None)
    fast = Model(model.config, network, model.digest, presets=model.presets, tuned=model.tuned)
    if compile:
        fast.evaluator = AnyBatch(network)
    if not on_cpu:
        fast.evaluator = Graphs(fast.evaluator)
    return fast


class AnyBatch:
    """A compiled network, called as it is: few kinds of code, made at the first call, serve all.

    What torch.compile would take for a call of another kind, and compile for a minute, is brought
    into one form. Code is for one row, for a few or for many; where there is only code for more,
    fewer rows run as so many.
    """

    is_compiled = True  # see `cores.evaluate`

    def __init__(self, network: UNet) -> None:
        self._network = network
        self._met: set[tuple[int, Hashable]] = set()

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The raw output, [N, …] of x, t and labels [N, …]. Raises CompileError."""
        rows, kind = x.shape[0], (x.dtype, labels is None, torch.is_inference_mode_enabled())
        least = _fewest(rows, x.device.type)
        if (least, kind) not in self._met:
            larger = [fewest for fewest, met in self._met if met == kind and fewest > least]
            least = min(larger, default=least)
        if rows < least:
            chosen = torch.arange(least, device=x.device).clamp_max(rows - 1)
            x, t, labels = x[chosen], t[chosen], labels if labels is None else labels[chosen]
        met = (least, kind)
        with compiling(), nullcontext() if met in self._met else _of_this_model_alone():
            out: Tensor = self._network(
                _plain(x), _plain(t.to(torch.float32)), labels if labels is None else _plain(labels)
            )
        self._met.add(met)
        return out[:rows]


def _fewest(rows: int, device: str) -> int:
    """The fewest rows for which torch.compile makes the same code as for so many.

    For a CPU it asks at each convolution whether there are 16: from there on oneDNN does those of
    one pixel, too.
    """
    return 16 if device == "cpu" and rows >= 16 else min(rows, 2)


@contextmanager
def _of_this_model_alone() -> Iterator[None]:
    """In here torch.compile makes code that has nothing to do with another model's.

    The layers of all models are the same Python code, to which torch.compile keeps what it made. So
    one must not take what changed from another for what will change, nor reach a limit of 8.
    """
    import torch._dynamo.config

    dynamo = {"automatic_dynamic_shapes": False, "recompile_limit": 256}
    with torch._dynamo.config.patch(dynamo):
        yield


@contextmanager
def compiling() -> Iterator[None]:
    """In here torch.compile is called, perhaps for the first time. Raises CompileError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not _is_of_compiling(error):
            raise
        raise CompileError(f"torch.compile failed: {_reason(error)}") from error


def _is_of_compiling(error: OSError | RuntimeError) -> bool:
    """Or of what was compiled. A network touches no file, but its compiler a folder for code."""
    if isinstance(error, OSError):
        return True
    from torch._dynamo.exc import TorchDynamoException  # takes a second, and needs the folder

    return isinstance(error, TorchDynamoException)


def _reason(error: BaseException) -> str:
    """In one line: what went wrong inside of torch.compile, of a compiler its first error."""
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if "error:" in line.lower()), "".join(lines[:1]))
    return f"{type(error).__name__}: {said}"


def _plain(v: Tensor) -> Tensor:
    """v [N, …] in the one form that code is made for."""
    v = v.contiguous().flatten().view(v.shape)  # strides of dimensions of size 1 may be any
    if v.is_inference() != torch.is_inference_mode_enabled():
        v = v.clone()
    torch._dynamo.maybe_mark_dynamic(v, 0)
    return v


def fast_dtype(model: Model) -> torch.dtype:
    """bfloat16 if this device's convolutions are clearly faster in it, else float32: timed once.

    Convolutions alone, since a compiler makes the rest of the network as fast in either.
    """
    network = model.config.network
    return _timed(model.device, network.image_size, network.channels[0])


@functools.cache  # a second answer might differ, and with it the rounding of the same seed's image
def _timed(device: torch.device, side: int, width: int) -> torch.dtype:
    return torch.bfloat16 if cost_of_bfloat16(device, side, width) < CLEARLY else torch.float32


@torch.inference_mode()
def cost_of_bfloat16(device: torch.device, side: int, width: int) -> float:
    """The time of a 3×3 convolution of [·, width, side, side] in bfloat16, of that in float32.

    On a CPU the time that this thread had a core, in turns: whatever else runs has no say in it.
    """
    on_cpu = device.type == "cpu"
    clock = time.thread_time if on_cpu else time.perf_counter
    pixels = 2**14 if on_cpu else 2**16  # milliseconds of a core
    x = torch.zeros(max(1, pixels // side**2), width, side, side, device=device)
    weight = torch.zeros(width, width, 3, 3, device=device)
    inputs = {
        dtype: [v.to(dtype, memory_format=torch.channels_last) for v in (x, weight)]
        for dtype in (torch.float32, torch.bfloat16)
    }
    seconds = dict.fromkeys(inputs, math.inf)
    threads = torch.get_num_threads()
    if on_cpu:
        torch.set_num_threads(1)
    try:
        for _ in range(TURNS):  # the first sets the kernel up
            for dtype, (a, b) in inputs.items():
                start = clock()
                F.conv2d(a, b, padding=1)
                _synchronize(device)
                seconds[dtype] = min(seconds[dtype], clock() - start)
    finally:
        if on_cpu:
            torch.set_num_threads(threads)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
