"""The whole service on a GPU: its capacity, and how long jobs of Poisson arrivals take.

    .venv/bin/python benchmarks/accelerator_service.py [--model FOLDER] [--seconds 20]

The network is that of `accelerator.py`, which says what `--device cpu --small` is for.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from accelerator import Place, parse
from serving import STEPS

from diffusion.checkpoint import save
from diffusion.model import Model
from worker.bench.load import image_steps, service


@contextmanager
def up(folder: Path, model: Model, data: Path) -> Iterator[str]:
    """The whole service with this model alone; gives its address."""
    save(model, folder / "models" / "paper")
    data.mkdir(parents=True, exist_ok=True)
    with service(data, folder / "models") as url:
        yield url


async def job(http: httpx.AsyncClient, url: str, steps: int, images: int, seed: int) -> float:
    """Seconds from asking to the last picture's being there."""
    body = {"model": "paper", "sampler": "ddim", "steps": steps, "num_images": images, "seed": seed}
    began = time.perf_counter()
    answer = await http.post(f"{url}/generate", json=body, headers={"Prefer": "wait=60"})
    answer.raise_for_status()
    found = answer.json()
    while found["status"] != "succeeded":
        if found["status"] not in ("queued", "running"):
            raise RuntimeError(f"{found['status']}: {found.get('error')}")
        found = (await http.get(f"{url}/jobs/{found['id']}", params={"wait": 20})).json()
    return time.perf_counter() - began


async def closed(url: str, seconds: float, clients: int, images: int) -> float:
    """Image-steps/s with so many clients, each with a job at a time, as the service counts them."""
    until = time.perf_counter() + seconds * 4 / 3
    rng = random.Random(0)

    async def client(http: httpx.AsyncClient) -> None:
        while time.perf_counter() < until:
            await job(http, url, rng.choice(STEPS), images, rng.randrange(2**31))

    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as http:
        tasks = [asyncio.create_task(client(http)) for _ in range(clients)]
        await asyncio.sleep(seconds / 3)
        before, began = await asyncio.to_thread(image_steps, url), time.perf_counter()
        await asyncio.sleep(seconds - 1)
        done = await asyncio.to_thread(image_steps, url)
        rate = (done - before) / (time.perf_counter() - began)
        await asyncio.gather(*tasks)
    return rate


async def arrivals(url: str, seconds: float, rate: float) -> list[tuple[int, int, float]]:
    """(steps, images, latency) of Poisson arrivals, so many a second."""
    rng = random.Random(1)

    async def one(http: httpx.AsyncClient, at: float) -> tuple[int, int, float]:
        steps, images = rng.choice(STEPS), rng.choice((1, 1, 2, 4, 8))
        seed = rng.randrange(2**31)
        await asyncio.sleep(at)
        return steps, images, await job(http, url, steps, images, seed)

    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as http:
        tasks, at = [], rng.expovariate(rate)
        while at < seconds:
            tasks.append(asyncio.create_task(one(http, at)))
            at += rng.expovariate(rate)
        return await asyncio.gather(*tasks)


def serve(
    place: Place, folder: Path | None, seconds: float, slots: int, warm: float, crowds: list[int]
) -> None:
    """Capacity under closed-loop clients, then latencies of Poisson arrivals at shares of it."""
    os.environ["DDPM_SLOTS"] = str(slots)
    os.environ.setdefault("DDPM_DEVICE", str(place.device))
    model = place.model(folder)
    mean = statistics.mean(STEPS) * 3.2  # image-steps a job
    with (
        tempfile.TemporaryDirectory() as scratch,
        up(Path(scratch), model, Path(scratch) / "data") as url,
    ):
        # Shapes are met, and what gains is compiled.
        asyncio.run(closed(url, warm, max(crowds) // 2 or 1, 8))
        print("| clients, 8 images a job | image-steps/s |\n|---|---|")
        capacity = 0.0
        for clients in crowds:
            found = asyncio.run(closed(url, seconds / 2, clients, 8))
            capacity = max(capacity, found)
            print(f"| {clients} | {found:.0f} |", flush=True)
        waits(url, seconds, capacity / mean)


def waits(url: str, seconds: float, capacity: float) -> None:
    """Print how long jobs take that arrive at shares of the capacity, in jobs/s."""
    print(
        "\n| Poisson arrivals, of capacity | jobs | jobs/s | p50 s | p95 s | p99 s "
        "| p50 of 10 steps |\n|---|---|---|---|---|---|---|"
    )
    for share in (0.3, 0.6, 0.8):
        found = asyncio.run(arrivals(url, seconds, share * capacity))
        every = np.array([latency for _, _, latency in found])
        short = np.array([latency for steps, _, latency in found if steps == 10])
        p50, p95, p99 = np.percentile(every, [50, 95, 99])
        print(
            f"| {share} | {len(every)} | {share * capacity:.1f} | {p50:.3f} | {p95:.3f} "
            f"| {p99:.3f} | {np.median(short):.3f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="of a point")
    parser.add_argument("--clients", default="1,8,32,64", help="in a closed loop")
    parser.add_argument("--warm", type=float, default=15, help="seconds of load before it")
    parser.add_argument("--slots", type=int, default=256, help="images stepped together")
    arguments, place = parse(parser)
    crowds = [int(clients) for clients in arguments.clients.split(",")]
    serve(place, arguments.model, arguments.seconds, arguments.slots, arguments.warm, crowds)


if __name__ == "__main__":
    main()
