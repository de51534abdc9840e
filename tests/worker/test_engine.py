from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import diffusion
from diffusion import Model
from diffusion.condition import Measurement, condition
from diffusion.encoding import encoding_table
from diffusion.operators import Identity
from diffusion.samplers import build_table
from diffusion.table import DeviceTable, remember
from tests.diffusion.steps import one_step
from worker.engine import chain_pool
from worker.engine.lane import EngineOptions
from worker.engine.loop import Engine
from worker.engine.tasks import (
    Advanced,
    Canceled,
    Checkpoint,
    EngineStopped,
    Event,
    Failed,
    Finished,
    Images,
    NotFinite,
    Snapshot,
    Start,
    States,
    Task,
)
from worker.network.costs import Shape
from worker.network.network import Network
from worker.network.networks import LaneKey
from worker.network.out_of_memory import is_out_of_memory

E = TypeVar("E", bound=Event)
GREY_LEVEL = 2 / 255


class Harness:
    """An engine ticked by hand, and everything that it said."""

    def __init__(self, **options: Any) -> None:
        self.events: list[Event] = []
        options.setdefault("dtype", torch.float32)
        self.engine = Engine(self.events.extend, EngineOptions(**options))  # type: ignore[arg-type]

    def run(self, *tasks: Task, ticks: int | None = None) -> None:
        for task in tasks:
            self.engine.submit(task)
        count = 0
        while (ticks is None or count < ticks) and self.engine.tick():
            count += 1
            assert count < 100_000

    def of(self, kind: type[E], task_id: str) -> list[E]:
        return [e for e in self.events if isinstance(e, kind) and e.task_id == task_id]

    def images(self, task_id: str) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for event in self.of(Images, task_id):
            assert not found.keys() & set(event.indices), "an image was reported twice"
            found.update(zip(event.indices, event.x, strict=True))
        return found

    def when_ended(self, task_id: str) -> int:
        """The position of a task's last event."""
        return next(
            i for i, e in enumerate(self.events) if isinstance(e, Finished) and e.task_id == task_id
        )


def task(
    model: Model,
    name: str,
    *,
    n: int = 1,
    seed: int = 1,
    label: int | None = None,
    **options: Any,
) -> Task:
    """A task; options of the table (sampler, steps, …) and of Task may be mixed."""
    names = ("sampler", "steps", "spacing", "eta", "variance", "corrector_steps")
    table = {key: options.pop(key) for key in names if key in options}
    starts = tuple(Start(index=i, class_label=label) for i in range(n))
    return Task(
        id=name,
        model=model,
        table=build_table(model.schedule, **{"steps": 10, **table}),  # type: ignore[arg-type]
        seed=seed,
        starts=starts,
        **options,  # type: ignore[arg-type]
    )


def crowd(model: Model, n: int = 60, **options: Any) -> list[Task]:
    """Tasks of mixed samplers, steps, labels and guidance."""
    rng = random.Random(0)
    tasks = []
    for i in range(n):
        label = rng.choice([None, 0, 1, 2])
        guidance = rng.choice([1.0, 3.0])
        kind: dict[str, Any] = rng.choice(
            [
                {"sampler": "ddpm", "variance": "small"},
                {"sampler": "ddim", "eta": 0.5},
                {"sampler": "dpmpp_2m"},
                {"sampler": "unipc", "spacing": "lambda"},
            ]
        )
        steps = rng.choice([2, 5, 11, 20])
        tasks.append(
            task(
                model, f"mate{i}", seed=1000 + i, label=label, guidance=guidance, steps=steps,
                **kind, **options,
            )
        )  # fmt: skip
    return tasks


SAMPLERS: list[dict[str, Any]] = [
    {"sampler": "ddpm"},
    {"sampler": "ddpm", "variance": "small", "spacing": "quadratic"},
    {"sampler": "ddim", "eta": 0.0},
    {"sampler": "ddim", "eta": 1.0},
    {"sampler": "dpmpp_2m"},
    {"sampler": "dpmpp_3m", "spacing": "lambda"},
    {"sampler": "unipc", "spacing": "karras"},
    {"sampler": "ddpm", "spacing": "karras"},
    {"sampler": "ddpm", "corrector_steps": 1},
    {"sampler": "langevin", "corrector_steps": 2},
]


@pytest.mark.parametrize("options", SAMPLERS)
def test_agrees_with_the_offline_sampler(model: Model, options: dict[str, Any]) -> None:
    harness = Harness()
    harness.run(task(model, "a", n=3, seed=5, label=2, guidance=2.0, **options))
    expected = diffusion.sample(
        model, 3, seed=5, class_label=2, guidance=2.0, steps=10, dtype=torch.float32, **options
    )  # type: ignore[arg-type]
    images = harness.images("a")
    for i in range(3):
        torch.testing.assert_close(images[i].clamp(-1, 1), expected[i], atol=1e-4, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_learned_variance_beside_a_fixed_one(
    make_model: Callable[..., Model], guidance: float
) -> None:
    model = make_model(learned_variance=True)
    harness = Harness()
    options: dict[str, Any] = {"n": 2, "seed": 5, "label": 1, "guidance": guidance}
    harness.run(*(task(model, name, variance=name, **options) for name in ("learned", "small")))
    for name in ("learned", "small"):
        expected = diffusion.sample(
            model, 2, seed=5, steps=10, class_label=1, guidance=guidance, variance=name,
            dtype=torch.float32,
        )  # fmt: skip
        for i, image in harness.images(name).items():
            torch.testing.assert_close(image.clamp(-1, 1), expected[i], atol=1e-4, rtol=0)


def test_a_learned_variance_needs_a_network_that_has_one(model: Model) -> None:
    harness = Harness()
    harness.run(task(model, "a", variance="learned"))
    assert "variance = 'learned'" in str(harness.of(Failed, "a")[0].error)


@pytest.mark.parametrize("prediction", ["v", "sample", "mean"])
def test_other_parameterisations_agree_with_the_offline_sampler(
    make_model: Callable[..., Model], prediction: str
) -> None:
    model = make_model(prediction=prediction, classes=0)
    harness = Harness()
    harness.run(task(model, "a", n=2, seed=5))
    expected = diffusion.sample(model, 2, seed=5, steps=10, dtype=torch.float32)
    for i, image in harness.images("a").items():
        torch.testing.assert_close(image.clamp(-1, 1), expected[i], atol=1e-4, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_same_image_alone_and_among_sixty_others(model: Model, guidance: float) -> None:
    me = task(model, "me", seed=7, label=1, guidance=guidance, steps=20)
    alone, crowded = Harness(), Harness()
    alone.run(me)
    mates = crowd(model)
    crowded.run(*mates[:30], me, *mates[30:])
    difference = (alone.images("me")[0] - crowded.images("me")[0]).abs().mean()
    assert difference < GREY_LEVEL
    assert len([e for e in crowded.events if isinstance(e, Finished)]) == 61


def test_deterministic_is_the_same_bytes_in_any_slot_with_any_mates(model: Model) -> None:
    me = task(model, "me", seed=7, label=1, guidance=3.0, steps=20, deterministic=True)
    alone = Harness()
    alone.run(me)
    expected = alone.images("me")[0].numpy().tobytes()
    for position, count in ((0, 10), (5, 7), (33, 60)):
        crowded = Harness(max_rows=8, capacity=8)
        mates = crowd(model, count, deterministic=True)
        crowded.run(*mates[:position], me, *mates[position:])
        assert crowded.images("me")[0].numpy().tobytes() == expected


@pytest.mark.parametrize("method", [None, "projection", "moment"])
def test_deterministic_samples_are_guided_also_where_no_batch_leaves_its_rows_alone(
    model: Model, method: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine whose kernels see the other rows: one row a call, the labels' one and the
    null label's too."""
    monkeypatch.setattr(Network, "_rows_stand_alone", lambda *_: False)
    me = task(model, "me", n=2, seed=7, label=1, guidance=3.0, steps=6, deterministic=True)
    mates = crowd(model, 12, deterministic=True)
    mates.append(task(model, "unguided", n=2, steps=6, deterministic=True))
    if method is not None:
        measured = Measurement(Identity(), torch.zeros(1, *model.shape), 0.1)
        me, *mates = (replace(one, condition=condition(measured, method)) for one in (me, *mates))
    alone, crowded = Harness(), Harness(max_rows=8, capacity=8)
    alone.run(me)
    [lane] = alone.engine.lanes.values()
    seen: set[int] = set()
    eager = lane.pool.network.eager

    def watched(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        seen.add(x.shape[0])
        return eager(x, t, labels)

    monkeypatch.setattr(lane.pool.network, "eager", watched)
    alone.run(replace(me, id="again"))
    assert seen == {1}
    crowded.run(*mates[:5], me, *mates[5:])
    assert not [e for e in crowded.events if isinstance(e, Failed)]
    for index, image in alone.images("me").items():
        assert torch.equal(crowded.images("me")[index], image)
        assert torch.equal(alone.images("again")[index], image)


def test_image_i_does_not_depend_on_how_many_are_asked_for(model: Model) -> None:
    many, one = Harness(), Harness()
    many.run(task(model, "a", n=5, seed=3, deterministic=True))
    third = replace(task(model, "b", seed=3, deterministic=True), starts=(Start(index=3),))
    one.run(third)
    assert torch.equal(many.images("a")[3], one.images("b")[3])


def test_batches_have_the_sizes_of_the_buckets(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(max_rows=16, capacity=16)
    harness.run(task(model, "warm"))
    network = harness.engine.lanes[LaneKey(model.digest)].pool.network
    allowed = {shape.rows for shape in network.shapes}
    seen: set[int] = set()
    eager = network.eager

    def watched(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        seen.add(x.shape[0])
        return eager(x, t, labels)

    monkeypatch.setattr(network, "eager", watched)
    harness.run(*crowd(model, 40))
    assert seen <= allowed
    assert max(seen) <= 16


def test_a_gpu_may_be_given_more_than_256_rows(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(max_rows=1000, capacity=1000)
    harness.run(task(model, "warm"))
    network = harness.engine.lanes[LaneKey(model.digest)].pool.network
    assert max(shape.rows for shape in network.shapes) == 768
    seen: set[int] = set()
    output = network.output

    def watched(x: Tensor, t: Tensor, labels: Tensor | None, shape: Shape) -> Tensor:
        seen.add(shape.rows)
        return output(x, t, labels, shape)

    monkeypatch.setattr(network, "output", watched)
    harness.run(task(model, "large", n=1000, steps=6))
    assert harness.of(Finished, "large") and len(harness.images("large")) == 1000
    assert 512 <= max(seen) <= 768


def test_fewer_slots_than_samples_gives_the_same_images(model: Model) -> None:
    roomy, tight = Harness(), Harness(max_rows=8, capacity=8)
    tasks = [task(model, f"t{i}", n=3, seed=i, steps=5 + i, deterministic=True) for i in range(6)]
    roomy.run(*tasks)
    tight.run(*tasks)
    for each in tasks:
        for index, image in roomy.images(each.id).items():
            torch.testing.assert_close(tight.images(each.id)[index], image, atol=1e-4, rtol=0)


def test_a_short_job_overtakes_a_long_one(model: Model) -> None:
    harness = Harness(max_rows=16, capacity=64)
    harness.run(task(model, "long", n=64, steps=50, sampler="ddim"), ticks=5)
    # Three turns of four begin with it: ten rows take at most fourteen turns.
    harness.run(task(model, "short", steps=10), ticks=14)
    assert harness.of(Finished, "short")
    assert not harness.of(Images, "long")
    assert len(harness.of(Advanced, "long")) > 5  # which did not stand still


def test_a_long_job_is_not_starved_by_a_stream_of_short_ones(model: Model) -> None:
    harness = Harness(max_rows=8, capacity=16)
    harness.run(task(model, "long", n=1, steps=16), ticks=1)
    for i in range(100):
        for copy in range(8):
            harness.engine.submit(task(model, f"short{i}.{copy}", steps=2))
        harness.engine.tick()
        if harness.of(Finished, "long"):
            break
    assert harness.of(Finished, "long"), "the long job did not end"
    assert i <= 4 * 16 + 4


def test_urgent_goes_first(model: Model) -> None:
    harness = Harness(max_rows=8, capacity=8)
    normal = [task(model, f"n{i}", n=4, steps=10) for i in range(8)]
    urgent = task(model, "urgent", steps=20, urgent=True)
    harness.run(*normal, urgent)
    ended = [e.task_id for e in harness.events if isinstance(e, Finished)]
    assert ended.index("urgent") <= 3  # only those that age let through come before it


def test_progress_counts_every_evaluation(model: Model) -> None:
    harness = Harness()
    harness.run(task(model, "a", n=2, steps=7, label=0, guidance=2.0))
    progress = harness.of(Advanced, "a")
    assert [e.done for e in progress] == sorted({e.done for e in progress})
    assert progress[-1].done == progress[-1].total == 2 * 7 * 2
    assert progress[-1].t == 0
    assert isinstance(harness.events[-1], Finished)


@pytest.mark.parametrize("steps_behind", [0, 1, 3])
def test_snapshots_hold_what_entered_the_step_and_what_was_found(
    model: Model, steps_behind: int
) -> None:
    harness = Harness(steps_behind=steps_behind)
    one = replace(task(model, "a", n=2, seed=4), snapshot_rows=frozenset({0, 4, 9}))
    harness.run(one, *crowd(model, 5))
    snapshots = harness.of(Snapshot, "a")  # the two chains may be stepped apart
    kept = [(snapshot.row, index) for snapshot in snapshots for index in snapshot.indices]
    assert sorted(kept) == [(row, index) for row in (0, 4, 9) for index in (0, 1)]
    for snapshot in snapshots:
        assert snapshot.t == one.table.t[snapshot.row]
        found, _ = one_step(model.schedule, one.table, snapshot.row, snapshot.x_t, snapshot.eps)
        torch.testing.assert_close(snapshot.x_start, found)
        if snapshot.row == 9:  # the last row lands on x̂_0
            images = torch.stack([harness.images("a")[i] for i in snapshot.indices])
            torch.testing.assert_close(images, snapshot.x_start)
    assert isinstance(harness.events[harness.when_ended("a")], Finished)


def test_cancel_between_steps_gives_the_state_and_frees_the_slots(model: Model) -> None:
    harness = Harness(max_rows=8, capacity=8)
    harness.run(task(model, "a", n=8, steps=30), ticks=6)
    harness.engine.cancel("a")
    harness.engine.cancel("nobody")
    harness.run(task(model, "b", n=4, steps=5))
    (canceled,) = harness.of(Canceled, "a")
    assert canceled.states is not None
    assert canceled.states.rows.max() > 0
    assert not harness.of(Images, "a")
    assert not harness.of(Finished, "a")
    assert len(harness.images("b")) == 4
    assert harness.engine.waiting_rows == 0


def resumed(task_: Task, states: States, finished: set[int]) -> Task:
    """The rest of a task, from a state exported by another engine."""
    at = {int(index): k for k, index in enumerate(states.indices)}
    starts = []
    for start in task_.starts:
        if start.index in finished:
            continue
        if (k := at.get(start.index)) is None:
            starts.append(start)
            continue
        starts.append(
            replace(
                start,
                row=int(states.rows[k]),
                x_t=states.x_t[k],
                x_start_prev=states.x_start_prev[k],
                x_start_older=None if states.x_start_older is None else states.x_start_older[k],
            )
        )
    return replace(task_, starts=tuple(starts))


@pytest.mark.parametrize("options", SAMPLERS)
def test_a_resume_in_mid_chain_gives_what_an_undisturbed_run_gives(
    model: Model, options: dict[str, Any]
) -> None:
    whole = task(model, "a", n=12, seed=9, label=1, guidance=2.0, deterministic=True, **options)
    undisturbed = Harness()
    undisturbed.run(whole)
    first = Harness(max_rows=8, capacity=8)
    first.run(whole, *crowd(model, 5, deterministic=True), ticks=25)
    first.engine.cancel("a")
    first.engine.tick()
    (canceled,) = first.of(Canceled, "a")
    assert canceled.states is not None
    done = first.images("a")
    second = Harness()
    second.run(resumed(whole, canceled.states, set(done)))
    images = {**done, **second.images("a")}
    assert set(images) == set(range(12))
    for index, image in undisturbed.images("a").items():
        assert torch.equal(images[index], image)


def test_checkpoints_come_by_time_and_resume(model: Model) -> None:
    harness = Harness(checkpoint_every=0.0)
    whole = task(model, "a", n=2, seed=9, deterministic=True)
    harness.run(whole)
    checkpoints = harness.of(Checkpoint, "a")
    assert [int(c.states.rows.max()) for c in checkpoints] == list(range(1, 10))
    again = Harness()
    again.run(resumed(whole, checkpoints[4].states, set()))
    for index, image in harness.images("a").items():
        assert torch.equal(again.images("a")[index], image)


def test_a_task_with_nothing_left_to_do_finishes(model: Model) -> None:
    harness = Harness()
    harness.run(replace(task(model, "a"), starts=()))
    assert harness.of(Finished, "a")


def test_a_chain_may_start_from_any_x_t(model: Model) -> None:
    x_t = torch.randn(model.shape, generator=torch.Generator().manual_seed(0))
    table = build_table(model.schedule, steps=10)
    starts = tuple(Start(index=i, row=4, x_t=x_t) for i in range(3))
    harness = Harness()
    harness.run(Task(id="a", model=model, table=table, seed=1, starts=starts))
    images = harness.images("a")
    assert len(images) == 3
    assert not torch.equal(images[0], images[1])  # one x_t, but each its own noise


@pytest.mark.parametrize("steps_behind", [0, 2])
def test_a_chain_that_is_not_finite_fails_alone(model: Model, steps_behind: int) -> None:
    bad = replace(
        task(model, "bad", n=2, steps=20),
        starts=(Start(index=0), Start(index=1, x_t=torch.full(model.shape, torch.nan))),
    )
    harness = Harness(steps_behind=steps_behind)
    good = task(model, "good", n=4, seed=2, steps=20)
    harness.run(bad, good)
    (failed,) = harness.of(Failed, "bad")
    assert isinstance(failed.error, NotFinite)
    assert "image 1" in str(failed.error)
    assert not harness.of(Finished, "bad")
    alone = Harness()
    alone.run(good)
    for index, image in alone.images("good").items():
        torch.testing.assert_close(harness.images("good")[index], image, atol=1e-4, rtol=0)


def test_a_batch_that_raises_is_bisected_down_to_the_guilty_task(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness()
    tasks = [task(model, f"t{i}", seed=i, label=i % 3) for i in range(16)]
    harness.run(tasks[0], ticks=1)
    network = harness.engine.lanes[LaneKey(model.digest)].pool.network
    eager = network.eager

    def broken(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        # The network's own check, as it would be for a label beyond the table.
        assert labels is not None
        if bool((labels == 2).any()) and bool((t < 20).any()):
            raise IndexError("index out of range in self")
        return eager(x, t, labels)

    monkeypatch.setattr(network, "eager", broken)
    harness.run(*tasks[1:])
    failed = {e.task_id for e in harness.events if isinstance(e, Failed)}
    ended = {e.task_id for e in harness.events if isinstance(e, Finished)}
    assert failed == {f"t{i}" for i in range(16) if i % 3 == 2}
    assert ended == {f"t{i}" for i in range(16) if i % 3 != 2}


def test_a_step_that_finds_no_memory_at_its_end_is_done_again_as_a_whole(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoding keeps something else than x̂_0 of each row: what makes that takes memory."""
    start = torch.rand(4, *model.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoding = Task(
        id="a",
        model=model,
        table=encoding_table(model.schedule, [5, 15, 25, 35, 45], iterations=1),
        seed=1,
        starts=tuple(Start(i, x_t=x) for i, x in enumerate(start)),
    )
    undisturbed, disturbed = Harness(), Harness()
    undisturbed.run(encoding)
    calls = 0

    def short(*given: Any, **more: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return remember(*given, **more)

    monkeypatch.setattr(chain_pool, "remember", short)
    disturbed.run(encoding)
    assert calls > 3 and disturbed.of(Finished, "a")
    for index, image in undisturbed.images("a").items():
        torch.testing.assert_close(disturbed.images("a")[index], image, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()], ids=["device", "host"]
)
def test_a_batch_without_memory_is_halved_and_all_goes_on(
    model: Model, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """And stays so for a while: not every step runs into it again; then all of it is tried."""
    harness, alone = Harness(), Harness()
    tasks = [task(model, f"t{i}", seed=i, steps=40) for i in range(16)]
    harness.run(tasks[0], ticks=1)
    lane = harness.engine.lanes[LaneKey(model.digest)]
    eager, sizes = lane.pool.network.eager, []

    def limited(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        sizes.append(len(x))
        if len(x) > 5:
            raise error
        return eager(x, t, labels)

    monkeypatch.setattr(lane.pool.network, "eager", limited)
    monkeypatch.setattr("worker.engine.lane.GROW_EVERY", 30)
    harness.run(*tasks[1:])
    assert not [e for e in harness.events if isinstance(e, Failed)]
    assert {e.task_id for e in harness.events if isinstance(e, Finished)} == {t.id for t in tasks}
    refused = sum(size > 5 for size in sizes)
    assert 2 <= refused < len(sizes) / 4
    alone.run(tasks[3])
    torch.testing.assert_close(harness.images("t3")[0], alone.images("t3")[0], atol=1e-4, rtol=0)


def test_a_model_that_is_made_ready_while_memory_is_short_serves_all_the_same(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large batches are tried as it is loaded: one that does not fit must not cost the model."""
    output = Network.output

    def limited(self: Network, x: Tensor, *others: Any) -> Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return output(self, x, *others)

    monkeypatch.setattr(Network, "output", limited)
    harness = Harness()
    for exact in (False, True):
        assert harness.engine.networks.prepare(model, exact=exact).shapes
    harness.run(*(task(model, f"t{i}", seed=i, steps=4) for i in range(8)))
    assert not [e for e in harness.events if isinstance(e, Failed)]


def test_a_sample_without_memory_for_itself_fails_by_that_name(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness()
    harness.run(task(model, "a", steps=4), ticks=1)
    network = harness.engine.lanes[LaneKey(model.digest)].pool.network

    def full(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return torch.empty(10**15)  # more than any machine has

    monkeypatch.setattr(network, "eager", full)
    harness.run(task(model, "b", steps=4))
    [*failed] = [e for e in harness.events if isinstance(e, Failed)]
    assert {e.task_id for e in failed} == {"a", "b"}
    assert all(is_out_of_memory(e.error) for e in failed)


@pytest.mark.parametrize("what", ["slots", "table", "two rows back"])
def test_a_task_for_whose_state_there_is_no_memory_fails_alone(
    model: Model, make_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Whatever else is in flight comes to the same pictures."""
    harness, undisturbed = Harness(), Harness()
    first, last = task(model, "a", seed=1, steps=8), task(model, "c", seed=2, steps=6)
    undisturbed.run(first, last)
    harness.run(first, ticks=3)
    other = make_model(seed=9, classes=0)
    harness.engine.networks.prepare(other)

    def full(*given: Any, **more: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patched:
        if what == "slots":
            refused = task(other, "b", steps=4)
            patched.setattr(torch, "zeros", full)
        elif what == "table":
            refused = task(model, "b", steps=4)
            patched.setattr(DeviceTable, "of", full)
        else:
            refused = task(model, "b", steps=10, sampler="dpmpp_3m")
            patched.setattr(torch, "zeros_like", full)
        harness.engine.submit(refused)
        harness.engine._commands.popleft()()
    harness.run(last)
    [failed] = [e for e in harness.events if isinstance(e, Failed)]
    assert failed.task_id == "b" and is_out_of_memory(failed.error)
    for name in ("a", "c"):
        torch.testing.assert_close(harness.images(name), undisturbed.images(name))


def test_a_model_that_is_not_kept_is_let_go_of_with_its_last_task(
    make_model: Callable[..., Model],
) -> None:
    harness = Harness()
    old, new = make_model(seed=1, classes=0), make_model(seed=2, classes=0)
    harness.run(task(old, "a", steps=9), task(old, "b", steps=5, deterministic=True), ticks=2)
    harness.engine.keep_only([new.digest])
    harness.run(task(new, "c", steps=3), ticks=6)
    assert harness.engine.networks.is_prepared(old)
    harness.run()
    assert {e.task_id for e in harness.events if isinstance(e, Finished)} == {"a", "b", "c"}
    for exact in (False, True):
        assert not harness.engine.networks.is_prepared(old, exact=exact)
    assert {key.digest for key in harness.engine.lanes} == {new.digest}
    assert harness.engine.networks.is_prepared(new)
    weights = weakref.ref(old)
    del old
    harness.events.clear()
    gc.collect()
    assert weights() is None, gc.get_referrers(weights())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"starts": (Start(index=0, class_label=3),)}, "class_label = 3"),
        ({"starts": (Start(index=0, row=10),)}, "row = 10"),
        ({"starts": (Start(index=0, x_t=torch.zeros(1, 4, 4)),)}, "x_t"),
    ],
)
def test_a_task_that_cannot_run_fails_at_once_and_names_the_field(
    model: Model, change: dict[str, Any], field: str
) -> None:
    harness = Harness()
    harness.run(replace(task(model, "bad"), **change), task(model, "good"))  # type: ignore[arg-type]
    (failed,) = harness.of(Failed, "bad")
    assert field in str(failed.error)
    assert harness.of(Finished, "good")


def test_guidance_needs_a_null_label(make_model: Callable[..., Model]) -> None:
    unconditional = make_model(classes=0)
    harness = Harness()
    harness.run(task(unconditional, "a", label=1, guidance=2.0), task(unconditional, "b"))
    assert "guidance" in str(harness.of(Failed, "a")[0].error)
    assert harness.of(Finished, "b")


def test_two_models_take_turns(model: Model, make_model: Callable[..., Model]) -> None:
    other = make_model(seed=1, classes=0)
    harness = Harness()
    harness.run(task(model, "a", n=8, steps=20), task(other, "b", n=8, steps=20))
    order = [e.task_id for e in harness.events if isinstance(e, Advanced)]
    assert 4 <= order[:20].count("a") <= 16  # by their share of time, which a busy machine shakes
    expected = diffusion.sample(other, 8, seed=1, steps=20, dtype=torch.float32)
    for index, image in harness.images("b").items():
        torch.testing.assert_close(image.clamp(-1, 1), expected[index], atol=1e-4, rtol=0)


def test_tables_of_finished_tasks_are_let_go(model: Model) -> None:
    harness = Harness()
    harness.run(*(task(model, f"t{i}", steps=2 + i) for i in range(20)))
    harness.run(task(model, "last", steps=3))
    pool: Any = harness.engine.lanes[LaneKey(model.digest)].pool
    bank = pool.bank
    assert bank.rows is not None and bank.rows.t.shape == (3,)


def test_compiled_code_is_swapped_in_while_tasks_run(model: Model) -> None:
    harness = Harness()
    harness.run(task(model, "a", n=4, steps=40), ticks=5)
    calls = []

    def compiled(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        calls.append(x.shape[0])
        return model.output(x, t, labels)

    network = harness.engine.networks.prepare(model)
    network.add_compiled(network.tile(4), compiled)
    harness.run()
    assert calls and set(calls) == {4}
    expected = diffusion.sample(model, 4, seed=1, steps=40, dtype=torch.float32)
    for index, image in harness.images("a").items():
        torch.testing.assert_close(image.clamp(-1, 1), expected[index], atol=1e-4, rtol=0)


def test_the_thread_runs_tasks_and_stops(model: Model) -> None:
    import queue

    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    engine = Engine(events.put)
    engine.start()
    engine.submit(task(model, "a", n=2))
    seen: list[Event] = []
    while not any(isinstance(event, Finished) for event in seen):
        seen += events.get(timeout=60)
    assert engine.rates()[model.digest] > 0
    engine.stop()
    with pytest.raises(EngineStopped):
        engine.submit(task(model, "b"))


def test_the_rate_is_that_of_full_batches(model: Model) -> None:
    """One sample alone takes a step for itself; a queue of them would not."""
    harness = Harness()
    harness.run(task(model, "a"))
    network = harness.engine.networks.prepare(model)
    for _ in range(2):
        network.costs.record(Shape(64), 1e-6)
    assert harness.engine.rates()[model.digest] == pytest.approx(64e6)


def test_a_lost_device_breaks_the_engine_down_and_not_the_tasks(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness()
    harness.run(task(model, "a"), ticks=1)
    network = harness.engine.lanes[LaneKey(model.digest)].pool.network

    def lost(*_: object) -> Tensor:
        raise torch.AcceleratorError("the device was lost")

    monkeypatch.setattr(network, "eager", lost)
    with pytest.raises(torch.AcceleratorError):
        harness.engine.tick()
    assert not harness.of(Failed, "a")


def test_options_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="capacity = 8"):
        EngineOptions(capacity=8, max_rows=16)
    with pytest.raises(ValueError, match="max_rows = 4"):
        EngineOptions(max_rows=4)
