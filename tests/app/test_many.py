"""Very many requests at once: they wait for each other, and none is refused for it."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx

from jobs.store.writer import JobStore

AT_ONCE = 150  # more than any pool of connections has by itself


def test_many_at_once_wait_for_a_connection(store: JobStore, client: httpx.Client) -> None:
    job_id = client.post("/generate", json={}).json()["id"]

    async def ask_all() -> Counter[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=client.base_url, timeout=120, trust_env=False, limits=limits
        ) as many:
            store.redis.client_pause(1000)  # so that all of them are there before one is answered
            replies = await asyncio.gather(*(many.get(f"/jobs/{job_id}") for _ in range(AT_ONCE)))
        return Counter(reply.status_code for reply in replies)

    assert asyncio.run(ask_all()) == {200: AT_ONCE}
