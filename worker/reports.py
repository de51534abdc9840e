"""What a step has to tell of the chains that came to a snapshot or to their end in it."""

from __future__ import annotations

from worker.pool import Step
from worker.runs import Run
from worker.tasks import Event, Images, Snapshot


def due_events(step: Step) -> list[Event]:
    """Snapshots, then images, one event for the chains of a task that are at the same row.

    Counts the chains that ended as told.
    """
    snapshots: dict[tuple[Run, int], list[int]] = {}
    images: dict[Run, list[int]] = {}
    for i in step.due:
        run, row = step.batch.samples[i].run, int(step.rows[i])
        if run.over:
            continue
        if row in run.task.snapshot_rows:
            snapshots.setdefault((run, row), []).append(i)
        if row == len(run.task.table) - 1:
            images.setdefault(run, []).append(i)
    events: list[Event] = []
    for (run, row), at in snapshots.items():
        found = (step.x_t[at], step.x_start[at], step.eps[at])
        events.append(Snapshot(run.task.id, _indices(step, at), row, int(step.t[at[0]]), *found))
    for run, at in images.items():
        run.untold -= len(at)
        events.append(Images(run.task.id, _indices(step, at), step.x_next[at]))
    return events


def _indices(step: Step, at: list[int]) -> tuple[int, ...]:
    return tuple(step.batch.samples[i].index for i in at)
