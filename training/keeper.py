"""What a run writes of itself, and only while it is sound: configuration, model, state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from diffusion.checkpoint import save
from diffusion.model import Model
from training.config import TrainConfig
from training.ema import EMA
from training.state import (
    CONFIG_FILE,
    StateError,
    find_state,
    load_state,
    not_finite,
    read_step,
    save_state,
    state_tensors,
    write_failure,
)
from training.timesteps import Timesteps


@dataclass
class Keeper:
    """Saves and restores one run in one folder. writes: whether this process is the one to write.

    A checkpoint is written only if every loss since the last one, the loss of the very weights,
    and all that goes into it, is finite: so the folder always holds the last good one.
    """

    folder: Path
    config: TrainConfig
    network: nn.Module
    ema: EMA
    optimizer: torch.optim.Adam
    timesteps: Timesteps
    writes: bool
    _losses: list[Tensor] = field(default_factory=list)  # not yet looked at

    def add(self, loss: Tensor) -> None:
        """The loss of a step, to be looked at later: to look at each would wait for the device."""
        self._losses.append(loss)

    def check_losses(self, step: int) -> None:
        """Raises StateError if a loss since the last look is NaN or infinite."""
        losses = torch.stack(self._losses).tolist() if self._losses else []
        self._losses.clear()
        bad = next((loss for loss in losses if not math.isfinite(loss)), None)
        if bad is not None:
            raise self._diverged(step, f"the loss is {bad}")

    def check(self, step: int) -> None:
        """Raises StateError if the run has diverged: see the class."""
        self.check_losses(step)
        if name := not_finite(self._tensors()):
            raise self._diverged(step, f"{name} is not finite")

    def save(self, model: Callable[[], Model], step: int) -> None:
        """Write model and state. Raises StateError; what was there before stays whole.

        model: makes what is to be written, once all it is made of is known to be finite.
        """
        self.check(step)
        if not self.writes:
            return
        self.save_config()
        try:
            save(model(), self.folder)
        except (OSError, SafetensorError) as error:
            raise StateError(write_failure(self.folder, error)) from error
        save_state(self.folder, self._tensors(), step=step)

    def save_config(self) -> None:
        """Write train.json, whole or not at all. Raises StateError."""
        if not self.writes:
            return
        fresh = self.folder / f".{CONFIG_FILE}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fresh.write_text(self.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
            fresh.replace(self.folder / CONFIG_FILE)
        except OSError as error:
            raise StateError(write_failure(self.folder, error)) from error

    def load(self) -> int:
        """Restore the run in place and return its step. Raises StateError."""
        return load_state(
            self.folder,
            network=self.network,
            ema=self.ema,
            optimizer=self.optimizer,
            timesteps=self.timesteps,
        )

    def _tensors(self) -> dict[str, Tensor]:
        return state_tensors(self.network, self.ema, self.optimizer, self.timesteps)

    def _diverged(self, step: int, what: str) -> StateError:
        state, optimizer = find_state(self.folder), self.config.optimizer
        kept, then = "nothing was saved", "start again"
        if state is not None:
            kept, then = f"the checkpoint of step {read_step(state)} is kept", "go on with --resume"
        return StateError(
            f"{self.folder}: step {step}: {what}: the run has diverged; {kept}. Lower "
            f"optimizer.learning_rate = {optimizer.learning_rate}, raise optimizer.warmup_steps = "
            f"{optimizer.warmup_steps} or lower optimizer.grad_clip = {optimizer.grad_clip}, "
            f"and {then}"
        )
