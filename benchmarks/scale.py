"""Pictures/s and waiting against clients, steps, images a job and workers, and what bounds each.

    .venv/bin/python benchmarks/scale.py [--seconds 6] [--out docs/figures/scale.png]

Closed-loop clients, jobs of ddim. The bound of a point is the network, if the service has
`NEARLY` of what the network alone gives in batches of as many rows as were asked for at once; else
it is what a job costs beside the network: API, Redis, and the wait for the next step. Let a service
of the same model run a few minutes first: it keeps what it compiled.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import matplotlib
import torch
from serving import HERE, open_client, percentile

from diffusion import cores
from jobs.settings import load_settings
from worker.bench.command import cpu_name, forward_rate
from worker.bench.load import image_steps, service
from worker.models import ModelFolder
from worker.network.compiling import Compiler
from worker.network.network import Network
from worker.network.networks import Networks

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NEARLY = 0.75
MAX_ROWS = 64
SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Load:
    """So many clients, each with one job at a time."""

    clients: int = 32
    steps: int = 10
    images: int = 1
    workers: int = 1


@dataclass(frozen=True)
class Point:
    """images_s: pictures/s; steps_s: image-steps/s; p95: seconds of a job; bound: in words."""

    load: Load
    images_s: float
    steps_s: float
    p95: float
    bound: str


SWEEPS: dict[str, Sequence[Load]] = {
    "clients": [Load(clients=n) for n in (1, 4, 16, 64, 256)],
    "steps": [Load(steps=n) for n in (4, 10, 20, 50)],
    "images": [Load(clients=4, images=n) for n in (1, 4, 16, 64)],
    "workers": [Load(clients=64, workers=n) for n in (1, 2)],
}


async def measure(url: str, model: str, load: Load, seconds: float) -> tuple[float, list[float]]:
    """Image-steps/s, and the seconds of each job that ended."""
    body = {"model": model, "num_images": load.images, "steps": load.steps, "sampler": "ddim"}
    taken: list[float] = []
    running = True

    async def client(http: httpx.AsyncClient) -> None:
        while running:
            began = time.perf_counter()
            job = (await http.post("/generate", json=body, headers={"Prefer": "wait=60"})).json()
            while job["status"] in ("queued", "running"):
                job = (await http.get(f"/jobs/{job['id']}?wait=20")).json()
            taken.append(time.perf_counter() - began)

    async with open_client() as http:
        http.base_url = httpx.URL(url)
        tasks = [asyncio.create_task(client(http)) for _ in range(load.clients)]
        await asyncio.sleep(seconds / 3)
        taken.clear()
        before, began = await asyncio.to_thread(image_steps, url), time.perf_counter()
        await asyncio.sleep(seconds)
        rate = (await asyncio.to_thread(image_steps, url) - before) / (time.perf_counter() - began)
        running = False
        await asyncio.gather(*tasks)
    return rate, taken


def network_alone(model: Path) -> Network:
    """As the service will run it: with the code that was compiled before."""
    folder = ModelFolder(model.parent, queue="bench", names=(model.name,))
    folder.rescan()
    networks = Networks(None, MAX_ROWS)
    network = networks.prepare(folder.served[model.name].model)
    code = load_settings().cache_dir.expanduser() / "compiled"
    Compiler(networks, code).take_up(folder.served[model.name])
    return network


def network_rates(network: Network, seconds: float) -> dict[int, float]:
    """Rows/s of the network alone by the rows of a batch."""
    by_rows = {shape.rows: shape for shape in network.shapes}
    return {rows: forward_rate(network, by_rows[rows], seconds) for rows in SIZES}


def bound_of(load: Load, steps_s: float, alone: dict[int, float]) -> str:
    """What a point is held back by."""
    rows = min(load.clients * load.images, MAX_ROWS * load.workers)
    size = max(size for size in SIZES if size <= max(1, rows // load.workers))
    share = steps_s / alone[size]
    if share >= NEARLY:
        return f"the network, {size} rows at once ({share:.2f} of it)"
    return f"what a job costs beside the network ({share:.2f} of {size} rows at once)"


def sweep(
    model: Path, loads: Sequence[Load], seconds: float, alone: dict[int, float]
) -> list[Point]:
    """All points with the same number of workers, from one service."""
    workers = loads[0].workers
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as scratch:
        folder = Path(scratch)
        with service(folder, model.parent, workers=workers) as url:
            points = []
            for load in loads:
                rate, taken = asyncio.run(measure(url, model.name, load, seconds))
                found = Point(
                    load,
                    rate / load.steps,
                    rate,
                    percentile(taken, 0.95),
                    bound_of(load, rate, alone),
                )
                points.append(found)
                print(line(found), flush=True)
    return points


def line(point: Point) -> str:
    """One row of the table."""
    load = point.load
    return (
        f"| {load.clients} | {load.steps} | {load.images} | {load.workers} "
        f"| {point.images_s:.1f} | {point.steps_s:.0f} | {point.p95:.2f} | {point.bound} |"
    )


def plot(found: dict[str, list[Point]], title: str, out: Path) -> None:
    """Pictures/s and p95, a panel a sweep."""
    figure, axes = plt.subplots(
        1, len(found), figsize=(3.2 * len(found), 3.0), layout="constrained"
    )
    for axis, (name, points) in zip(axes, found.items(), strict=True):
        at = [getattr(point.load, name) for point in points]
        axis.plot(at, [point.images_s for point in points], "o-", label="pictures/s")
        axis.plot(at, [point.p95 for point in points], "s--", label="p95, s")
        axis.set(xscale="log", yscale="log", xlabel=name, xticks=at, xticklabels=at)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title, fontsize=9)
    figure.savefig(out, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE.parent / "models" / "mnist")
    parser.add_argument("--seconds", type=float, default=6, help="a point")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "figures" / "scale.png")
    arguments = parser.parse_args()
    cores.use(cores.count())
    model = arguments.model.resolve()
    network = network_alone(model)
    alone = network_rates(network, arguments.seconds / 6)
    title = f"{cpu_name()}, {cores.count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    title += f", {network.provenance()['code']} {network.provenance()['dtype']}"
    print(title, "; rows/s of the network alone:", {k: round(v) for k, v in alone.items()})
    print("\n| clients | steps | images | workers | pictures/s | image-steps/s | p95, s | bound |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    found: dict[str, list[Point]] = {}
    for name, loads in SWEEPS.items():
        found[name] = []
        for workers in sorted({load.workers for load in loads}):
            same = [load for load in loads if load.workers == workers]
            found[name] += sweep(model, same, arguments.seconds, alone)
    plot(found, title, arguments.out)
    print(arguments.out, file=sys.stderr)


if __name__ == "__main__":
    main()
