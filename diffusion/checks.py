"""Arguments that are not what they are called are refused by name, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

_SLACK = 1e-3  # beyond [−1, 1], of arithmetic


class ImagesError(ValueError):
    """Images of a wrong type, shape or range; the message names the argument."""


def check_images(
    name: str, images: Any, shape: tuple[int, ...] | None = None, *, bounded: bool = True
) -> None:
    """Raise ImagesError unless `images` is a floating tensor [N, C, H, W] in [−1, 1].

    shape: what [C, H, W] must be. bounded: whether the range matters.
    """
    wanted = f"[N, {', '.join(map(str, shape))}]" if shape else "[N, C, H, W]"
    if not isinstance(images, torch.Tensor):
        raise ImagesError(f"{name}: a {type(images).__name__}; must be a torch tensor {wanted}")
    if not images.is_floating_point():
        raise ImagesError(
            f"{name}: {images.dtype}; must be floating, in [−1, 1]: {name} / 127.5 - 1 of grey "
            "levels 0..255"
        )
    if images.ndim != 4 or (shape is not None and tuple(images.shape[1:]) != shape):
        raise ImagesError(f"{name}: its shape is {[*images.shape]}; must be {wanted}")
    if not len(images):
        raise ImagesError(f"{name}: holds no image; must be one or more")
    if bounded:
        check_range(name, images)


def check_range(
    name: str, values: torch.Tensor, *, most: float = 1.0, slack: float = _SLACK
) -> None:
    """Raise ImagesError unless all values lie in [−most, most], or beyond it by no more than slack.

    NaN lies nowhere.
    """
    low, high = (float(x) for x in values.aminmax())
    if not (low >= -most - slack and high <= most + slack):
        levels = high > 2 * most and low >= 0
        hint = f": {name} / 127.5 - 1 of grey levels 0..255" if levels else ""
        raise ImagesError(f"{name}: in {low:g}..{high:g}; must be in [−{most:g}, {most:g}]{hint}")


def as_tuple(name: str, value: object, *, error: type[ValueError] = ValueError) -> tuple[Any, ...]:
    """The value as a tuple: JSON and TOML hand over lists. Raises an error for what is none."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise error(f"{name} = {value!r:.200}: must be a list")
    return tuple(value)


def check_flags(*, error: type[ValueError] = ValueError, **flags: object) -> None:
    """Raise an error, naming the flag, unless each is a bool."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise error(f"{name} = {value!r:.200}: must be true or false")


def check_whole(
    name: str,
    value: object,
    *,
    least: int,
    most: int | None = None,
    error: type[ValueError] = ValueError,
) -> None:
    """Raise an error unless the value is an integer of this range."""
    allowed = f"{least} or more" if most is None else f"{least}..{most}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise error(f"{name} = {value!r:.80}: must be {allowed}, and an int")
    if int(value) < least or (most is not None and int(value) > most):
        raise error(f"{name} = {value}: must be {allowed}")


def check_real(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    most: float | None = None,
    error: type[ValueError] = ValueError,
) -> None:
    """Raise an error unless the value is a finite number of this range."""
    allowed = f"{least:g}..{most:g}" if most is not None else f"{least:g} or more"
    allowed = "a finite number" if least == -math.inf else allowed
    if isinstance(value, bool) or not isinstance(value, Real):
        raise error(f"{name} = {value!r:.80}: must be {allowed}")
    number = float(value)
    if not least <= number < math.inf or (most is not None and number > most):
        raise error(f"{name} = {value!r:.80}: must be {allowed}")
