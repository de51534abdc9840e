"""What is counted of jobs and batches for the metrics, and how it lies in the store.

A histogram is one field a bound, counting what is at most that and more than the bound before, and
one for the sum: `{what}:{labels…}:{place of the bound}`, `…:sum`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass
class Histogram:
    """counts: one a bound, and one for what is above all."""

    counts: list[int]
    sum: float = 0.0

    def cumulative(self, bounds: Iterable[float]) -> list[tuple[str, float]]:
        """(bound, how many are at most that), as Prometheus has it."""
        total, found = 0, []
        for bound, count in zip([*bounds, float("inf")], self.counts, strict=True):
            total += count
            found.append(("+Inf" if bound == float("inf") else f"{bound:g}", float(total)))
        return found


def histograms(
    raw: Mapping[str, float], bounds: tuple[float, ...]
) -> dict[tuple[str, ...], Histogram]:
    """(what, labels…), one or more → histogram, from the fields of a hash; without others."""
    found: dict[tuple[str, ...], Histogram] = {}
    for name, value in raw.items():
        *labels, place = name.split(":")
        if not labels or (place != "sum" and not place.isdecimal()):
            continue
        one = found.setdefault(tuple(labels), Histogram([0] * (len(bounds) + 1)))
        if place == "sum":
            one.sum = value
        elif len(place) < 4 and int(place) < len(one.counts):
            one.counts[int(place)] = int(value)
    return dict(sorted(found.items()))


@dataclass
class Batches:
    """Steps of batches by how many rows they had; not for several threads."""

    counts: dict[tuple[str, int], int] = field(default_factory=dict)  # (model, place) → steps
    rows: dict[str, int] = field(default_factory=dict)

    def add(self, model: str, rows: int, steps: int = 1) -> None:
        """So many steps of so many rows."""
        place = next((i for i, bound in enumerate(ROWS) if rows <= bound), len(ROWS))
        self.counts[model, place] = self.counts.get((model, place), 0) + steps
        self.rows[model] = self.rows.get(model, 0) + rows * steps
