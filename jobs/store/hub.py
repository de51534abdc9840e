"""Reading many jobs' event streams through one blocked connection.

`EventHub.follow` is what a server-sent event stream or a waiting request uses. One XREAD waits for
all of them; a new follower wakes it by an entry in a stream of the hub's own. Redis keeps the
events, so a follower that falls behind reads them again instead of filling memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable
from typing import Any, NamedTuple

import redis.asyncio as aioredis
from redis.exceptions import RedisError

from jobs.store import keys
from jobs.store.tolerance import is_data_fault, text

log = logging.getLogger(__name__)

START = "0-0"
ENDS = frozenset({"done", "error"})
BLOCK_MS = 5000
_ID = re.compile(r"([0-9]{1,20})(?:-([0-9]{1,20}))?")
_MOST = 2**64 - 1  # Redis' own limit of either number
_GATHER_S = 0.01  # lets a tick's events arrive together
_PAGE = 500
_MOST_PENDING = 1000


class Entry(NamedTuple):
    """One event. id: the stream entry's, `ms-n`. data: JSON."""

    id: str
    name: str
    data: str


def order(entry_id: str) -> tuple[int, int]:
    """What stream ids sort by. Raises ValueError for text that is no id."""
    found = _ID.fullmatch(entry_id)
    ms, n = (int(found[1]), int(found[2] or 0)) if found else (_MOST + 1, 0)
    if max(ms, n) > _MOST:
        raise ValueError(f"{entry_id[:60]!r} is no id of a stream entry")
    return ms, n


class _Follower:
    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.pending: list[Entry] = []
        self.lagging = False

    def put(self, entries: list[Entry]) -> None:
        if len(self.pending) + len(entries) > _MOST_PENDING:
            self.pending.clear()
            self.lagging = True
        else:
            self.pending.extend(entries)
        self.ready.set()

    async def wait(self, seconds: float) -> None:
        # Not wait_for: before Python 3.12 it could lose a cancellation.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.ready.wait()

    def take(self) -> list[Entry]:
        self.ready.clear()
        taken, self.pending = self.pending, []
        return taken


class EventHub:
    """One per process.

    blocked: a connection of its own, with a socket timeout above BLOCK_MS. connection: any other.
    """

    def __init__(self, connection: aioredis.Redis, blocked: aioredis.Redis) -> None:
        self._redis: Any = connection
        self._blocked: Any = blocked
        self._wake_key = keys.wake(secrets.token_hex(8))
        self._cursors: dict[str, str] = {self._wake_key: START}
        self._followers: defaultdict[str, set[_Follower]] = defaultdict(set)

    async def run(self) -> None:
        """Read until canceled; a lost connection is tried again."""
        while True:
            asked = dict(self._cursors)
            try:
                reply = await self._blocked.xread(asked, count=_PAGE, block=BLOCK_MS)
            except RedisError as error:
                log.warning("event reader: %s; trying again", error)
                if is_data_fault(error):
                    with contextlib.suppress(RedisError):
                        await self._drop_strangers(asked)
                await asyncio.sleep(0.5)
                continue
            for stream, entries in reply or ():
                name = stream.decode()
                # Else its followers have changed meanwhile: it is read again from their place.
                if self._cursors.get(name) == asked[name]:
                    self._deliver(name, entries)
            if reply:
                await asyncio.sleep(_GATHER_S)

    async def _drop_strangers(self, streams: Iterable[str]) -> None:
        """Stop reading keys that hold no stream: one of them would fail every read of all."""
        for stream in streams:
            if await self._redis.type(stream) not in (b"stream", b"none"):
                self._cursors.pop(stream, None)

    def _deliver(self, stream: str, raw: list[Any]) -> None:
        entries = _entries(raw)
        self._cursors[stream] = entries[-1].id
        for follower in self._followers.get(stream, ()):
            follower.put(entries)

    async def follow(
        self, job_id: str, after: str = START, *, idle_s: float = 15.0
    ) -> AsyncGenerator[list[Entry]]:
        """Events of a job past `after`, in order, each once; [] when `idle_s` pass without any.

        It never ends by itself: stop at an entry named in ENDS. A missing stream is an idle one.
        """
        stream, follower = keys.events(job_id), _Follower()
        last = after
        try:
            await self._attach(stream, follower, after)
            while True:
                entries = [e for e in follower.take() if order(e.id) > order(last)]
                if follower.lagging:
                    follower.lagging = False
                    entries = await self.read(job_id, last)
                    follower.lagging |= len(entries) == _PAGE  # or it fell behind meanwhile
                if entries:
                    last = entries[-1].id
                    yield entries
                elif not follower.lagging:
                    await follower.wait(idle_s)
                    if not follower.pending and not follower.lagging:
                        yield []
        finally:
            self._detach(stream, follower)

    async def replay(self, job_id: str, after: str = START) -> AsyncGenerator[list[Entry]]:
        """What a job that has ended left behind past `after`; [] if that was not its end."""
        while entries := await self.read(job_id, after):
            yield entries
            after = entries[-1].id
        yield []

    async def read(self, job_id: str, after: str = START) -> list[Entry]:
        """Up to 500 events of a job past `after`."""
        return _entries(await self._redis.xrange(keys.events(job_id), f"({after}", "+", _PAGE))

    async def last_id(self, job_id: str) -> str:
        """The newest event's id, START where there is none."""
        newest = await self._redis.xrevrange(keys.events(job_id), count=1)
        return newest[0][0].decode() if newest else START

    async def knows(self, job_id: str, entry_id: str) -> bool:
        """Whether an event with this id is still there (then so is all that followed it)."""
        return bool(await self._redis.xrange(keys.events(job_id), entry_id, entry_id, 1))

    async def length(self, job_id: str) -> int:
        """How many events the stream holds."""
        return int(await self._redis.xlen(keys.events(job_id)))

    async def close(self) -> None:
        """Remove what the hub wrote."""
        await self._redis.delete(self._wake_key)

    async def _attach(self, stream: str, follower: _Follower, after: str) -> None:
        """A new stream is read from `after` on; one that is read already has to be caught up."""
        if stream in self._cursors:
            follower.lagging = True
        else:
            self._cursors[stream] = after
        self._followers[stream].add(follower)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.xadd(self._wake_key, {"event": "wake", "data": ""}, maxlen=1)
            pipe.expire(self._wake_key, 3600)  # in case this process is killed
            await pipe.execute()

    def _detach(self, stream: str, follower: _Follower) -> None:
        self._followers[stream].discard(follower)
        if not self._followers[stream]:
            del self._followers[stream]
            self._cursors.pop(stream, None)


def _entries(raw: list[Any]) -> list[Entry]:
    return [_entry(entry_id.decode(), fields or {}) for entry_id, fields in raw]


def _entry(entry_id: str, fields: dict[bytes, bytes]) -> Entry:
    """An event; what is none, or would break the stream's lines, is passed on without a word."""
    name, data = text(fields.get(b"event", b"")), text(fields.get(b"data", b""))
    if not name or not data or len(f"{name}{data}".splitlines()) > 1:
        return Entry(entry_id, "unknown", "{}")
    return Entry(entry_id, name, data)
