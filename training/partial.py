"""Results that grow on disk, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.schedule import Float64

SAVE_EVERY_S = 30.0


class PartialError(ValueError):
    """A file of partial results that belongs to another evaluation."""


class PartialArrays:
    """Named float64 arrays, NaN where nothing was found yet, in one .npz file.

    key: what the numbers depend on; a file with another key is refused, never overwritten.
    Raises PartialError.
    """

    def __init__(
        self, path: Path, shapes: Mapping[str, tuple[int, ...]], key: Mapping[str, Any]
    ) -> None:
        self.path, self.key = path, json.dumps(key, sort_keys=True)
        self.arrays: dict[str, Float64] = {
            name: np.full(shape, np.nan) for name, shape in shapes.items()
        }
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            with np.load(self.path) as file:
                found = {name: file[name] for name in ("key", *self.arrays)}
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise PartialError(f"{self.path}: cannot be read: {error}") from error
        if str(found.pop("key")) != self.key:
            raise PartialError(
                f"{self.path}: holds results of another evaluation (model, data, seed or size "
                "differ); choose another --out or remove the file"
            )
        self.arrays = found

    def missing(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Flat positions, of the first array, that have no result yet."""
        return np.flatnonzero(np.isnan(next(iter(self.arrays.values()))))

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}")
        with temporary.open("wb") as file:
            np.savez(file, key=np.array(self.key), **self.arrays)  # type: ignore[arg-type]
        temporary.replace(self.path)

    @contextmanager
    def saved(self) -> Iterator[Saver]:
        """Call the saver often: it writes every half minute, and at the end, come what may."""
        try:
            yield Saver(self)
        finally:
            self.save()


class Saver:
    """Writes partial results now and then."""

    def __init__(self, partial: PartialArrays) -> None:
        self.partial, self.last = partial, time.monotonic()

    def __call__(self) -> None:
        """Write if it is time."""
        if time.monotonic() - self.last > SAVE_EVERY_S:
            self.partial.save()
            self.last = time.monotonic()
