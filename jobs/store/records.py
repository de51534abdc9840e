"""The record of a job as it stands in Redis, and its identifier."""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jobs import chance
from jobs.errors import JobNotFound
from jobs.kinds.common import JobSpec, SpecWarning
from jobs.kinds.stored import Unread, read
from jobs.states import Status
from jobs.store.events import JobFault
from jobs.store.tolerance import Fields, is_data_fault, json_object, number

# The number of the form that records have. It goes up when an older version would misread what
# is written here; until then, new fields of the hash are such that one may ignore them.
FORMAT = 1
ID = re.compile(r"[0-9a-f]{28}")
_MOST_IMAGES = 100_000  # far above any limit: a number beyond it is nonsense

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
        return f"{now:012x}{next(_last[1]):04x}{chance.draw(6).hex()}"


def known_form(job_id: str) -> str:
    """The id, if it has the form of one. Raises JobNotFound: there never was such a job.

    Everything that a client calls an id passes here, before a key of Redis is made of it.
    """
    if not ID.fullmatch(job_id):
        raise JobNotFound(f"no job {job_id[:60]!r}: an id has 28 hexadecimal digits")
    return job_id


@dataclass(frozen=True)
class JobRecord:
    """One job.

    work, done: image-steps in all and so far. unit: bytes of one output plane. digest: the model
    at admission; run_digest: the model that ran. levels: t → (ᾱ_t, SNR_t) of a noise job.
    unread: why this version cannot run it, and must not judge it by what it could read.
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
    position: int  # image-steps admitted to the queue up to and including this job; 0.1 needs it
    client: str = ""
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    t: int | None = None
    eta_s: float | None = None
    execution: str | None = None
    worker: str | None = None
    run_digest: str | None = None
    crashes: int = 0  # workers that died with the job in their batch since it was cleared
    cancel_requested: bool = False
    fault: JobFault | None = None
    provenance: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    levels: dict[str, tuple[float, float]] | None = None
    request_id: str = ""
    warnings: tuple[SpecWarning, ...] = ()
    unread: Unread | None = None

    def as_of(self, now: float) -> JobRecord:
        """The record with outputs that have lapsed reported as such, swept or not."""
        lapsed = self.expires_at is not None and now >= self.expires_at
        if lapsed and self.status in (Status.SUCCEEDED, Status.CANCELED):
            return replace(self, status=Status.EXPIRED)
        return self

    @property
    def deadline(self) -> float | None:
        """Unix time by which the request wants the job to have ended."""
        seconds = self.spec.deadline_s
        return None if seconds is None else self.created_at + seconds

    @property
    def late(self) -> JobFault:
        """Why a job fails that has not ended by its deadline."""
        detail = f"not done within deadline_s = {self.spec.deadline_s:g}"
        return JobFault(code="deadline_exceeded", detail=detail)

    @property
    def outputs_gone(self) -> bool:
        """Whether the outputs have passed their time to live."""
        return self.expires_at is not None and time.time() >= self.expires_at


def parse_record(job_id: str, raw: Mapping[bytes, bytes]) -> JobRecord:
    """A record from its hash, as much of it as can be read; `unread` says where that is not all.

    A field of the hash that is not known here is none that matters: what would matter is in the
    spec, or comes with a higher FORMAT.
    """
    f = Fields(raw)
    version = f.find("format", int, FORMAT)
    spec, unread = f.need("spec", read, read("{}"))
    record = JobRecord(
        id=job_id,
        status=f.need("status", Status, Status.FAILED),
        spec=spec,
        model=f.need("model", str, ""),
        digest=f.need("digest", str, ""),
        queue=f.need("queue", str, ""),
        shape=f.need("shape", _shape, (0, 0, 0)),
        images=f.need("images", _images, 0),
        work=f.need("work", int, 0),
        done=f.find("done", int, 0),
        bytes=f.need("bytes", int, 0),
        created_at=f.need("created_at", number, _made_at(job_id)),
        ttl_s=f.need("ttl_s", int, 0),
        events=f.find("events", int, 0),
        position=f.find("position", int, 0),
        client=f.find("client", str, ""),
        started_at=f.find("started_at", number, None),
        completed_at=f.find("completed_at", number, None),
        expires_at=f.find("expires_at", number, None),
        t=f.find("t", int, None),
        eta_s=f.find("eta_s", number, None),
        execution=f.find("execution", str, None),
        worker=f.find("worker", str, None),
        run_digest=f.find("run_digest", str, None),
        crashes=f.find("crashes", int, 0),
        cancel_requested=f.find("cancel", str, "") == "1",
        fault=f.find("error", JobFault.model_validate_json, None),
        provenance=f.find("provenance", json_object, None),
        result=f.find("result", json_object, None),
        levels=f.find("levels", _levels, None),
        request_id=f.find("request_id", str, ""),
        warnings=f.find("warnings", _warnings, ()),
    )
    if version > FORMAT:
        why = f"its format is {version}, and this version reads up to {FORMAT}"
        unread = Unread(True, why, unread.request if unread else None)
    elif f.faults:
        why = "; ".join(f.faults[:3] + ([unread.why] if unread else []))
        unread = Unread(False, why, unread.request if unread else None)
    return record if unread is None else _with(record, unread)


def _with(record: JobRecord, unread: Unread) -> JobRecord:
    fault = record.fault
    if not unread.newer and fault is None:
        fault = JobFault(code="broken_record", detail=unread.why)
    return replace(record, unread=unread, fault=fault)


def parse_reply(job_id: str, reply: Any) -> JobRecord | None:
    """A record from HGETALL's reply, an error among them; None where there is none."""
    if isinstance(reply, Exception):
        if not is_data_fault(reply):
            raise reply
        return parse_record(job_id, {})  # something else stands under the key
    return parse_record(job_id, reply) if reply else None


def _made_at(job_id: str) -> float:
    return int(job_id[:12], 16) / 1000 if ID.fullmatch(job_id) else 0.0


def _shape(raw: str) -> tuple[int, int, int]:
    c, h, w = (int(n) for n in json.loads(raw))
    if min(c, h, w) < 1:
        raise ValueError(raw)
    return c, h, w


def _images(raw: str) -> int:
    if not 0 <= int(raw) <= _MOST_IMAGES:
        raise ValueError(raw)
    return int(raw)


def _warnings(raw: str) -> tuple[SpecWarning, ...]:
    return tuple(SpecWarning.model_validate(item) for item in json.loads(raw))


def _levels(raw: str) -> dict[str, tuple[float, float]]:
    return {t: (float(bar), float(snr)) for t, (bar, snr) in json_object(raw).items()}
