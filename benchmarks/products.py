"""What a product with the network's Jacobian costs, in forwards: the price at admission.

    .venv/bin/python benchmarks/products.py

A row that needs products is one forward with autograd on and k vector–Jacobian products, in
float32, its rows dealt to the cores as those of other chains, whose forward it is timed in turns
with: (time of the row / time of a forward − 1) / k is a product's price. Printed are
medians over the turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import diffusion
from diffusion import cores
from worker.network.costs import Shape
from worker.network.network import Network, worker_dtype

BATCHES = (1, 4, 16)
PRODUCTS = (1, 3, 5)


def row(network: Network, x: torch.Tensor, t: torch.Tensor, products: int) -> Callable[[], None]:
    """A row with so many products; 0: as a chain without any."""
    shape, labels = Shape(len(x)), torch.zeros_like(t)
    model = network.model

    def forward() -> None:
        with torch.inference_mode():
            model.read(network.output(x, t, labels, shape), x, t)

    def with_products() -> None:
        with torch.enable_grad():
            at = x.clone().requires_grad_()
            found = model.read(network.output(at, t, labels, shape), at, t).x_start
            for _ in range(products):
                torch.autograd.grad(found, at, x, retain_graph=True)

    return with_products if products else forward


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/mnist")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--dtype", help="of chains, float32 or bfloat16: default as a worker's")
    asked = parser.parse_args()
    model = diffusion.load(asked.model)
    cores.use(cores.usable())
    dtype = getattr(torch, asked.dtype) if asked.dtype else worker_dtype(model)
    chains = Network(model, dtype=dtype, max_rows=max(BATCHES))
    products = Network(model, dtype=torch.float32, max_rows=max(BATCHES))
    print(f"{cores.count()} cores; chains in {chains.dtype}, products in float32")
    print(
        "| rows of a batch | forward, ms | " + " | ".join(f"{k} products" for k in PRODUCTS) + " |"
    )
    print("|---" * (2 + len(PRODUCTS)) + "|")
    for n in BATCHES:
        x, t = torch.randn(n, *model.shape), torch.full((n,), model.schedule.T // 2)
        rows = {k: row(products if k else chains, x, t, k) for k in (0, *PRODUCTS)}
        seconds: dict[int, list[float]] = {k: [] for k in rows}
        for turn in range(asked.turns + 1):
            for k, run in rows.items():
                began = time.perf_counter()
                run()
                if turn:  # the first prepares
                    seconds[k].append(time.perf_counter() - began)
        forward = statistics.median(seconds[0])
        prices = [(statistics.median(seconds[k]) / forward - 1) / k for k in PRODUCTS]
        print(f"| {n} | {1000 * forward:.1f} | " + " | ".join(f"{p:.2f}" for p in prices) + " |")


if __name__ == "__main__":
    main()
