"""Likelihoods by the flow as the engine and a worker run them: the library's, and resumable."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
import torch

import diffusion
from diffusion import Model
from diffusion.flow import ROW_COST, FlowLikelihood, flow_likelihood, flow_table, log_prior
from diffusion.spacings import spaced_timesteps
from jobs.kinds.common import PRODUCT_COST
from worker.engine import flow_pool
from worker.engine.flows import FlowTask
from worker.engine.lane import EngineOptions
from worker.engine.loop import Engine
from worker.engine.tasks import Canceled, Densities, Event, Failed, Finished, Start, States
from worker.kinds.inputs import x_start_of

Service = Any  # of conftest.py; tests cannot import it
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
X_START = x_start_of(PICTURES)
DIMS = 64


def flow_task(model: Model, name: str, *, steps: int = 6, **options: Any) -> FlowTask:
    n, draws = options.pop("n", 2), options.pop("draws", 2)
    timesteps = spaced_timesteps(model.schedule.T, steps)
    given = {
        "table": flow_table(model.schedule, timesteps),
        "seed": 1,
        "x_start": X_START[:n],
        "indices": np.arange(n),
        "starts": tuple(Start(strand) for strand in range(n * draws)),
    }
    return FlowTask(id=name, model=model, draws=draws, **{**given, **options})


class Harness:
    """An engine ticked by hand, and everything that it said."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        options = EngineOptions(dtype=torch.bfloat16)
        self.engine = Engine(self.events.extend, options)

    def run(self, *tasks: FlowTask, ticks: int = 100_000) -> None:
        for task in tasks:
            self.engine.submit(task)
        while ticks and self.engine.tick():
            ticks -= 1

    def density(self, task: FlowTask) -> torch.Tensor:
        """[N, draws]; NaN of strands that did not end."""
        found = np.full(len(task.x_start) * task.draws, np.nan)
        for event in self.events:
            if isinstance(event, Densities) and event.task_id == task.id:
                found[event.strands] = event.nats
        return torch.from_numpy(found).view(-1, task.draws)

    def ends(self, name: str) -> list[type[Event]]:
        ends = [e for e in self.events if isinstance(e, Finished | Failed | Canceled)]
        return [type(end) for end in ends if end.task_id == name]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-3)  # nats, of some −300


def test_strands_of_several_tasks_are_the_librarys_in_float32(model: Model) -> None:
    """In one batch, at different rows, where the engine samples in bfloat16."""
    long = flow_task(model, "long", steps=9, draws=1)
    other = flow_task(model, "other", seed=5, starts=tuple(Start(i, class_label=1) for i in (0, 1)))
    other = flow_task(model, "other", seed=5, n=1, starts=other.starts)
    harness = Harness()
    harness.run(long, ticks=3)
    harness.run(other)
    close(
        harness.density(long),
        flow_likelihood(model, X_START[:2], draws=1, steps=9, seed=1).log_density,
    )
    expected = flow_likelihood(model, X_START[:1], draws=2, steps=6, seed=5, class_label=1)
    close(harness.density(other), expected.log_density)
    assert harness.ends("long") == harness.ends("other") == [Finished]


def test_a_strand_goes_on_from_where_it_was_taken_out(model: Model) -> None:
    whole, part = flow_task(model, "whole"), flow_task(model, "part")
    first = Harness()
    first.run(part, ticks=4)
    first.engine.cancel("part")
    first.run()
    [states] = [e.states for e in first.events if isinstance(e, Canceled)]
    assert isinstance(states, States) and states.nats is not None
    assert (states.rows > 0).any() and (states.rows < len(part.table)).all()
    starts = {
        strand: Start(strand, row=int(row), x_t=x)
        for strand, row, x in zip(states.indices.tolist(), states.rows, states.x_t, strict=True)
    }
    rest = flow_task(
        model,
        "rest",
        starts=tuple(starts.get(strand, Start(strand)) for strand in range(4)),
        nats=dict(zip(states.indices.tolist(), states.nats.tolist(), strict=True)),
    )
    assert rest.evaluations == whole.evaluations - int(states.rows.sum()) * ROW_COST
    second = Harness()
    second.run(rest, whole)
    close(second.density(rest), second.density(whole))


def test_a_step_that_finds_no_memory_at_its_end_is_done_again_as_a_whole(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = flow_task(model, "t")
    undisturbed, disturbed = Harness(), Harness()
    undisturbed.run(task)
    calls = 0

    def short(*given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return log_prior(*given)

    monkeypatch.setattr(flow_pool, "log_prior", short)
    disturbed.run(task)
    assert calls > 2 and disturbed.ends("t") == [Finished]
    close(disturbed.density(task), undisturbed.density(task))


def test_a_bad_image_fails_alone_and_deterministic_strands_see_no_mates(model: Model) -> None:
    bad = X_START[:2].clone()
    bad[1, 0, 0, 0] = float("nan")
    harness = Harness()
    alone = flow_task(model, "alone", n=1, deterministic=True)
    harness.run(flow_task(model, "bad", x_start=bad))
    harness.run(alone)
    mated = flow_task(model, "mated", n=1, deterministic=True)
    harness.run(flow_task(model, "mate", n=2, seed=9, deterministic=True), ticks=2)
    harness.run(mated)
    assert harness.ends("bad") == [Failed]
    [error] = [e.error for e in harness.events if isinstance(e, Failed)]
    assert "image 1: not finite" in str(error)
    assert torch.equal(harness.density(alone), harness.density(mated))


CLOSE = 4e-5  # bits/dim, of some 17: the rows are dealt otherwise, and float32 has 7 digits


def same(result: dict[str, Any], expected: FlowLikelihood) -> None:
    for i, image in enumerate(result["images"]):
        assert image["bits_per_dim"] == pytest.approx(float(expected.bits_per_dim[i]), abs=CLOSE)
        error = float(expected.standard_error[i]) / DIMS / math.log(2)
        assert image["standard_error"] == pytest.approx(error, abs=CLOSE)
        assert image["log_density"] == pytest.approx(float(expected.mean[i]), abs=CLOSE * DIMS)
    bits = expected.bits_per_dim
    assert result["bits_per_dim"] == pytest.approx(float(bits.mean()), abs=CLOSE)
    assert result["dims"] == DIMS


def test_a_job_is_the_library_call(running: Service) -> None:
    assert ROW_COST == 2 + PRODUCT_COST
    options = {"kind": "likelihood", "mode": "flow", "draws": 3, "steps": 8, "seed": 4}
    busy = running.admit(steps=30, seed=1)
    job = running.admit(inputs=PICTURES, class_label=2, **options)
    part = running.admit(inputs=PICTURES[[2]], indices=(2,), class_label=2, **options)
    model = diffusion.load(running.models / "tiny")
    expected = flow_likelihood(model, X_START, draws=3, steps=8, seed=4, class_label=2)
    record = running.ended(job)
    assert record.done == record.work == 3 * 3 * 9 * ROW_COST
    same(record.result, expected)
    found = running.ended(part).result["images"][0]["bits_per_dim"]
    assert found == pytest.approx(record.result["images"][2]["bits_per_dim"], abs=1e-5)
    running.ended(busy)


SLOW = """
import time
from worker.engine.flow_pool import FlowPool
step = FlowPool.step
def slow(self, batch, shape):
    time.sleep(0.1)
    return step(self, batch, shape)
FlowPool.step = slow
"""


@pytest.mark.slow
@pytest.mark.parametrize("signal", [9, 15])
def test_a_job_whose_worker_ends_goes_on_with_the_next(service: Service, signal: int) -> None:
    """Killed, it does again what was not yet saved; stopped, nothing."""
    options = {"kind": "likelihood", "mode": "flow", "draws": 2, "steps": 60, "seed": 4}
    first = service.worker(fault=SLOW, DDPM_CHECKPOINT_S="0.02", DDPM_DRAIN_S="0")
    job = service.admit(inputs=PICTURES, **options)
    work = service.record(job).work
    service.until(lambda: service.record(job).done >= work // 4)
    service.kill(first, signal)
    kept = service.redis.hgetall(f"ddpm:job:{job}:state")
    rows = [struct.unpack_from("<4sId", raw)[1] for raw in kept.values()]
    known, done = sum(rows) * ROW_COST, service.record(job).done
    assert 0 < known <= done < work and (signal == 9 or known == done)
    if signal == 9:
        assert service.store.requeue(job, "")
    service.worker()
    model = diffusion.load(service.models / "tiny")
    expected = flow_likelihood(model, X_START, draws=2, steps=60, seed=4)
    same(service.ended(job, seconds=90).result, expected)
    steps = int(service.redis.hget("ddpm:totals", "image_steps"))
    assert work <= steps <= work + done - known
    assert not service.redis.exists(f"ddpm:job:{job}:state")
