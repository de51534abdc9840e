"""Tables that were learned for one checkpoint: `tuned.json` in its folder.

For each number of evaluations the times and coefficients of its rows, as `training.tune` found
them. They are tied to the weights: those of others they fit no better than any table.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.files import CheckpointError, read_json, write_json
from diffusion.table import (
    COLUMNS,
    SamplerError,
    SamplerTable,
    checked_timesteps,
    empty_rows,
    stepping,
)

TUNED = "tuned"  # the name of the sampler
TUNED_NAME = "tuned.json"
FORMAT = 1
LEARNED = ("a", "b", "d", "f")
MOST_ROWS = 1000


@dataclass(frozen=True, eq=False)
class Tuned:
    """The rows for one number of evaluations.

    times: descending, the last row lands on the image. rows: a, b, d and f of each. clip: whether
    x̂_0 is clipped. figures: what was measured of it, for people.
    """

    times: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    clip: bool = True
    figures: Mapping[str, Any] = field(default_factory=dict)

    def table(self, T: int) -> SamplerTable:
        """The sampler table. Raises SamplerError for rows that make none."""
        ts, rows = checked_timesteps(T, self.times), empty_rows(len(self.times), self.clip)
        if ts[0] != T - 1:
            raise SamplerError(f"times = {ts}: must begin at {T - 1}")
        if len(self.rows) != len(ts) or {len(row) for row in self.rows} != {len(LEARNED)}:
            raise SamplerError(f"rows: must be {len(ts)} of {', '.join(LEARNED)}")
        rows[:, [COLUMNS.index(name) for name in LEARNED]] = self.rows
        if not np.isfinite(rows[:, 1:]).all():
            raise SamplerError("rows: must be finite")
        return stepping(ts, rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        rows = [list(row) for row in self.rows]
        return {
            "times": list(self.times), "rows": rows, "clip": self.clip,
            "figures": dict(self.figures),
        }  # fmt: skip


def tuned_table(tables: Mapping[int, SamplerTable], steps: int) -> SamplerTable:
    """The learned table of so many rows. Raises SamplerError where there is none."""
    if not tables:
        raise SamplerError("sampler = 'tuned': this model has no tuned tables (ddpm tune)")
    if steps not in tables:
        allowed = ", ".join(map(str, sorted(tables)))
        raise SamplerError(f"steps = {steps}: this model's tuned tables are of {allowed}")
    return tables[steps]


def table_digest(table: SamplerTable) -> str:
    """SHA-256 (hex) of the times and coefficients of a table, as little-endian float64."""
    numbers = np.column_stack([table.time, table.coefficients])
    return hashlib.sha256(numbers.astype("<f8").tobytes()).hexdigest()


def read_tuned(folder: Path, *, weights: str) -> dict[int, Tuned]:
    """Number of rows → rows; none where there is no file, or where it is of other weights.

    weights: SHA-256 (hex) of the weights' file. Raises CheckpointError for a broken file.
    """
    path = folder / TUNED_NAME
    if not path.exists():
        return {}
    raw = read_json(path)
    if raw.get("format") != FORMAT or raw.get("weights") != weights:
        return {}
    try:
        found = [from_dict(item) for item in raw["tables"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error!r}") from error
    return {len(tuned.times): tuned for tuned in found}


def from_dict(raw: Mapping[str, Any]) -> Tuned:
    """Inverse of `Tuned.to_dict`. Raises KeyError, TypeError or ValueError."""
    times = tuple(float(t) for t in raw["times"])
    rows = tuple(tuple(float(v) for v in row) for row in raw["rows"])
    if not 0 < len(times) <= MOST_ROWS or not all(map(math.isfinite, times)):
        raise ValueError(f"times: must be 1..{MOST_ROWS} finite numbers")
    return Tuned(times, rows, bool(raw.get("clip", True)), dict(raw.get("figures", {})))


def write_tuned(tables: Iterable[Tuned], folder: Path, *, weights: str) -> None:
    """Write them beside the weights, whole or not at all."""
    ordered = sorted(tables, key=lambda tuned: len(tuned.times))
    made = {"format": FORMAT, "weights": weights, "tables": [t.to_dict() for t in ordered]}
    write_json(made, folder / TUNED_NAME)
