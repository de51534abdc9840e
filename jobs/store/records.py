"""The record of a job as it stands in Redis, and its identifier."""

from __future__ import annotations

import itertools
import json
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jobs.kinds.table import JobSpec, parse
from jobs.states import Status
from jobs.store.events import JobFault

_lock = threading.Lock()
_last = (0, itertools.count())


def new_id() -> str:
    """A job id, 28 hex digits: milliseconds, a counter within them, and 48 random bits.

    Ids of one process sort in the order they were made, so sorted sets of ids sort by time.
    """
    global _last
    with _lock:
        now = max(time.time_ns() // 1_000_000, _last[0])
        if now != _last[0]:
            _last = (now, itertools.count())
        return f"{now:012x}{next(_last[1]):04x}{secrets.token_hex(6)}"


@dataclass(frozen=True)
class JobRecord:
    """One job.

    work, done: image-steps in all and so far. unit: bytes of one output plane. digest: the model
    at admission; run_digest: the model that ran. levels: t → (ᾱ_t, SNR_t) of a noise job.
    """

    id: str
    status: Status
    spec: JobSpec
    model: str
    digest: str
    queue: str
    shape: tuple[int, int, int]
    images: int
    work: int
    done: int
    bytes: int
    created_at: float
    ttl_s: int
    events: int
    position: int  # image-steps admitted to the queue up to and including this job
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    t: int | None = None
    eta_s: float | None = None
    execution: str | None = None
    worker: str | None = None
    run_digest: str | None = None
    attempts: int = 0
    cancel_requested: bool = False
    fault: JobFault | None = None
    provenance: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    levels: dict[str, tuple[float, float]] | None = None

    def as_of(self, now: float) -> JobRecord:
        """The record with outputs that have lapsed reported as such, swept or not."""
        lapsed = self.expires_at is not None and now >= self.expires_at
        if lapsed and self.status in (Status.SUCCEEDED, Status.CANCELED):
            return replace(self, status=Status.EXPIRED)
        return self

    @property
    def outputs_gone(self) -> bool:
        """Whether the outputs have passed their time to live."""
        return self.expires_at is not None and time.time() >= self.expires_at


def _number(raw: str | None) -> float | None:
    return float(raw) if raw else None


def _json(raw: str | None) -> Any:
    return json.loads(raw) if raw else None


def parse_record(raw: Mapping[bytes, bytes]) -> JobRecord:
    """A record from its hash."""
    f = {name.decode(): value.decode() for name, value in raw.items()}
    c, h, w = json.loads(f["shape"])
    fault = f.get("error")
    return JobRecord(
        id=f["id"],
        status=Status(f["status"]),
        spec=parse(f["spec"]),
        model=f["model"],
        digest=f["digest"],
        queue=f["queue"],
        shape=(c, h, w),
        images=int(f["images"]),
        work=int(f["work"]),
        done=int(f.get("done", 0)),
        bytes=int(f["bytes"]),
        created_at=float(f["created_at"]),
        ttl_s=int(f["ttl_s"]),
        events=int(f.get("events", 0)),
        position=int(f.get("position", 0)),
        started_at=_number(f.get("started_at")),
        completed_at=_number(f.get("completed_at")),
        expires_at=_number(f.get("expires_at")),
        t=int(f["t"]) if f.get("t") else None,
        eta_s=_number(f.get("eta_s")),
        execution=f.get("execution"),
        worker=f.get("worker"),
        run_digest=f.get("run_digest") or None,
        attempts=int(f.get("attempts", 0)),
        cancel_requested=f.get("cancel") == "1",
        fault=JobFault.model_validate_json(fault) if fault else None,
        provenance=_json(f.get("provenance")),
        result=_json(f.get("result")),
        levels=_json(f.get("levels")),
    )
