"""The events of a job: what the stream in Redis holds and server-sent events carry.

A reader that missed some loses nothing: each snapshot and image event says where its picture is,
and the job itself says how it ended.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from jobs.states import Status


def image_url(job_id: str, index: int, suffix: str) -> str:
    """Path of an image, from the service's root."""
    return f"/jobs/{job_id}/images/{index}.{suffix}"


def snapshot_url(job_id: str, t: int, kind: str, index: int) -> str:
    """Path of a snapshot, from the service's root."""
    return f"/jobs/{job_id}/snapshots/{t}/{index}.png?kind={kind}"


class StatusEvent(BaseModel):
    """`status`: the job has entered a state."""

    status: Status


class ProgressEvent(BaseModel):
    """`progress`: image-steps done, of how many; t of an image that was just stepped."""

    step: int
    total: int
    t: int | None = None
    eta_s: float | None = None


class SnapshotEvent(BaseModel):
    """`snapshot`: a state of the chain. `png` (base64) only where previews were asked for."""

    t: int
    index: int
    kind: Literal["x_t", "x_start", "eps"]
    url: str
    png: str | None = None


class ImageEvent(BaseModel):
    """`image`: a finished image. `png` (base64) only with `?inline=true`."""

    index: int
    url: str
    sha256: str
    png: str | None = None


class JobFault(BaseModel):
    """Why a job failed."""

    code: str = Field(examples=["worker_error"])
    detail: str


class DoneEvent(BaseModel):
    """`done`: the last event of a job that succeeded or was canceled."""

    status: Status


class ErrorEvent(JobFault):
    """`error`: the last event of a job that failed, or of a stream that cannot go on."""

    status: Status | None = None


def dump(event: BaseModel) -> str:
    """Compact JSON, without the fields that are not there."""
    return event.model_dump_json(exclude_none=True)


def status_data(status: Status) -> str:
    """Data of a `status` event."""
    return dump(StatusEvent(status=status))


def last_event(status: Status, fault: JobFault | None) -> tuple[str, str]:
    """Name and data of the event that closes a job's stream."""
    if fault is None:
        return "done", dump(DoneEvent(status=status))
    return "error", dump(ErrorEvent(status=status, **dict[str, Any](fault.model_dump())))


class ResetEvent(BaseModel):
    """`reset`: earlier events are not to be had; the job as it stands says all they said.

    `new` opens the stream of a POST, `trimmed` answers a Last-Event-ID that is gone.
    """

    reason: Literal["new", "trimmed"]
    job: dict[str, Any]


EVENTS: dict[str, type[BaseModel]] = {
    "status": StatusEvent,
    "progress": ProgressEvent,
    "snapshot": SnapshotEvent,
    "image": ImageEvent,
    "done": DoneEvent,
    "error": ErrorEvent,
    "reset": ResetEvent,
}
