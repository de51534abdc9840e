"""Holding a request until its job ends."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from fastapi import Request

from app.receiving import release
from app.services import Services
from app.streams import disconnected
from app.tasks import reap
from jobs.states import ACTIVE
from jobs.store.hub import ENDS
from jobs.store.reader import JobState

_LOOK_S = 5.0  # how often to look for itself whether the job goes on


async def until_ended(
    services: Services,
    request: Request,
    state: JobState,
    *,
    seconds: float,
    cancel_on_disconnect: bool = False,
) -> JobState:
    """The job as it is when it ends, when the time is over, or when nobody listens any more."""
    release(request.scope)
    job_id = state.record.id
    if seconds <= 0 or state.record.status not in ACTIVE:
        return state
    ended = asyncio.create_task(_ended(services, job_id))
    gone = asyncio.create_task(disconnected(request.receive))
    closing = asyncio.create_task(services.closing.wait())
    tasks = {ended, gone, closing}
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        left = gone.done() and not ended.done()
    finally:
        await reap(tasks)
    if left and cancel_on_disconnect:
        await services.cancel(job_id)
    return await services.job(job_id)


async def _ended(services: Services, job_id: str) -> None:
    async with aclosing(services.hub.follow(job_id, idle_s=_LOOK_S)) as batches:
        async for entries in batches:
            if any(entry.name in ENDS for entry in entries):
                return
            if entries:
                continue
            record = await services.reader.record(job_id)
            if record is None or record.status not in ACTIVE:
                return
