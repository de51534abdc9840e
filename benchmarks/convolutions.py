"""Our 3×3 convolutions of float32 beside torch's, one core, layer by layer.

    .venv/bin/python benchmarks/convolutions.py [--rows 16] [--instructions "-mavx2 -mfma"]

For less than the processor has, say so to torch as well: ONEDNN_MAX_CPU_ISA=AVX2.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import winograd

# Channels of x and of y, side of the result, whether of a doubled x: of the MNIST network, and of
# one as wide as the paper's for CIFAR-10.
LAYERS = (
    (32, 32, 32, False),
    (96, 32, 32, False),
    (64, 64, 32, True),
    (64, 64, 16, False),
    (128, 64, 16, False),
    (64, 64, 8, False),
    (128, 128, 32, False),
    (256, 128, 32, False),
)
CALLED = """#include "{kernel}"
extern "C" void convolve(const float* x, const float* u, const float* bias, float* y,
                         const ddpm_winograd::Sizes* sizes) {{
    ddpm_winograd::convolve(x, u, bias, y, *sizes);
}}
"""


def built(instructions: str) -> Callable[..., None]:
    """The code, as GCC makes it for these instructions."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "called.cpp", Path(folder) / "called.so"
        kernel = Path(winograd.__file__).with_name("kernel.h")
        source.write_text(CALLED.format(kernel=kernel))
        options = [
            "-std=c++20",
            "-O1",
            "-ffp-contract=fast",
            "-shared",
            "-fPIC",
            *instructions.split(),
        ]
        subprocess.run(["g++", *options, str(source), "-o", str(library)], check=True)
        convolve: Callable[..., None] = ctypes.CDLL(str(library)).convolve
        return convolve


def best(call: Callable[[], object]) -> float:
    """Milliseconds of the quickest of twenty calls."""
    times = []
    for _ in range(23):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1000 * min(times[3:])


def pointer(v: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(v.data_ptr())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--instructions", default="-march=native", help="options for GCC")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    convolve = built(asked.instructions)
    print(
        "| channels | side | torch, ms | ours, ms | ratio | difference |\n|---|---|---|---|---|---|"
    )
    for c, k, side, doubled in LAYERS:
        of_x = side >> doubled
        x = torch.randn(asked.rows, c, of_x, of_x).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(k, c, 3, 3) / (3 * c**0.5), torch.randn(k)
        y = torch.empty(asked.rows, k, side, side).contiguous(memory_format=torch.channels_last)
        u = winograd.transformed(weight)
        sizes = (ctypes.c_size_t * 6)(asked.rows, side, side, c, k, doubled)
        given = [pointer(v) for v in (x, u, bias, y)]
        seen = F.interpolate(x, scale_factor=2.0) if doubled else x
        packed = weight.contiguous(memory_format=torch.channels_last)
        theirs = best(lambda s=seen, w=packed, b=bias: F.conv2d(s, w, b, padding=1))
        ours = best(lambda g=given, s=sizes: convolve(*g, s))
        exact = F.conv2d(seen, weight, bias, padding=1)
        off = float((y - exact).abs().max() / exact.abs().max())
        named = f"{c} → {k}{', doubled' if doubled else ''}"
        ratio = theirs / ours
        print(f"| {named} | {side} | {theirs:.2f} | {ours:.2f} | {ratio:.2f} | {off:.0e} |")


if __name__ == "__main__":
    main()
