"""What it costs that chains are of several kinds: a mixed load beside generation alone.

    .venv/bin/python benchmarks/mixed.py [--turns 5]

The engine, fed in its own process, steps a batch of 48 chains to their end: all generated; or a
third each generated, restored by projection (lower half unknown, enlarged, with noise) and
reconstructed from the middle. In turns, the same number of network evaluations in each; printed are
image-steps/s and their ratio, and how many forwards the kinds shared.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch

import diffusion
from diffusion import cores
from diffusion.condition import Measurement, Projection
from diffusion.model import Model
from diffusion.operators import AveragePool, Identity, Mask
from diffusion.samplers import build_table
from worker.engine.lane import EngineOptions
from worker.engine.loop import Engine
from worker.engine.tasks import Event, Failed, Start, Task

ROWS, CHAINS = 20, 48  # rows a chain; chains in all
names = (f"task-{i}" for i in itertools.count())


def generated(model: Model, chains: int) -> Task:
    """From noise."""
    table = build_table(model.schedule, sampler="ddim", steps=ROWS, eta=1.0)
    return Task(next(names), model, table, 0, tuple(Start(i) for i in range(chains)))


def restored(model: Model, chains: int) -> list[Task]:
    """By projection, a measurement each for a third of them."""
    known = torch.zeros(model.shape[1:], dtype=torch.bool)
    known[: model.shape[1] // 2] = True
    image = torch.rand(1, *model.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    table = build_table(model.schedule, sampler="ddim", steps=ROWS // 5 + 1, eta=1.0, travel=5)
    tasks = []
    for operator, sigma in ((Mask(known), 0.0), (AveragePool(4), 0.0), (Identity(), 0.2)):
        condition = Projection(Measurement(operator, operator.forward(image), sigma))
        starts = tuple(Start(i) for i in range(chains // 3))
        tasks.append(Task(next(names), model, table, 1, starts, condition=condition))
    return tasks


def reconstructed(model: Model, chains: int) -> Task:
    """From the middle."""
    middle = model.schedule.T // 2
    table = build_table(model.schedule, sampler="ddim", steps=ROWS, eta=1.0, start=middle)
    x_t = torch.randn(chains, *model.shape, generator=torch.Generator().manual_seed(0))
    starts = tuple(Start(i, x_t=x) for i, x in enumerate(x_t))
    return Task(next(names), model, table, 2, starts)


class Load:
    """An engine that runs tasks to their end, again and again."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.engine = Engine(self._take, EngineOptions(max_rows=CHAINS))

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Failed):
                raise event.error

    def tasks(self, *, mixed: bool) -> list[Task]:
        """For one turn."""
        if not mixed:
            return [generated(self.model, CHAINS)]
        third = CHAINS // 3
        both = [
            generated(self.model, third),
            reconstructed(self.model, CHAINS - third - third // 3 * 3),
        ]
        return [*both, *restored(self.model, third // 3 * 3)]

    def rate(self, *, mixed: bool) -> tuple[float, float]:
        """Image-steps/s of a turn, and samples a step."""
        tasks = self.tasks(mixed=mixed)
        evaluations = sum(task.evaluations for task in tasks)
        self.engine.stepped()
        began = time.perf_counter()
        for task in tasks:
            self.engine.submit(task)
        while self.engine.tick():
            pass
        seconds = time.perf_counter() - began
        return evaluations / seconds, evaluations / sum(self.engine.stepped().values())


def main() -> None:
    """Print both rates, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/mnist")
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    cores.use(cores.usable())
    load = Load(diffusion.load(asked.model))
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for turn in range(asked.turns + 1):
        for mixed in (False, True) if turn % 2 else (True, False):
            measured = load.rate(mixed=mixed)
            if turn:  # the first prepares
                found[mixed].append(measured)
    ratios = [m[0] / g[0] for g, m in zip(found[False], found[True], strict=True)]
    for mixed, name in ((False, "generate alone"), (True, "mixed")):
        rate, together = (statistics.median(values) for values in zip(*found[mixed], strict=True))
        print(f"{name}: {rate:.0f} image-steps/s, {together:.1f} chains a forward")
    print(
        f"ratio: median {statistics.median(ratios):.3f}; " + ", ".join(f"{r:.3f}" for r in ratios)
    )


if __name__ == "__main__":
    main()
