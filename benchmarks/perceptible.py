"""Where the bits of a picture go: most describe what nobody sees (Ho et al. 2020, section 4.3).

    .venv/bin/python benchmarks/perceptible.py EVALUATION MODEL DATA PICTURE

EVALUATION is the folder of a `ddpm evaluate` of MODEL on DATA. Draws the share of the rate that is
sent after each reverse step, and below it what the receiver can show there: x̂_0(x_t).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import diffusion
from training.bits import choose
from training.config import DataConfig
from training.data import load_images
from training.progressive import progressive_reconstructions
from training.rate_distortion import rate_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TENTHS = (3, 4, 5, 6, 7, 8, 9, 10)  # of the reverse steps
DIGITS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()

    report = json.loads((arguments.evaluation / "results.json").read_text())
    model = diffusion.load(arguments.model)
    if report["digest"] != model.digest:
        raise SystemExit(f"{arguments.evaluation} is of another model than {arguments.model}")
    split, T = list(report["splits"])[-1], report["T"]
    found = report["splits"][split]["full"]
    rate = rate_of(np.array(found["terms"]["bits_per_dim"]), found["L_T"])
    rows = {row["reverse_steps"]: row for row in report["rate_distortion"]}
    steps = [T * tenth // 10 for tenth in TENTHS]

    data = DataConfig(source=arguments.data, split=split, fit="pad")
    channels, side, _ = model.shape
    images = load_images(data, channels=channels, side=side, num_classes=0)
    chosen = choose(images, DIGITS, seed=report["seed"])
    ts = [T + 1 - n for n in steps]
    shown = progressive_reconstructions(model, chosen, seed=report["seed"], ts=ts, steps=1)

    figure = plt.figure(figsize=(9, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(1, 1.05))
    axes = figure.add_subplot(grid[0])
    axes.fill_between(np.arange(1, T + 1), 100 * rate / rate[-1], color="tab:blue", alpha=0.3)
    axes.plot(np.arange(1, T + 1), 100 * rate / rate[-1], color="tab:blue")
    axes.set(xlabel="reverse steps", ylabel=f"% of the rate, {rate[-1]:.2f} bits/dim, sent")
    axes.set(xlim=(0, T), ylim=(0, 100))
    axes.grid(alpha=0.3)
    cells = grid[1].subgridspec(DIGITS, len(steps) + 1, wspace=0.05, hspace=0.05)
    for column, (n, x_start) in enumerate(zip(steps, shown.x_starts, strict=True)):
        row = rows[n]
        share = 100 * row["rate_bits_per_dim"] / rate[-1]
        for line in range(DIGITS):
            cell = picture(figure, cells[line, column], x_start[line])
            if line == 0:
                percent = f"{share:.0f}" if share >= 10 else f"{share:.2g}"
                title = f"{n} steps\n{percent} % of bits\nRMSE {row['rmse']:.2g}"
                cell.set_title(title, fontsize=8)
    for line in range(DIGITS):
        cell = picture(figure, cells[line, len(steps)], shown.images[line])
        if line == 0:
            cell.set_title("the image", fontsize=8)
    figure.savefig(arguments.picture, dpi=100)


def picture(figure: Figure, place: Any, x: Any) -> Axes:
    axes = figure.add_subplot(place)
    pixels = np.asarray(x).transpose(1, 2, 0).squeeze()
    axes.imshow(pixels.clip(-1, 1), cmap="gray", vmin=-1, vmax=1)
    axes.axis("off")
    return axes


if __name__ == "__main__":
    main()
