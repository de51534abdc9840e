"""Everything that can go wrong, by the `code` of the service.

Error
├── ConnectionFailed      the service cannot be reached
├── MissingPackage        an optional package is needed for this
├── WaitTimeout           the job has not ended in the time given
├── JobEnded              the job did not succeed
│   ├── JobFailed
│   ├── JobCanceled
│   └── JobExpired
└── Problem               the service refused (RFC 9457)
    ├── BadRequest        …, and one class a group of codes, as below
"""

from __future__ import annotations

import contextlib
import json
import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from pydantic import ValidationError

from ddpm_client.models import FieldError, JobData


class Error(Exception):
    """Any error of this client."""


class ConnectionFailed(Error):
    """The service could not be reached, or stopped answering, as often as it was tried."""


class MissingPackage(Error):
    """An optional package is needed for this."""


class WaitTimeout(Error):
    """The job goes on, but longer than it was to be waited for."""

    def __init__(self, job: JobData, seconds: float) -> None:
        super().__init__(f"job {job.id} is {job.status} after {seconds:g} s")
        self.job = job


class JobEnded(Error):
    """The job ended without success; `job` says all that is known."""

    def __init__(self, job: JobData) -> None:
        fault = job.error
        self.job = job
        self.code = job.status if fault is None else fault.code
        super().__init__(f"job {job.id} {job.status}" + (f": {fault.detail}" if fault else ""))


class JobFailed(JobEnded):
    """A worker could not do it: `code` and the message say why."""


class JobCanceled(JobEnded):
    """Someone canceled it."""


class JobExpired(JobEnded):
    """It succeeded, and its outputs are deleted."""


class Problem(Error):
    """An answer that is an error.

    code: what the service calls it. errors: which fields are wrong, by JSON pointer. request_id:
    what the service's log has it under. retry_after: seconds, where the service said when to come
    back.
    """

    def __init__(
        self,
        detail: str,
        *,
        status: int,
        code: str,
        errors: list[FieldError] | None = None,
        request_id: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.status = status
        self.code = code
        self.errors = errors or []
        self.request_id = request_id
        self.retry_after = retry_after


class BadRequest(Problem):
    """This is no request that the service understands."""


class InvalidRequest(BadRequest):
    """Fields are wrong: `errors` names them."""


class IdempotencyConflict(BadRequest):
    """This idempotency key was used for another request."""


class TooLarge(BadRequest):
    """More bytes, or pixels, than the service takes."""


class UnsupportedMediaType(BadRequest):
    """No picture of a kind that the service reads."""


class Unauthorized(Problem):
    """The service needs a key, and this is none."""


class NotFound(Problem):
    """There is no such job, model or output."""


class NotReady(NotFound):
    """The output is not there yet."""


class Expired(Problem):
    """The outputs of the job are deleted."""


class QuotaExceeded(Problem):
    """This key has as much work outstanding as it may."""


class ServerFault(Problem):
    """An error of the service; its log has it under `request_id`. Or no answer of this service."""


class Unavailable(Problem):
    """Not now: try again later."""


class QueueFull(Unavailable):
    """As many jobs wait as may."""


class StorageFull(Unavailable):
    """There is no room for the outputs."""


class NoModels(Unavailable):
    """No worker has published a model yet."""


CODES: dict[str, type[Problem]] = {
    "bad_request": BadRequest,
    "unauthorized": Unauthorized,
    "not_found": NotFound,
    "not_ready": NotReady,
    "method_not_allowed": BadRequest,
    "not_acceptable": BadRequest,
    "timeout": Unavailable,
    "expired": Expired,
    "too_large": TooLarge,
    "unsupported_media_type": UnsupportedMediaType,
    "invalid_request": InvalidRequest,
    "idempotency_conflict": IdempotencyConflict,
    "quota_exceeded": QuotaExceeded,
    "headers_too_large": BadRequest,
    "internal": ServerFault,
    "no_models": NoModels,
    "queue_full": QueueFull,
    "storage_full": StorageFull,
    "still_running": Unavailable,
}
_STATUSES: dict[int, type[Problem]] = {
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    410: Expired,
    429: QuotaExceeded,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


def class_of(code: str, status: int) -> type[Problem]:
    """The class for a code; for one that is new, by the status."""
    return CODES.get(code) or _STATUSES.get(status) or (BadRequest if status < 500 else ServerFault)


def problem_of(reply: httpx.Response) -> Problem:
    """The error for an answer; whatever answered need not be the service."""
    try:
        body: Any = json.loads(reply.content)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        body = {}
    code = str(body.get("code") or f"http_{reply.status_code}")
    detail = str(body.get("detail") or f"{reply.status_code} {reply.reason_phrase}")
    return class_of(code, reply.status_code)(
        detail,
        status=reply.status_code,
        code=code,
        errors=_field_errors(body.get("errors")),
        request_id=reply.headers.get("x-request-id", ""),
        retry_after=_seconds(reply.headers.get("retry-after", "")),
    )


def foreign(reply: httpx.Response) -> ServerFault:
    """The error for a good answer that is none of this service's: a page to sign in at, say."""
    asked = f"{reply.request.method} {reply.request.url.path}"
    return ServerFault(
        f"{asked}: {reply.status_code} {reply.reason_phrase}, but no answer of this service",
        status=reply.status_code,
        code=f"http_{reply.status_code}",
        request_id=reply.headers.get("x-request-id", ""),
    )


def ended_badly(job: JobData) -> JobEnded | None:
    """The error for a job that has ended; None: it succeeded."""
    kinds = {"failed": JobFailed, "canceled": JobCanceled, "expired": JobExpired}
    return kinds[job.status](job) if job.status in kinds else None


def _field_errors(said: Any) -> list[FieldError]:
    found = []
    for one in said if isinstance(said, list) else []:
        with contextlib.suppress(ValidationError):  # of a gateway, which has errors of its own
            found.append(FieldError.model_validate(one))
    return found


def _seconds(text: str) -> float | None:
    """Seconds from now of a Retry-After: a number of them, or the date of HTTP (RFC 9110)."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = _until(text)
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _until(text: str) -> float:
    try:
        return (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (OverflowError, TypeError, ValueError):  # absent, no date, or one of no time zone
        return math.nan
