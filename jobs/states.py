"""The states of a job, and the only moves between them: the Lua scripts check this very table."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """Where a job stands. A job that is lost is never called done: it goes back to the queue."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"


TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.RUNNING, Status.CANCELED, Status.FAILED}),
    # To QUEUED when a worker is stopped or dies; to RUNNING when another takes over.
    Status.RUNNING: frozenset(
        {Status.RUNNING, Status.QUEUED, Status.SUCCEEDED, Status.FAILED, Status.CANCELED}
    ),
    Status.SUCCEEDED: frozenset({Status.EXPIRED}),
    Status.CANCELED: frozenset({Status.EXPIRED}),
    Status.FAILED: frozenset(),
    Status.EXPIRED: frozenset(),
}

ACTIVE = frozenset({Status.QUEUED, Status.RUNNING})
ENDED = frozenset(Status) - ACTIVE
