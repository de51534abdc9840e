"""What the API says of a job: the JSON bodies, built from records."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from jobs.kinds.common import SpecWarning
from jobs.kinds.table import result_models
from jobs.states import Status
from jobs.store.events import JobFault, image_url, snapshot_url
from jobs.store.reader import JobState
from jobs.store.records import JobRecord

EXAMPLE_ID = "019ac5d2f3a40000a1b2c3d4e5f6"


class Urls(BaseModel):
    """Where to go on, from the service's root."""

    self: str
    events: str
    cancel: str
    images: str | None = Field(None, description="where a job makes images")
    grid: str | None = Field(None, description="where a job makes images or noises them")
    mean: str | None = Field(None, description="of the images, where they are samples of one thing")
    std: str | None = Field(None, description="their standard deviation: where they differ")


class ImageView(BaseModel):
    """A finished image. sha256: of the 8-bit pixels, row by row, channels last."""

    index: int
    url: str
    sha256: str
    seed: int
    residual: float | None = Field(
        None, description="of a restored image: root of the mean square of y − A x, in grey levels"
    )


class SnapshotView(BaseModel):
    """A kept state of the chain; ᾱ_t and SNR_t where the job is about them (`/noise`)."""

    t: int
    index: int
    kind: str
    url: str
    alpha_bar: float | None = None
    snr: float | None = None


class ProgressView(BaseModel):
    """Image-steps done, of how many; t of an image that was just stepped."""

    step: int
    total: int
    t: int | None = None


class JobView(BaseModel):
    """A job."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": EXAMPLE_ID,
                "kind": "generate",
                "status": "succeeded",
                "model": "mnist",
                "progress": {"step": 100, "total": 100, "t": 1},
                "request": {"model": "mnist", "num_images": 1, "seed": 7, "class_label": 7},
                "created_at": "2026-01-31T12:00:00.120Z",
                "started_at": "2026-01-31T12:00:00.140Z",
                "completed_at": "2026-01-31T12:00:01.350Z",
                "expires_at": "2026-02-01T12:00:01.350Z",
                "images": [
                    {
                        "index": 0,
                        "url": f"/jobs/{EXAMPLE_ID}/images/0.png",
                        "sha256": "5f8c…",
                        "seed": 7,
                    }
                ],
                "snapshots": [],
                "urls": {
                    "self": f"/jobs/{EXAMPLE_ID}",
                    "events": f"/jobs/{EXAMPLE_ID}/events",
                    "cancel": f"/jobs/{EXAMPLE_ID}/cancel",
                    "images": f"/jobs/{EXAMPLE_ID}/images.zip",
                    "grid": f"/jobs/{EXAMPLE_ID}/grid.png",
                },
            }
        }
    )

    id: str
    kind: str
    status: Status
    cancel_requested: bool = False
    model: str
    queue_position: int | None = Field(None, description="0: next")
    eta_s: float | None = Field(None, description="estimated seconds to the end")
    progress: ProgressView | None = None
    request: dict[str, Any] = Field(description="the request with defaults and seed filled in")
    created_at: str
    started_at: str | None = None
    completed_at: str | None = None
    expires_at: str | None = Field(None, description="when the outputs are deleted")
    images: list[ImageView] | None = Field(None, description="not in listings")
    snapshots: list[SnapshotView] | None = Field(None, description="not in listings")
    result: dict[str, Any] | None = Field(
        None,
        description="of a kind that gives numbers",
        json_schema_extra=lambda schema: schema.update(anyOf=_results()),
    )
    error: JobFault | None = None
    warnings: list[SpecWarning] | None = Field(
        None, description="what the request is unlikely to want, such as too few steps"
    )
    request_id: str | None = Field(
        None, description="X-Request-ID of the request that made the job, as logs have it"
    )
    manifest: dict[str, Any] | None = Field(
        None,
        description="post it again, to the same route, for the same images: to the byte where the "
        "job was deterministic, else but for rounding",
    )
    urls: Urls


def _results() -> Any:
    models = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in result_models()]
    return [*models, {"type": "null"}]


class JobList(BaseModel):
    """A page of jobs, newest first."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "data": [
                    {
                        "id": EXAMPLE_ID,
                        "kind": "generate",
                        "status": "queued",
                        "cancel_requested": False,
                        "model": "mnist",
                        "request": {"model": "mnist", "num_images": 1, "seed": 7},
                        "created_at": "2026-01-31T12:00:00.120Z",
                        "urls": {
                            "self": f"/jobs/{EXAMPLE_ID}",
                            "events": f"/jobs/{EXAMPLE_ID}/events",
                            "cancel": f"/jobs/{EXAMPLE_ID}/cancel",
                            "images": f"/jobs/{EXAMPLE_ID}/images.zip",
                            "grid": f"/jobs/{EXAMPLE_ID}/grid.png",
                        },
                    }
                ],
                "next_cursor": EXAMPLE_ID,
            }
        }
    )

    data: list[JobView]
    next_cursor: str | None = None


def timestamp(unix: float | None) -> str | None:
    """RFC 3339 in UTC, to the millisecond."""
    if unix is None:
        return None
    return datetime.fromtimestamp(unix, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def _request(record: JobRecord) -> dict[str, Any]:
    """The spec; as it stands in the store where this version cannot read all of it."""
    if record.unread is not None and record.unread.request is not None:
        return record.unread.request
    return record.spec.model_dump(mode="json")


def manifest(record: JobRecord, *, index: int | None = None) -> dict[str, Any]:
    """What makes these images again: the request, the model's digest, the versions used.

    index: of the image that carries the manifest.
    """
    private = {"webhook_url", "ttl_s", "deadline_s", "priority", "format", "model_digest"}
    request = record.spec.model_dump(mode="json", exclude=private, exclude_none=True)
    if record.unread is not None and record.unread.request is not None:
        asked = record.unread.request
        request = {name: asked[name] for name in asked if name not in private}
    provenance = dict(record.provenance or {})
    if index is not None:
        provenance["index"] = index
    digest = record.run_digest or record.digest
    return {**request, "model_digest": digest, "provenance": provenance}


def job_view(state: JobState, *, full: bool = True) -> JobView:
    """A job as JSON; full=False leaves out outputs and manifest, for listings."""
    record = state.record
    return JobView(
        id=record.id,
        kind=record.spec.kind,
        status=record.status,
        cancel_requested=record.cancel_requested,
        model=record.model,
        queue_position=state.queue_position,
        eta_s=state.eta_s,
        progress=_progress(record),
        request=_request(record),
        created_at=timestamp(record.created_at) or "",
        started_at=timestamp(record.started_at),
        completed_at=timestamp(record.completed_at),
        expires_at=timestamp(record.expires_at),
        images=_images(state) if full else None,
        snapshots=_snapshots(state) if full else None,
        result=record.result if full else None,
        error=record.fault,
        warnings=list(record.warnings) or None,
        request_id=record.request_id or None,
        manifest=manifest(record) if full and record.run_digest else None,
        urls=urls(record),
    )


def urls(record: JobRecord) -> Urls:
    """The links of a job."""
    root = f"/jobs/{record.id}"
    images = "images" in record.spec.gives
    pictures = bool(record.spec.grid(record.images))
    summarized = record.spec.summarized and record.images > 1
    return Urls(
        self=root,
        events=f"{root}/events",
        cancel=f"{root}/cancel",
        images=f"{root}/images.zip" if images else None,
        grid=f"{root}/grid.png" if pictures else None,
        mean=f"{root}/mean.png" if summarized else None,
        std=f"{root}/std.png" if summarized else None,
    )


def dump(view: BaseModel) -> str:
    """The JSON of a view, without what is not there."""
    return view.model_dump_json(exclude_none=True)


def _progress(record: JobRecord) -> ProgressView | None:
    if not record.work or record.started_at is None:
        return None
    return ProgressView(step=record.done, total=record.work, t=record.t)


def _images(state: JobState) -> list[ImageView]:
    job_id, spec = state.record.id, state.record.spec
    return [
        ImageView(
            index=i,
            url=image_url(job_id, i, spec.format),
            sha256=sha256,
            seed=spec.seed or 0,
            residual=state.residuals.get(i),
        )
        for i, sha256 in state.images.items()
    ]


def _snapshots(state: JobState) -> list[SnapshotView]:
    levels = state.record.levels or {}
    views = []
    for t, kind, index in state.snapshots:
        alpha_bar, snr = levels.get(str(t), (None, None))
        url = snapshot_url(state.record.id, t, kind, index)
        views.append(
            SnapshotView(t=t, index=index, kind=kind, url=url, alpha_bar=alpha_bar, snr=snr)
        )
    return views
