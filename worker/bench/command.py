"""The command `ddpm bench`: this machine's own figures, each part against what bounds it."""

from __future__ import annotations

import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from diffusion import cores
from diffusion.speed import prepare
from jobs.settings import load_settings
from worker.bench.limit import fastest, limit_rate
from worker.bench.load import (
    EngineLoad,
    LoadError,
    first_picture,
    service,
    service_rate,
)
from worker.models import ModelFolder, Served
from worker.network.compiling import Compiler
from worker.network.costs import Shape
from worker.network.network import Network, example
from worker.network.networks import Networks

GOOD = {"network": 0.75, "engine": 0.95, "service": 0.90}  # of the part above each
FIRST_S = 2.0  # seconds to the first picture of a fresh service
MAX_ROWS = 64


@dataclass(frozen=True)
class Figures:
    """Image-steps/s of each part; 0 for a limit that was not measured (on a GPU).

    first_s: from a fresh service's ready line to the picture of the default request.
    """

    limit: float
    forward: float
    engine: float
    service: float
    first_s: float
    compiled: bool


@click.command()
@click.argument("name", default="mnist")
@click.option("--models", type=click.Path(path_type=Path), help="Folder; default DDPM_MODELS.")
@click.option(
    "--seconds", default=15.0, show_default=True, type=click.FloatRange(1), help="A part."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads; default: all cores.")
def bench(name: str, models: Path | None, seconds: float, threads: int | None) -> None:
    """Measure the network, the engine and the whole service with the model NAME, on this machine.

    Two minutes. Let nothing else run meanwhile: it is the machine's own figures that are wanted.
    """
    settings = load_settings(models=models)
    cores.use(threads or cores.count())
    folder = ModelFolder(settings.models, queue="bench", names=(name,))
    folder.rescan()
    if name not in folder.served:
        raise click.ClickException(f"no model {name!r} in {settings.models}")
    served = folder.served[name]
    click.echo(f"{machine()}; {name}, {served.card.parameters:,} parameters")
    try:
        found = measure(served, settings.cache_dir.expanduser() / "compiled", seconds, threads)
    except LoadError as error:
        raise click.ClickException(str(error)) from error
    click.echo(table(found))
    click.echo("\n".join(verdict(found)))


def machine() -> str:
    """The processor, its cores for this process, and what is busy beside it."""
    features = torch.backends.cpu.get_cpu_capability()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return f"{cpu_name()}, {cores.count()} cores, {features}; load {load:.1f} before"


def cpu_name() -> str:
    """As Linux calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def measure(served: Served, code: Path, seconds: float, threads: int | None) -> Figures:
    """All figures. Raises LoadError if the service does not start or answer."""
    networks = Networks(None, MAX_ROWS)
    network = networks.prepare(served.model)
    Compiler(networks, code).take_up(served)
    compiled = network.shapes[-1].compiled
    limit = 0.0
    if served.model.device.type == "cpu":
        fast = prepare(served.model, dtype=network.dtype)
        limit = limit_rate(fast, MAX_ROWS, seconds)
    forward = forward_rate(network, network.shapes[-1], seconds)
    engine = EngineLoad(served.model, networks).rate(seconds)
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as scratch:
        models = served.folder.resolve().parent
        with service(Path(scratch), models, threads=threads) as url:
            first_s = first_picture(url, served.name)
            whole = service_rate(url, served.name, seconds)
    return Figures(limit, forward, engine, whole, first_s, compiled)


@torch.inference_mode()
def forward_rate(network: Network, shape: Shape, seconds: float) -> float:
    """Rows/s of the network alone, in batches of a shape."""
    x, t, labels = example(network.model, shape.rows)

    def call() -> None:
        network.output(x, t, labels, shape).sum().item()  # waits for the device

    return shape.rows / fastest(call, seconds)


def table(found: Figures) -> str:
    """The figures, each against the part above it."""
    rows = [
        ("torch's convolutions alone", found.limit),
        (f"the network, {'compiled' if found.compiled else 'eager'}", found.forward),
        ("the engine", found.engine),
        ("the whole service", found.service),
    ]
    lines, above = ["", "| part | image-steps/s | of the part above |", "|---|---|---|"], 0.0
    for name, rate in rows:
        if rate:
            share = f"{rate / above:.2f}" if above else ""
            lines.append(f"| {name} | {rate:.0f} | {share} |")
            above = rate
    return "\n".join([*lines, ""])


def verdict(found: Figures) -> list[str]:
    """What the figures say, a sentence each."""
    said = []
    if found.limit:
        share, good = found.forward / found.limit, GOOD["network"]
        said.append(_judged("The network", share, good, "torch's convolutions alone"))
    if not found.compiled:
        said.append("It ran uncompiled: a worker compiles what it uses in the background.")
    for name, share in (
        ("engine", found.engine / found.forward),
        ("service", found.service / found.engine),
    ):
        of = "the network alone" if name == "engine" else "the engine"
        said.append(_judged(f"The {name}", share, GOOD[name], of))
    soon = "as wanted" if found.first_s < FIRST_S else f"longer than the {FIRST_S:.0f} wanted"
    said.append(f"The first picture of a fresh service took {found.first_s:.1f} s, {soon}.")
    fast = found.service / 50
    said.append(f"So: about {fast:.1f} pictures/s of 50 steps, or {fast * 5:.1f} of 10 steps.")
    return said


def _judged(part: str, share: float, good: float, of: str) -> str:
    well = "as wanted" if share >= good else f"short of the {good:.2f} wanted"
    return f"{part} has {share:.2f} of the speed of {of}, {well}."
