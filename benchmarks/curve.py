"""Quality against evaluations: one table and one figure of what `ddpm evaluate --quality` found.

    .venv/bin/python benchmarks/curve.py RESULTS.json… [--figure docs/figures/mnist_quality.png]

RESULTS.json are of `ddpm evaluate --quality` (--quality-against the first of them) and of
quality_peer.py, all of one model or of its tuned tables and consistency models. Printed are every
cell, spacings side by side; for each number of evaluations the best of each sampler; and the
fewest evaluations whose pictures are those of the aim, the first cell of the first file: a Fréchet
ratio within 10 % or two standard errors of it, and a recognised share within one point.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from training.quality import Cell

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WITHIN, ERRORS, POINT = 1.1, 2.0, 0.01
PEER = "diffusers"


def read(path: Path) -> list[Cell]:
    """The cells of a file."""
    return [Cell(**cell) for cell in json.loads(path.read_text())["quality"]["cells"]]


def equal(cell: Cell, aim: Cell) -> bool:
    """Whether its pictures are as good as those of the aim."""
    error = float(np.hypot(cell.ratio_error, aim.ratio_error))
    near = cell.ratio <= max(WITHIN * aim.ratio, aim.ratio + ERRORS * error)
    if cell.recognised is None or aim.recognised is None:
        return near
    return near and cell.recognised >= aim.recognised - POINT


def best(cells: Iterable[Cell]) -> dict[str, dict[int, Cell]]:
    """Sampler → evaluations → the cell of the least ratio."""
    found: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        mine = found.setdefault(cell.sampler, {})
        if cell.steps not in mine or cell.ratio < mine[cell.steps].ratio:
            mine[cell.steps] = cell
    return found


def whole_table(cells: Sequence[Cell], aim: Cell) -> str:
    """A line a sampler and number of evaluations, a column a spacing; what is equal is bold."""
    spacings = list(dict.fromkeys(cell.spacing for cell in cells))
    lines = [
        f"| sampler | evaluations | {' | '.join(spacings)} |",
        "|---" * (len(spacings) + 2) + "|",
    ]
    by = {(cell.sampler, cell.steps, cell.spacing): cell for cell in cells}
    for sampler, steps in dict.fromkeys((cell.sampler, cell.steps) for cell in cells):
        entries = [told(by.get((sampler, steps, spacing)), aim) for spacing in spacings]
        lines.append(f"| {sampler} | {steps} | {' | '.join(entries)} |")
    return "\n".join(lines)


def told(cell: Cell | None, aim: Cell) -> str:
    """An entry: the ratio with its error, and the share in percent."""
    if cell is None:
        return ""
    share = "" if cell.recognised is None else f", {100 * cell.recognised:.1f}"
    text = f"{cell.ratio:.2f} ± {cell.ratio_error:.2f}{share}"
    return f"**{text}**" if equal(cell, aim) else text


def short_table(cells: Sequence[Cell], aim: Cell) -> str:
    """A line a number of evaluations, a column a sampler: the best spacing of each."""
    found = best(cells)
    counts = sorted({steps for mine in found.values() for steps in mine})
    lines = [f"| evaluations | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for n in counts:
        entries = [told(mine.get(n), aim) for mine in found.values()]
        lines.append(f"| {n} | {' | '.join(entries)} |")
    return "\n".join(lines)


def fewest(cells: Sequence[Cell], aim: Cell) -> str:
    """What is equal in the fewest evaluations, of each sampler."""
    lines = []
    for sampler, mine in best(cells).items():
        good = [cell for n, cell in sorted(mine.items()) if equal(cell, aim)]
        said = str(good[0]) if good else f"{sampler}: none"
        lines.append(f"- {said}")
    return "\n".join(lines)


def plot(cells: Sequence[Cell], aim: Cell, path: Path) -> None:
    """The best of each sampler against evaluations, the aim as a band of two errors."""
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    low, high = (aim.ratio + ERRORS * sign * aim.ratio_error for sign in (-1, 1))
    axes.axhspan(low, high, color="0.9", label=f"{aim.sampler}, {aim.steps} evaluations, ± 2 s.e.")
    axes.axhline(aim.ratio, color="0.6", linewidth=0.8)
    for sampler, mine in best(cells).items():
        chosen = [mine[n] for n in sorted(mine) if n < aim.steps]
        if not chosen:
            continue
        axes.errorbar(
            [cell.steps for cell in chosen],
            [cell.ratio for cell in chosen],
            [cell.ratio_error for cell in chosen],
            label=sampler,
            marker="o",
            markersize=3.5,
            linewidth=1.1,
            linestyle="--" if sampler.startswith(PEER) else "-",
            capsize=2,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="evaluations of the network an image",
        ylabel="Fréchet distance to the test set / that of training images",
    )
    ticks = [n for n in (1, 2, 3, 5, 10, 20, 50, 100, 250) if n < aim.steps]
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the tables, and draw the figure if asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--figure", type=Path)
    asked = parser.parse_args()
    aim = read(asked.results[0])[0]
    cells = [aim, *(cell for path in asked.results for cell in read(path) if cell != aim)]
    print(f"The aim: {aim}\n")
    print(whole_table(cells, aim), short_table(cells, aim), fewest(cells, aim), sep="\n\n")
    if asked.figure is not None:
        plot(cells, aim, asked.figure)


if __name__ == "__main__":
    main()
