"""The engine asks its book before it steps a task, and steps one alone where it is told to."""

from __future__ import annotations

import torch

import diffusion
from diffusion import Model
from diffusion.samplers import build_table
from worker.engine.lane import LOOK_EVERY, EngineOptions
from worker.engine.loop import Engine
from worker.engine.tasks import Advanced, Event, Finished, Images, Start, Task


class Book:
    """Notes what it is told, and lets nobody in by itself."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.gone: list[str] = []
        self.only: list[str] = []

    def called(self, task_ids: list[str]) -> None:
        self.calls += task_ids

    def left(self, task_ids: list[str]) -> None:
        self.gone += task_ids

    def alone(self, task_id: str) -> None:
        self.only.append(task_id)


class Harness:
    """An engine ticked by hand."""

    def __init__(self) -> None:
        self.book, self.events = Book(), list[Event]()
        options = EngineOptions(dtype=torch.float32, max_rows=8, capacity=8)
        self.engine = Engine(self.events.extend, options, book=self.book)

    def tick(self, times: int = 1) -> set[str]:
        """The tasks that were stepped."""
        self.events.clear()
        for _ in range(times):
            self.engine.tick()
        return {event.task_id for event in self.events if isinstance(event, Advanced)}


def task(model: Model, name: str, *, n: int = 1, steps: int = 10) -> Task:
    table = build_table(model.schedule, steps=steps)
    return Task(
        id=name,
        model=model,
        table=table,
        seed=7,
        starts=tuple(Start(index=i, class_label=1) for i in range(n)),
    )


def test_a_held_task_is_called_first_and_stepped_once_it_is_admitted(model: Model) -> None:
    harness = Harness()
    harness.engine.submit(task(model, "free"))
    harness.engine.submit(task(model, "held"), held=True)
    assert harness.tick(3) == {"free"} and harness.book.calls == ["held"]
    harness.engine.admit(["held", "unknown"])
    assert harness.tick() == {"free", "held"}
    assert harness.book.calls == ["held"]  # once


def test_only_what_has_its_turn_is_called(model: Model) -> None:
    """Four tasks fill the batch; the others are called when room is about to be made."""
    harness = Harness()
    for i in range(4):
        harness.engine.submit(task(model, f"in{i}", n=2, steps=40))
    for i in range(3):
        harness.engine.submit(task(model, f"out{i}", n=2, steps=50), held=True)
    harness.tick(16)
    assert harness.book.calls == []
    first: list[Event] | None = None
    while set(harness.book.calls) != {"out0", "out1", "out2"}:
        assert harness.tick() <= {f"in{i}" for i in range(4)}
        if first is None and harness.book.calls:
            first = list(harness.events)
    assert first and not any(isinstance(event, Finished) for event in first)  # in good time


def test_what_is_displaced_from_the_batch_has_left_it(model: Model) -> None:
    harness = Harness()
    harness.engine.submit(task(model, "oldest", n=8, steps=50))
    harness.engine.submit(task(model, "longest", n=8, steps=49))
    harness.tick(2)
    for i in range(8):
        harness.engine.submit(task(model, f"short{i}", steps=45))
    harness.tick(2 * LOOK_EVERY + 2)
    # On a busy machine smaller batches may be found quicker, and displace some of the short ones.
    assert "longest" in harness.book.gone and not {"oldest", "short0"} & {*harness.book.gone}
    harness.engine.admit(["longest"])  # it was not called
    assert "longest" not in harness.tick()


def test_a_task_set_apart_is_stepped_alone_and_ends_alike(model: Model) -> None:
    harness = Harness()
    harness.engine.submit(task(model, "other", n=2))
    harness.tick(2)
    harness.engine.only("suspect")
    assert harness.tick(3) == set()
    assert harness.book.only == ["suspect"] and harness.book.gone == ["other"]
    harness.engine.submit(task(model, "late"))
    harness.engine.submit(task(model, "suspect"))
    assert harness.tick(4) == {"suspect"} and harness.book.calls == []
    harness.engine.only(None)
    assert harness.tick(2) == {"suspect"}
    assert set(harness.book.calls) == {"other", "late"}
    harness.engine.admit(["other", "late"])
    images: dict[int, torch.Tensor] = {}
    ended: set[str] = set()
    while ended < {"other", "late", "suspect"}:
        harness.tick()
        ended |= {e.task_id for e in harness.events if isinstance(e, Finished)}
        for event in harness.events:
            if isinstance(event, Images) and event.task_id == "other":
                images.update(zip(event.indices, event.x, strict=True))
    expected = diffusion.sample(model, 2, steps=10, seed=7, class_label=1, dtype=torch.float32)
    for i in range(2):
        torch.testing.assert_close(images[i].clamp(-1, 1), expected[i], atol=1e-4, rtol=0)
