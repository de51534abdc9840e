"""Plots of an evaluation: terms over t, rate and distortion, progressive reconstructions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from torch import Tensor

from diffusion.schedule import Float64
from training.pictures import as_generated, to_uint8
from training.progressive import Reconstructions
from training.rate_distortion import Curve

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def plot_terms(terms: Mapping[str, Float64], path: Path) -> None:
    """L_{t−1} in bits/dim over t = 1..T, one line a name; arrays [T], L_0 first."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, values in terms.items():
        axes.loglog(np.arange(1, len(values) + 1), values, label=name, linewidth=1)
    axes.set(xlabel="t", ylabel="L$_{t-1}$ (bits/dim)", title="The terms of the bound")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_rate_distortion(curve: Curve, path: Path) -> None:
    """The paper's three panels: distortion and rate over reverse steps, distortion over rate."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    steps, rate, rmse = "reverse steps (T − t + 1)", "rate (bits/dim)", "distortion (RMSE)"
    for panel, x, y, names in (
        (axes[0], curve.steps, curve.rmse, (steps, rmse)),
        (axes[1], curve.steps, curve.rate, (steps, rate)),
        (axes[2], curve.rate, curve.rmse, (rate, rmse)),
    ):
        panel.plot(x, y)
        panel.set(xlabel=names[0], ylabel=names[1])
        panel.grid(alpha=0.3)
    _save(figure, path)


def plot_progressive(found: Reconstructions, path: Path) -> None:
    """Each image, then x̂_0(x_t) above one draw of p_θ(x_0|x_t), a column for each t."""
    images = found.images
    columns: list[tuple[str, Tensor, Tensor | None]] = [("x$_0$", images, None)]
    columns += [
        (f"t = {t}", x_starts, samples)
        for t, x_starts, samples in zip(found.ts, found.x_starts, found.samples, strict=True)
    ]
    figure, axes = plt.subplots(
        2 * len(images),
        len(columns),
        figsize=(0.75 * len(columns), 1.5 * len(images) + 0.3),
        squeeze=False,
        gridspec_kw={"wspace": 0.05, "hspace": 0.05},
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for column, (title, upper, lower) in enumerate(columns):
        axes[0, column].set_title(title, fontsize=7)
        for i in range(len(images)):
            _show(axes[2 * i, column], upper[i])
            if lower is not None:
                _show(axes[2 * i + 1, column], lower[i])
    _save(figure, path)
    path.write_bytes(as_generated(path.read_bytes(), "png"))


def _show(axis: Any, image: Tensor) -> None:
    pixels = to_uint8(image[None])[0]
    grey = pixels.shape[2] == 1
    axis.imshow(
        pixels[:, :, 0] if grey else pixels, cmap="gray" if grey else None, vmin=0, vmax=255
    )


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)
