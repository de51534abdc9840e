"""A model made ready for fast evaluation, and the number format that is fastest here."""

from __future__ import annotations

import functools
import math
import time
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import cores
from diffusion.graphs import Graphs
from diffusion.model import Model
from diffusion.unet import Conv3x3, UNet

CLEARLY = 0.7  # of the time in float32
TURNS = 10


def prepare(model: Model, *, dtype: torch.dtype = torch.float32, compile: bool = False) -> Model:
    """A copy of the model for fast evaluation: `dtype`, channels last, compiled if asked.

    The first layer takes x_t in float32 at least, and hands on `dtype`: see `UNet`. On a GPU an
    evaluation is one launch, see `diffusion.graphs`.
    """
    network = deepcopy(model.network).eval().requires_grad_(False)
    first = {"dtype": torch.promote_types(dtype, torch.float32)}
    conv_in = deepcopy(network.conv_in).to(**first, memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = network.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.conv_in = conv_in
    for layer in network.modules():
        if isinstance(layer, Conv3x3):
            layer.fewer_products = True
    on_cpu = model.device.type == "cpu"
    if compile:  # frozen: weights are constants, which convolutions take packed
        options = {**cores.compile_options(), "freezing": True} if on_cpu else None
        network.compile(options=options)
    fast = Model(model.config, network, model.digest, presets=model.presets, tuned=model.tuned)
    if not on_cpu:
        fast.evaluator = Graphs(_any_batch(network) if compile else network)
    return fast


def _any_batch(network: UNet) -> cores.Network:
    """A compiled network whose code is made for batches of any size, at the first of them."""

    def evaluate(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        for given in (x, t, labels):
            if given is not None:
                torch._dynamo.maybe_mark_dynamic(given, 0)
        out: Tensor = network(x, t, labels)
        return out

    return evaluate


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
