"""A run of `ddpm tune`: the teacher's images, then a table for each number of evaluations.

All of it grows in a folder, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import diffusion
from diffusion.checkpoint import WEIGHTS_NAME
from diffusion.device import pick_device
from diffusion.files import digest_of
from diffusion.model import Model
from diffusion.noise import Purpose, image_normals
from diffusion.table import SamplerError, SamplerTable, stepping
from diffusion.tuned import Tuned, read_tuned, write_tuned
from training.partial import PartialArrays, PartialError
from training.tune import Options, Pairs, Tuner, best_fixed, run

SEED = 2**40  # of the x_T: none that people draw
TEACHER: dict[str, Any] = {"sampler": "dpmpp_3m", "spacing": "lambda"}
CHUNK = 16  # Adam steps between two savings, and pairs on a CPU
LARGE_CHUNK = 512  # pairs on a GPU


@dataclass(frozen=True)
class TuneOptions:
    """model: a folder of ours. evaluations: of the tables, in the order to learn them. pairs, held:
    x_T to learn from, and to choose by. teacher_steps: of the fine solver. device: default cuda
    where there is one."""

    model: Path
    out: Path
    evaluations: tuple[int, ...]
    pairs: int = 512
    held: int = 256
    teacher_steps: int = 50
    quiet: bool = False
    device: str | None = None
    learning: Options = field(default_factory=Options)


def tune(options: TuneOptions, echo: Callable[[str], None]) -> Path:
    """Learn what is missing; the tables are in the model's folder as soon as each is learned.

    Raises CheckpointError, SamplerError, PartialError.
    """
    model = diffusion.load(options.model, pick_device(options.device))
    if not model.schedule.alphas_cumprod[-1]:
        raise SamplerError("the model's x_T holds no signal (ᾱ_T = 0), so that it has no λ to tune")
    for rows in options.evaluations:
        if not 2 <= rows <= model.schedule.T:
            raise SamplerError(f"evaluations = {rows}: must be 2..{model.schedule.T}")
    weights = digest_of([options.model / WEIGHTS_NAME])
    options.out.mkdir(parents=True, exist_ok=True)
    pairs = _pairs(model, options, weights)
    learn, held = pairs.part(slice(options.pairs)), pairs.part(slice(options.pairs, None))
    for rows in options.evaluations:
        tuned = _learn(model, rows, learn, held, options, weights)
        tables = read_tuned(options.model, weights=weights) | {rows: tuned}
        write_tuned(tables.values(), options.model, weights=weights)
        echo(_told(tuned))
    return options.model


def _told(tuned: Tuned) -> str:
    figures = tuned.figures
    return (
        f"{len(tuned.times)} evaluations: RMSE to the teacher {figures['rmse']:.4f}, "
        f"{figures['fixed_rmse']:.4f} by {figures['fixed']}"
    )


def _pairs(model: Model, options: TuneOptions, weights: str) -> Pairs:
    """x_T and the teacher's images, those that are not there yet being made."""
    n = options.pairs + options.held
    indices, labels = torch.arange(n, device=model.device), _labels(model, n)
    x_T = image_normals(SEED, indices, row=0, purpose=Purpose.X_T, shape=model.shape)
    key = {"weights": weights, "steps": options.teacher_steps, "images": n, **TEACHER}
    kept = PartialArrays(options.out / "teacher.npz", {"images": (n, *model.shape)}, key)
    table = model.table(
        steps=min(options.teacher_steps, model.schedule.T),
        clip=model.config.sampling.clip,
        **TEACHER,
    )
    done = int(np.isfinite(kept.arrays["images"].reshape(n, -1)).all(axis=1).sum())
    with tqdm(total=n, initial=done, desc="teacher", unit="image", disable=options.quiet) as bar:
        chunk = CHUNK if model.device.type == "cpu" else LARGE_CHUNK
        for first in range(done, n, chunk):
            part = slice(first, min(first + chunk, n))
            made = run(model, table, x_T[part], None if labels is None else labels[part])
            kept.arrays["images"][part] = made.cpu().numpy()
            kept.save()
            bar.update(len(made))
    images = torch.tensor(kept.arrays["images"], dtype=torch.float32, device=model.device)
    return Pairs(x_T, images, labels)


def _labels(model: Model, n: int) -> Tensor | None:
    """Every label in turn, and "no label" where the network has that."""
    network = model.config.network
    if not network.num_classes:
        return None
    return torch.arange(n, device=model.device) % (network.num_classes + network.null_class)


def _learn(
    model: Model, rows: int, learn: Pairs, held: Pairs, options: TuneOptions, weights: str
) -> Tuned:
    path = options.out / f"{rows}.pt"
    key = {
        "weights": weights, "pairs": len(learn), "held": len(held),
        "teacher_steps": options.teacher_steps, **asdict(options.learning),
    }  # fmt: skip
    state = _kept(path, key)
    if not state:
        table, name, error = best_fixed(model, rows, held)
        state = {"key": key, "fixed": name, "fixed_rmse": error, "table": _numbers(table)}
        _save(state, path)
    tuner = Tuner(model, _table(state["table"]), learn, held, options.learning)
    if "tuner" in state:
        tuner.restore(state["tuner"])
    else:
        tuner.judge()
    most = options.learning.iterations
    with tqdm(
        total=most, initial=tuner.iteration, desc=f"{rows} rows", disable=options.quiet
    ) as bar:
        while tuner.iteration < most:
            for _ in range(min(CHUNK, most - tuner.iteration)):
                tuner.step()
                bar.update()
            tuner.judge()
            bar.set_postfix(rmse=f"{tuner.best_error:.4f}", fixed=f"{state['fixed_rmse']:.4f}")
            _save(state | {"tuner": tuner.state()}, path)
    figures = {
        "rmse": tuner.best_error, "fixed": state["fixed"], "fixed_rmse": state["fixed_rmse"],
        "teacher_steps": options.teacher_steps, "held": len(held), **asdict(options.learning),
    }  # fmt: skip
    return Tuned(tuner.best.times, tuner.best.rows, tuner.best.clip, figures)


def _kept(path: Path, key: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run of the same options left; empty where none was. Raises PartialError."""
    if not path.exists():
        return {}
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        made = state.get("key")
    except Exception as error:  # torch.load lets out whatever it stumbles over
        raise PartialError(f"{path}: cannot be read: {error}; remove it") from error
    if made is None:
        raise PartialError(f"{path}: is of an earlier version; remove it, or choose another --out")
    for name, value in key.items():
        if made.get(name) != value:
            raise PartialError(
                f"{path}: was learned with {name} = {made.get(name)!r}, not {value!r}; choose "
                "another --out or remove it"
            )
    return state


def _save(state: dict[str, Any], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def _numbers(table: SamplerTable) -> dict[str, Any]:
    return {"times": table.time.tolist(), "coefficients": table.coefficients.tolist()}


def _table(numbers: dict[str, Any]) -> SamplerTable:
    return stepping(numbers["times"], np.array(numbers["coefficients"]))
