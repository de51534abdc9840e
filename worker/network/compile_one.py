"""Compile one batch shape of one model, in a process of its own (see `worker.network.compiling`).

Arguments: model folder, expected digest, device, data type, rows, CPU threads, package to write.
Rows `ANY_ROWS`: fill Inductor's cache for batches of all sizes, and write a marker.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import diffusion
from diffusion import cores
from diffusion.speed import prepare
from worker.network.in_process import fill_cache
from worker.network.network import ANY_ROWS, example

# Beside a worker that is never idle a third of one core: it is done in a minute or two, and the
# sooner the better, as it repays what it took in as long again.
NICENESS = 3


def main(arguments: list[str]) -> None:
    """Write the package or the marker; it appears whole or not at all."""
    os.nice(NICENESS)
    folder, digest, device, dtype, rows, threads, out = arguments
    torch.set_num_threads(int(threads))  # the generated code has this number built in
    model = diffusion.load(Path(folder), device)
    if model.digest != digest:
        raise SystemExit(f"{folder} has changed")
    if int(rows) == ANY_ROWS:
        fill_cache(model, getattr(torch, dtype), Path(out))
        return
    fast = prepare(model, dtype=getattr(torch, dtype))
    x, t, labels = example(model, int(rows))
    temporary = Path(out).with_suffix(".tmp.pt2")
    with torch.no_grad():  # where gradients might be wanted, nothing is frozen
        program = torch.export.export(fast.network, (x, t, labels), strict=False)
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(temporary),
            inductor_configs={
                "freezing": True,  # weights are constants: convolutions prepack them
                **cores.code_options(),
            },
        )
    temporary.replace(out)


if __name__ == "__main__":
    main(sys.argv[1:])
