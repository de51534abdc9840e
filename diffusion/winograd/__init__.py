"""3×3 convolutions of float32 on a CPU with a quarter of the products, in compiled code.

Winograd's F(4×4, 3×3), after Lavin and Gray 2016 (arXiv 1509.09308), in `kernel.h`, which compiled
code takes in. It is for processors whose products of bfloat16 are no faster than those of float32:
there convolutions are most of an evaluation, and torch's own do them by the definition.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.cpu_layers import double

CHANNELS, SIDE = 16, 4  # multiples
# Of each batch that code is for; with fewer the weights, four times as many, take longer to read
# than to use.
FEWEST_PIXELS = 64
# Pairs of channels; compiled code keeps four times the weights for each size of batch.
MOST_PAIRS = 2**15
# The matrices of the paper, for the points 0, ±1, ±2 and ∞.
_BT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_AT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def _no_team() -> bool:
    """A constant for torch.compile, which compiles anew where it changes. Asked itself, it would
    compile what comes before and after the question apart."""
    return torch.get_num_threads() == 1


# What torch.compiler.assume_constant_result does, but that takes a second of every start to import.
_no_team._dynamo_marked_constant = True  # type: ignore[attr-defined]


def suits(x: Tensor, weight: Tensor, *, doubled: bool = False) -> bool:
    """Whether `convolution` takes x [N, C, H, W] and weight [K, C, 3, 3], and gains by it."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # not at every start

    n, channels, *sides = x.shape
    height, width = (2 * side if doubled else side for side in sides)
    return (
        sys.platform == "linux"  # where g++ is mostly GCC: others were not measured
        and _no_team()  # it has none itself, and with one torch's own are soon faster
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and channels % CHANNELS == weight.shape[0] % CHANNELS == 0
        and channels * weight.shape[0] <= MOST_PAIRS
        and height % SIDE == width % SIDE == 0
        and statically_known_true(n * height * width >= FEWEST_PIXELS)
    )


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *, doubled: bool = False) -> Tensor:
    """`F.conv2d` of x [N, C, H, W], padded by 1, to ten times the rounding of float32's own.

    doubled: of the nearest-neighbour doubled x.
    """
    if bias is None:
        bias = weight.new_zeros(weight.shape[0])
    x = x.contiguous(memory_format=torch.channels_last)
    out: Tensor = torch.ops.ddpm.winograd(x, transformed(weight), bias, int(doubled))
    return out


def transformed(weight: Tensor) -> Tensor:
    """G g Gᵀ of each pair of channels: [36, C, K] of [K, C, 3, 3]."""
    g = torch.tensor(_G)
    places = torch.einsum("ai,bj,ocij->abco", g, g, weight)
    return places.reshape(-1, weight.shape[1], weight.shape[0]).contiguous()


def code_options() -> dict[str, Any]:
    """For Inductor: the operation's code, where it would go back to Python."""
    # What stands here is written as `extern …;` within an extern "C": the declaration of a function
    # that some library has. It may as well be the function.
    folder = Path(__file__).parent
    code = "\n".join((folder / name).read_text("utf-8") for name in ("kernel.h", "aoti.h"))
    shims = {torch.ops.ddpm.winograd.default: [f'"C++" {{\n{code}\n}}']}
    return {"aot_inductor.custom_ops_to_c_shims": shims}


@torch.library.custom_op(
    "ddpm::winograd", mutates_args=(), tags=[torch.Tag.needs_fixed_stride_order]
)
def _winograd(x: Tensor, u: Tensor, bias: Tensor, doubled: int) -> Tensor:
    """The same by torch's operations, where no compiler put in the code: slow.

    x: [N, C, H, W]; u: `transformed`. Returns [N, K, H, W], channels last, twice as large of a
    doubled x.
    """
    x = F.pad(double(x) if doubled else x, (1, 1, 1, 1))
    bt, at = torch.tensor(_BT, dtype=x.dtype), torch.tensor(_AT, dtype=x.dtype)
    tiles = x.unfold(2, 6, SIDE).unfold(3, 6, SIDE)  # [N, C, H/4, W/4, 6, 6]
    v = torch.einsum("ai,bj,nchwij->abnhwc", bt, bt, tiles)
    m = torch.einsum("abnhwc,abck->abnhwk", v, u.view(6, 6, *u.shape[1:]))
    y = torch.einsum("ya,xb,abnhwk->nhywxk", at, at, m).flatten(3, 4).flatten(1, 2)
    return (y + bias).permute(0, 3, 1, 2)


@_winograd.register_fake
def _(x: Tensor, u: Tensor, bias: Tensor, doubled: int) -> Tensor:  # noqa: ARG001
    n, _, height, width = x.shape
    sizes = (n, u.shape[2], height << doubled, width << doubled)
    return x.new_empty(sizes).to(memory_format=torch.channels_last)
