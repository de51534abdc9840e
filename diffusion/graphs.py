"""Evaluations on a GPU as one launch each: CUDA graphs, one for each shape of batch.

An evaluation is a hundred small kernels or more, and Python takes longer to start them than a GPU
takes to run those of a small batch. What was recorded once starts as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion.cores import Network

MOST = 32  # graphs of a network; each holds the addresses of its own input
WARM_UPS = 2  # calls of a shape before it is recorded: kernels are chosen, code is compiled


class _Graph(NamedTuple):
    """A recorded evaluation: what it reads, and what it writes."""

    graph: Any  # torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    out: Tensor


class Graphs:
    """A network that is evaluated as a CUDA graph wherever that is possible: in inference mode.

    Called as the network is, with x [N, C, H, W], t [N] and labels [N] or None; the result is the
    caller's own. A shape is recorded once it has been called `WARM_UPS` times. Any thread may call.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._recorded: dict[Hashable, _Graph | None] = {}  # None: cannot be
        self._calls: dict[Hashable, int] = {}
        self._pool: Any = None  # of memory: graphs run one after the other, and share it
        self._lock = threading.Lock()

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        if not torch.is_inference_mode_enabled() or not x.is_cuda:
            return self._network(x, t, labels)
        inputs = (x, t) if labels is None else (x, t, labels)
        key = tuple((v.shape, v.dtype, v.device) for v in inputs)
        with self._lock:
            found = self._recorded.get(key) or self._record(key, inputs)
            if found is None:
                return self._network(x, t, labels)
            for held, given in zip(found.inputs, inputs, strict=True):
                held.copy_(given)
            found.graph.replay()
            return found.out.clone()  # the next replay writes over it

    def _record(self, key: Hashable, inputs: tuple[Tensor, ...]) -> _Graph | None:
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if key in self._recorded or calls <= WARM_UPS or len(self._recorded) >= MOST:
            return None
        try:
            self._recorded[key] = self._capture(inputs)
        except RuntimeError:  # something in it cannot be recorded, or there is no memory for it
            torch.cuda.synchronize(inputs[0].device)
            self._recorded[key] = None
        return self._recorded[key]

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Graph:
        held = tuple(v.clone(memory_format=torch.contiguous_format) for v in inputs)
        x, t, *labels = held
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with what they do on the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = self._network(x, t, labels[0] if labels else None)
        return _Graph(graph, held, out)
