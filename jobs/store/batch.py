"""What a worker writes while jobs run: progress, outputs and saved states, many jobs at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from enum import IntEnum, StrEnum
from typing import Any

import numpy as np

from jobs.outputs import image_name, snapshot_name
from jobs.pictures import Float32, to_uint8
from jobs.store import events
from jobs.store.events import ImageEvent, ProgressEvent, SnapshotEvent
from jobs.store.outputs import OutputStore, Put
from jobs.store.records import JobRecord


class Fate(IntEnum):
    """What a write says about its job."""

    LOST = 0
    OK = 1
    CANCEL = 2


class InBatch(StrEnum):
    """Whether a job is in the batch that its worker steps: what a worker's death says of it."""

    NO = ""
    SHARED = "shared"
    ALONE = "alone"
    CLEARED = "cleared"  # shared again, and no longer suspected of what happened before


class WriteBatch:
    """Writes for any number of jobs: first the bytes of outputs, then one atomic script a job."""

    def __init__(self, outputs: OutputStore, write: Callable[[list[list[Any]]], list[int]]) -> None:
        self._outputs = outputs
        self._write = write
        self._jobs: dict[tuple[str, str], list[Any]] = {}
        self._bytes: dict[tuple[str, str], dict[str, bytes]] = {}

    def _ops(self, job_id: str, execution: str) -> list[Any]:
        return self._jobs.setdefault((job_id, execution), [])

    def _keep(self, record: JobRecord, execution: str, name: str, x: Float32) -> None:
        self._bytes.setdefault((record.id, execution), {})[name] = _plane(x, record)

    def progress(
        self, record: JobRecord, execution: str, *, done: int, t: int, eta_s: float | None = None
    ) -> None:
        """done: image-steps so far, over all images; t: of an image that was just stepped."""
        eta = None if eta_s is None else round(eta_s, 2)
        event = events.dump(ProgressEvent(step=done, total=record.work, t=t, eta_s=eta))
        self._ops(record.id, execution).extend(["p", done, t, "" if eta is None else eta, event])

    def image(
        self,
        record: JobRecord,
        execution: str,
        *,
        index: int,
        x: Float32,
        residual: float | None = None,
    ) -> None:
        """A finished image, float32 [C,H,W] in [−1, 1]; its saved state is dropped.

        residual: how far it is from what was measured of it, in grey levels.
        """
        sha256 = pixels_sha256(x)
        url = events.image_url(record.id, index, record.spec.format)
        event = events.dump(ImageEvent(index=index, url=url, sha256=sha256))
        about = {"sha256": sha256} | ({} if residual is None else {"residual": residual})
        meta = json.dumps(about)
        name = image_name(index)
        self._keep(record, execution, name, x)
        ops = self._ops(record.id, execution)
        ops.extend(["o", name, meta, "image", event, "x", index])

    def snapshot(
        self, record: JobRecord, execution: str, *, t: int, kind: str, index: int, x: Float32
    ) -> None:
        """A state of the chain, float32 [C,H,W]; t = 1..T; kind x_t, x_start or eps."""
        url = events.snapshot_url(record.id, t, kind, index)
        fields = {"t": t, "index": index, "kind": kind, "url": url}
        event = events.dump(SnapshotEvent.model_validate(fields))
        name = snapshot_name(t, kind, index)
        self._keep(record, execution, name, x)
        self._ops(record.id, execution).extend(["o", name, "{}", "snapshot", event])

    def checkpoint(self, record: JobRecord, execution: str, *, index: int, state: bytes) -> None:
        """The chain state of one image, in whatever form the engine reads back."""
        self._ops(record.id, execution).extend(["c", index, state])

    def in_batch(self, job_id: str, execution: str, how: InBatch) -> None:
        """Said before the first step for which it holds."""
        self._ops(job_id, execution).extend(["b", how.value])

    def send(self) -> dict[str, Fate]:
        """Write everything. Returns what became of each job; the batch is empty afterwards."""
        found, self._bytes = self._bytes, {}
        jobs, self._jobs = self._jobs, {}
        if not jobs:
            return {}
        if found:
            self._outputs.put([Put(*key, outputs) for key, outputs in found.items()])
        replies = self._write([[*key, *ops] for key, ops in jobs.items()])
        return {job_id: Fate(r) for (job_id, _), r in zip(jobs, replies, strict=True)}


def _plane(x: Float32, record: JobRecord) -> bytes:
    if x.shape != record.shape:
        raise ValueError(f"x: shape {x.shape}, must be {record.shape} (job {record.id})")
    return np.ascontiguousarray(x, dtype="<f4").tobytes()


def pixels_sha256(x: Float32) -> str:
    """SHA-256 (hex) of the 8-bit pixels, row by row with channels last: what a PNG decodes to."""
    return hashlib.sha256(to_uint8(x).tobytes()).hexdigest()
