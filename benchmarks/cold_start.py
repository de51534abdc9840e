"""A service's first minutes, with nothing compiled yet, against one that never compiles.

    .venv/bin/python benchmarks/cold_start.py [--minutes 3] [--only cold]

Each is a fresh `ddpm up` without a compile cache: first the default request, alone, then 32 clients
in a closed loop. A third row starts anew with what the cold one has compiled.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import serving
from serving import HERE, ask_us, closed_loop

from worker.bench.load import first_picture, image_steps, service

WANTED = 0.85  # of the eager engine's, in the first minutes


@dataclass(frozen=True)
class Minutes:
    """first_s: seconds to the first picture; rates: image-steps/s, minute by minute."""

    first_s: float
    rates: list[float]
    compiled: str

    @property
    def mean(self) -> float:
        return sum(self.rates) / len(self.rates)


async def watch(url: str, minutes: float, part: float) -> list[float]:
    """Image-steps/s of each part of the time, under full load."""
    serving.OUR_PORT = int(url.rpartition(":")[2])
    load = asyncio.create_task(closed_loop(ask_us, 60 * minutes * 3 / 4))
    rates, before, began = [], image_steps(url), time.perf_counter()
    for i in range(1, round(60 * minutes / part) + 1):
        await asyncio.sleep(max(0.0, began + i * part - time.perf_counter()))
        now = await asyncio.to_thread(image_steps, url)
        rates.append((now - before) / part)
        before = now
    await load
    return rates


def run(model: Path, minutes: float, part: float, *, compiles: bool, cache: Path) -> Minutes:
    """One service, from its start."""
    os.environ["DDPM_COMPILE"] = "1" if compiles else "0"
    os.environ["DDPM_CACHE_DIR"] = str(cache)
    folder = Path(tempfile.mkdtemp(prefix="ddpm-bench-"))
    print(f"logs: {folder}", file=sys.stderr, flush=True)
    began = time.time()
    with service(folder, model.parent) as url:
        ready = time.time()
        first_s = first_picture(url, model.name)
        rates = asyncio.run(watch(url, minutes, part))
    log = (folder / "data" / "worker-1.log").read_text(encoding="utf-8")
    made = len(re.findall("run compiled code", log))
    print(f"ready after {ready - began:.1f} s", file=sys.stderr, flush=True)
    return Minutes(first_s, rates, f"{made} of {len(re.findall('compiling ', log))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE.parent / "models" / "mnist")
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--part", type=float, default=60, help="seconds of a column")
    parser.add_argument("--only", choices=["eager", "cold", "warm"], action="append")
    parser.add_argument("--cache", type=Path, help="of the cold one; default: a new folder")
    arguments = parser.parse_args()
    cache = arguments.cache or Path(tempfile.mkdtemp(prefix="ddpm-bench-cache-"))
    model = arguments.model.resolve()
    columns = round(60 * arguments.minutes / arguments.part)
    heads = " | ".join(f"{round((i + 1) * arguments.part)} s" for i in range(columns))
    print(f"| image-steps/s until | {heads} | mean | first picture, s | compiled |")
    print("|---|" + "---|" * (columns + 3))
    found: dict[str, Minutes] = {}
    for name in arguments.only or ("eager", "cold", "warm"):
        folder = Path(tempfile.mkdtemp()) if name == "eager" else cache
        one = run(model, arguments.minutes, arguments.part, compiles=name != "eager", cache=folder)
        found[name] = one
        rates = " | ".join(f"{rate:.0f}" for rate in one.rates)
        print(
            f"| {name} | {rates} | {one.mean:.0f} | {one.first_s:.2f} | {one.compiled} |",
            flush=True,
        )
    if {"eager", "cold"} <= found.keys():
        print(f"\ncold / eager: {found['cold'].mean / found['eager'].mean:.2f} ({WANTED} wanted)")


if __name__ == "__main__":
    main()
