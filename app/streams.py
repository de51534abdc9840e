"""Server-sent events: a job's stream in Redis as text, resumable by its entry ids."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from redis.exceptions import RedisError
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app.problems import Problem, from_error, internal
from app.services import Services
from app.tasks import reap
from jobs.outputs import image_name, snapshot_name
from jobs.states import ACTIVE
from jobs.store.events import ErrorEvent, last_event
from jobs.store.events import dump as dump_event
from jobs.store.hub import ENDS, START, Entry, order
from jobs.store.reader import JobState
from jobs.store.records import JobRecord
from jobs.store.trouble import passes

log = logging.getLogger(__name__)
MEDIA_TYPE = "text/event-stream"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_PATIENCE_S = 30.0  # with a Redis that does not answer, before a stream ends for it
_RETRY = b"retry: 1000\n\n"
_COMMENT = b": still here\n\n"


def frame(name: str, data: str, entry_id: str | None = None) -> bytes:
    """One event. data: a JSON text, which has no line breaks."""
    head = "" if entry_id is None else f"id: {entry_id}\n"
    return f"{head}event: {name}\ndata: {data}\n\n".encode()


class EventStream(Response):
    """A response that ends with its source, with the client, or with the server.

    on_disconnect: called if the client went away before the source ended.
    """

    def __init__(
        self,
        source: AsyncGenerator[bytes],
        *,
        services: Services,
        headers: dict[str, str] | None = None,
        on_disconnect: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._source = source
        self._services = services
        self._on_disconnect = on_disconnect
        self.status_code = 200
        self.media_type = MEDIA_TYPE
        self.background = None
        self.body = b""
        self.init_headers({**HEADERS, **(headers or {})})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        if scope.get("head"):
            await self._source.aclose()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        pump = asyncio.create_task(self._pump(scope, send))
        gone = asyncio.create_task(disconnected(receive))
        closing = asyncio.create_task(self._services.closing.wait())
        with self._services.metrics.streams.track_inprogress():
            try:
                await asyncio.wait({pump, gone, closing}, return_when=asyncio.FIRST_COMPLETED)
                left = gone.done() and not pump.done()
            finally:
                await reap((pump, gone, closing))
        if left and self._on_disconnect is not None:
            await self._on_disconnect()
        if not left:
            error = None if pump.cancelled() else pump.exception()
            last = b"" if error is None else _fault_frame(error, scope)
            await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _pump(self, scope: Scope, send: Send) -> None:
        async with aclosing(self._source) as chunks:
            async for chunk in chunks:
                if self._services.keyring.client(scope) is None:
                    raise Problem("unauthorized", "the key was revoked")
                await send({"type": "http.response.body", "body": chunk, "more_body": True})


def _fault_frame(error: BaseException, scope: Scope) -> bytes:
    """The last event of a stream that cannot go on; without one a client would ask for ever."""
    request_id = scope.get("request_id", "")
    problem = from_error(error) if isinstance(error, Exception) else None
    if problem is None:
        log.error("request %s: an event stream", request_id, exc_info=error)
        problem = internal()
    told = ErrorEvent(code=problem.code, detail=f"{problem.detail} (request {request_id})")
    return frame("error", dump_event(told))


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone away. Only after the request's body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def has_ended(services: Services, record: JobRecord, last_event_id: str | None) -> bool:
    """Whether a client that comes back with this Last-Event-ID has seen everything."""
    if last_event_id is None or record.status in ACTIVE:
        return False
    return await services.hub.last_id(record.id) == last_event_id


async def job_frames(
    services: Services, state: JobState, *, last_event_id: str | None, inline: bool, new: bool
) -> AsyncGenerator[bytes]:
    """The frames of a job's stream, to its end.

    last_event_id: resume after it; if it is gone, `reset` comes first. inline: pictures as base64
    in their events. new: begin with the job itself (the stream of a POST).
    """
    job_id = state.record.id
    yield _RETRY
    after = await _resume_at(services, state.record, last_event_id)
    if new:
        yield await _reset_frame(services, "new", state)
    elif after is None:
        after = await services.hub.last_id(job_id)
        state = await services.job(job_id)
        yield await _reset_frame(services, "trimmed", state, after)
    away: float | None = None
    while True:
        try:
            async for entry_id, chunk in _following(services, state.record, after or START, inline):
                after, away = entry_id or after, None
                yield chunk
            return
        except RedisError as error:
            away = away or time.monotonic()
            if not passes(error) or time.monotonic() - away > _PATIENCE_S:
                raise
            log.warning("a stream of job %s: %s; going on after %s", job_id, error, after)
            await asyncio.sleep(1)


async def _following(
    services: Services, record: JobRecord, after: str, inline: bool
) -> AsyncGenerator[tuple[str | None, bytes]]:
    """The frames past `after` to the job's end, each with its entry's id if it has one."""
    if record.status in ACTIVE:
        source = services.hub.follow(record.id, after, idle_s=services.settings.sse_comment_s)
    else:
        source = services.hub.replay(record.id, after)
    async with aclosing(source) as batches:
        async for entries in batches:
            chunks = await _frames(services, record, entries, inline)
            for entry, chunk in zip(entries, chunks, strict=True):
                after = entry.id
                yield entry.id, chunk
            if any(entry.name in ENDS for entry in entries):
                return
            if entries:
                continue
            now = await services.reader.record(record.id)
            if now is None or record.status not in ACTIVE:
                yield None, _closing_frame(now)
                return
            if now.status in ACTIVE:
                yield None, _COMMENT
                continue
            # Whoever reads events for all streams may be behind: the end comes after the rest.
            async with aclosing(_following(services, now, after, inline)) as rest:
                async for one in rest:
                    yield one
            return


async def _resume_at(services: Services, record: JobRecord, last: str | None) -> str | None:
    """The id to go on after; None: what followed is (partly) gone."""
    hub = services.hub
    if last is None or last in ("0", START):
        complete = await hub.length(record.id) >= record.events
        return START if complete else None
    try:
        order(last)
    except ValueError:
        return None
    return last if await hub.knows(record.id, last) else None


async def _reset_frame(
    services: Services, reason: str, state: JobState, entry_id: str | None = None
) -> bytes:
    job = await services.told(state)
    return frame("reset", f'{{"reason":"{reason}","job":{job}}}', entry_id)


def _closing_frame(record: JobRecord | None) -> bytes:
    """The last event of a job whose stream no longer has it."""
    if record is None:
        gone = ErrorEvent(code="not_found", detail="the job was deleted")
        return frame("error", dump_event(gone))
    return frame(*last_event(record.status, record.fault))


async def _frames(
    services: Services, record: JobRecord, entries: list[Entry], inline: bool
) -> list[bytes]:
    px = record.spec.preview_px
    wanted = [_plane_field(e) if inline or (px and e.name == "snapshot") else None for e in entries]
    pictures = await services.previews.of(record, [f for f in wanted if f is not None], px)
    frames = []
    for entry, field in zip(entries, wanted, strict=True):
        data = entry.data
        if field is not None and field in pictures:
            data = json.dumps({**json.loads(data), "png": pictures[field]}, separators=(",", ":"))
        frames.append(frame(entry.name, data, entry.id))
    return frames


def _plane_field(entry: Entry) -> str | None:
    if entry.name not in ("image", "snapshot"):
        return None
    data = json.loads(entry.data)
    if entry.name == "image":
        return image_name(data["index"])
    return snapshot_name(data["t"], data["kind"], data["index"])
