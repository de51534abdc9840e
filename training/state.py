"""What a run keeps on disk: the model (averaged weights) and the state to resume from.

    RUN/config.json, model.safetensors   a checkpoint like any other: `ddpm sample --model RUN`
    RUN/train.json                       the training configuration
    RUN/state/                           weights, averages and Adam's moments (safetensors), step
    RUN/metrics.jsonl, samples/, tensorboard/

A state is written to a new folder that is then renamed, so a kill at any moment leaves a whole one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.ema import EMA
from training.timesteps import Timesteps

STATE_FILE, PROGRESS_FILE = "state.safetensors", "progress.json"
CONFIG_FILE = "train.json"


class StateError(ValueError):
    """A run folder that cannot be written or resumed; the message says why."""


def state_tensors(
    network: nn.Module, ema: EMA, optimizer: torch.optim.Adam, timesteps: Timesteps
) -> dict[str, Tensor]:
    """All that a state keeps: weights, averages, Adam's moments, and what timesteps go by."""
    tensors = timesteps.state()
    for i, (name, p) in enumerate(network.named_parameters()):
        moments = optimizer.state.get(p, {})
        tensors[f"weights.{name}"] = p.detach()
        tensors[f"ema.{name}"] = ema.shadow[i]
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in moments:
                tensors[f"{moment}.{name}"] = moments[moment]
    return tensors


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinity, if one does."""
    return next((name for name, v in tensors.items() if not bool(v.isfinite().all())), None)


def save_state(folder: Path, tensors: Mapping[str, Tensor], *, step: int) -> None:
    """Write the state after `step` optimizer steps. Raises StateError on a full disk."""
    fresh, old, state = folder / "state.new", folder / "state.old", folder / "state"
    try:
        if find_state(folder) == old:  # the only one there is: it takes its place again
            shutil.rmtree(state, ignore_errors=True)
            old.rename(state)
        for stale in (fresh, old):
            shutil.rmtree(stale, ignore_errors=True)
        fresh.mkdir(parents=True)
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, fresh / STATE_FILE)
        (fresh / PROGRESS_FILE).write_text(json.dumps({"step": step}))
        for written in (fresh / STATE_FILE, fresh / PROGRESS_FILE, fresh):
            _sync(written)
        if state.exists():
            state.rename(old)
        fresh.rename(state)
        _sync(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise StateError(write_failure(folder, error)) from error


def write_failure(folder: Path, error: Exception) -> str:
    """One clear sentence about a failed write; the state before it is still whole."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    why = "the disk is full" if full else str(error)
    return f"{folder}: cannot write the checkpoint: {why}; the previous one is kept"


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk and not only on their way to it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_state(folder: Path) -> Path | None:
    """The newest whole state of a run, or None."""
    for name in ("state", "state.old"):  # the second, if a kill fell between the two renames
        if (folder / name / PROGRESS_FILE).is_file():
            return folder / name
    return None


def read_step(state: Path) -> int:
    """Optimizer steps behind a state. Raises StateError if its file is damaged."""
    path = state / PROGRESS_FILE
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StateError(f"{path}: damaged: {error}") from error
    step = progress.get("step") if isinstance(progress, dict) else None
    if type(step) is not int or step < 0:
        raise StateError(f"{path}: damaged: must be a table with step = 0, 1, …")
    return step


def load_state(
    folder: Path,
    *,
    network: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Adam,
    timesteps: Timesteps,
) -> int:
    """Restore a run in place and return its step. Raises StateError."""
    where = find_state(folder)
    if where is None:
        raise StateError(f"{folder}: holds no state to resume from")
    step = read_step(where)
    try:
        tensors = load_file(where / STATE_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise StateError(f"{where}: broken state: {error}") from error
    wanted = {
        f"{kind}.{name}" for kind in ("weights", "ema") for name, _ in network.named_parameters()
    }
    missing = sorted(wanted - tensors.keys())
    if missing:
        raise StateError(f"{where}: does not fit this network: no {missing[0]}")
    with torch.no_grad():
        for i, (name, p) in enumerate(network.named_parameters()):
            weights = tensors[f"weights.{name}"]
            if weights.shape != p.shape:
                raise StateError(
                    f"{where}: {name} has shape {list(weights.shape)}, "
                    f"the configuration makes it {list(p.shape)}"
                )
            p.copy_(weights)
            ema.shadow[i].copy_(tensors[f"ema.{name}"])
            if f"exp_avg.{name}" in tensors:
                optimizer.state[p] = {
                    "step": torch.tensor(
                        float(step), device=p.device if _fused(optimizer) else None
                    ),
                    "exp_avg": _like(tensors[f"exp_avg.{name}"], p),
                    "exp_avg_sq": _like(tensors[f"exp_avg_sq.{name}"], p),
                }
        timesteps.load(tensors)
    return step


def _like(value: Tensor, p: Tensor) -> Tensor:
    """The value with the device and the memory format of the parameter."""
    return torch.empty_like(p, memory_format=torch.preserve_format).copy_(value)


def _fused(optimizer: torch.optim.Adam) -> bool:
    return bool(optimizer.param_groups[0].get("fused"))
