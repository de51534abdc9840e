"""Compiled code made in the process that runs it, of what another process left in Inductor's cache.

The way of a GPU, where one compilation serves batches of all sizes, and where a package compiled
ahead of time ends the process that calls it. What takes a minute is done once, at low priority,
elsewhere: this process makes the same calls in the same way, and finds all code ready.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.graphs import WARM_UPS
from diffusion.model import Model
from diffusion.speed import prepare
from worker.network.network import Forward, example

# A batch of one row is code of its own to torch.compile; that of two or more serves all others.
SIZES = (1, 4)


def use_cache(folder: Path) -> None:
    """Let Inductor find and keep its code there, in all of this process from now on."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def build(model: Model, dtype: torch.dtype, *, threads: int | None = None) -> Forward:
    """The compiled network (x, t, labels) → raw output, for batches of any size, in inference mode.

    Takes seconds where the cache has it, else a minute or more. threads: that compile (None: as
    torch sees fit, in processes of their own). Any thread may call what is made, and none compiles
    ever after: a call of a kind not met here runs eagerly. The engine must not stand still for a
    minute, which is what a device that hangs looks like.
    """
    import torch._inductor.config

    fast = prepare(model, dtype=dtype, compile=True)
    network: Any = fast.network
    team = torch.get_num_threads()

    def forward(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        if torch.get_num_threads() != team:  # of the calling thread: with another it runs eagerly
            torch.set_num_threads(team)
        return fast.evaluator(x, t, labels)

    inductor = {} if threads is None else {"compile_threads": threads}
    with torch._inductor.config.patch(inductor), torch.inference_mode():
        for rows in SIZES:
            forward(*example(model, rows))
    network._compiled_call_impl = torch._dynamo.run(network._call_impl)
    return forward


def fill_cache(model: Model, dtype: torch.dtype, marker: Path) -> None:
    """Compile for another process, try the code, and leave a marker that says what there is.

    Code that cannot run ends this process, or raises RuntimeError, and not a worker.
    """
    forward = build(model, dtype)
    with torch.inference_mode():
        for rows in SIZES:
            for _ in range(WARM_UPS + 1):  # recorded as well, see `diffusion.graphs`
                out = forward(*example(model, rows))
            if not bool(out.isfinite().all()):
                raise RuntimeError(f"{rows} rows: compiled code gives values that are not finite")
    made = {"model": model.digest, "dtype": str(dtype), "device": str(model.device)}
    temporary = marker.with_suffix(".tmp")
    temporary.write_text(json.dumps({**made, "torch": torch.__version__}), encoding="utf-8")
    temporary.replace(marker)
