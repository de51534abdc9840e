"""Layers in the form that is fast on a CPU, each the same function as torch's to rounding.

`double` is taken on a GPU, too; what that needs beside it is in `gpu_layers`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ATTENDING = 1024  # positions for which the weights of all pairs stay in the cache
# Of 1, a, a² … in e^(a/8) for 0 ≤ a ≤ 12. The least relative errors: 8e-6, and 2e-8.
_ROOT = {
    torch.bfloat16: (
        0.999992407, 0.125054959, 0.00775175414, 0.000348923866, 6.29390838e-06, 5.27663666e-07,
    ),
    torch.float32: (
        1.0, 0.125000238, 0.00781203434, 0.000325859612, 1.00545485e-05, 2.76053385e-07,
        3.15486681e-09, 1.97183436e-10,
    ),
}  # fmt: skip


def group_norm(x: Tensor, groups: int, *, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`F.group_norm` of x [N, C, H, W] as one scale and one shift a channel, found in float32.

    Inductor, left to itself, looks up the statistics of a channel's group for each element, in
    scalar code. A small matrix product with the membership of channels in groups does it once.
    """
    # Autocast would round the moments to bfloat16, whose difference is the variance.
    with torch.autocast(x.device.type, enabled=False):
        n, channels = x.shape[:2]
        each = channels // groups
        member = torch.arange(channels) // each == torch.arange(groups)[:, None]
        to_channels = member.to(torch.float32)  # [G, C]
        to_groups = to_channels.T / each  # [C, G]
        x32 = x.to(torch.float32)
        moments = torch.cat([x32.mean((2, 3)), x32.square().mean((2, 3))]) @ to_groups
        mean, mean_square = moments[:n], moments[n:]  # [N, G]
        inverse = torch.rsqrt((mean_square - mean.square()).clamp(min=0) + eps)
        spread = torch.cat([inverse, -mean * inverse]) @ to_channels  # [2N, C]
        scale, shift = spread[:n] * weight, spread[n:] * weight + bias
        return (x32 * scale[:, :, None, None] + shift[:, :, None, None]).to(x.dtype)


def has_exp(dtype: torch.dtype) -> bool:
    """Whether `silu_forward` and `attend_forward` take this type."""
    return dtype in _ROOT


def _exp(a: Tensor, dtype: torch.dtype) -> Tensor:
    """e^a of a ≥ 0 up to 12 as exact as the type wants it: to 6e-5, a thirtieth of what bfloat16
    resolves, or to the 2e-6 of three squares in float32. Less beyond, where 1/e^a is nothing to 1.

    As (e^(a/8))⁸: it needs no cases, and ends in ∞. Inductor would call a function for each sixteen
    numbers, which takes more time than all else that is done with them.
    """
    *lower, before, last = _ROOT[dtype]
    root = last * a + before
    for coefficient in reversed(lower):
        root = root * a + coefficient
    return root.square().square().square()


def silu_forward(x: Tensor) -> Tensor:
    """x·σ(x) = max(x, 0) − |x|/(1 + e^|x|), without a gradient."""
    x32 = x.to(torch.float32)
    size = x32.abs()
    return (x32.relu() - size / (1 + _exp(size, x.dtype))).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """x·σ(x), for training: with an exp, Inductor's backward keeps σ(x) in memory, in float32."""
    exponent = (-math.log2(math.e) * x).clamp(max=126)  # beyond, the gradient would be 0·∞
    return x / (1 + torch.exp2(exponent))


def double(x: Tensor) -> Tensor:
    """Nearest-neighbour doubling of [N, C, H, W]: its backward sums four pixels, not scatters."""
    n, c, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None, :]  # channels last, as the convolutions
    doubled = pixels.expand(n, height, 2, width, 2, c).reshape(n, 2 * height, 2 * width, c)
    return doubled.permute(0, 3, 1, 2)


def doubled_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3×3 convolution, padded by 1, of the nearest-neighbour doubled x [N, C, H, W].

    Of the nine weights several meet the same pixel of x: two of three in each direction. So an
    output in even or odd rows and columns is a 2×2 convolution of x, with sums of the weights: the
    four are one, of four times the channels, with half the products.
    """
    n, channels, height, width = x.shape
    out = weight.shape[0]
    meets = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # [even/odd, 2, 3]
    weights = torch.einsum("yai,xbj,ocij->yxocab", meets, meets, weight.to(torch.float32))
    weights = weights.reshape(4 * out, channels, 2, 2).to(weight.dtype)
    four = F.conv2d(x, weights, None if bias is None else bias.repeat(4), padding=1)
    pixels = four.permute(0, 2, 3, 1).contiguous()  # [N, H + 1, W + 1, 4·out]
    # Of an odd row the pixel is one further down than of an even one, and so of columns.
    down, right = (width + 1) * 4 * out, 4 * out
    doubled = pixels.as_strided(
        (n, height, 2, width, 2, out),
        ((height + 1) * down, down, down + 2 * out, right, right + out, 1),
    )
    return doubled.reshape(n, 2 * height, 2 * width, out).permute(0, 3, 1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√C) v of [N, heads, positions, C], all weights in memory at once.

    The fused kernel's backward is slower; and in bfloat16 its products are done in float32 where
    MKL has no better, at half the speed of torch's own.
    """
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
    out: Tensor = weights @ v
    return out


def attend_forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `attend`, without a gradient: what is divided by the sum is the product."""
    scores = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).to(torch.float32)
    weights = 1 / _exp(scores.amax(-1, keepdim=True) - scores, v.dtype)
    out: Tensor = (weights.to(v.dtype) @ v) / weights.sum(-1, keepdim=True)
    return out.to(v.dtype)
