"""What a short job costs, in milliseconds of a core: by process, and what it asks of Redis.

    .venv/bin/python benchmarks/per_job.py [--jobs 1200] [--steps 4,6,8,10] [--warm-up 400]

32 clients in a closed loop, as in serving.py, on a service of its own. The threads of the worker
that do the network's rows, one a core, are a line of their own; all the rest is what jobs cost
beside the network, the clients themselves among it. For figures of compiled code let the service
run first: it keeps what it compiled.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil
import redis
from serving import HERE, OUR_PORT, ask_us, jobs, open_client, server

from diffusion import cores

CLIENTS = 32
ROLES = {"ddpm worker": "worker", "ddpm api": "API", "redis-server": "Redis"}
OURSELVES, OTHERS, ROWS = "the clients", "others", "the network's rows"


def processor_seconds() -> dict[tuple[str, int], float]:
    """(role, thread) → seconds of a core so far, of all that this process has started."""
    found: dict[tuple[str, int], float] = {}
    ourselves = psutil.Process()
    for process in (ourselves, *ourselves.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has ended
            command = " ".join(process.cmdline())
            role = next((name for part, name in ROLES.items() if part in command), OTHERS)
            for thread in process.threads():
                key = (OURSELVES if process == ourselves else role, thread.id)
                found[key] = thread.user_time + thread.system_time
    return found


async def load(count: int, lengths: tuple[int, ...]) -> None:
    """So many jobs, from all clients together."""
    source, left = jobs(0, lengths), iter(range(count))
    async with open_client() as http:

        async def loop() -> None:
            for _ in left:
                await ask_us(http, next(source))

        await asyncio.gather(*(loop() for _ in range(CLIENTS)))


def by_role(spent: dict[tuple[str, int], float]) -> dict[str, float]:
    """Seconds by role, with the worker's busiest threads, one a core, as the network's rows."""
    threads = sorted((key for key in spent if key[0] == "worker"), key=lambda key: -spent[key])
    found: dict[str, float] = {}
    for key, seconds in spent.items():
        role = ROWS if key in threads[: cores.usable()] else key[0]
        found[role] = found.get(role, 0.0) + seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=HERE.parent / "models")
    parser.add_argument("--jobs", type=int, default=1200)
    parser.add_argument("--warm-up", type=int, default=400, help="jobs")
    parser.add_argument("--steps", default="4,6,8,10")
    asked = parser.parse_args()
    lengths = tuple(map(int, asked.steps.split(",")))
    folder = Path(tempfile.mkdtemp(prefix="ddpm-bench-"))
    os.environ["DDPM_MODELS"] = str(asked.models.resolve())
    ours = [sys.executable, "-m", "ddpm", "up", "--port", str(OUR_PORT)]
    ours += ["--data", str(folder / "ddpm")]
    with server(ours, f"http://127.0.0.1:{OUR_PORT}/readyz", folder / "ours.log"):
        asyncio.run(load(asked.warm_up, lengths))
        with redis.Redis(unix_socket_path=str(folder / "ddpm" / "redis.sock")) as store:
            store.config_resetstat()
            before, times, began = processor_seconds(), psutil.cpu_times(), time.perf_counter()
            asyncio.run(load(asked.jobs, lengths))
            seconds = time.perf_counter() - began
            after, times_after = processor_seconds(), psutil.cpu_times()
            calls = {
                name.removeprefix("cmdstat_"): stat["calls"] / asked.jobs
                for name, stat in store.info("commandstats").items()
            }
    spent = {key: value - before.get(key, 0.0) for key, value in after.items()}
    waited = times_after.idle - times.idle
    print(f"{asked.jobs} jobs of {asked.steps} steps: {asked.jobs / seconds:.1f} jobs/s")
    print(f"cores without work: {waited / seconds / psutil.cpu_count():.0%}\n")
    print("| part | ms of a core a job |\n|---|---|")
    for role, value in sorted(by_role(spent).items(), key=lambda item: -item[1]):
        print(f"| {role} | {1000 * value / asked.jobs:.1f} |")
    print(f"| all | {1000 * sum(spent.values()) / asked.jobs:.1f} |\n")
    trips = {name: calls.get(name, 0.0) for name in ("evalsha", "eval", "exec", "xread")}
    print("Redis, a job: " + ", ".join(f"{n:.1f} {name}" for name, n in trips.items()))


if __name__ == "__main__":
    main()
