"""What a processor's own convolutions and matrix products allow a network: nothing but them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from diffusion import cores
from diffusion.model import Model
from worker.network.network import example

Call = Callable[[], object]


@torch.inference_mode()
def limit_rate(model: Model, rows: int, seconds: float) -> float:
    """Rows/s of a CPU that does the convolutions and linear layers of batches and nothing else.

    model: as `diffusion.speed.prepare` made it. Each core has its rows, as in an evaluation.
    """
    x, t, labels = example(model, rows)
    parts, threads = cores.deal(rows, cores.count(), large=model.is_large)
    calls = [
        partial(
            _all, products(model.network, x[a:b], t[a:b], None if labels is None else labels[a:b])
        )
        for a, b in pairwise(cores.cuts(rows, parts))
    ]
    return rows / fastest(lambda: cores.together(calls, threads=threads), seconds)


def fastest(call: Call, seconds: float) -> float:
    """Seconds of the quickest third of the calls that so long a time holds; three at least."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    best = sorted(times)[: max(1, len(times) // 3)]
    return sum(best) / len(best)


def products(network: nn.Module, *inputs: Tensor | None) -> list[Call]:
    """A call for each convolution and linear layer of one evaluation, on what it is given there."""
    calls: list[Call] = []

    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        calls.append(_product(module, given[0].clone(memory_format=torch.preserve_format)))

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _product(module: nn.Module, x: Tensor) -> Call:
    if not isinstance(module, nn.Conv2d) or not torch._C._has_mkldnn:
        return partial(_mode(module), x)
    layout = (list(module.padding), list(module.stride), list(module.dilation), module.groups)
    # Weights in the processor's own order, which is done once, and not at each call.
    packed = torch.ops.mkldnn._reorder_convolution_weight(module.weight, *layout, list(x.shape))
    call = torch.ops.mkldnn._convolution_pointwise.default
    return _mode(partial(call, x, packed, module.bias, *layout, "none", [], ""))


def _mode(call: Callable[..., object]) -> Callable[..., object]:
    """In every thread: the mode of the one that measures is its own."""

    def run(*arguments: Tensor) -> object:
        with torch.inference_mode():
            return call(*arguments)

    return run


def _all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
