"""What the client does, without doing it: each function yields the calls it wants made and gets
their answers, and both clients, the plain and the asynchronous, run the same ones."""

from __future__ import annotations

import math
import random
import time
import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
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
_LATE_S = 1.0  # how much after a deadline the last answer may come
RETRIED = frozenset({408, 429, 502, 503, 504})
_SLOWEST_S = 10.0


@dataclass(frozen=True)
class Call:
    """One request to be made. wait_s: how long the service may hold it. most_s: after which its
    answer counts as lost in any case."""

    method: str
    path: str
    params: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    json: Any = None
    wait_s: float = 0.0
    most_s: float = math.inf

    def held(self, left: float) -> Call:
        """The same, held until the job has ended, or for as long as is left."""
        seconds = min(LONGEST_WAIT_S, left)
        if self.method == "GET":
            params = {**self.params, "wait": round(seconds, 3)}
            return replace(self, params=params, wait_s=seconds, most_s=left + _LATE_S)
        # No most_s: where this answer is lost, there is a job that nobody knows of.
        headers = {**self.headers, "Prefer": f"wait={int(seconds)}"}
        return replace(self, headers=headers, wait_s=seconds)


@dataclass(frozen=True)
class Sleep:
    """A pause to be made."""

    seconds: float


class Deadline:
    """So many seconds from now; None: never."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = math.inf if seconds is None else seconds
        self._at = time.monotonic() + self.seconds

    @property
    def left(self) -> float:
        """Seconds until then; 0 from then on."""
        return max(0.0, self._at - time.monotonic())


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


def send(
    call: Call, retry: Retry, deadline: Deadline | None = None, job: JobData | None = None
) -> Flow[httpx.Response]:
    """A good answer to a call that may be repeated. Raises Problem or ConnectionFailed.

    deadline: the call is held by the service until then, and not repeated after it. job: the one
    that is waited for, if it is known; if the deadline comes first, that is a WaitTimeout.
    """
    tried = 0
    while True:
        tried += 1
        error: Problem | ConnectionFailed
        asked: float | None = None
        try:
            reply = yield call if deadline is None else call.held(deadline.left)
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
        if deadline is not None and deadline.left <= (pause or 0):
            if job is None:
                raise error
            yield Sleep(deadline.left)
            raise WaitTimeout(job, deadline.seconds) from error
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
    deadline = Deadline(fields.pop("timeout", None))
    headers = {"Idempotency-Key": fields.pop("idempotency_key", None) or uuid.uuid4().hex}
    call = Call("POST", f"/{kind}", headers=headers, json=encoded(fields))
    reply = yield from send(call, retry, deadline if wait else None)
    job = _read(JobData, reply)
    return (yield from until_ended(job, deadline, retry)) if wait else job


def until_ended(
    job: JobData,
    deadline: Deadline,
    retry: Retry,
    heard: Callable[[JobData], None] | None = None,
) -> Flow[JobData]:
    """The job once it has succeeded. Raises JobEnded, or WaitTimeout.

    heard: is told how it stands whenever the service says so, however this ends.
    """
    while not job.ended:
        if not deadline.left:
            raise WaitTimeout(job, deadline.seconds)
        reply = yield from send(Call("GET", job.urls.self), retry, deadline, job)
        job = _read(JobData, reply)
        if heard is not None:
            heard(job)
    if (error := ended_badly(job)) is not None:
        raise error
    return job


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
