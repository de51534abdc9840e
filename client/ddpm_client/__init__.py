"""Python client of ddpm-serve.

import ddpm_client

with ddpm_client.Client("http://localhost:8000") as client:
    job = client.generate(class_label=7)
    job.images[0].save("seven.png")
"""

from ddpm_client.asynchronous import AsyncClient
from ddpm_client.client import Client
from ddpm_client.errors import (
    BadRequest,
    ConnectionFailed,
    Error,
    Expired,
    IdempotencyConflict,
    InvalidRequest,
    JobCanceled,
    JobEnded,
    JobExpired,
    JobFailed,
    MissingPackage,
    NoModels,
    NotFound,
    NotReady,
    Problem,
    QueueFull,
    QuotaExceeded,
    ServerFault,
    StorageFull,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
    WaitTimeout,
)
from ddpm_client.events import (
    DoneEvent,
    ErrorEvent,
    Event,
    ImageEvent,
    ProgressEvent,
    ResetEvent,
    SnapshotEvent,
    StatusEvent,
)
from ddpm_client.jobs import AsyncJob, Job
from ddpm_client.models import JobData, ModelInfo, Queues, Schedule
from ddpm_client.version import VERSION as __version__

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "BadRequest",
    "Client",
    "ConnectionFailed",
    "DoneEvent",
    "Error",
    "ErrorEvent",
    "Event",
    "Expired",
    "IdempotencyConflict",
    "ImageEvent",
    "InvalidRequest",
    "Job",
    "JobCanceled",
    "JobData",
    "JobEnded",
    "JobExpired",
    "JobFailed",
    "MissingPackage",
    "ModelInfo",
    "NoModels",
    "NotFound",
    "NotReady",
    "Problem",
    "ProgressEvent",
    "QueueFull",
    "Queues",
    "QuotaExceeded",
    "ResetEvent",
    "Schedule",
    "ServerFault",
    "SnapshotEvent",
    "StatusEvent",
    "StorageFull",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "UnsupportedMediaType",
    "WaitTimeout",
    "__version__",
]
