"""A tiny network with random weights: quick to run, and not near zero as a fresh one is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import diffusion
from diffusion import Model, ModelConfig, ScheduleConfig, UNet, UNetConfig


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@torch.no_grad()
def random_model(
    *, seed: int = 0, classes: int = 3, T: int = 50, prediction: str = "epsilon"
) -> Model:
    network = UNetConfig(
        image_size=8,
        in_channels=1,
        channels=(8, 8),
        attention=(False, True),
        res_blocks=1,
        groups=4,
        num_classes=classes,
        null_class=classes > 0,
    )
    schedule = ScheduleConfig(T=T, beta_end=min(0.999, 20 / T))
    config = ModelConfig(network=network, schedule=schedule, prediction=prediction)
    unet = UNet(network).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise / fan_in**0.5 + (parameter == 1))
    return Model(config, unet, digest=f"{seed:064x}")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Model]:
    return random_model


@pytest.fixture(scope="session")
def model() -> Model:
    return random_model()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    """A models root with one model, `tiny`."""
    root = tmp_path_factory.mktemp("models")
    diffusion.save(model, root / "tiny")
    return root
