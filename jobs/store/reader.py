"""The API's side of the store: asynchronous reads, one or two round trips each."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import redis.asyncio as aioredis
from redis.exceptions import ResponseError

from jobs.cards import ModelCard
from jobs.outputs import parse_name
from jobs.rates import combined_rate, eta_s
from jobs.settings import Settings
from jobs.states import ACTIVE, Status
from jobs.store import keys, scripts
from jobs.store.cards import parse_cards
from jobs.store.connections import probe
from jobs.store.outputs import open_outputs
from jobs.store.records import JobRecord, parse_record, parse_reply
from jobs.store.remembered import Remembered
from jobs.store.rq_queue import queue_key
from jobs.store.tolerance import UNREADABLE, count, each, finite, items, number, text
from jobs.store.workers import WorkerInfo

_SCAN = 100
_MANY = 1000  # entries of an index
_MOST_SCANNED = 2000


@dataclass(frozen=True)
class JobState:
    """A record with what there is of its outputs.

    images: index → SHA-256 of the pixels. snapshots: (t, kind, index), t falling. residuals: of
    the images that have one, in grey levels.
    queue_position: 0 is next; None for a job that does not wait.
    """

    record: JobRecord
    images: dict[int, str]
    snapshots: tuple[tuple[int, str, int], ...]
    queue_position: int | None = None
    eta_s: float | None = None
    residuals: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class QueueState:
    """One queue: jobs that wait and run, and image-steps not yet done."""

    name: str
    queued: int
    running: int
    outstanding: int
    paused: bool = False


@dataclass(frozen=True)
class Page:
    """One page of a listing. cursor: of the next page, None at the end."""

    jobs: list[JobState]
    cursor: str | None


class JobReader:
    """Reads what admission, workers and the janitor write.

    Writes nothing but a probe, and whether a queue is paused.
    """

    def __init__(self, connection: aioredis.Redis, settings: Settings) -> None:
        self.outputs = open_outputs(settings, reading=connection)
        self._redis: Any = connection  # redis-py types every reply as sync or async
        self._view: Any = connection.register_script(scripts.VIEW)
        self._cards = Remembered(self._read_cards)
        self._rates: dict[str, Remembered[float | None]] = {}

    async def check_writable(self) -> None:
        """Raise the redis.RedisError that says why no job could be taken in, if there is one."""
        await probe(self._redis)

    async def cards(self) -> dict[str, ModelCard]:
        """Every known model by name, at most a second old."""
        return await self._cards.get()

    async def _read_cards(self) -> dict[str, ModelCard]:
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(keys.MODELS)
            pipe.hgetall(keys.MODELS_MORE)
            return parse_cards(*await pipe.execute())

    async def rate(self, model: str) -> float | None:
        """Image-steps/s of a model over its workers, None if never measured."""
        if model not in self._rates:
            self._rates[model] = Remembered(functools.partial(self._read_rate, model))
        return await self._rates[model].get()

    async def _read_rate(self, model: str) -> float | None:
        return combined_rate(await self._redis.hvals(keys.rates(model)), time.time())

    async def record(self, job_id: str) -> JobRecord | None:
        """The record alone."""
        try:
            reply = await self._redis.hgetall(keys.job(job_id))
        except ResponseError as error:
            reply = error
        record = parse_reply(job_id, reply)
        return None if record is None else record.as_of(time.time())

    async def job(self, job_id: str) -> JobState | None:
        """A job with its outputs, place in the queue and estimate; None if unknown."""
        try:
            found = await self._view(args=[job_id, queue_key("")])
        except ResponseError as error:
            broken = parse_reply(job_id, error)
            return None if broken is None else JobState(broken, {}, ())
        if not found:
            return None
        raw, index, place, left = found
        record = parse_record(job_id, _pairs(raw)).as_of(time.time())
        state = await _state_of(record, [] if record.outputs_gone else index)
        if record.status not in ACTIVE:
            return state
        eta = record.eta_s  # what a running job measures itself
        if record.status is Status.QUEUED or eta is None:
            eta = eta_s(count(left), await self.rate(record.model))
        return replace(state, queue_position=None if place < 0 else place, eta_s=eta)

    async def page(
        self, *, status: Status | None, model: str | None, limit: int, cursor: str | None
    ) -> Page:
        """Jobs from new to old, at most `limit`, older than `cursor`."""
        index = keys.JOBS
        if status is not None:
            index = keys.by_status(status)
        elif model is not None:
            index = keys.by_model(model)
        found: list[JobState] = []
        for _ in range(_MOST_SCANNED // _SCAN):
            ids = await self._ids(index, cursor, max(limit + 1, _SCAN))
            for job_id, record in await self._records(ids):
                if len(found) == limit:
                    return Page(found, found[-1].record.id)
                cursor = job_id
                if record is None:
                    continue
                if status in (None, record.status) and model in (None, record.model):
                    found.append(JobState(record, {}, ()))
            if len(ids) < max(limit + 1, _SCAN):
                return Page(found, None)
        return Page(found, cursor)

    async def _ids(self, index: str, cursor: str | None, count: int) -> list[str]:
        top = "+" if cursor is None else f"({cursor}"
        members = await self._redis.zrevrangebylex(index, top, "-", start=0, num=count)
        return [text(member) for member in members]

    async def _records(self, ids: list[str]) -> list[tuple[str, JobRecord | None]]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hgetall(keys.job(job_id))
            replies = await pipe.execute(raise_on_error=False)
        now = time.time()
        found: list[tuple[str, JobRecord | None]] = []
        for job_id, reply in zip(ids, replies, strict=True):
            record = parse_reply(job_id, reply)
            found.append((job_id, record and record.as_of(now)))
            await asyncio.sleep(0)  # a request may be long; others go on between two of them
        return found

    async def queues(self) -> list[QueueState]:
        """Every queue that was ever used."""
        names = sorted(text(name) for name in await self._redis.smembers(keys.QUEUES))
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.zcard(keys.in_queue(name, Status.QUEUED))
                pipe.zcard(keys.in_queue(name, Status.RUNNING))
                pipe.hmget(keys.queue(name), ["admitted", "completed"])
                pipe.sismember(keys.PAUSED, name)
            rows = await pipe.execute()
        return [
            QueueState(name, queued, running, _difference(work), paused=bool(paused))
            for name, queued, running, work, paused in zip(
                names, rows[::4], rows[1::4], rows[2::4], rows[3::4], strict=True
            )
        ]

    async def paused(self) -> list[str]:
        """The queues from which no worker takes a job."""
        return sorted(text(name) for name in await self._redis.smembers(keys.PAUSED))

    async def pause(self, queue: str, *, paused: bool) -> QueueState | None:
        """Let workers take no job from a queue any more, or again. None: there is no such queue."""
        change = self._redis.sadd if paused else self._redis.srem
        if await self._redis.sismember(keys.QUEUES, queue):
            await change(keys.PAUSED, queue)
        return next((state for state in await self.queues() if state.name == queue), None)

    async def workers(self) -> list[WorkerInfo]:
        """Workers that spoke lately."""
        now = time.time()
        raw = await self._redis.hgetall(keys.WORKERS)
        infos = each("heartbeat of worker", items(raw), WorkerInfo.parse)
        return sorted((i for i in infos.values() if i.alive(now)), key=lambda info: info.name)

    async def slots(self) -> dict[str, int]:
        """Worker → images that it steps together, of one model; not every release says it."""
        raw = await self._redis.hgetall(keys.SLOTS)
        return each("slots of worker", items(raw), int)

    async def clients(self) -> dict[str, int]:
        """Outstanding image-steps of every client that has any."""
        raw = await self._redis.hgetall(keys.CLIENTS)
        return {name: count(value) for name, value in items(raw)}

    async def totals(self) -> dict[str, int]:
        """Counters since the store began, and the bytes that outputs hold."""
        raw = await self._redis.hgetall(keys.TOTALS)
        return {name: count(value) for name, value in items(raw)}

    async def observed(self) -> tuple[dict[str, float], dict[str, float]]:
        """The fields of the histograms: of seconds, and of rows a batch."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(keys.SECONDS)
            pipe.hgetall(keys.BATCHES)
            seconds, rows = await pipe.execute()
        return each("seconds", items(seconds), finite), each("rows", items(rows), finite)


def _pairs(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _difference(pair: list[bytes | None]) -> int:
    admitted, completed = (count(value) for value in pair)
    return max(admitted - completed, 0)


async def _state_of(record: JobRecord, index: list[bytes]) -> JobState:
    """With what an index names; that of many outputs in a thread, so that the loop goes on."""
    if len(index) < _MANY:
        return _parse_index(record, index)
    return await asyncio.to_thread(_parse_index, record, index)


def _parse_index(record: JobRecord, index: list[bytes]) -> JobState:
    images: dict[int, str] = {}
    residuals: dict[int, float] = {}
    snapshots: list[tuple[int, str, int]] = []
    for name, meta in _pairs(index).items():
        with contextlib.suppress(*UNREADABLE):  # of a newer version
            what = parse_name(text(name))
            if isinstance(what, int):
                about = json.loads(meta)
                images[what] = str(about["sha256"])
                if "residual" in about:
                    residuals[what] = number(about["residual"])
            else:
                snapshots.append(what)
    snapshots.sort(key=lambda s: (-s[0], s[1], s[2]))
    return JobState(record, dict(sorted(images.items())), tuple(snapshots), residuals=residuals)
