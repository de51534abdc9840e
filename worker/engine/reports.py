"""What a step has to tell of the chains that came to a snapshot or to their end in it."""

from __future__ import annotations

from worker.engine.pool import ChainStep, Step
from worker.engine.runs import Run
from worker.engine.tasks import Event, Images, Snapshot, Terms
from worker.engine.term_pool import TermStep


def step_events(step: Step) -> list[Event]:
    """What a step found. Counts the chains that ended in it as told."""
    if isinstance(step, TermStep):
        return _terms(step)
    assert isinstance(step, ChainStep)
    return _chains(step)


def _terms(step: TermStep) -> list[Event]:
    """One event for the terms of a task."""
    nats, squares = step.nats.cpu().numpy(), step.squared_error.cpu().numpy()
    by_run: dict[Run, list[int]] = {}
    for i, sample in enumerate(step.batch.samples):
        if not sample.run.over:
            by_run.setdefault(sample.run, []).append(i)
    for i in step.due:
        step.batch.samples[i].run.untold -= 1
    return [
        Terms(run.task.id, step.places[at], nats[at], squares[at]) for run, at in by_run.items()
    ]


def _chains(step: ChainStep) -> list[Event]:
    """Snapshots, then images, one event for the chains of a task that are at the same row."""
    snapshots: dict[tuple[Run, int], list[int]] = {}
    images: dict[Run, list[int]] = {}
    for i in step.due:
        run, row = step.batch.samples[i].run, int(step.rows[i])
        if run.over:
            continue
        if row in run.task.snapshot_rows:
            snapshots.setdefault((run, row), []).append(i)
        if row == run.task.rows - 1:
            images.setdefault(run, []).append(i)
    events: list[Event] = []
    for (run, row), at in snapshots.items():
        found = (step.x_t[at], step.x_start[at], step.eps[at])
        events.append(Snapshot(run.task.id, _indices(step, at), row, int(step.t[at[0]]), *found))
    for run, at in images.items():
        run.untold -= len(at)
        events.append(Images(run.task.id, _indices(step, at), step.x_next[at]))
    return events


def _indices(step: ChainStep, at: list[int]) -> tuple[int, ...]:
    return tuple(step.batch.samples[i].index for i in at)
