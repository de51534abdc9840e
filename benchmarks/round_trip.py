"""From digits to their x_T and back: how exactly, by timesteps, order and iterations.

    .venv/bin/python benchmarks/round_trip.py --data FOLDER_WITH_MNIST_PARQUET

PSNR of `diffusion.decode` of `diffusion.encode` over the first test digits, float32, the mean over
digits and its standard error; and the variance of x_T, which is 1 of noise. Without --data the
digits are generated. A timestep up takes 1 + iterations evaluations, a timestep down one.
"""

from __future__ import annotations

import argparse

import torch
from quality import load_split
from restore import Value, psnr
from torch import Tensor

import diffusion

ROWS = (10, 20, 50, 100, 200)
WAYS = ((1, 0), (1, 1), (1, 2), (1, 3), (2, 0))  # order, iterations


def digits(asked: argparse.Namespace, model: diffusion.Model) -> Tensor:
    """[N, C, H, W]."""
    if asked.data:
        return load_split(asked.data, "test").images(slice(0, asked.images))
    return diffusion.sample(model, asked.images, sampler="ddim", steps=50, class_label=None)


def there_and_back(
    model: diffusion.Model, images: Tensor, steps: int, *, order: int, iterations: int
) -> tuple[Value, float]:
    """PSNR, and the variance of x_T."""
    exact = {"steps": steps, "order": order, "dtype": torch.float32}
    x_T = diffusion.encode(model, images, iterations=iterations, **exact)  # type: ignore[arg-type]
    back = diffusion.decode(model, x_T, **exact)  # type: ignore[arg-type]
    return Value.of(psnr(back.cpu(), images)), float(x_T.var())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data")
    parser.add_argument("--model", default="models/mnist")
    parser.add_argument("--images", type=int, default=8, help="digits")
    asked = parser.parse_args()
    model = diffusion.load(asked.model, "cuda" if torch.cuda.is_available() else "cpu")
    images = digits(asked, model)
    print("| order | iterations | " + " | ".join(f"{steps} timesteps" for steps in ROWS) + " |")
    print("|" + "---|" * (2 + len(ROWS)))
    for order, iterations in WAYS:
        print(f"| {order} | {iterations} |", end="", flush=True)
        for steps in ROWS:
            found, variance = there_and_back(
                model, images, steps, order=order, iterations=iterations
            )
            print(f" {found.told('.1f')} dB, {variance:.2f} |", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
