"""Layers in the form that is fast on a CPU, each the same function as torch's to rounding.

`double` is taken on a GPU, too; what that needs beside it is in `gpu_layers`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_ATTENDING = 1024  # positions for which the weights of all pairs stay in the cache


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


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√C) v of [N, heads, positions, C], all weights in memory at once.

    The fused kernel's backward is slower; and in bfloat16 its products are done in float32 where
    MKL has no better, at half the speed of torch's own.
    """
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
    out: Tensor = weights @ v
    return out
