"""The shape of the U-Net, checked before anything is built."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffusion.checks import as_tuple


class NetworkConfigError(ValueError):
    """A network configuration that cannot be built; the message names the field."""


# Bounds that no sensible network meets, so that a broken configuration is refused before it takes
# memory or time.
_MOST = {"image_size": 4096, "in_channels": 64, "res_blocks": 64, "groups": 8192}
_MAX_LEVELS = 12
_MAX_WIDTH = 8192
_MAX_CLASSES = 100_000
_MAX_ATTENDING = 256  # pixels a side: attention is of all pairs of pixels


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the network.

    channels: width of each resolution level, finest first; each level halves the side.
    attention: for each level, whether its residual blocks are followed by self-attention.
    res_blocks: residual blocks a level on the way down (one more on the way up).
    groups: of each GroupNorm. Have several channels in each: see `deaf_levels`.
    head_dim: channels of an attention head; None means a single head (the paper).
    downsample_padding: 0 pads the right and the bottom only, 1 all four sides.
    cos_first: [cos | sin] features of the timestep instead of the paper's [sin | cos].
    freq_shift: their frequencies are exp(−ln 10⁴ · k/(channels[0]/2 − freq_shift)).
    num_classes: real classes; 0 for an unconditional network.
    null_class: one more label, the last, stands for "no label" (needed for guidance).
    learned_variance: the output has 2C channels; the second half is v of Improved DDPM.
    """

    image_size: int = 32
    in_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 256, 256)
    attention: tuple[bool, ...] = (False, True, False, False)
    res_blocks: int = 2
    groups: int = 32
    norm_eps: float = 1e-6
    head_dim: int | None = None
    downsample_padding: int = 0
    cos_first: bool = False
    freq_shift: float = 1.0
    dropout: float = 0.0
    num_classes: int = 0
    null_class: bool = False
    learned_variance: bool = False

    def __post_init__(self) -> None:
        for field in ("channels", "attention"):
            listed = as_tuple(field, getattr(self, field), error=NetworkConfigError)
            object.__setattr__(self, field, listed)
        for field, most in _MOST.items():
            _check_integer(field, getattr(self, field), 1, most)
        levels = len(self.channels)
        _check(1 <= levels <= _MAX_LEVELS, "channels", self.channels, f"1..{_MAX_LEVELS} levels")
        for width in self.channels:
            _check_integer("channels", width, 1, _MAX_WIDTH)
            ok = width % self.groups == 0
            _check(ok, "channels", width, f"multiples of groups = {self.groups}")
        for field in ("cos_first", "null_class", "learned_variance"):
            value = getattr(self, field)
            _check(isinstance(value, bool), field, value, "true or false")
        eps_ok = _is_number(self.norm_eps) and 0 < self.norm_eps < 1
        _check(eps_ok, "norm_eps", self.norm_eps, "between 0 and 1")
        _check(self.channels[0] % 2 == 0, "channels", self.channels[0], "an even first width")
        flags = f"one flag for each of the {levels} levels"
        ok = len(self.attention) == levels and all(isinstance(on, bool) for on in self.attention)
        _check(ok, "attention", self.attention, flags)
        attending = [w for w, on in zip(self.channels, self.attention, strict=True) if on]
        for width in (*attending, self.channels[-1]):
            heads = self.head_dim
            ok = heads is None or (_is_integer(heads) and heads > 0 and width % heads == 0)
            _check(ok, "head_dim", heads, f"None or a divisor of {width}")
        pad = self.downsample_padding
        _check(pad in (0, 1), "downsample_padding", pad, "0 or 1")
        below = self.channels[0] // 2
        ok = _is_number(self.freq_shift) and self.freq_shift < below
        _check(ok, "freq_shift", self.freq_shift, f"below {below}")
        ok = _is_number(self.dropout) and 0 <= self.dropout < 1
        _check(ok, "dropout", self.dropout, "0 ≤ dropout < 1")
        _check_integer("num_classes", self.num_classes, 0, _MAX_CLASSES)
        ok = not self.null_class or self.num_classes > 0
        _check(ok, "null_class", self.null_class, "false without classes (num_classes = 0)")
        factor = 2 ** (levels - 1)
        allowed = f"a multiple of {factor} for {levels} levels"
        _check(self.image_size % factor == 0, "image_size", self.image_size, allowed)
        attending_sides = [self.image_size >> i for i in range(levels) if self.attention[i]]
        side = max(*attending_sides, self.image_size // factor, 0)  # the last level always does
        allowed = (
            f"such that no level with attention is wider than {_MAX_ATTENDING} (one is {side})"
        )
        _check(side <= _MAX_ATTENDING, "image_size", self.image_size, allowed)

    @property
    def out_channels(self) -> int:
        """Channels of the output: C, or 2C with a learned variance."""
        return self.in_channels * (2 if self.learned_variance else 1)

    @property
    def deaf_levels(self) -> list[int]:
        """Levels whose groups are single channels: there t and the label have no effect.

        They are added to each channel as one number, which the normalisation that follows, over
        that same channel, subtracts again.
        """
        return [i for i, width in enumerate(self.channels) if width == self.groups]

    @property
    def dropout_shapes(self) -> list[tuple[int, int, int]]:
        """[C, H, W] of what each residual block drops from, in the order they run."""
        sides = [self.image_size >> i for i in range(len(self.channels))]
        down = [(width, side, side) for width, side in zip(self.channels, sides, strict=True)]
        up = down[::-1]
        return [
            *(shape for shape in down for _ in range(self.res_blocks)),
            *(up[0] for _ in ("mid1", "mid2")),
            *(shape for shape in up for _ in range(self.res_blocks + 1)),
        ]

    @property
    def null_label(self) -> int | None:
        """The index that means "no label", or None where there is none."""
        return self.num_classes if self.null_class else None


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _check_integer(field: str, value: object, least: int, most: int) -> None:
    ok = isinstance(value, int) and _is_integer(value) and least <= value <= most
    _check(ok, field, value, f"an integer {least}..{most}")


def _check(ok: bool, field: str, value: object, allowed: str) -> None:
    if not ok:
        raise NetworkConfigError(f"{field} = {value!r:.200}: must be {allowed}")
