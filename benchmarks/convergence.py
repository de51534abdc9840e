"""How far the samplers without noise still are from the one image that they all tend to.

    .venv/bin/python benchmarks/convergence.py [--images 16] [--figure docs/figures/FILE.png]
        [--page docs/quality.md]

From one x_T and label, ddim and the multistep solvers follow the same ODE, so with more and more
evaluations each of them comes to the same image, whatever the spacing. The table gives the RMSE to
it (images in [−1, 1]) by sampler, spacing and evaluations; for it stands what `REFERENCE` finds,
and ddim with all T steps is named beside. What is measured goes to results.json of --out; what is
there already stays.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from curve import put_into
from torch import Tensor

import diffusion
from diffusion.samplers import FewStepsWarning
from diffusion.spacings import SPACINGS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SAMPLERS = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc")
STEPS = (5, 10, 15, 20, 50, 100, 250)
BEGIN, END = "<!-- what convergence.py found -->", "<!-- until here, of convergence.py -->"


class Way(NamedTuple):
    """A sampler, its spacing and its evaluations."""

    sampler: str
    spacing: str
    steps: int


REFERENCE = Way("dpmpp_2m", "uniform", 1000)  # of order 2, at every timestep of the model
CHECK = Way("ddim", "uniform", 1000)


def ways(T: int) -> Iterator[Way]:
    """What is compared with the reference, the cheapest first."""
    for steps in STEPS:
        for sampler in SAMPLERS:
            for spacing in SPACINGS:
                if steps < T:
                    yield Way(sampler, spacing, steps)
    yield CHECK._replace(steps=T)


def draw(model: diffusion.Model, way: Way, asked: argparse.Namespace) -> Tensor:
    """Images [N, C, H, W] of seed 0, the labels in turn."""
    classes = model.config.network.num_classes
    return (
        diffusion.sample(
            model,
            asked.images,
            sampler=way.sampler,
            spacing=way.spacing,
            steps=way.steps,
            class_label=[i % classes for i in range(asked.images)] if classes else None,
            dtype=getattr(torch, asked.dtype),
            compile=asked.compile,
            batch_size=asked.batch_size,
        )
        .double()
        .cpu()
    )


def rmse(a: Tensor, b: Tensor) -> float:
    """Over all images and pixels."""
    return float((a - b).square().mean().sqrt())


def markdown(found: dict[Way, float]) -> str:
    """A line a sampler and spacing, a column a number of evaluations."""
    steps = sorted({way.steps for way in found if way.steps in STEPS})
    lines = [f"| sampler | spacing | {' | '.join(map(str, steps))} |"]
    lines.append("|---" * (len(steps) + 2) + "|")
    for sampler in SAMPLERS:
        for spacing in SPACINGS:
            values = [found.get(Way(sampler, spacing, n)) for n in steps]
            entries = ["" if value is None else f"{value:.4f}" for value in values]
            lines.append(f"| {sampler} | {spacing} | {' | '.join(entries)} |")
    return "\n".join(lines)


def plot(found: dict[Way, float], path: Path) -> None:
    """RMSE against evaluations, a panel a spacing."""
    figure, panels = plt.subplots(
        1, len(SPACINGS), figsize=(12, 2.7), sharey=True, layout="constrained"
    )
    for spacing, axes in zip(SPACINGS, panels, strict=True):
        for sampler in SAMPLERS:
            points = sorted(
                (way.steps, value)
                for way, value in found.items()
                if (way.sampler, way.spacing) == (sampler, spacing) and way.steps in STEPS
            )
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=sampler)
        axes.set(xscale="log", yscale="log", title=spacing)
        axes.set_xticks((5, 10, 20, 50, 100, 250), ("5", "10", "20", "50", "100", "250"))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="RMSE to the limit")
    panels[0].legend(fontsize=7, loc="lower left")
    figure.supxlabel("evaluations of the network an image", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def report(found: dict[Way, float], images: int, asked: argparse.Namespace) -> None:
    """Print the table; put it and the figure where they were asked for."""
    check = found.get(CHECK)
    said = f"{images} images; the limit: {REFERENCE.sampler}, {REFERENCE.spacing}, all steps."
    if check is not None:
        said += f" {CHECK.sampler} with all steps is {check:.4f} from it."
    text = f"{said}\n\n{markdown(found)}"
    print(text)
    if asked.page is not None:
        put_into(asked.page, text, begin=BEGIN, end=END)
    if asked.figure is not None:
        plot(found, asked.figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/mnist")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--out", type=Path, default=Path("runs/convergence"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args(arguments)
    path = asked.out / "results.json"
    kept = json.loads(path.read_text()) if path.exists() else {"images": asked.images, "rmse": []}
    if kept["images"] != asked.images:
        raise SystemExit(f"{path}: of {kept['images']} images, not of {asked.images}")
    found = {Way(*way): value for *way, value in kept["rmse"]}
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = diffusion.load(asked.model, device)
    warnings.simplefilter("ignore", FewStepsWarning)  # that is what is shown
    missing = [way for way in ways(model.schedule.T) if way not in found]
    if missing:
        limit_path = asked.out / "limit.npy"
        asked.out.mkdir(parents=True, exist_ok=True)
        if not limit_path.exists():
            np.save(limit_path, draw(model, REFERENCE, asked).numpy())
        limit = torch.from_numpy(np.load(limit_path))
        for way in missing:
            found[way] = rmse(draw(model, way, asked), limit)
            print(f"{way.sampler}, {way.spacing}, {way.steps}: {found[way]:.4f}", flush=True)
            kept["rmse"] = [[*each, value] for each, value in found.items()]
            path.write_text(json.dumps(kept))
    report(found, kept["images"], asked)


if __name__ == "__main__":
    main()
