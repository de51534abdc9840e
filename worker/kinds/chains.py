"""Jobs that run reverse chains as tasks of the engine: where each chain starts, by which table."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from diffusion.forward import q_samples_at
from diffusion.model import Model
from diffusion.noise import Purpose, image_normals
from diffusion.samplers import SamplerTable
from diffusion.sampling import build_table
from diffusion.schedule import Schedule
from jobs.kinds.chain import ChainSpec, Snapshots
from jobs.kinds.generate import GenerateSpec
from jobs.kinds.interpolate import InterpolateSpec
from jobs.kinds.reconstruct import ReconstructSpec
from jobs.store.writer import Started
from worker.engine.tasks import Start, Task
from worker.kinds.chain_state import StateError, unpack
from worker.kinds.noising import MissingInput, uploaded
from worker.models import Served

log = logging.getLogger("ddpm.worker")


def chain_task(served: Served, started: Started, execution: str) -> tuple[Task, int]:
    """The rest of a job that runs chains as a task, and the image-steps that are done already.

    The task is named by the execution: another execution of the same job is another task.

    Images and states of another version of the model do not count.
    """
    record, spec = started.record, started.record.spec
    assert isinstance(spec, ChainSpec) and spec.seed is not None
    table = spec_table(served, spec)
    same = started.earlier_digest in (None, served.model.digest)
    starts = []
    for fresh in fresh_starts(served.model, started):
        if same and fresh.index in started.finished:
            continue
        state = started.states.get(fresh.index) if same else None
        starts.append(fresh if state is None else _resumed(fresh, state, served.model.shape))
    task = Task(
        id=execution,
        model=served.model,
        table=table,
        seed=spec.seed,
        starts=tuple(starts),
        guidance=spec.guidance,
        deterministic=spec.deterministic,
        urgent=spec.priority == "high",
        snapshot_rows=snapshot_rows(table, spec.snapshots),
    )
    return task, record.work - task.evaluations


def _resumed(fresh: Start, state: bytes, shape: tuple[int, int, int]) -> Start:
    try:
        row, x_t, x_start_prev = unpack(state, shape)
    except StateError as error:  # of another version: the chain begins again, and ends alike
        log.warning("image %d starts over: %s", fresh.index, error)
        return fresh
    return replace(fresh, row=row, x_t=x_t, x_start_prev=x_start_prev)


def fresh_starts(model: Model, started: Started) -> list[Start]:
    """Where the chains of a job begin: in noise, in the one x_t, or in x̄_t of each λ.

    Raises MissingInput.
    """
    spec = started.record.spec
    assert isinstance(spec, ChainSpec) and spec.seed is not None
    label, indices = spec.class_label, range(spec.count)
    match spec:
        case ReconstructSpec():
            x_t = given_x_t(model, started, spec)
            return [Start(i, x_t=x_t, class_label=label) for i in indices]
        case InterpolateSpec():
            first, second = noised(model.schedule, uploaded(started), t=spec.t, seed=spec.seed)
            mixed = [(1 - share) * first + share * second for share in spec.lambdas]
            # One noise for all: two images differ by their λ, and by nothing else.
            return [Start(i, x_t=mixed[i], class_label=label, noise_index=0) for i in indices]
        case _:
            return [Start(i, class_label=label) for i in indices]


def given_x_t(model: Model, started: Started, spec: ReconstructSpec) -> Tensor:
    """The x_t [C, H, W] that all samples of a reconstruction begin with."""
    assert spec.seed is not None and spec.t is not None
    if not spec.from_x_t:
        return noised(model.schedule, uploaded(started), t=spec.t, seed=spec.seed)[0]
    if started.x_t is None:
        raise MissingInput("the x_t to start from is gone")
    return torch.from_numpy(started.x_t.copy())


def noised(schedule: Schedule, x_start: Tensor, *, t: int, seed: int) -> Tensor:
    """x_t of images [N, C, H, W] at the paper's t with one ε for all, that of (seed, image 0)."""
    shape = tuple(x_start.shape[1:])
    index = torch.zeros(1, dtype=torch.long)
    eps = image_normals(seed, index, row=0, purpose=Purpose.Q_SAMPLE, shape=shape)
    [(_, x_t)] = q_samples_at(schedule, x_start, [t - 1], eps)
    return x_t


def spec_table(served: Served, spec: ChainSpec) -> SamplerTable:
    """The sampler table of a filled spec; equal requests share one."""
    names = ("sampler", "steps", "spacing", "eta", "variance", "corrector_steps")
    given = {name: getattr(spec, name) for name in names}
    first = spec.first_t(served.card)
    given["start"] = None if isinstance(spec, GenerateSpec) else first - 1
    return _table(served, tuple((name, v) for name, v in given.items() if v is not None))


@lru_cache(maxsize=256)
def _table(served: Served, options: tuple[tuple[str, object], ...]) -> SamplerTable:
    defaults = asdict(served.model.config.sampling) | dict(options)
    return build_table(served.model.schedule, **defaults)


def snapshot_rows(table: SamplerTable, wanted: Snapshots | None) -> frozenset[int]:
    """The rows of a table at which a request wants to see the chain."""
    if wanted is None:
        return frozenset()
    if wanted.every is not None:
        return frozenset(range(0, len(table), wanted.every))
    return frozenset(int(np.abs(table.t + 1 - t).argmin()) for t in wanted.at or ())
