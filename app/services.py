"""What one API process holds: connections, threads and background tasks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import Request
from redis.exceptions import RedisError

from app.admitting import Admitter
from app.auth import Keyring
from app.credentials import credentials_of
from app.metrics import Metrics
from app.pools import Pools
from app.previews import Previews
from app.tasks import reap
from app.views import JobView, dump, job_view
from app.webhooks import Courier
from jobs.errors import JobNotFound
from jobs.rates import eta_s
from jobs.settings import Settings
from jobs.store.admission import Admission, Admitted
from jobs.store.connections import connect_async
from jobs.store.hub import BLOCK_MS, EventHub
from jobs.store.janitor import Janitor
from jobs.store.reader import JobReader, JobState
from jobs.store.records import known_form
from jobs.store.writer import JobStore
from jobs.webhooks import WebhookQueue

_MANY = 500  # images and snapshots
log = logging.getLogger(__name__)


class Services:
    """Built by `create_app`; opens nothing until `running` is entered."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keyring = Keyring(settings)
        self.credentials = credentials_of(settings)
        self.metrics = Metrics()
        self.closing = asyncio.Event()  # streams end when it is set
        self.store = JobStore.connect(settings)
        self.admission = Admission(self.store)
        self.admitter = Admitter(self.admission)
        self._redis = connect_async(settings)
        self._blocked = connect_async(settings, socket_timeout=3 * BLOCK_MS / 1000)
        self.reader = JobReader(self._redis, settings)
        self.pools = Pools()
        self.previews = Previews(
            self.reader, self.pools.encoding, self.metrics, mark=settings.mark_outputs
        )
        self.hub = EventHub(self._redis, self._blocked)
        self.courier = Courier(settings, WebhookQueue(self._redis), self.reader, self.metrics)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._janitor = Janitor(self.store)
        self._sweeper = ThreadPoolExecutor(1, thread_name_prefix="janitor")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the background tasks."""
        self._loop = asyncio.get_running_loop()
        tasks = [
            asyncio.create_task(self.hub.run(), name="event hub"),
            asyncio.create_task(self._maintain(), name="janitor"),
        ]
        if self.settings.webhook_secret is not None:
            tasks.append(asyncio.create_task(self.courier.run(), name="courier"))
        try:
            yield
        finally:
            self.closing.set()
            await reap(tasks)
            await self._close()

    def end_streams(self) -> None:
        """Let streams and held requests end. From any thread, and from signal handlers."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.closing.set)

    async def _close(self) -> None:
        self.admitter.close()
        self.pools.close()
        self._sweeper.shutdown()
        try:
            await self.hub.close()
        except RedisError as error:
            log.info("closing: %s", error)
        await self.courier.close()
        await self._blocked.aclose()
        await self._redis.aclose()
        self.store.redis.close()

    async def _maintain(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                await loop.run_in_executor(self._sweeper, self._janitor.run)
            except RedisError as error:
                log.warning("maintenance: %s; trying again", error)
            except Exception:
                log.exception("maintenance failed; trying again")
            await asyncio.sleep(self.settings.janitor_s)

    async def admitted(self, admitted: Admitted) -> JobState:
        """A job just taken in, as it is; read again only if it is an earlier one."""
        record = admitted.record
        if record is None:
            return await self.job(admitted.job_id)
        eta = eta_s(admitted.ahead, await self.reader.rate(record.model))
        return JobState(record, {}, (), admitted.queue_position, eta)

    async def job(self, job_id: str) -> JobState:
        """The job, or JobNotFound."""
        state = await self.reader.job(known_form(job_id))
        if state is None:
            raise JobNotFound(f"no job {job_id}")
        return state

    async def told(self, state: JobState, view: Callable[[JobState], JobView] = job_view) -> str:
        """The JSON of a job; of one with many outputs in a thread, so that the loop goes on."""
        if len(state.images) + len(state.snapshots) < _MANY:
            return dump(view(state))
        return await self.pools.encoding.run(lambda: dump(view(state)))

    async def cancel(self, job_id: str) -> None:
        """Ask a job to stop; JobNotFound. A job that has ended is left as it is."""
        if await self.pools.store.run(self._cancel, known_form(job_id)) == "missing":
            raise JobNotFound(f"no job {job_id}")

    def _cancel(self, job_id: str) -> str:
        # First our record: from then on no worker starts the job, even if RQ hands it out.
        what = self.store.cancel(job_id)
        if what == "canceled":
            self._janitor.queues.cancel(job_id)
        return what

    async def purge(self, job_id: str) -> None:
        """Delete a job and all that belongs to it; JobNotFound."""
        if not await self.pools.store.run(self._purge, known_form(job_id)):
            raise JobNotFound(f"no job {job_id}")

    def _purge(self, job_id: str) -> bool:
        there = self.store.purge(job_id)
        self._janitor.queues.delete(job_id)
        return there


def services(request: Request) -> Services:
    """The services of the application that serves this request."""
    held: Services = request.app.state.services
    return held
