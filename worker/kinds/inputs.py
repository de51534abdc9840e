"""What a client sent for a job, as tensors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.store.started import Started


class MissingInput(Exception):
    """What a client sent for the job is no longer in the store."""


def uploaded(started: Started) -> Tensor:
    """The images a client sent, float32 [N, C, H, W] in [−1, 1]. Raises MissingInput."""
    if started.inputs is None:
        raise MissingInput("the uploaded images are gone")
    return x_start_of(started.inputs)


def given_x_t(started: Started) -> Tensor:
    """The x_t a job was given, float32 [C, H, W]. Raises MissingInput."""
    if started.array is None:
        raise MissingInput("the x_t to start from is gone")
    return torch.from_numpy(started.array.copy())


def measured(started: Started) -> Tensor:
    """The measurement of a job, float32 [1, C, H, W], from a picture or an array.

    Raises MissingInput.
    """
    if started.array is not None:
        return torch.from_numpy(started.array.copy())[None]
    if started.inputs is None:
        raise MissingInput("the measurement is gone")
    return x_start_of(started.inputs)


def x_start_of(inputs: NDArray[np.uint8]) -> Tensor:
    """float32 [N, C, H, W] in [−1, 1] of uint8 [N, H, W, C]."""
    pixels = np.moveaxis(inputs, -1, 1).astype(np.float32, order="C")
    return torch.from_numpy(pixels) / 127.5 - 1.0
