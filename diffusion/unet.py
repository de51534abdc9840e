"""The U-Net ε_θ of Ho et al. 2020, appendix B, with an optional class label.

The default conventions (asymmetric padding on the way down, [sin | cos] time embedding with
`half - 1` in the exponent, GroupNorm ε = 1e-6) are those of the paper's code and of the public
`google/ddpm-*` checkpoints, so that those weights give the same numbers here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion import cpu_layers, gpu_layers, winograd
from diffusion.unet_config import UNetConfig


def timestep_embedding(
    t: Tensor, dim: int, *, freq_shift: float = 1.0, cos_first: bool = False
) -> Tensor:
    """[sin | cos] features of the timestep index t (0..T−1), as in the paper's code.

    t: [N]; returns float32 [N, dim]. Frequencies exp(−ln 10⁴ · k/(dim/2 − freq_shift)).
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    freqs = torch.exp(-math.log(10_000) * k / (half - freq_shift))
    angles = t.to(torch.float32)[:, None] * freqs[None, :]  # [N, half]
    sin, cos = angles.sin(), angles.cos()
    return torch.cat([cos, sin] if cos_first else [sin, cos], dim=1)


@torch.no_grad()
def _scaled_init(layer: nn.Conv2d | nn.Linear, scale: float = 1.0) -> None:
    """Uniform fan-average ("variance scaling") weights, zero bias: the paper's initialiser."""
    receptive = math.prod(layer.weight.shape[2:])
    fan_avg = receptive * (layer.weight.shape[0] + layer.weight.shape[1]) / 2
    bound = math.sqrt(3 * scale / fan_avg)
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _embedding(rows: int, width: int) -> nn.Embedding:
    """nn.Embedding; on "meta" without values, for which torch would load its compiler: a second."""
    weight = torch.empty(rows, width)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding(rows, width, _weight=weight)


NEAR_ZERO = 1e-10  # scale of the layers that close a residual branch


def _compiling_for_cpu(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and x.device.type == "cpu"


def _compiling_for_gpu(x: Tensor) -> bool:
    """In less than float32, whose digits are torch's own layers' to keep."""
    return torch.compiler.is_compiling() and x.is_cuda and x.dtype == torch.bfloat16


def _training_on_cpu(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad and x.device.type == "cpu"


def _evaluating_for_cpu(x: Tensor) -> bool:
    """Compiling for a CPU what no gradient is taken of."""
    return _compiling_for_cpu(x) and not _training_on_cpu(x)


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution of stride 1.

    fewer_products: compiled for a CPU, by `winograd` where that gains. It has no gradient, and its
    code comes with `cores.code_options`: for copies that `diffusion.speed.prepare` makes.
    """

    fewer_products = False

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 3, padding=1)

    def has_fewer(self, x: Tensor, *, doubled: bool = False) -> bool:
        """Whether x, or the doubled x, is to be convolved by `winograd`."""
        evaluating = self.fewer_products and _evaluating_for_cpu(x)
        return evaluating and winograd.suits(x, self.weight, doubled=doubled)

    def forward(self, x: Tensor) -> Tensor:
        if self.has_fewer(x):
            return winograd.convolution(x, self.weight, self.bias)
        return super().forward(x)


class GroupNorm(nn.GroupNorm):
    """GroupNorm; compiled, in a form that the device's compiler makes fast."""

    def forward(self, x: Tensor) -> Tensor:
        if _compiling_for_cpu(x):
            return cpu_layers.group_norm(
                x, self.num_groups, weight=self.weight, bias=self.bias, eps=self.eps
            )
        if _compiling_for_gpu(x):
            return gpu_layers.group_norm(
                x, self.num_groups, weight=self.weight, bias=self.bias, eps=self.eps
            )
        return super().forward(x)


def silu(x: Tensor) -> Tensor:
    """x·σ(x)."""
    if _evaluating_for_cpu(x) and cpu_layers.has_exp(x.dtype):
        return cpu_layers.silu_forward(x)
    fast = _compiling_for_cpu(x) and _training_on_cpu(x)
    return cpu_layers.silu(x) if fast else F.silu(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√C) v of [N, heads, positions, C]."""
    small = q.shape[-2] <= cpu_layers.MOST_ATTENDING
    if _evaluating_for_cpu(q) and small and cpu_layers.has_exp(q.dtype):
        return cpu_layers.attend_forward(q, k, v)
    fast = _training_on_cpu(q) or (_compiling_for_cpu(q) and small)
    return cpu_layers.attend(q, k, v) if fast else F.scaled_dot_product_attention(q, k, v)


class ResBlock(nn.Module):
    """GroupNorm → SiLU → 3×3, plus the time embedding, twice; added to the (projected) input."""

    def __init__(self, c_in: int, c_out: int, c_emb: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = GroupNorm(config.groups, c_in, eps=config.norm_eps)
        self.conv1 = Conv3x3(c_in, c_out)
        self.emb = nn.Linear(c_emb, c_out)
        self.norm2 = GroupNorm(config.groups, c_out, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = Conv3x3(c_out, c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, added: Tensor, kept: Tensor | None = None) -> Tensor:
        """added: [N, C], `emb` of the embedding; kept: bool, of the output's shape, in dropout's
        place."""
        h = self.conv1(silu(self.norm1(x)))
        h = h + added[:, :, None, None]
        h = silu(self.norm2(h))
        h = self.dropout(h) if kept is None else h * (kept.to(h.dtype) / (1 - self.dropout.p))
        out: Tensor = self.shortcut(x) + self.conv2(h)
        return out


class Attention(nn.Module):
    """Self-attention over the H·W positions, scale (head width)^−½, added to its input."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = 1 if config.head_dim is None else channels // config.head_dim
        self.norm = GroupNorm(config.groups, channels, eps=config.norm_eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        h = self.norm(x).flatten(2).transpose(1, 2)  # [N, HW, C]
        qkv = self.qkv(h).view(n, height * width, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [N, heads, HW, C/heads]
        h = attend(q, k, v)
        h = self.out(h.transpose(1, 2).reshape(n, height * width, c))
        out: Tensor = x + h.transpose(1, 2).view(n, c, height, width)
        return out


class Downsample(nn.Module):
    """3×3 convolution of stride 2; in the paper, padded on the right and the bottom only."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        first = config.downsample_padding
        self.pad = (first, 1, first, 1)  # left, right, top, bottom
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, self.pad))
        return out


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.has_fewer(x, doubled=True):
            return winograd.convolution(x, self.conv.weight, self.conv.bias, doubled=True)
        if _evaluating_for_cpu(x):
            return cpu_layers.doubled_convolution(x, self.conv.weight, self.conv.bias)
        fast = _compiling_for_cpu(x) or _compiling_for_gpu(x)
        x = cpu_layers.double(x) if fast else F.interpolate(x, scale_factor=2.0, mode="nearest")
        out: Tensor = self.conv(x)
        return out


class Level(nn.Module):
    """The residual blocks of one resolution, each with its attention if the level has it.

    Called for block i at a time: the way up concatenates a skip connection before each.
    """

    def __init__(self, c_ins: list[int], c_out: int, attention: bool, config: UNetConfig) -> None:
        super().__init__()
        c_emb = 4 * config.channels[0]
        self.res = nn.ModuleList(ResBlock(c_in, c_out, c_emb, config) for c_in in c_ins)
        self.attn = nn.ModuleList(
            Attention(c_out, config) if attention else nn.Identity() for _ in c_ins
        )

    def forward(self, i: int, x: Tensor, added: Tensor, kept: Tensor | None = None) -> Tensor:
        out: Tensor = self.attn[i](self.res[i](x, added, kept))
        return out


class UNet(nn.Module):
    """ε_θ(x_t, t, class): see the module docstring."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, blocks = config.channels, config.res_blocks
        c_emb = 4 * widths[0]
        self.time1 = nn.Linear(widths[0], c_emb)
        self.time2 = nn.Linear(c_emb, c_emb)
        labels = config.num_classes + config.null_class
        self.label = _embedding(labels, c_emb) if labels else None
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)

        skips = [widths[0]]  # widths of the feature maps that the way up concatenates
        current = widths[0]
        self.down = nn.ModuleList()
        self.downsample = nn.ModuleList()
        for i, width in enumerate(widths):
            c_ins = [current] + [width] * (blocks - 1)
            self.down.append(Level(c_ins, width, config.attention[i], config))
            skips += [width] * blocks
            current = width
            if i < len(widths) - 1:
                self.downsample.append(Downsample(width, config))
                skips.append(width)

        self.mid1 = ResBlock(current, current, c_emb, config)
        self.mid_attn = Attention(current, config)
        self.mid2 = ResBlock(current, current, c_emb, config)

        self.up = nn.ModuleList()  # coarsest first
        self.upsample = nn.ModuleList()
        for i in reversed(range(len(widths))):
            c_ins = []
            for _ in range(blocks + 1):
                c_ins.append(current + skips.pop())
                current = widths[i]
            self.up.append(Level(c_ins, widths[i], config.attention[i], config))
            if i > 0:
                self.upsample.append(Upsample(widths[i]))

        self.norm_out = GroupNorm(config.groups, current, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(current, config.out_channels, 3, padding=1)
        self._init_weights()

    def _init_weights(self) -> None:
        closing: set[nn.Module] = {self.conv_out}
        for module in self.modules():
            if isinstance(module, ResBlock):
                closing.add(module.conv2)
            elif isinstance(module, Attention):
                closing.add(module.out)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                _scaled_init(module, NEAR_ZERO if module in closing else 1.0)

    def embed(self, t: Tensor, class_label: Tensor | None) -> Tensor:
        """SiLU of the joint embedding of timestep index and label: [N, 4·channels[0]]."""
        config = self.config
        features = timestep_embedding(
            t, config.channels[0], freq_shift=config.freq_shift, cos_first=config.cos_first
        )
        emb = self.time2(F.silu(self.time1(features.to(self.time1.weight.dtype))))
        if self.label is not None:
            if class_label is None:
                if config.null_label is None:
                    raise ValueError(
                        "class_label = None: this network has no null label, so each image "
                        f"needs a label 0..{config.num_classes - 1}"
                    )
                class_label = torch.full_like(t, config.null_label, dtype=torch.long)
            emb = emb + self.label(class_label)
        elif class_label is not None:
            raise ValueError("class_label: this network is unconditional and takes none")
        return F.silu(emb)

    def _added(self, emb: Tensor) -> Iterator[Tensor]:
        """What each residual block adds to all of its pixels, [N, its width], in turn."""
        # They were made in the order in which they are called.
        layers = [block.emb for block in self.modules() if isinstance(block, ResBlock)]
        if not _evaluating_for_cpu(emb):
            return (layer(emb) for layer in layers)
        # They are so small that to call them is what they cost; so they are one.
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        all_of_them = F.linear(emb, weight, bias)
        return iter(torch.split(all_of_them, [layer.out_features for layer in layers], dim=1))

    def _enter(self, x: Tensor) -> Tensor:
        """The first layer, in float32 also where the others run in less: x_t is not rounded.

        At small t the noise is a few thousandths, which bfloat16 cannot tell from none.
        """
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return self.conv_in(x).to(self.time1.weight.dtype)  # type: ignore[no-any-return]
        with torch.autocast(device, enabled=False):
            return self.conv_in(x).to(torch.get_autocast_dtype(device))  # type: ignore[no-any-return]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        class_label: Tensor | None = None,
        kept: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """x: [N, C, H, W], of conv_in's type; t: [N], index 0..T−1; class_label: [N] or None.

        kept: what dropout keeps in each residual block, bool [N, *shape] of `dropout_shapes`; None:
        in training, torch draws it for the whole batch. Returns [N, out, H, W].
        """
        added = self._added(self.embed(t, class_label))
        keeps = repeat(None) if kept is None else iter(kept)
        h = self._enter(x)
        skips = [h]
        for i, level in enumerate(self.down):
            for j in range(self.config.res_blocks):
                h = level(j, h, next(added), next(keeps))
                skips.append(h)
            if i < len(self.downsample):
                h = self.downsample[i](h)
                skips.append(h)
        h = self.mid1(h, next(added), next(keeps))
        h = self.mid2(self.mid_attn(h), next(added), next(keeps))
        for i, level in enumerate(self.up):
            for j in range(self.config.res_blocks + 1):
                h = level(j, torch.cat([h, skips.pop()], dim=1), next(added), next(keeps))
            if i < len(self.upsample):
                h = self.upsample[i](h)
        out: Tensor = self.conv_out(silu(self.norm_out(h)))
        return out
