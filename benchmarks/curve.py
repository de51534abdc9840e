"""Quality against evaluations: one table and one figure of what `ddpm evaluate --quality` found.

    .venv/bin/python benchmarks/curve.py RESULTS.json… [--figure docs/figures/mnist_quality.png]
        [--page docs/quality.md]

RESULTS.json are of `ddpm evaluate --quality` (--quality-against the first of them) and of
quality_peer.py, all of one model or of its tuned tables and consistency models. Printed are every
cell, spacings side by side; for each number of evaluations the best of each sampler; and the
fewest evaluations whose pictures are those of the aim, the first cell of the first file: a Fréchet
ratio within 10 % or two standard errors of it, and a recognised share within one point. --page
puts the same between the marks of a page. A new table is added by naming its file too.
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
MOST_DRAWN = 10.0  # a ratio beyond which a line is left to the table
PEER = "diffusers"
BEGIN, END = "<!-- what curve.py found -->", "<!-- until here -->"


def read(path: Path) -> list[Cell]:
    """The cells of a file."""
    return [Cell(**cell) for cell in json.loads(path.read_text())["quality"]["cells"]]


def equal(cell: Cell, aim: Cell) -> str:
    """Whether it is as good as the aim: "near" it, within the "error", or no: ""."""
    error = float(np.hypot(cell.ratio_error, aim.ratio_error))
    shares = (cell.recognised, aim.recognised)
    if None not in shares and (cell.recognised or 0) < (aim.recognised or 0) - POINT:
        return ""
    if cell.ratio <= WITHIN * aim.ratio:
        return "near"
    return "error" if cell.ratio <= aim.ratio + ERRORS * error else ""


def best(cells: Iterable[Cell]) -> dict[str, dict[int, Cell]]:
    """Sampler → evaluations → the cell of the least ratio."""
    found: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        mine = found.setdefault(cell.sampler, {})
        if cell.steps not in mine or cell.ratio < mine[cell.steps].ratio:
            mine[cell.steps] = cell
    return found


def whole_table(cells: Sequence[Cell], aim: Cell) -> str:
    """A line a sampler and number of evaluations, a column a spacing; near the aim is bold."""
    spacings = list(dict.fromkeys(cell.spacing for cell in cells))
    lines = [
        f"| sampler | evaluations | {' | '.join(spacings)} |",
        "|---" * (len(spacings) + 2) + "|",
    ]
    by = {(cell.sampler, cell.steps, cell.spacing): cell for cell in cells}
    samplers = list(dict.fromkeys(cell.sampler for cell in cells))
    rows = sorted({(samplers.index(cell.sampler), cell.steps) for cell in cells})
    for sampler, steps in ((samplers[i], steps) for i, steps in rows):
        entries = [told(by.get((sampler, steps, spacing)), aim) for spacing in spacings]
        lines.append(f"| {sampler} | {steps} | {' | '.join(entries)} |")
    return "\n".join(lines)


def told(cell: Cell | None, aim: Cell) -> str:
    """An entry: the ratio with its error, and the share in percent."""
    if cell is None:
        return ""
    share = "" if cell.recognised is None else f", {100 * cell.recognised:.1f}"
    text = f"{cell.ratio:.2f} ± {cell.ratio_error:.2f}{share}"
    mark = {"near": "**", "error": "*", "": ""}[equal(cell, aim)]
    return f"{mark}{text}{mark}"


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
    """What is equal in the fewest evaluations, of each sampler: near the aim; within the error."""
    lines = ["| sampler | within 10 % | within two errors |", "|---|---|---|"]
    for sampler, mine in best(cells).items():
        good = [cell for _, cell in sorted(mine.items()) if equal(cell, aim)]
        near = [cell for cell in good if equal(cell, aim) == "near"]
        said = [f"{c[0].steps} ({c[0].spacing})" if c else "none" for c in (near, good)]
        lines.append(f"| {sampler} | {' | '.join(said)} |")
    return "\n".join(lines)


def plot(cells: Sequence[Cell], aim: Cell, path: Path) -> None:
    """The best of each sampler against evaluations, the aim as a band of two errors. What is far
    worse than all others (`MOST_DRAWN`) is left out."""
    figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    low, high = (aim.ratio + ERRORS * sign * aim.ratio_error for sign in (-1, 1))
    axes.axhspan(low, high, color="0.9", label=f"{aim.sampler}, {aim.steps} evaluations, ± 2 s.e.")
    axes.axhline(aim.ratio, color="0.6", linewidth=0.8)
    for sampler, mine in best(cells).items():
        chosen = [mine[n] for n in sorted(mine) if n < aim.steps and mine[n].ratio <= MOST_DRAWN]
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
        ylabel="Fréchet ratio to as many training images",
    )
    most = max(cell.steps for cell in cells if cell != aim)
    ticks = [n for n in (1, 2, 3, 5, 10, 20, 50, 100, 250) if n <= most]
    axes.set_xticks(ticks, [str(n) for n in ticks])
    levels = (0.5, 0.7, 1, 1.5, 2, 3, 5)
    axes.set_yticks(levels, [str(level) for level in levels])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, ncols=4, loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def put_into(page: Path, found: str, *, begin: str = BEGIN, end: str = END) -> None:
    """Between the marks of a page, in the place of what was there."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise SystemExit(f"{page}: must have {begin} and {end}")
    page.write_text(f"{before}{begin}\n\n{found}\n\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Print the tables, and draw the figure if asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args()
    aim = read(asked.results[0])[0]
    cells = [aim, *(cell for path in asked.results for cell in read(path) if cell != aim)]
    titles = ("The best spacing of each sampler:", "As good as the aim, in the fewest evaluations:")
    found = "\n\n".join(
        (
            f"The aim: {aim}.",
            titles[0],
            short_table(cells, aim),
            titles[1],
            fewest(cells, aim),
            "All:",
            whole_table(cells, aim),
        )
    )
    print(found)
    if asked.page is not None:
        put_into(asked.page, found)
    if asked.figure is not None:
        plot(cells, aim, asked.figure)


if __name__ == "__main__":
    main()
