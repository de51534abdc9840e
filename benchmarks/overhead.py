"""What the engine costs over bare forwards, and the whole service over the engine.

    .venv/bin/python benchmarks/overhead.py [--seconds 20] [--eager]

The same model, the same code (compiled, unless --eager), full load. Three ways to the same work
take turns: a loop that does nothing but call the network, in the engine's mix of batch sizes; the
engine, fed in its own process; `ddpm up` under clients that hold the queue full and fetch every
picture.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import torch
from serving import HERE, OUR_PORT, open_client, server

from diffusion import cores
from diffusion.samplers import build_table
from jobs.settings import Settings
from worker.engine.lane import EngineOptions
from worker.engine.loop import Engine
from worker.engine.tasks import Advanced, Event, Finished, Start, Task
from worker.models import ModelFolder
from worker.network.compiling import Compiler
from worker.network.network import example
from worker.network.networks import Networks

IMAGES, STEPS, CLIENTS = 16, 50, 8  # a job, and how many are under way: 128 chains


class BareEngine:
    """The engine alone, its batch held full by tasks like the clients' jobs."""

    def __init__(self, models: Path, name: str, sampler: str) -> None:
        folder = ModelFolder(models, queue="ddpm", names=(name,))
        folder.rescan()
        self.served = folder.served[name]
        self.table = build_table(self.served.model.schedule, sampler=sampler, steps=STEPS)
        self.networks = Networks(None, EngineOptions().max_rows)
        self.network = self.networks.prepare(self.served.model)
        self.engine = self._new_engine()
        self.names = itertools.count()
        self.done: dict[str, int] = {}
        self.feeding = False

    def _new_engine(self) -> Engine:
        engine = Engine(self._take)
        engine.networks = self.networks
        return engine

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Advanced):
                self.done[event.task_id] = event.done
            elif isinstance(event, Finished) and self.feeding:
                self.feed()

    def feed(self) -> None:
        """One more task."""
        number = next(self.names)
        starts = tuple(Start(i, class_label=i % 10) for i in range(IMAGES))
        self.engine.submit(Task(str(number), self.served.model, self.table, number, starts))

    def rate(self, seconds: float) -> float:
        """Image-steps/s."""
        self.engine = self._new_engine()
        self.engine.start()
        self.feeding = True
        for _ in range(CLIENTS):
            self.feed()
        time.sleep(seconds / 4)
        before, start = sum(self.done.values()), time.perf_counter()
        time.sleep(seconds)
        rate = (sum(self.done.values()) - before) / (time.perf_counter() - start)
        self.feeding = False
        while self.engine.waiting_rows:
            time.sleep(0.05)
        self.engine.stop()  # its thread's share of the cores goes with it
        return rate

    def compile(self) -> None:
        """Wait until the background compiler has made what this load uses."""
        compiler = Compiler(self.networks, Settings().cache_dir.expanduser() / "compiled")
        while True:
            self.rate(4)
            compiler.poll([self.served])
            if not compiler.working and compiler._most_wanted([self.served]) is None:
                return

    def bare_rate(self, seconds: float, uses: dict[int, int]) -> float:
        """Rows/s of nothing but the network, in this mix of batch sizes (rows → forwards)."""
        steps = sum(uses.values())
        taken = 0.0
        for rows, count in uses.items():
            share = seconds * count / steps
            taken += count * self._forward_s(share, rows)
        return sum(rows * count for rows, count in uses.items()) / taken

    @torch.inference_mode()
    def _forward_s(self, seconds: float, rows: int) -> float:
        x, t, labels = example(self.served.model, rows)
        shapes = [shape for shape in self.network.shapes if shape.rows >= rows]
        shape = min(shapes, key=lambda shape: shape.rows)
        self.network.output(x, t, labels, shape)
        start, count = time.perf_counter(), 0
        while count < 3 or time.perf_counter() - start < seconds:
            self.network.output(x, t, labels, shape)
            count += 1
        return (time.perf_counter() - start) / count


async def image_steps(http: httpx.AsyncClient) -> float:
    """The service's own count of image-steps done."""
    text = (await http.get("/metrics")).text
    line = next(line for line in text.splitlines() if line.startswith("ddpm_image_steps_total"))
    return float(line.split()[-1])


async def service_rate(seconds: float, model: str, sampler: str) -> float:
    """Image-steps/s of the whole service under CLIENTS clients in a closed loop."""
    running = True

    async def loop(http: httpx.AsyncClient) -> None:
        while running:
            body = {"model": model, "num_images": IMAGES, "steps": STEPS, "sampler": sampler}
            job = (await http.post("/generate", json=body)).json()
            while (await http.get(f"/jobs/{job['id']}?wait=20")).json()["status"] != "succeeded":
                pass
            (await http.get(f"/jobs/{job['id']}/grid.png")).raise_for_status()

    async with open_client() as http:
        http.base_url = httpx.URL(f"http://127.0.0.1:{OUR_PORT}")
        clients = [asyncio.create_task(loop(http)) for _ in range(CLIENTS)]
        await asyncio.sleep(seconds / 4)
        before, start = await image_steps(http), time.perf_counter()
        await asyncio.sleep(seconds)
        rate = (await image_steps(http) - before) / (time.perf_counter() - start)
        running = False
        await asyncio.gather(*clients)
    return rate


def warm_up(worker_log: Path, model: str, sampler: str, compiled: int) -> None:
    """Load the service until its worker has taken up what the bare engine had compiled."""
    for _ in range(60):
        asyncio.run(service_rate(4, model, sampler))
        if worker_log.read_text().count("run compiled code") >= compiled:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE.parent / "models" / "mnist")
    parser.add_argument("--sampler", default="ddim", help="ddim, or ddpm, which draws noise too")
    parser.add_argument("--seconds", type=float, default=20, help="a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="nothing is compiled")
    arguments = parser.parse_args()
    cores.use(cores.count())
    model = arguments.model.resolve()
    os.environ["DDPM_MODELS"] = str(model.parent)
    bare = BareEngine(model.parent, model.name, arguments.sampler)
    if arguments.eager:
        os.environ["DDPM_COMPILE"] = "0"
    else:
        bare.compile()
    data = Path(tempfile.mkdtemp(prefix="ddpm-bench-"))
    command = [sys.executable, "-m", "ddpm", "up", "--port", str(OUR_PORT), "--data", str(data)]
    turns: list[tuple[float, float, float]] = []
    sizes: Counter[int] = Counter()
    with server(command, f"http://127.0.0.1:{OUR_PORT}/readyz", data / "up.log"):
        warm_up(data / "worker-1.log", model.name, arguments.sampler, len(bare.network._compiled))
        for _ in range(arguments.turns):
            bare.network.uses.clear()
            engine = bare.rate(arguments.seconds)
            uses = dict(bare.network.uses)
            sizes.update(uses)
            forwards = bare.bare_rate(arguments.seconds, uses)
            service = asyncio.run(service_rate(arguments.seconds, model.name, arguments.sampler))
            turns.append((forwards, engine, service))
    dtype = str(bare.network.dtype).removeprefix("torch.")
    mix = ", ".join(f"{rows}: {n / sizes.total():.0%}" for rows, n in sizes.most_common(3))
    code = "eager" if arguments.eager else "compiled"
    print(f"{arguments.sampler}, {code}, {dtype}; steps by batch size: {mix}")
    print(f"medians of {len(turns)}\n")
    print("| what | image-steps/s | of the row above |\n|---|---|---|")
    names = ("bare forwards", "the engine", "the whole service")
    for i, name in enumerate(names):
        share = statistics.median(turn[i] / turn[i - 1] for turn in turns) if i else 1.0
        print(f"| {name} | {statistics.median(turn[i] for turn in turns):.0f} | {share:.1%} |")


if __name__ == "__main__":
    main()
