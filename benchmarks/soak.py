"""Very many small jobs beside many streams in which nothing happens: what is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
import psutil
from storm import Stage, save_model, until

from jobs.settings import Settings
from jobs.store.writer import JobStore

TOGETHER = 32  # posts under way
WARM_UP = 500  # jobs before the first look: what is filled once is no leak
STREAMS_S = 30.0  # for all to be open
Look = tuple[float, float, float, float]
# MiB that the API, the workers and Redis may have more after all the jobs and the second wave of
# streams than after the first wave. An allocator that is asked in another order keeps some more;
# of 20,000 jobs of which each leaves a kilobyte in a process it would be 20 in that process.
MORE = (16.0, 32.0, 1.0)
ONE_A_SERVICE = {b"ddpm:queue:idle", b"rq:clean_groups"}  # numbers of a queue; when RQ tidied up


def soak(jobs: int, streams: int) -> bool:
    """Prints a table; whether no job is unaccounted for, no key is left, and no memory is lost."""
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    save_model(folder / "models" / "tiny", seed=0)
    stage = Stage(folder, folder / "models", DDPM_RECORD_TTL_S="60", DDPM_MAX_QUEUED_JOBS="100000")
    try:
        until(lambda: _publish_idle(stage), "the model")
        until(lambda: _knows(stage, "idle"), "the API")
        return asyncio.run(_soak(stage, jobs, streams))
    finally:
        stage.close()
        shutil.rmtree(folder, ignore_errors=True)


def _publish_idle(stage: Stage) -> bool:
    """The same model again, in a queue that no worker listens to: its jobs wait."""
    store = JobStore.connect(Settings(redis_url=f"unix://{stage.socket}"))
    card = store.cards().get("tiny")
    if card is not None:
        store.publish_card(card.model_copy(update={"name": "idle", "queue": "idle"}))
    store.redis.close()
    return card is not None


def _knows(stage: Stage, name: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{stage.url}/models/{name}", trust_env=False).status_code == 200
    return False


async def _soak(stage: Stage, jobs: int, streams: int) -> bool:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=TOGETHER)
    async with httpx.AsyncClient(
        base_url=stage.url, timeout=120, trust_env=False, limits=limits
    ) as client:
        ended = await _post_all(client, WARM_UP)
        await asyncio.to_thread(_forgotten, stage)
        looks, known = {"before": _look(stage)}, set(stage.redis.keys())
        closed = await _wave(client, streams)
        await asyncio.to_thread(_forgotten, stage)
        looks["after the streams alone"] = _look(stage)
        closed += await _wave(client, streams, while_open=_load(client, jobs, ended, stage, looks))
        await asyncio.to_thread(_forgotten, stage)
        looks["after"] = _look(stage)
    print(f"{jobs + WARM_UP} jobs: {dict(ended)}; {closed} of 2 × {streams} streams ended in order")
    print("| | API, MiB | workers, MiB | Redis, MiB | keys |\n|---|---|---|---|---|")
    for name, row in looks.items():
        print(f"| {name} | {' | '.join(f'{value:.0f}' for value in row)} |", flush=True)
    grown = [a - b for a, b in zip(looks["after"], looks["after the streams alone"], strict=True)]
    lost = [f"{more:.1f} of {most:.0f}" for more, most in zip(grown, MORE, strict=False)]
    print(f"MiB more than after the streams alone (API, workers, Redis): {', '.join(lost)}")
    left = {key.decode() for key in set(stage.redis.keys()) - known - ONE_A_SERVICE}
    print(f"keys that are new: {', '.join(sorted(left)) or 'none'}", flush=True)
    kept = all(more <= most for more, most in zip(grown, MORE, strict=False))
    accounted = ended == {"succeeded": jobs + WARM_UP} and closed == 2 * streams
    return accounted and kept and not left


async def _load(
    client: httpx.AsyncClient, jobs: int, ended: Counter[str], stage: Stage, looks: dict[str, Look]
) -> None:
    ended += await _post_all(client, jobs)
    looks["under load"] = _look(stage)


async def _wave(
    client: httpx.AsyncClient, streams: int, *, while_open: Coroutine[Any, Any, None] | None = None
) -> int:
    """Streams of one job that waits until it is deleted; how many ended in order.

    There are two such waves, since what a process takes for its first thousand connections it
    keeps: a leak is what the second adds.
    """
    idle = await client.post("/generate", json={"model": "idle", "ttl_s": 1})
    job_id = idle.raise_for_status().json()["id"]
    following = [asyncio.create_task(_follow(client, job_id)) for _ in range(streams)]
    await (while_open or asyncio.sleep(STREAMS_S))
    await client.delete(f"/jobs/{job_id}")  # which ends the streams
    return sum([await task for task in following])


async def _post_all(client: httpx.AsyncClient, jobs: int) -> Counter[str]:
    """How so many jobs ended."""
    ended: Counter[str] = Counter()
    numbers = iter(range(jobs))

    async def post() -> None:
        for number in numbers:
            body = {"model": "tiny", "steps": 1, "seed": number, "ttl_s": 1}
            headers = {"Idempotency-Key": uuid.uuid4().hex, "Prefer": "wait=30"}
            job = await _ask(client, "POST", "/generate", json=body, headers=headers)
            while job["status"] in ("queued", "running"):
                job = await _ask(client, "GET", f"/jobs/{job['id']}", params={"wait": 30})
            ended["succeeded" if job["status"] == "expired" else job["status"]] += 1

    await asyncio.gather(*(post() for _ in range(TOGETHER)))
    return ended


async def _ask(client: httpx.AsyncClient, method: str, path: str, **more: Any) -> Any:
    """The job of an answer. Asked again where the service cannot serve now, and where a connection
    that was kept is closed at the moment that it is used."""
    while True:
        try:
            reply = await client.request(method, path, **more)
        except httpx.TransportError:
            continue
        if reply.status_code == 503:
            await asyncio.sleep(1)
            continue
        return reply.raise_for_status().json()


async def _follow(client: httpx.AsyncClient, job_id: str) -> bool:
    """Whether a stream ended with an end of the job."""
    last = ""
    with contextlib.suppress(httpx.HTTPError):
        async with client.stream("GET", f"/jobs/{job_id}/events", timeout=None) as reply:
            async for line in reply.aiter_lines():
                last = line if line.startswith("event:") else last
    return bool(last) and last != "event: status"


def _forgotten(stage: Stage) -> None:
    """Wait until nothing of the jobs is due any more, or for ten minutes."""
    deadline = time.monotonic() + 600
    while stage.redis.zcard("ddpm:due") and time.monotonic() < deadline:
        time.sleep(1)
    time.sleep(15)  # RQ forgets by itself


def _look(stage: Stage) -> Look:
    """MiB of the API, of the workers and of Redis; keys."""
    held = [psutil.Process(p.pid).memory_info().rss / 2**20 for p in (stage.api, *stage.workers)]
    info: Any = stage.redis.info("memory")
    return held[0], sum(held[1:]), info["used_memory"] / 2**20, float(stage.redis.dbsize())
