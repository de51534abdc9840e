"""How good samples are by sampler, spacing and steps, and which a model should take by default.

Beside the Fréchet distance of n samples to real images stands that of as many other real images;
their ratio is 1 for samples that cannot be told from those. Errors are by bootstrap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffusion.files import read_json
from diffusion.model import Model
from diffusion.schedule import Float64
from diffusion.table import SamplerTable
from diffusion.tuned import TUNED
from training.features import Draw, FeatureError, Features, Looked, sampled
from training.frechet import Gaussian

RESAMPLES = 40


@dataclass(frozen=True)
class Worth:
    """Which cells of a sampler tell something: its spacings, and its steps up to `most`."""

    spacings: tuple[str, ...]
    most: int


_SLOW = Worth(("uniform", "quadratic", "trailing"), most=10_000)
_QUICK = Worth(("uniform", "trailing", "lambda", "karras"), most=50)  # exact long before
WORTH = {
    "ddpm": _SLOW, "ddim": _SLOW, "dpmpp_2m": _QUICK, "dpmpp_3m": _QUICK, "unipc": _QUICK,
}  # fmt: skip
# Of the samplers that are a model's own; a tuned table has no spacing, so one stands for all.
OWN = {"consistency": ("trailing", "lambda"), TUNED: ("uniform",)}


@dataclass(frozen=True)
class Cell:
    """A line of the table: one way to sample, and how good what it gives is.

    recognised: the share that the network classifies as the label asked for; None where it tells
    features alone, or the model has no labels. The errors are standard errors.
    """

    sampler: str
    spacing: str
    steps: int
    images: int
    ratio: float
    ratio_error: float
    recognised: float | None = None
    recognised_error: float | None = None

    def __str__(self) -> str:
        name = f"{self.sampler}, {self.spacing}, {self.steps} steps"
        ratio = f"Fréchet ratio {self.ratio:.3f} ± {self.ratio_error:.3f}"
        return f"{name}: {ratio}{', recognised ' + self.share if self.share else ''}"

    @property
    def share(self) -> str:
        """`recognised` with its error, or nothing."""
        if self.recognised is None or self.recognised_error is None:
            return ""
        return f"{self.recognised:.1%} ± {self.recognised_error:.1%}"

    def as_good_as(self, other: Cell) -> bool:
        """Whether it is not worse, but for what the errors of both allow."""
        error = float(np.hypot(self.ratio_error, other.ratio_error))
        if self.ratio > other.ratio + error:
            return False
        if self.recognised is None or other.recognised is None:
            return True
        errors = (self.recognised_error or 0.0, other.recognised_error or 0.0)
        return self.recognised >= other.recognised - float(np.hypot(*errors))


@dataclass(frozen=True, eq=False)
class Real:
    """What samples are held against: features of real images [M, F] and of n others [n, F]."""

    reference: Float64
    others: Float64

    def ratio(self, samples: Float64, *, seed: int) -> tuple[float, float]:
        """The Fréchet ratio of samples [n, F] and its standard error."""
        drawn = self._resampled(len(samples), seed)
        found = self._distance(samples) / self._distance(self.others)
        again = [self._distance(samples[which]) / theirs for which, theirs in drawn]
        return found, float(np.std(again, ddof=1))

    def _resampled(self, n: int, seed: int) -> list[tuple[NDArray[np.int64], float]]:
        """Of each resampling: which of n samples, and the distance of as many others."""
        if (n, seed) not in self._drawn:
            generator, m = np.random.Generator(np.random.Philox(key=seed)), len(self.others)
            self._drawn[n, seed] = [
                (
                    generator.integers(n, size=n),
                    self._distance(self.others[generator.integers(m, size=m)]),
                )
                for _ in range(RESAMPLES)
            ]
        return self._drawn[n, seed]

    @cached_property
    def _drawn(self) -> dict[tuple[int, int], list[tuple[NDArray[np.int64], float]]]:
        return {}

    @cached_property
    def _gaussian(self) -> Gaussian:
        return Gaussian.of(self.reference)

    def _distance(self, features: Float64) -> float:
        return Gaussian.of(features).distance(self._gaussian)


@dataclass(frozen=True, eq=False)
class Quality:
    """Measures cells, keeping the features of every sample in `folder`.

    features: the network, which `classifies` or not. labels: of each sample, int64 [n], or None.
    key: what the samples depend on beside the cell.
    """

    model: Model
    features: Features
    real: Real
    labels: Tensor | None
    classifies: bool
    seed: int
    folder: Path
    key: dict[str, Any]
    batch_size: int = 64
    progress: bool = True

    def measure(self, sampler: str, spacing: str, steps: int) -> Cell:
        """Draw what is missing of this cell's samples, and judge them."""
        n = len(self.real.others)
        cell = {"sampler": sampler, "spacing": spacing, "steps": steps}
        looked = sampled(
            self.features,
            Draw(self.model, self._table(sampler, spacing, steps), n, self.seed, self.labels),
            width=self.real.reference.shape[1],
            classified=self.classifies and self.labels is not None,
            path=self.folder / f"quality-{sampler}-{spacing}-{steps}.npz",
            key=self.key | cell | {"seed": self.seed, "images": n},
            batch_size=self.batch_size,
            progress=self.progress,
        )
        ratio, error = self.real.ratio(looked.features, seed=self.seed)
        share = self._share(looked)
        return Cell(sampler, spacing, steps, n, ratio, error, *share)

    def _table(self, sampler: str, spacing: str, steps: int) -> SamplerTable:
        own = self.model.config.sampling
        way = own.options(self.model.schedule.T, sampler=sampler, spacing=spacing, steps=steps)
        return self.model.table(**way)

    def _share(self, looked: Looked) -> tuple[float | None, float | None]:
        if self.labels is None or looked.labels is None:
            return None, None
        share = float((looked.labels == self.labels.numpy()).mean())
        return share, float(np.sqrt(share * (1 - share) / len(self.labels)))


Way = tuple[str, str, int]  # sampler, spacing, steps


def ways(
    T: int,
    samplers: Sequence[str],
    spacings: Sequence[str],
    steps: Iterable[int],
    *,
    tuned: Sequence[int] = (),
) -> list[Way]:
    """The cells, the first all T steps of ddpm.

    samplers, spacings: every one of the first with every one of the second. Without samplers those
    of WORTH with at most so many steps; without spacings those that suit each sampler. tuned: of
    how many steps the model has learned tables: of these all, whatever `steps` are.
    """
    some = [n for n in dict.fromkeys(steps) if n <= T]
    cells = [
        (a, b, n)
        for a in samplers or WORTH
        for b in _spacings(a, spacings)
        for n in (sorted(tuned) if a == TUNED else some)
        if samplers or n <= WORTH[a].most
    ]
    if not samplers:
        cells += [(TUNED, OWN[TUNED][0], n) for n in sorted(tuned)]
    return list(dict.fromkeys([("ddpm", "uniform", T), *cells]))


def _spacings(sampler: str, asked: Sequence[str]) -> Sequence[str]:
    """Those asked for, else those that suit the sampler; a tuned table has none to choose."""
    own = OWN.get(sampler, WORTH.get(sampler, _SLOW).spacings)
    return own if sampler == TUNED else asked or own


def outlook(cells: Sequence[Way], images: int) -> str:
    """What the cells cost, by sampler."""
    lines = []
    for sampler in dict.fromkeys(sampler for sampler, _, _ in cells):
        mine = [(spacing, n) for name, spacing, n in cells if name == sampler]
        spacings = ", ".join(dict.fromkeys(spacing for spacing, _ in mine))
        steps = sum(n for _, n in mine)
        lines.append(f"{sampler} ({spacings}): {len(mine)} cells, {steps} evaluations an image")
    total = images * sum(n for _, _, n in cells)
    return "\n".join([*lines, f"{len(cells)} cells of {images} images: {total:,} evaluations"])


def table(
    quality: Quality,
    cells: Sequence[Way],
    echo: Callable[[str], None],
    *,
    aim: Cell | None = None,
) -> dict[str, Any]:
    """Measure the cells in turn; JSON form of all.

    aim: the one to equal, measured before; else the first.
    """
    echo(outlook(cells, len(quality.real.others)))
    found = [] if aim is None else [aim]
    for cell in cells:
        found.append(quality.measure(*cell))
        echo(str(found[-1]))
    best, first = cheapest(found), found[0]
    equal = f"as good as {first.steps} steps of {first.sampler}, in the fewest"
    echo(f"\n{markdown(found)}\n\n{equal}: {best}")
    default = {"sampler": best.sampler, "spacing": best.spacing, "steps": best.steps}
    return {"cells": [dataclasses.asdict(cell) for cell in found], "sampling": default}


def aim_of(path: Path, said: dict[str, Any], *, splits: Sequence[str], images: int) -> Cell:
    """The first cell of an earlier table, made with the same data, features and seed.

    said: what its results.json must say; splits, images: of which it must be. Raises FeatureError,
    CheckpointError.
    """
    raw = read_json(path)
    try:
        aim = Cell(**raw["quality"]["cells"][0])
    except (KeyError, IndexError, TypeError) as error:
        raise FeatureError(f"{path}: holds no table of `ddpm evaluate --quality`") from error
    found = {**raw, "images": aim.images}
    if "splits" in raw:  # of an earlier version, or a table that was put together, not all is known
        found["splits"] = [*raw["splits"]]
    for name, value in {**said, "splits": [*splits], "images": images}.items():
        if name in found and found[name] != value:
            raise FeatureError(f"{path}: {name} = {found[name]!r}, must be {value!r} as here")
    return aim


def cheapest(cells: Sequence[Cell]) -> Cell:
    """The cell of the fewest steps that is as good as the first; the better of equally many."""
    good = [cell for cell in cells if cell.as_good_as(cells[0])]
    return min(good, key=lambda cell: (cell.steps, cell.ratio))


def markdown(cells: Sequence[Cell]) -> str:
    """The cells as a table."""
    shares = any(cell.share for cell in cells)
    head = ["sampler", "spacing", "steps", "Fréchet ratio", *["recognised"] * shares]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for cell in cells:
        ratio = f"{cell.ratio:.3f} ± {cell.ratio_error:.3f}"
        entries = [cell.sampler, cell.spacing, str(cell.steps), ratio, *[cell.share] * shares]
        lines.append(f"| {' | '.join(entries)} |")
    return "\n".join(lines)
