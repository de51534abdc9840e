"""The whole service against LitServe over diffusers' DDIM, same weights, same machine, same run.

    .venv/bin/python benchmarks/serving.py [--seconds 60] [--steps 4,6,8,10] [--warm-up 180]

Jobs are one image of 10, 20, 50 or 100 DDIM steps, mixed evenly. After a warm-up of the service,
in which it compiles what it uses, 32 clients in a closed loop, each server in turn, twice:
image-steps/s. Then the same Poisson arrivals to each, at half
of the peer's capacity as just measured: latencies from request to picture. Only the server that is
measured runs: LitServe's idle processes take a tenth of a core.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from storm import free_port

from diffusion.checkpoint import convert

HERE = Path(__file__).parent
STEPS = (10, 20, 50, 100)  # of the jobs, evenly mixed
PEERS = {"sampler": "ddpm", "spacing": "uniform"}  # defaults that diffusers has, too
OUR_PORT, PEER_PORT = free_port(), free_port()


@dataclass(frozen=True)
class Job:
    """One request: steps, class and seed; `at` is its arrival, seconds from the start."""

    steps: int
    class_label: int
    seed: int
    at: float = 0.0


Client = Callable[[httpx.AsyncClient, Job], Awaitable[None]]


async def ask_us(http: httpx.AsyncClient, job: Job) -> None:
    """Send a job and hold the request until its picture comes."""
    body = {
        "sampler": "ddim",
        "steps": job.steps,
        "class_label": job.class_label,
        "seed": job.seed,
    }
    headers = {"Prefer": "wait=60", "Accept": "image/png"}
    url = f"http://127.0.0.1:{OUR_PORT}/generate"
    answer = await http.post(url, json=body, headers=headers)
    if answer.status_code == 202:  # not done after a minute: go on waiting
        job_url = f"http://127.0.0.1:{OUR_PORT}/jobs/{answer.json()['id']}"
        while (await http.get(job_url, params={"wait": 20})).json()["status"] != "succeeded":
            pass
        answer = await http.get(f"{job_url}/images/0.png")
    assert answer.headers["content-type"] == "image/png", answer.text


async def ask_peer(http: httpx.AsyncClient, job: Job) -> None:
    """Send a job to the peer, which answers when it is done."""
    body = {"steps": job.steps, "class_label": job.class_label, "seed": job.seed}
    answer = await http.post(f"http://127.0.0.1:{PEER_PORT}/predict", json=body)
    assert answer.json()["png"], answer.text


def jobs(seed: int, lengths: Sequence[int] = STEPS) -> Iterator[Job]:
    """Endless jobs, the lengths evenly mixed."""
    rng = random.Random(seed)
    while True:
        for steps in rng.sample(lengths, len(lengths)):
            yield Job(steps, rng.randrange(10), rng.randrange(2**31))


def poisson(rate: float, seconds: float, lengths: Sequence[int]) -> list[Job]:
    """Jobs with exponential gaps."""
    rng, now = random.Random(1), 0.0
    out: list[Job] = []
    for job in jobs(2, lengths):
        now += rng.expovariate(rate)
        if now > seconds:
            return out
        out.append(Job(job.steps, job.class_label, job.seed, now))
    raise AssertionError


def open_client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=2000, max_keepalive_connections=200)
    return httpx.AsyncClient(timeout=600, limits=limits)


async def closed_loop(
    ask: Client,
    seconds: float,
    clients: int = 32,
    patience: float | None = None,
    *,
    lengths: Sequence[int] = STEPS,
) -> float:
    """Image-steps/s of jobs that ended within the window, after a third of it as a warm-up.

    patience: seconds after it that answers are waited for; None: until all have come.
    """
    source, done = jobs(0, lengths), []
    start = time.perf_counter()
    end = start + seconds * 4 / 3

    async def loop(http: httpx.AsyncClient) -> None:
        while time.perf_counter() < end:
            job = next(source)
            await ask(http, job)
            done.append((time.perf_counter(), job.steps))

    async with open_client() as http:
        tasks = [asyncio.create_task(loop(http)) for _ in range(clients)]
        limit = None if patience is None else seconds * 4 / 3 + patience
        ended, late = await asyncio.wait(tasks, timeout=limit)
        for task in late:
            task.cancel()
        for task in ended:
            task.result()
    return sum(steps for at, steps in done if start + seconds / 3 < at <= end) / seconds


async def open_loop(ask: Client, arrivals: list[Job]) -> list[tuple[int, float]]:
    """(steps, latency in seconds) of each job."""
    start = time.perf_counter()

    async def one(http: httpx.AsyncClient, job: Job) -> tuple[int, float]:
        await asyncio.sleep(max(0.0, start + job.at - time.perf_counter()))
        began = time.perf_counter()
        await ask(http, job)
        return job.steps, time.perf_counter() - began

    async with open_client() as http:
        return await asyncio.gather(*(one(http, job) for job in arrivals))


@contextmanager
def server(command: list[str], ready: str, log_path: Path) -> Iterator[None]:
    """Run a server until it answers, then stop it with everything that it started."""
    log = log_path.open("a")
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"{command} ended:\n{log_path.read_text()}")
            try:
                if httpx.get(ready, timeout=1).status_code < 500:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


def percentile(values: list[float], p: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(p * len(ordered)))]


def show(label: str, measured: list[tuple[int, float]]) -> dict[str, float]:
    least = min(steps for steps, _ in measured)
    short = [latency for steps, latency in measured if steps == least]
    every = [latency for _, latency in measured]
    row = {
        f"p50 of {least} steps": statistics.median(short),
        "p50": statistics.median(every),
        "p95": percentile(every, 0.95),
        "p99": percentile(every, 0.99),
    }
    print(f"| {label} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE.parent / "models" / "mnist")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--steps", default=",".join(map(str, STEPS)), help="of the jobs")
    parser.add_argument("--warm-up", type=float, default=180, help="seconds; of ours alone")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--peer-dtype", default="bfloat16", help="bfloat16 or float32")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ddpm-bench-"))  # kept: it holds the servers' logs
    print(f"logs: {folder}", file=sys.stderr)
    os.environ["DDPM_MODELS"] = str(arguments.model.resolve().parent)
    convert(arguments.model, folder / "peer", "diffusers", sampling=PEERS)
    ours = [sys.executable, "-m", "ddpm", "up", "--port", str(OUR_PORT)]
    ours += ["--data", str(folder / "ddpm")]
    peer = [sys.executable, str(HERE / "peer.py"), str(folder / "peer"), str(PEER_PORT)]
    peer.append(arguments.peer_dtype)
    us = Contender(ask_us, ours, f"http://127.0.0.1:{OUR_PORT}/readyz", folder / "ours.log")
    them = Contender(ask_peer, peer, f"http://127.0.0.1:{PEER_PORT}/health", folder / "peer.log")
    compare(us, them, arguments)


@dataclass(frozen=True)
class Contender:
    """A server, which runs for one measurement at a time, and how it is asked."""

    ask: Client
    command: list[str]
    ready: str
    log: Path

    def rate(self, seconds: float, lengths: Sequence[int]) -> float:
        """Image-steps/s in a closed loop."""
        with server(self.command, self.ready, self.log):
            return asyncio.run(closed_loop(self.ask, seconds, lengths=lengths))

    def latencies(self, arrivals: list[Job]) -> list[tuple[int, float]]:
        """(steps, seconds) of each job, after some seconds in a closed loop."""

        async def measure() -> list[tuple[int, float]]:
            await closed_loop(self.ask, 6, lengths=sorted({job.steps for job in arrivals}))
            return await open_loop(self.ask, arrivals)

        with server(self.command, self.ready, self.log):
            return asyncio.run(measure())


def compare(ours: Contender, theirs: Contender, asked: argparse.Namespace) -> None:
    seconds, turns, dtype = asked.seconds, asked.turns, asked.peer_dtype
    lengths = tuple(map(int, asked.steps.split(",")))
    ours.rate(asked.warm_up * 3 / 4, lengths)
    rates: dict[str, list[float]] = {"us": [], "peer": []}
    for _ in range(turns):
        rates["us"].append(ours.rate(seconds, lengths))
        rates["peer"].append(theirs.rate(seconds, lengths))
    us, peer = (statistics.median(rates[name]) for name in ("us", "peer"))
    print(f"Jobs of {asked.steps} steps; each turn: {rates}", file=sys.stderr)
    print(f"32 closed-loop clients, {seconds:.0f} s, {turns} turns: image-steps/s\n")
    print("| server | image-steps/s |\n|---|---|")
    print(f"| ddpm-serve | {us:.0f} |\n| LitServe, diffusers {dtype} | {peer:.0f} |")
    print(f"| ratio | {us / peer:.2f} |\n", flush=True)
    rate = peer / statistics.mean(lengths) / 2
    arrivals = poisson(rate, seconds * 1.5, lengths)
    print(f"Poisson arrivals, {rate:.2f} jobs/s, {len(arrivals)} jobs: seconds to the picture\n")
    print(f"| server | p50 of {min(lengths)} steps | p50 | p95 | p99 |\n|---|---|---|---|---|")
    mine = show("ddpm-serve", ours.latencies(arrivals))
    peers = show(f"LitServe, diffusers {dtype}", theirs.latencies(arrivals))
    ratios = " | ".join(f"{mine[name] / peers[name]:.2f}" for name in mine)
    print(f"| ratio | {ratios} |")


if __name__ == "__main__":
    main()
