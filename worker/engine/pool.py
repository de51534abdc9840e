"""What a pool is: it holds the samples of one model in one mode, and steps some of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.condition import Condition
from diffusion.model import Model
from worker.engine.runs import Run, Sample
from worker.engine.tasks import Event, States
from worker.network.costs import Shape
from worker.network.network import Network

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batch:
    """A choice of samples, with the part of a step's input that stays the same while it stands.

    corrections: of x̂_0, each with the samples (positions in the batch) that it is for.
    """

    samples: list[Sample]
    slots: Int64
    network_rows: int
    labels: Tensor | None
    guided: Tensor | None
    guidance: Tensor | None
    corrections: tuple[tuple[Condition, Tensor], ...] = ()


@dataclass(frozen=True, eq=False)
class Step:
    """What one step did. Tensors are on the device and may still be being computed.

    t: the index each sample stepped at; rows: its row. finite: bool [M]. due: samples (positions
    in the batch) with a snapshot or their end in this row.
    """

    batch: Batch
    rows: Int64
    t: Int64
    finite: Tensor
    due: list[int]

    def image(self, i: int) -> int:
        """The image index that sample i of the batch works on."""
        return self.batch.samples[i].index

    def events(self) -> list[Event]:
        """What there is to tell of it. Counts the chains that ended in it as told."""
        raise NotImplementedError


class Pool(Protocol):
    """Chains have one with slots on the device, likelihoods those without."""

    network: Network
    device: torch.device

    def hold(self, runs: Collection[Run]) -> None:
        """Make ready for these tasks, and for no others. An exception leaves all as it was."""

    def seat(self, samples: Sequence[Sample], evict: Iterable[Sample]) -> bool:
        """Give each sample a slot, taking those of `evict` in turn; whether any was taken."""

    def release(self, sample: Sample) -> None:
        """Free what a sample holds."""

    def states(self, samples: Sequence[Sample]) -> States | None:
        """What a later run of these samples can go on from; None: it needs nothing."""

    def batch(self, samples: list[Sample]) -> Batch:
        """Samples to be stepped together, again and again."""

    def step(self, batch: Batch, shape: Shape) -> Step:
        """Step every sample of the batch. An exception leaves the state of all as it was."""


def without_slots(model: Model, samples: list[Sample]) -> Batch:
    """The batch of a pool that holds no slots on the device."""
    return Batch(
        samples=samples,
        slots=np.zeros(0, np.int64),
        network_rows=len(samples),
        labels=labels_of(model, samples),
        guided=None,
        guidance=None,
    )


def labels_of(model: Model, samples: Sequence[Sample], extra: int = 0) -> Tensor | None:
    """int64 [M + extra]: the samples' labels, then null labels; None for a model without any."""
    network = model.config.network
    if not network.num_classes:
        return None
    null = network.null_label
    values = [null if sample.label is None else sample.label for sample in samples]
    return torch.tensor(values + [null] * extra, device=model.device)
