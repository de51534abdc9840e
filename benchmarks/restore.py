"""How good are restored digits? A classifier's verdict, PSNR and calibration, at stated costs.

    .venv/bin/python benchmarks/restore.py --data FOLDER_WITH_MNIST_PARQUET --images 1000

For test digits of which the lower half is unknown, that are pooled in blocks of 4 × 4, or noisy
with σ_y = 0.2, no label given, by each method at about equal cost in network evaluations: the share
of samples that a classifier (that of quality.py) reads as the true digit, beside that of the
measurement itself; PSNR of the samples' mean beside that of a single one; the share of true pixels,
where the samples differ at all, inside their central 50 % and 90 %; and how far A x is from y.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from quality import classifier, evaluate, load_classifier, load_split
from torch import Tensor
from tqdm import tqdm

import diffusion
from diffusion.condition import PRODUCT_COST
from diffusion.operators import AveragePool, Identity, Mask, Operator
from diffusion.restoring import TRAVEL


@dataclass(frozen=True)
class Way:
    """Options of `diffusion.restore`."""

    method: str
    steps: int
    travel: int | None = None
    solver_steps: int = 1

    @property
    def cost(self) -> int:
        """Network evaluations an image."""
        travel = self.travel or TRAVEL[self.method]
        rows = (self.steps - 1) * travel + 1
        products = max(self.solver_steps, 1) if self.method == "moment" else 0
        return rows * (1 + PRODUCT_COST * products)


def ways(evaluations: int) -> dict[str, Way]:
    """Of about equal cost."""
    return {
        "projection": Way("projection", evaluations, travel=1),
        "projection, travel 5": Way("projection", max(2, evaluations // 5), travel=5),
        "moment, 1 step": Way("moment", max(2, evaluations // 3)),
        "moment, 3 steps": Way("moment", max(2, evaluations // 7), solver_steps=3),
    }


def lower_half() -> Mask:
    """Keeps the upper half of 32 × 32 pixels."""
    known = torch.zeros(32, 32, dtype=torch.bool)
    known[:16] = True
    return Mask(known)


TASKS: dict[str, tuple[Operator, float]] = {
    "lower half": (lower_half(), 0.0),
    "average_pool 4": (AveragePool(4), 0.0),
    "noise 0.2": (Identity(), 0.2),
}


def psnr(found: Tensor, truth: Tensor) -> float:
    """Mean over images [N, ...] in [−1, 1], dB."""
    error = (found - truth).square().flatten(1).mean(1).clamp_min(1e-12)
    return float((10 * torch.log10(4 / error)).mean())


def coverage(samples: Tensor, truth: Tensor, share: float) -> float:
    """Share of true pixels in the central `share` of samples [N, S, ...], where these differ."""
    low, high = (samples.quantile((1 + sign * share) / 2, dim=1) for sign in (-1, 1))
    unsure = samples.std(1) > 0.05
    inside = (truth >= low) & (truth <= high)
    return float(inside[unsure].float().mean()) if unsure.any() else float("nan")


def restored(
    model: diffusion.Model,
    truth: Tensor,
    operator: Operator,
    *,
    sigma: float,
    way: Way,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Samples [N, count, C, H, W] of each image, and the measurements in its size."""
    samples, shown = [], []
    for i, x in enumerate(tqdm(truth, desc=f"{way.method} {way.cost}")):
        y = operator.forward(x[None])
        generator = torch.Generator().manual_seed(i)
        y = y + sigma * torch.randn(y.shape, generator=generator)
        options: dict[str, Any] = {"method": way.method, "steps": way.steps, "sigma": sigma}
        options |= {"travel": way.travel, "solver_steps": way.solver_steps, "seed": i}
        samples.append(diffusion.restore(model, y[0], operator, count, **options).cpu())
        if isinstance(operator, Mask):
            y = torch.where(operator.known, y, -1.0)  # black
        shown.append(F.interpolate(y, size=x.shape[-2:])[0])
    return torch.stack(samples), torch.stack(shown)


def main() -> None:
    """Print the tables; keep the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="models/mnist")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=16, help="of each")
    parser.add_argument("--evaluations", type=int, default=250, help="of the network, a sample")
    parser.add_argument("--folder", type=Path, default=Path("runs/restore"))
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    if not (asked.folder / "classifier.safetensors").exists():
        classifier(load_split(asked.data, "train"), asked.folder)
    judge = load_classifier(asked.folder)
    test = load_split(asked.data, "test")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = diffusion.load(asked.model, device)
    count, chosen = asked.samples, slice(0, asked.images)
    truth, labels = test.images(chosen), test.labels[chosen]
    found: dict[str, Any] = {}

    def right(images: Tensor) -> float:
        _, read = evaluate(judge, images)
        return float((read == labels.repeat_interleave(len(images) // len(labels))).float().mean())

    for task, (operator, sigma) in TASKS.items():
        for name, way in ways(asked.evaluations).items():
            samples, shown = restored(model, truth, operator, sigma=sigma, way=way, count=count)
            away = samples - truth[:, None]
            residual = operator.forward(away.flatten(0, 1))
            row = {
                "cost": way.cost,
                "read as the digit": right(samples.flatten(0, 1)),
                "the measurement itself": right(shown),
                "psnr of one": psnr(samples[:, 0], truth),
                "psnr of the mean": psnr(samples.mean(1), truth),
                "inside 50 %": coverage(samples, truth, 0.5),
                "inside 90 %": coverage(samples, truth, 0.9),
                "residual": float(residual.square().mean().sqrt()),
            }
            found[f"{task}: {name}"] = row
            told = ", ".join(f"{what} {value:.3f}" for what, value in row.items())
            print(f"{task}: {name}: {told}", flush=True)
            (asked.folder / "results.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
