"""What the service says, as pydantic models. Fields of a newer service are kept as they are."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Status = Literal["queued", "running", "succeeded", "failed", "canceled", "expired"]
ENDED = frozenset({"succeeded", "failed", "canceled", "expired"})


class Model(BaseModel):
    """What they share."""

    model_config = ConfigDict(extra="allow", frozen=True)


class FieldError(Model):
    """What is wrong with one field of a request."""

    pointer: str
    detail: str


class Urls(Model):
    """Where to go on, from the service's root."""

    self: str
    events: str
    cancel: str
    images: str | None = None
    grid: str | None = None
    mean: str | None = None
    std: str | None = None


class ImageData(Model):
    """A finished image. sha256: of its 8-bit pixels. residual: of a restored one."""

    index: int
    url: str
    sha256: str
    seed: int
    residual: float | None = None


class SnapshotData(Model):
    """A kept state of the chain at the paper's t."""

    t: int
    index: int
    kind: str
    url: str
    alpha_bar: float | None = None
    snr: float | None = None


class Progress(Model):
    """Image-steps done, of how many."""

    step: int
    total: int
    t: int | None = None


class Fault(Model):
    """Why a job failed."""

    code: str
    detail: str


class JobData(Model):
    """A job as it was when the service was asked."""

    id: str
    kind: str
    status: Status
    cancel_requested: bool = False
    model: str
    queue_position: int | None = None
    eta_s: float | None = None
    progress: Progress | None = None
    request: dict[str, Any]
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    expires_at: datetime | None = None
    images: list[ImageData] | None = None
    snapshots: list[SnapshotData] | None = None
    result: dict[str, Any] | None = None
    error: Fault | None = None
    warnings: list[FieldError] | None = None
    request_id: str | None = None
    manifest: dict[str, Any] | None = None
    urls: Urls

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in ENDED


class JobPage(Model):
    """One page of a listing."""

    data: list[JobData]
    next_cursor: str | None = None


class Sampling(Model):
    """How a model is sampled where a request says nothing."""

    sampler: str
    variance: str
    spacing: str


class Preset(Model):
    """A way to sample by name. evaluations: of the network, an image from noise."""

    sampler: str
    steps: int
    spacing: str
    evaluations: int


class ModelInfo(Model):
    """A model that jobs can ask for. shape: C, H, W."""

    name: str
    digest: str
    shape: tuple[int, int, int]
    T: int
    schedule: str
    class_names: tuple[str, ...]
    guidance: bool
    prediction: str
    learned_variance: bool
    samplers: tuple[str, ...]
    draws: tuple[str, ...] = ()
    spacings: tuple[str, ...]
    sampling: Sampling
    steps: int
    presets: dict[str, Preset] = {}
    parameters: int | None = None
    queue: str
    image_steps_per_s: float | None = None
    served: bool
    description: str
    thumbnail: str | None = None


class ModelPage(Model):
    """Every known model."""

    data: list[ModelInfo]


class Schedule(Model):
    """The forward process: entry k is for t[k] = k + 1."""

    t: list[int]
    beta: list[float]
    alpha_bar: list[float]
    snr: list[float]
    posterior_variance: list[float]


class QueueInfo(Model):
    """One queue, and the work that is not yet done in it."""

    name: str
    queued: int
    running: int
    image_steps: int
    eta_s: float | None = None
    paused: bool = False


class WorkerInfo(Model):
    """A worker that spoke lately."""

    name: str
    queue: str
    models: tuple[str, ...]
    device: str
    active: int
    slots: int | None = None


class Queues(Model):
    """All queues and workers."""

    queues: list[QueueInfo]
    workers: list[WorkerInfo]


class Health(Model):
    """The service answers. version: of its software."""

    status: str = "ok"
    version: str


class Readiness(Model):
    """Jobs can be taken in."""

    status: str = "ready"
    models: int
    workers: int
    paused: list[str] | None = None
