"""`ddpm …` with a closed form in place of every U-Net: the exact denoiser of Gaussian data.

    python -m tests.closed_form worker

An image of 32 × 32 pixels is 64 independent rows of D. All but the network is the service itself.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import ddpm
import diffusion
from diffusion import Model, ModelConfig, ScheduleConfig, UNet, UNetConfig
from tests.diffusion.conditional import D, denoiser

CORRELATION = 0.9
SIDE = 32
ROWS = SIDE * SIDE // D


def rows_of(images: Tensor) -> Tensor:
    """[N, 1, SIDE, SIDE] as [N, ROWS, D]."""
    return images.reshape(len(images), ROWS, D)


def image_of(rows: Tensor) -> Tensor:
    """[ROWS, D] as [1, SIDE, SIDE]."""
    return rows.reshape(1, SIDE, SIDE)


def save_model(folder: Path) -> None:
    """A checkpoint of that shape, with the paper's schedule; its weights are heard by nobody."""
    network = UNetConfig(
        image_size=SIDE, in_channels=1, channels=(4,), attention=(False,), res_blocks=1, groups=2
    )
    diffusion.save(Model(ModelConfig(network, ScheduleConfig()), UNet(network)), folder)


def _forward(
    self: UNet, x: Tensor, t: Tensor, class_label: Tensor | None = None, kept: object = None
) -> Tensor:
    exact = denoiser(CORRELATION).estimate(
        rows_of(x).reshape(-1, 1, 1, D), t.long().repeat_interleave(ROWS)
    )
    return exact.eps.to(torch.float32).view_as(x)


if __name__ == "__main__":
    UNet.forward = _forward  # type: ignore[method-assign]
    ddpm.main()
