"""Arguments that are not what they are called are refused by name, before anything is computed."""

from __future__ import annotations

from typing import Any

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
    if not bounded or not images.numel():
        return
    low, high = (float(x) for x in images.aminmax())
    if not (low >= -1 - _SLACK and high <= 1 + _SLACK):
        levels = high > 2 and low >= 0
        hint = f": {name} / 127.5 - 1 of grey levels 0..255" if levels else ""
        raise ImagesError(f"{name}: in {low:g}..{high:g}; must be in [−1, 1]{hint}")
