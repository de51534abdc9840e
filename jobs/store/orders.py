"""What asks for admission, what comes of it, and the record a job begins with."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from typing import Any

from jobs.cards import ModelCard, schedule_tables
from jobs.kinds.common import JobSpec, Plan
from jobs.kinds.stored import stored
from jobs.settings import Settings
from jobs.states import Status
from jobs.store import keys
from jobs.store.records import FORMAT, JobRecord, new_id


@dataclass(frozen=True)
class Idempotency:
    """key: the client's Idempotency-Key. fingerprint: digest of the request as it was sent."""

    key: str
    fingerprint: str


@dataclass(frozen=True)
class Order:
    """A checked and filled request that asks for admission.

    job_id: of the job that it becomes, however often it has to be tried. client: who asks (for the
    quota). inputs: uploaded images, uint8 [N,H,W,C] bytes, or
    an x_t, float32 [C,H,W] bytes. request_id: of the HTTP request that it came with.
    """

    spec: JobSpec
    plan: Plan
    card: ModelCard
    client: str
    inputs: bytes = b""
    idempotency: Idempotency | None = None
    request_id: str = ""
    job_id: str = field(default_factory=new_id)

    @property
    def bytes(self) -> int:
        """What is reserved in the store."""
        return self.plan.output_bytes + len(self.inputs)

    @property
    def at_front(self) -> bool:
        """Whether the job goes before those that wait."""
        return self.spec.priority == "high"


@dataclass(frozen=True)
class Admitted:
    """replayed: the id is that of an earlier, equal request, and nothing else is known.

    queue_position: jobs before it, as things are. ahead: image-steps to its end, its own among
    them, where each client gets the same share.
    """

    job_id: str
    replayed: bool
    record: JobRecord | None = None
    queue_position: int = 0
    ahead: int = 0


def idempotency_key(client: str, idempotency: Idempotency) -> str:
    """The Redis key of an Idempotency-Key: each client has its own."""
    digest = hashlib.sha256(f"{client}\0{idempotency.key}".encode()).hexdigest()
    return keys.idempotency(digest)


def new_record(order: Order, position: int, settings: Settings) -> JobRecord:
    """The record of a job that is taken in now; position: as in JobRecord."""
    spec, plan, card = order.spec, order.plan, order.card
    return JobRecord(
        id=order.job_id,
        status=Status.QUEUED,
        spec=spec,
        model=card.name,
        digest=card.digest,
        queue=card.queue,
        shape=card.shape,
        images=plan.images,
        work=plan.evaluations,
        done=0,
        bytes=order.bytes,
        created_at=time.time(),
        ttl_s=spec.ttl_s or settings.ttl_s,
        events=1,
        position=position,
        client=order.client,
        request_id=order.request_id,
        levels=_levels(card, spec.level_ts) if spec.level_ts else None,
        warnings=spec.warnings(card),
    )


def to_hash(record: JobRecord, order: Order, settings: Settings) -> dict[str, Any]:
    """The hash that `parse_record` reads back, with what only the scripts need."""
    said = {"request_id": record.request_id} if record.request_id else {}
    if record.warnings:
        said["warnings"] = json.dumps([warning.model_dump() for warning in record.warnings])
    return {
        **said,
        "id": record.id,
        "status": record.status,
        "kind": order.spec.kind,
        "format": FORMAT,
        "spec": stored(order.spec),
        "model": record.model,
        "digest": record.digest,
        "queue": record.queue,
        "client": order.client,
        "shape": json.dumps(record.shape),
        "unit": order.card.plane_bytes,
        "images": record.images,
        "work": record.work,
        "position": record.position,
        "bytes": record.bytes,
        "created_at": record.created_at,
        "ttl_s": record.ttl_s,
        "events": record.events,
        "maxlen": settings.events_maxlen,
        "webhook": int(record.spec.webhook_url is not None),
        "levels": "" if record.levels is None else json.dumps(record.levels),
    }


def _levels(card: ModelCard, ts: tuple[int, ...]) -> dict[str, tuple[float, float]]:
    """t → (ᾱ_t, SNR_t), as the model's schedule is now."""
    tables = schedule_tables(card)
    return {str(t): (tables["alpha_bar"][t - 1], tables["snr"][t - 1]) for t in ts}
