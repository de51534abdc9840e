"""What the client does, without doing it: each function yields the calls it wants made and gets
their answers, and both clients, the plain and the asynchronous, run the same ones."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import httpx
from pydantic import ValidationError

from ddpm_client.errors import (
    ConnectionFailed,
    NotFound,
    Problem,
    WaitTimeout,
    ended_badly,
    foreign,
    problem_of,
)
from ddpm_client.events import ErrorEvent, Event, Parser
from ddpm_client.models import JobData, JobPage, Model
from ddpm_client.pictures import encoded

T = TypeVar("T")
M = TypeVar("M", bound=Model)
LONGEST_WAIT_S = 30  # of one request; the service holds one for a minute at most
MARGIN_S = 15.0  # beyond that, until an answer counts as lost
RETRIED = frozenset({408, 429, 502, 503, 504})
_SLOWEST_S = 10.0


@dataclass(frozen=True)
class Call:
    """One request to be made. wait_s: how long the service may hold it."""

    method: str
    path: str
    params: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    json: Any = None
    wait_s: float = 0.0


@dataclass(frozen=True)
class Sleep:
    """A pause to be made."""

    seconds: float


Flow: TypeAlias = Generator[Call | Sleep, httpx.Response | None, T]


@dataclass(frozen=True)
class Retry:
    """When to try again. times: after the first time. patience_s: the longest that the service may
    ask to wait; if it asks for more, its refusal is raised at once."""

    times: int = 4
    patience_s: float = 60.0

    def pause(self, tried: int, asked: float | None = None) -> float | None:
        """Seconds until the next attempt; None: there is none."""
        if tried > self.times or (asked or 0) > self.patience_s:
            return None
        grown = min(0.25 * 2.0 ** (tried - 1), _SLOWEST_S)
        # Clients that were refused together must not come back together.
        return (asked if asked is not None else 0) + grown * random.uniform(0.5, 1)


def send(call: Call, retry: Retry) -> Flow[httpx.Response]:
    """A good answer to a call that may be repeated. Raises Problem or ConnectionFailed."""
    tried = 0
    while True:
        tried += 1
        error: Problem | ConnectionFailed
        asked: float | None = None
        try:
            reply = yield call
            assert reply is not None
        except httpx.RequestError as cause:
            error = ConnectionFailed(f"{call.method} {call.path}: {cause or type(cause).__name__}")
            error.__cause__ = cause
        else:
            if reply.is_success:
                if _media(reply).startswith("text/"):  # a page, whatever was asked for
                    raise foreign(reply)
                return reply
            error = problem_of(reply)
            if tried > 1 and call.method == "DELETE" and isinstance(error, NotFound):
                return reply  # the attempt whose answer was lost has done it
            if error.status not in RETRIED:
                raise error
            asked = error.retry_after
        pause = retry.pause(tried, asked)
        if pause is None:
            raise error
        yield Sleep(pause)


def get(model: type[M], path: str, retry: Retry, /, **params: Any) -> Flow[M]:
    """What stands at a path."""
    reply = yield from send(Call("GET", path, params=_given(params)), retry)
    return _read(model, reply)


def post(model: type[M], path: str, retry: Retry) -> Flow[M]:
    """What a command without a body answers."""
    reply = yield from send(Call("POST", path), retry)
    return _read(model, reply)


def delete(path: str, retry: Retry) -> Flow[None]:
    """Nothing stands there any more."""
    yield from send(Call("DELETE", path), retry)


def file(path: str, retry: Retry, /, **params: Any) -> Flow[bytes]:
    """The bytes of a file."""
    reply = yield from send(Call("GET", path, params=_given(params)), retry)
    return reply.content


def _given(params: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


def _read(model: type[M], reply: httpx.Response) -> M:
    try:
        return model.model_validate_json(reply.content)
    except ValidationError as error:
        raise foreign(reply) from error


def create(kind: str, request: dict[str, Any], retry: Retry) -> Flow[JobData]:
    """A new job; the options of `Options` are among the fields. It has ended, unless not waited."""
    fields = dict(request)
    wait: bool = fields.pop("wait", True)
    timeout: float | None = fields.pop("timeout", None)
    key = fields.pop("idempotency_key", None) or uuid.uuid4().hex
    began = time.monotonic()
    seconds = _wait_of(timeout) if wait else 0
    headers = {"Idempotency-Key": key}
    if seconds:
        headers["Prefer"] = f"wait={seconds}"
    call = Call("POST", f"/{kind}", headers=headers, json=encoded(fields), wait_s=seconds)
    reply = yield from send(call, retry)
    job = _read(JobData, reply)
    if not wait:
        return job
    left = None if timeout is None else timeout - (time.monotonic() - began)
    return (yield from until_ended(job, left, retry))


def until_ended(
    job: JobData,
    timeout: float | None,
    retry: Retry,
    heard: Callable[[JobData], None] | None = None,
) -> Flow[JobData]:
    """The job once it has succeeded. Raises JobEnded, or WaitTimeout.

    heard: is told how it stands whenever the service says so, however this ends.
    """
    began = time.monotonic()
    while not job.ended:
        left = None if timeout is None else timeout - (time.monotonic() - began)
        if left is not None and left <= 0:
            raise WaitTimeout(job, timeout or 0)
        seconds = _wait_of(left)
        call = Call("GET", job.urls.self, params={"wait": seconds}, wait_s=seconds)
        reply = yield from send(call, retry)
        job = _read(JobData, reply)
        if heard is not None:
            heard(job)
    if (error := ended_badly(job)) is not None:
        raise error
    return job


def _wait_of(left: float | None) -> int:
    return LONGEST_WAIT_S if left is None else max(1, min(LONGEST_WAIT_S, round(left)))


def jobs(cursor: str | None, retry: Retry, **params: Any) -> Flow[JobPage]:
    """One page of jobs."""
    return (yield from get(JobPage, "/jobs", retry, cursor=cursor, **params))


def is_stream(reply: httpx.Response) -> bool:
    """Whether events come."""
    return reply.is_success and _media(reply).startswith("text/event-stream")


def _media(reply: httpx.Response) -> str:
    said: str = reply.headers.get("content-type", "")
    return said.lower()


class Reading:
    """The reading of one job's events over as many connections as it takes.

    `call` says what to ask for next, `feed` takes what comes, and `broken` how it stopped; it is
    over when `ended`.
    """

    def __init__(self, job_id: str, retry: Retry, *, last: str | None, inline: bool) -> None:
        self.ended = False
        self._job_id, self._retry, self._inline = job_id, retry, inline
        self._last = last
        self._parser = Parser()
        self._tried = 0

    def call(self) -> Call:
        """The request for what comes after the last event."""
        self._parser = Parser()
        headers = {"Accept": "text/event-stream"}
        if self._last is not None:
            headers["Last-Event-ID"] = self._last
        params = {"inline": "true"} if self._inline else {}
        return Call("GET", f"/jobs/{self._job_id}/events", params=params, headers=headers)

    def feed(self, chunk: bytes) -> list[Event]:
        """The events in it."""
        found = []
        if chunk.startswith(b":"):  # a comment, four a minute: the connection lives
            self._tried = 0
        for event in self._parser.feed(chunk):
            if isinstance(event, ErrorEvent) and event.status is None:
                break  # not of the job: this stream cannot go on
            self._last = event.id or self._last
            self._tried = 0
            self.ended = event.name in ("done", "error")
            found.append(event)
            if self.ended:
                break
        return found

    def broken(self, cause: httpx.RequestError | httpx.Response | None) -> float:
        """Seconds until the next attempt. Raises ConnectionFailed or Problem if there is none.

        cause: what stopped it, an answer that was read as it is no stream, or None for a stream
        that just ended.
        """
        self._tried += 1
        asked = None
        error: Problem | ConnectionFailed
        if isinstance(cause, httpx.Response):
            if cause.is_success:
                raise foreign(cause)
            error = problem_of(cause)
            if error.status not in RETRIED:
                raise error
            asked = error.retry_after
        else:
            error = ConnectionFailed(f"the events of job {self._job_id}: {cause or 'cut off'}")
            error.__cause__ = cause
        pause = self._retry.pause(self._tried, asked)
        if pause is None:
            raise error
        return pause
