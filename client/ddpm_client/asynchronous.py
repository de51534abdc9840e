"""The asynchronous client: the plain one, with `await`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Self, TypeVar

import httpx

from ddpm_client import flows
from ddpm_client.events import Event
from ddpm_client.flows import MARGIN_S, Call, Flow, Reading, Retry, is_stream
from ddpm_client.jobs import AsyncJob
from ddpm_client.kinds import Kinds
from ddpm_client.models import (
    Health,
    JobData,
    ModelInfo,
    ModelPage,
    QueueInfo,
    Queues,
    Readiness,
    Schedule,
    Status,
)
from ddpm_client.transport import STREAM_TIMEOUT, options

T = TypeVar("T")


class AsyncClient(Kinds[Awaitable[AsyncJob]]):
    """A service. Use it in an `async with` block, or `close` it.

    key: where the service needs one. timeout: seconds that an answer may take, beyond what the
    service was asked to wait. retries: after connections that fail and refusals that pass by;
    however often a job is asked for, it is made once. http: options of httpx.AsyncClient, as
    `verify` or `proxy`.
    """

    def __init__(
        self,
        url: str = "http://localhost:8000",
        *,
        key: str | None = None,
        timeout: float = MARGIN_S,
        retries: int = 4,
        http: dict[str, Any] | None = None,
    ) -> None:
        self.retry = Retry(retries)
        self._timeout = timeout
        self._http = httpx.AsyncClient(**options(url, key, timeout), **(http or {}))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of the connections."""
        await self._http.aclose()

    async def create(self, kind: str, **request: Any) -> AsyncJob:
        """A job of any kind, also of one that this client has no method for; with `**job.manifest`,
        the job that makes the same images again."""
        return AsyncJob(self, await self.run(flows.create(kind, request, self.retry)))

    async def job(self, job_id: str) -> AsyncJob:
        """A job by its id."""
        return AsyncJob(self, await self.run(flows.get(JobData, f"/jobs/{job_id}", self.retry)))

    async def jobs(
        self, *, status: Status | None = None, model: str | None = None, page: int = 50
    ) -> AsyncIterator[AsyncJob]:
        """All jobs, newest first, fetched `page` by page as they are needed."""
        cursor: str | None = None
        while True:
            flow = flows.jobs(cursor, self.retry, status=status, model=model, limit=page)
            found = await self.run(flow)
            for data in found.data:
                yield AsyncJob(self, data)
            cursor = found.next_cursor
            if cursor is None:
                return

    async def stream(
        self, job: AsyncJob | str, *, inline: bool = False, last_event_id: str | None = None
    ) -> AsyncIterator[Event]:
        """What happens to a job, from its beginning (or after an event) to its end.

        A connection that breaks is made again, and goes on after the last event that came.
        inline: pictures as base64 PNG in their events.
        """
        job_id = job if isinstance(job, str) else job.id
        reading = Reading(job_id, self.retry, last=last_event_id, inline=inline)
        while not reading.ended:
            cause: httpx.RequestError | httpx.Response | None = None
            call = reading.call()
            try:
                async with self._http.stream(
                    call.method,
                    call.path,
                    params=call.params,
                    headers=call.headers,
                    timeout=STREAM_TIMEOUT,
                ) as reply:
                    if reply.status_code == httpx.codes.NO_CONTENT:
                        return
                    if is_stream(reply):
                        async for chunk in reply.aiter_bytes():
                            for event in reading.feed(chunk):
                                yield event
                    else:
                        await reply.aread()
                        cause = reply
            except httpx.RequestError as error:
                cause = error
            if not reading.ended:
                await asyncio.sleep(reading.broken(cause))

    async def models(self) -> list[ModelInfo]:
        """The models that jobs can ask for."""
        return (await self.run(flows.get(ModelPage, "/models", self.retry))).data

    async def model(self, name: str) -> ModelInfo:
        """One model."""
        return await self.run(flows.get(ModelInfo, f"/models/{name}", self.retry))

    async def schedule(self, name: str) -> Schedule:
        """β_t, ᾱ_t, SNR_t and β̃_t of a model."""
        return await self.run(flows.get(Schedule, f"/models/{name}/schedule", self.retry))

    async def thumbnail(self, name: str) -> bytes:
        """A small picture (PNG) of what a model draws."""
        return await self.run(flows.file(f"/models/{name}/thumbnail.png", self.retry))

    async def queues(self) -> Queues:
        """How much waits, how much runs, who works."""
        return await self.run(flows.get(Queues, "/queue", self.retry))

    async def pause(self, queue: str) -> QueueInfo:
        """Let workers take no more jobs from a queue."""
        return await self.run(flows.post(QueueInfo, f"/queue/{queue}/pause", self.retry))

    async def resume(self, queue: str) -> QueueInfo:
        """Let workers take jobs from a queue again."""
        return await self.run(flows.post(QueueInfo, f"/queue/{queue}/resume", self.retry))

    async def health(self) -> Health:
        """Whether the service answers, and its version."""
        return await self.run(flows.get(Health, "/healthz", self.retry))

    async def ready(self) -> Readiness:
        """Whether jobs can be taken in. Raises Unavailable."""
        return await self.run(flows.get(Readiness, "/readyz", self.retry))

    async def run(self, flow: Flow[T]) -> T:
        """Make the calls that a flow asks for."""
        reply: httpx.Response | None = None
        error: httpx.RequestError | None = None
        while True:
            try:
                step = flow.send(reply) if error is None else flow.throw(error)
            except StopIteration as stop:
                result: T = stop.value
                return result
            reply = error = None
            if isinstance(step, Call):
                try:
                    reply = await self._call(step)
                except httpx.RequestError as failed:
                    error = failed
            else:
                await asyncio.sleep(step.seconds)

    async def _call(self, call: Call) -> httpx.Response:
        return await self._http.request(
            call.method,
            call.path,
            params=call.params,
            headers=call.headers,
            json=call.json,
            timeout=min(self._timeout + call.wait_s, call.most_s),
        )
