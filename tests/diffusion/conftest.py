"""Fixtures of the mathematics' tests."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from diffusion import Model
from tests.diffusion.networks import build_model


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def diffusers() -> ModuleType:
    """Hugging Face diffusers, the reference; imported only when asked for: it takes seconds."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    return diffusers


@pytest.fixture
def model() -> Model:
    """A class-conditional model of a few thousand random weights."""
    return build_model()
