"""What a run records as it goes: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class Meter:
    """Mean loss and images/s since the last reading; the loss is fetched only when read."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._restart()

    def _restart(self) -> None:
        self.losses: list[Tensor] = []
        self.start = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands while the block runs."""
        began = time.perf_counter()
        yield
        self.start += time.perf_counter() - began

    def add(self, loss: Tensor) -> None:
        """Count one step."""
        self.losses.append(loss)

    def read(self) -> dict[str, float]:
        """Mean loss and images/s; starts anew."""
        if not self.losses:
            return {"loss": float("nan"), "images_s": 0.0}
        loss = float(torch.stack(self.losses).mean())
        rate = len(self.losses) * self.batch_size / (time.perf_counter() - self.start)
        self._restart()
        return {"loss": loss, "images_s": rate}


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for one that was cut off or damaged."""
    try:
        return float(json.loads(line)["step"])
    except (KeyError, TypeError, ValueError):
        return float("inf")


class RunLog:
    """metrics.jsonl and TensorBoard scalars; lines past the resumed step are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            shorter = self.path.with_suffix(".tmp")
            shorter.write_text("".join(line + "\n" for line in kept))
            shorter.replace(self.path)
        self.file = self.path.open("a", buffering=1)
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    @classmethod
    @contextmanager
    def at(cls, folder: Path, step: int, writes: bool) -> Iterator[RunLog | None]:
        """An open log, or None in a process that writes nothing."""
        log = cls(folder, step) if writes else None
        try:
            yield log
        finally:
            if log is not None:
                log.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line and one scalar a value."""
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 1), **values}) + "\n")
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, picture: Image.Image) -> None:
        """A sample grid."""
        array = np.asarray(picture)
        form = "HW" if array.ndim == 2 else "HWC"
        self.writer.add_image("samples", array, step, dataformats=form)

    def close(self) -> None:
        """Flush both."""
        self.file.close()
        self.writer.close()
