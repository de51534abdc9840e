"""Likelihoods as the engine and a worker run them: equal to the library's, fair, resumable."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffusion
from diffusion import Model
from diffusion.bound import bits_per_dim, bound_table
from diffusion.likelihood import likelihood
from diffusion.samplers import build_table
from diffusion.term_plan import full_plan, monte_carlo_plan
from worker.engine.lane import EngineOptions
from worker.engine.loop import Engine
from worker.engine.tasks import Advanced, Canceled, Event, Failed, Finished, Start, Task, Terms
from worker.engine.terms import TermTask
from worker.kinds.inputs import x_start_of
from worker.network.networks import LaneKey, Mode, Networks

Service = Any  # of conftest.py; tests cannot import it
PICTURES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
X_START = x_start_of(PICTURES)


def term_task(model: Model, name: str, *, samples: int | None = None, **options: Any) -> TermTask:
    n, table = options.pop("n", 3), bound_table(model.schedule)
    indices = np.arange(n)
    keys = torch.from_numpy(indices)
    plan = (
        full_plan(table, n)
        if samples is None
        else monte_carlo_plan(table, seed=1, indices=keys, samples=samples)
    )
    given = {"x_start": X_START[:n], "left": np.arange(plan.row.size), "variance": "small"}
    return TermTask(
        id=name, model=model, seed=1, indices=indices, plan=plan, **{**given, **options}
    )


class Harness:
    """An engine ticked by hand, and everything that it said."""

    def __init__(self, **options: object) -> None:
        self.events: list[Event] = []
        self.engine = Engine(
            self.events.extend,
            EngineOptions(dtype=torch.bfloat16, **options),  # type: ignore[arg-type]
        )

    def run(self, *tasks: Task | TermTask, ticks: int = 100_000) -> None:
        for task in tasks:
            self.engine.submit(task)
        while ticks and self.engine.tick():
            ticks -= 1

    def nats(self, task: TermTask) -> np.ndarray:
        found = np.full(task.plan.row.size, np.nan)
        for event in self.events:
            if isinstance(event, Terms) and event.task_id == task.id:
                assert np.isnan(found[event.places]).all(), "a term was told twice"
                found[event.places] = event.nats
        return found.reshape(task.plan.row.shape)

    def until(self, name: str) -> None:
        while self.ended(name) is None:
            assert self.engine.tick()

    def done(self, name: str) -> int:
        said = [e for e in self.events if isinstance(e, Advanced) and e.task_id == name]
        return said[-1].done

    def ended(self, name: str) -> type[Event] | None:
        ends = [e for e in self.events if isinstance(e, Finished | Failed | Canceled)]
        return next((type(e) for e in ends if e.task_id == name), None)


def test_terms_of_several_tasks_are_the_librarys_in_float32(model: Model) -> None:
    """Also where the engine samples in bfloat16, with other tasks in the same batch."""
    full = term_task(model, "full")
    drawn = term_task(model, "drawn", samples=7, variance="large", class_label=1)
    harness = Harness()
    harness.run(full, drawn)
    label = torch.ones(3, dtype=torch.long)
    for task, options in (
        (full, {"variance": "small"}),
        (drawn, {"samples": 7, "variance": "large", "class_label": label}),
    ):
        expected = likelihood(model, X_START[:3], seed=1, **options)  # type: ignore[arg-type]
        np.testing.assert_allclose(harness.nats(task), expected.nats, rtol=1e-4, atol=1e-3)
        assert harness.ended(task.id) is Finished
    assert not harness.engine.lanes[LaneKey(model.digest, mode="terms")].runs


@pytest.mark.parametrize("left", [1, 63, 64, 65, 127, 150])
def test_every_term_is_evaluated_once(model: Model, left: int) -> None:
    chosen = np.random.default_rng(left).permutation(150)[:left]
    task = term_task(model, "t", left=np.sort(chosen))
    assert task.evaluations == left
    harness = Harness()
    harness.run(task)
    there = ~np.isnan(harness.nats(task).ravel())
    assert set(np.flatnonzero(there)) == set(chosen)


def test_a_step_that_finds_no_memory_at_its_end_is_done_again_as_a_whole(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, plain, calls = term_task(model, "t"), torch.isfinite, 0

    def short(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += x.dtype is torch.float64  # a step asks it of its terms, at its end
        if calls == 3:
            calls += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(x)

    monkeypatch.setattr(torch, "isfinite", short)
    harness = Harness()
    harness.run(task)
    assert calls > 4 and harness.ended("t") is Finished
    assert np.isfinite(harness.nats(task)).all()


def test_nothing_left_ends_at_once(model: Model) -> None:
    harness = Harness()
    harness.run(term_task(model, "t", left=np.arange(0)))
    assert harness.ended("t") is Finished


def test_a_learned_variance_and_another_prediction(make_model: Callable[..., Model]) -> None:
    for options in ({"learned_variance": True}, {"prediction": "v"}):
        model = make_model(**options)
        variance = "learned" if "learned_variance" in options else "small"
        task = term_task(model, "t", variance=variance)
        harness = Harness()
        harness.run(task)
        expected = likelihood(model, X_START[:3], seed=1, variance=variance)
        np.testing.assert_allclose(harness.nats(task), expected.nats, rtol=1e-4, atol=1e-3)


def test_deterministic_terms_do_not_see_their_mates(model: Model) -> None:
    task = term_task(model, "t", n=1, deterministic=True)
    alone, shared = Harness(), Harness()
    alone.run(task)
    shared.run(task, term_task(model, "u", deterministic=True, variance="large"))
    np.testing.assert_array_equal(alone.nats(task), shared.nats(task))


def sampling(model: Model, name: str, steps: int, n: int = 8) -> Task:
    starts = tuple(Start(i) for i in range(n))
    return Task(name, model, build_table(model.schedule, steps=steps), 0, starts)


def test_neither_starves_the_other(model: Model) -> None:
    """Chains and a short likelihood end next to a long one, and it goes on all the while. How the
    time is shared: tests/worker/test_fairness.py."""
    harness = Harness()
    harness.run(term_task(model, "long", n=1, samples=20_000), ticks=5)
    harness.run(sampling(model, "chain", 50, n=1), ticks=1)
    harness.until("chain")
    harness.run(term_task(model, "short", n=1, samples=20), ticks=1)
    harness.until("short")
    assert harness.ended("long") is None
    harness.run(sampling(model, "many", 50, n=64), ticks=1)
    before = harness.done("long")
    harness.until("many")
    assert harness.done("long") > before
    harness.run()
    assert harness.ended("long") is Finished


def test_a_bad_image_fails_alone(model: Model) -> None:
    bad = X_START[:2].clone()
    bad[1, 0, 0, 0] = float("nan")
    harness = Harness()
    good = term_task(model, "good")
    harness.run(
        good, term_task(model, "bad", n=2, x_start=bad), term_task(model, "odd", variance="?")
    )
    assert harness.ended("good") is Finished
    assert harness.ended("bad") is Failed and harness.ended("odd") is Failed
    [error] = [e.error for e in harness.events if isinstance(e, Failed) and e.task_id == "bad"]
    assert "image 1: not finite" in str(error)
    assert np.isfinite(harness.nats(good)).all()


def test_cancel_between_two_steps(model: Model) -> None:
    harness = Harness()
    harness.run(term_task(model, "t", n=5), ticks=2)
    harness.engine.cancel("t")
    harness.run()
    assert harness.ended("t") is Canceled
    assert harness.engine.waiting_rows == 0


def test_a_job_is_the_library_call(running: Service) -> None:
    model = diffusion.load(running.models / "tiny")
    options = {"kind": "likelihood", "inputs": PICTURES, "seed": 4}
    drawn = running.admit(samples=9, **options)
    full = running.admit(
        mode="full", variance="large", class_label=2, terms=(1000, 1, 17), **options
    )
    busy = [running.admit(steps=30, seed=i) for i in range(3)]
    x = X_START
    by_job = {
        drawn: likelihood(model, x, samples=9, seed=4),
        full: likelihood(
            model, x, seed=4, variance="large", class_label=torch.full((5,), 2, dtype=torch.long)
        ),
    }
    for job_id, expected in by_job.items():
        record = running.ended(job_id)
        assert record.done == record.work == expected.nats.numel()
        result = record.result
        for i, image in enumerate(result["images"]):
            parts = {
                "bits_per_dim": expected.bits_per_dim,
                "L_T": bits_per_dim(expected.prior, 64),
                "L_t": bits_per_dim(expected.transitions, 64),
                "L_0": bits_per_dim(expected.decoder, 64),
            }
            for name, values in parts.items():
                assert image[name] == pytest.approx(float(values[i]), abs=1e-4)
        mean = expected.bits_per_dim.mean()
        assert result["bits_per_dim"] == pytest.approx(float(mean), abs=1e-4)
        error = float(expected.bits_per_dim.std()) / 5**0.5
        assert result["standard_error"] == pytest.approx(error, abs=1e-4)
    errors = by_job[drawn].standard_error
    first = running.record(drawn).result["images"][0]
    assert first["standard_error"] == pytest.approx(float(errors[0]), abs=1e-4)
    image = running.record(full).result["images"][3]
    assert "standard_error" not in image and image["terms"]["t"] == [1000, 1, 17]
    for t, bits, rmse in zip(*image["terms"].values(), strict=True):
        nats = by_job[full].nats[3, t - 1]
        assert bits == pytest.approx(float(bits_per_dim(nats, 64)), abs=1e-4)
        square = by_job[full].squared_error[3, t - 1]
        assert rmse == pytest.approx(127.5 * float(square) ** 0.5, abs=1e-2)
    for job_id in busy:
        running.ended(job_id)


def test_indices_key_the_noise(running: Service) -> None:
    """Parts of a set give the numbers of the whole."""
    options = {"kind": "likelihood", "seed": 4, "samples": 5}
    whole = running.admit(inputs=PICTURES, **options)
    part = running.admit(inputs=PICTURES[[4, 2]], indices=(4, 2), **options)
    found = [running.ended(job).result["images"] for job in (whole, part)]
    for place, index in enumerate((4, 2)):
        for name in ("bits_per_dim", "L_t", "L_0", "standard_error"):
            assert found[1][place][name] == pytest.approx(found[0][index][name], abs=1e-5)


SLOW = """
import time
from worker.engine.term_pool import TermPool
step = TermPool.step
def slow(self, batch, shape):
    time.sleep(0.3)
    return step(self, batch, shape)
TermPool.step = slow
"""


@pytest.mark.slow
@pytest.mark.parametrize("signal", [9, 15])
def test_a_job_whose_worker_ends_goes_on_with_the_next(service: Service, signal: int) -> None:
    """Killed, it does again what was not yet saved; stopped, nothing."""
    work = 1000 * len(PICTURES)
    options = {"kind": "likelihood", "mode": "full", "inputs": PICTURES, "seed": 1}
    # Slow, so that it is midway however late it is looked at, and however late the signal comes.
    first = service.worker(fault=SLOW, DDPM_CHECKPOINT_S="0.02", DDPM_DRAIN_S="0")
    job = service.admit(**options)
    service.until(lambda: service.record(job).done >= 500)
    service.kill(first, signal)
    kept = service.redis.hgetall(f"ddpm:job:{job}:state")
    known = sum(int((~np.isnan(np.frombuffer(raw[8:], "<f8"))).sum()) // 2 for raw in kept.values())
    done = service.record(job).done
    assert 0 < known <= done < work and (signal == 9 or known == done)
    if signal == 9:
        assert service.store.requeue(job, "")
    service.worker()
    again = service.admit(**options)
    expected = service.ended(again).result
    found = service.ended(job, seconds=90).result
    assert found["bits_per_dim"] == pytest.approx(expected["bits_per_dim"], abs=1e-5)
    steps = int(service.redis.hget("ddpm:totals", "image_steps"))
    assert 2 * work <= steps <= 2 * work + done - known
    assert not service.redis.exists(f"ddpm:job:{job}:state")


def test_cancel_progress_and_events(running: Service) -> None:
    job = running.admit(kind="likelihood", samples=5000, inputs=PICTURES, seed=1)
    running.until(lambda: running.record(job).done > 0)
    running.store.cancel(job)
    record = running.ended(job, "canceled", seconds=10)
    assert 0 < record.done < record.work == 25_000 and record.result is None
    rows = running.redis.xrange(f"ddpm:job:{job}:events")
    names = [fields[b"event"].decode() for _, fields in rows]
    assert "progress" in names and names[-1] == "done"


def test_a_stock_rq_worker_runs_it(service: Service) -> None:
    job = service.admit(kind="likelihood", samples=5, inputs=PICTURES[:2], seed=3)
    chain = service.admit(kind="reconstruct", inputs=PICTURES[:1], t=100, steps=5, seed=3)
    folder = Path(sys.executable).parent
    command = [str(folder / "rq"), "worker", "--burst", "--url", service.url]
    done = subprocess.run(
        [*command, "--serializer", "rq.serializers.JSONSerializer", "ddpm"],
        env=service.environment(PYTHONPATH=str(Path(__file__).parents[2])),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert service.record(chain).status == "succeeded", done.stderr
    expected = likelihood(diffusion.load(service.models / "tiny"), X_START[:2], samples=5, seed=3)
    found = service.ended(job).result["images"]
    for i in range(2):
        bits = float(expected.bits_per_dim[i])
        assert found[i]["bits_per_dim"] == pytest.approx(bits, abs=1e-4)


def test_a_worker_in_bfloat16_keeps_float32_for_bits(model: Model) -> None:
    networks = Networks(torch.bfloat16, 8)
    modes: tuple[Mode, ...] = ("chains", "terms", "products", "flow")
    found = {mode: networks.prepare(model, mode=mode).dtype for mode in modes}
    assert found.pop("chains") == torch.bfloat16
    assert set(found.values()) == {torch.float32}
