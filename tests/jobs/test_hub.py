from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

from app.tasks import reap
from jobs.settings import Settings
from jobs.store import keys
from jobs.store.connections import connect_async
from jobs.store.hub import BLOCK_MS, EventHub
from jobs.store.writer import JobStore

Submit = Callable[..., str]


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[EventHub]:
    connection = connect_async(settings)
    blocked = connect_async(settings, socket_timeout=3 * BLOCK_MS / 1000)
    hub = EventHub(connection, blocked)
    task = asyncio.create_task(hub.run())
    try:
        yield hub
    finally:
        await reap([task])  # redis-py may lose one cancellation
        await hub.close()
        await connection.aclose()
        await blocked.aclose()


def add(store: JobStore, job_id: str, numbers: range) -> None:
    with store.redis.pipeline() as pipe:
        for n in numbers:
            pipe.xadd(keys.events(job_id), {"event": "progress", "data": str(n)})
        pipe.execute()


async def collect(hub: EventHub, job_id: str, count: int) -> list[int]:
    """The first `count` numbers of a follower from the beginning."""
    seen: list[int] = []
    async with aclosing(hub.follow(job_id, idle_s=60.0)) as batches:
        async for entries in batches:
            assert entries, f"idle after {len(seen)}"
            seen += [int(entry.data) for entry in entries]
            if len(seen) >= count:
                break
    return seen


def test_followers_see_everything_once_and_in_order(settings: Settings, store: JobStore) -> None:
    """Early, late and slow ones, and more than a follower may have pending."""

    async def scenario() -> None:
        async with running(settings) as hub:
            early = [asyncio.create_task(collect(hub, "a", 3000)) for _ in range(3)]
            other = asyncio.create_task(collect(hub, "b", 10))
            await asyncio.sleep(0.1)
            await asyncio.to_thread(add, store, "a", range(1500))
            late = asyncio.create_task(collect(hub, "a", 3000))
            await asyncio.to_thread(add, store, "a", range(1500, 3000))
            await asyncio.to_thread(add, store, "b", range(10))
            for task in (*early, late):
                assert await task == list(range(3000))
            assert await other == list(range(10))

    asyncio.run(scenario())


def test_a_follower_right_after_another_left_misses_nothing(
    settings: Settings, store: JobStore
) -> None:
    async def scenario() -> None:
        async with running(settings) as hub:
            for round_ in range(20):
                await asyncio.to_thread(add, store, "a", range(2 * round_, 2 * round_ + 1))
                assert await collect(hub, "a", 2 * round_ + 1) == list(range(2 * round_ + 1))
                # The reader is blocked on the place the first one had; now comes a second one.
                second = asyncio.create_task(collect(hub, "a", 2 * round_ + 2))
                await asyncio.to_thread(add, store, "a", range(2 * round_ + 1, 2 * round_ + 2))
                assert await second == list(range(2 * round_ + 2))

    asyncio.run(scenario())


def test_idle_followers_hear_so(settings: Settings, store: JobStore) -> None:
    async def scenario() -> None:
        async with running(settings) as hub:
            follower = hub.follow("nothing", idle_s=0.05)
            assert await anext(follower) == [] == await anext(follower)
            await follower.aclose()

    asyncio.run(scenario())


def test_nothing_is_left_behind(settings: Settings, store: JobStore) -> None:
    async def scenario() -> None:
        async with running(settings) as hub:
            add(store, "a", range(1))
            await collect(hub, "a", 1)

    asyncio.run(scenario())
    assert store.redis.keys("ddpm:wake:*") == []
