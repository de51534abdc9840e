"""Small networks for tests, with random weights everywhere."""

from __future__ import annotations

from typing import Any

import torch

from diffusion import Model, ModelConfig, ScheduleConfig, UNet, UNetConfig

TINY = UNetConfig(
    image_size=8,
    in_channels=1,
    channels=(8, 16),
    attention=(False, True),
    res_blocks=1,
    groups=4,
    num_classes=3,
    null_class=True,
)
SHORT = ScheduleConfig(T=100, beta_end=0.1)


@torch.no_grad()
def randomize(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every weight a random value, so that no layer is near zero and no norm the identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:  # biases, and the scales and shifts of normalisations
            parameter.uniform_(0.2, 1.2, generator=generator)
    return network.eval().requires_grad_(False)


def build_model(network: UNetConfig = TINY, **config: Any) -> Model:
    """A model of random weights; `config`: further fields of its ModelConfig."""
    unet = UNet(network)
    randomize(unet)
    return Model(ModelConfig(network, **{"schedule": SHORT, **config}), unet)
