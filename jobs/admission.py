"""Admission: one MULTI writes the record, the idempotency record, the counters and RQ's job.

Either all of it is there or nothing is. Admissions watch one another (key ADMISSIONS), so that the
limits hold exactly even between several API processes; a job that ends in between only makes room.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass
from typing import Any

import redis

from jobs import events, keys, scripts
from jobs.cards import ModelCard, schedule_tables
from jobs.errors import Refused, SpecError
from jobs.rates import combined_rate, retry_after
from jobs.records import new_id
from jobs.rq_queue import Queues
from jobs.specs import GenerateSpec, NoiseSpec, Plan
from jobs.states import Status
from jobs.store import JobStore

_ATTEMPTS = 200


@dataclass(frozen=True)
class Idempotency:
    """key: the client's Idempotency-Key. fingerprint: digest of the request as it was sent."""

    key: str
    fingerprint: str


@dataclass(frozen=True)
class Order:
    """A checked and filled request that asks for admission.

    client: who asks (for the quota). inputs: uploaded images, uint8 [N,H,W,C] bytes.
    """

    spec: GenerateSpec | NoiseSpec
    plan: Plan
    card: ModelCard
    client: str
    inputs: bytes = b""
    idempotency: Idempotency | None = None


@dataclass(frozen=True)
class Admitted:
    """replayed: the id is that of an earlier, equal request."""

    job_id: str
    replayed: bool


class Admission:
    """Takes jobs in. Synchronous, since RQ is; the API calls it from its enqueue thread."""

    def __init__(self, store: JobStore) -> None:
        self._redis = store.redis
        self._settings = store.settings
        self._queues = Queues(store.redis)
        self._state = store.redis.register_script(scripts.ADMISSION_STATE)

    def replay(self, client: str, idempotency: Idempotency) -> str | None:
        """The job that this key made, None if the key is new.

        Raises Refused (idempotency_conflict) if it came with another request.
        """
        found: Any = self._redis.get(_idempotency_key(client, idempotency))
        return _replayed(found, idempotency) if found else None

    def admit(self, order: Order) -> Admitted:
        """Take the job in, or raise Refused or SpecError (it could never fit)."""
        self._check_size(order)
        self._queues.get(order.card.queue)
        with self._redis.pipeline() as pipe:
            for _ in range(_ATTEMPTS):
                try:
                    return self._try(order, pipe)
                except redis.WatchError:
                    pipe.reset()
        raise Refused("queue_full", "too many requests at once", 1)

    def _try(self, order: Order, pipe: Any) -> Admitted:
        idem = order.idempotency
        idem_key = "" if idem is None else _idempotency_key(order.client, idem)
        pipe.watch(keys.ADMISSIONS, *([idem_key] if idem_key else []))
        waiting = keys.in_queue(order.card.queue, Status.QUEUED)
        found, queued, outstanding, held = self._state(
            keys=[idem_key or keys.ADMISSIONS + ":none", waiting, keys.CLIENTS, keys.TOTALS],
            args=[order.client],
        )
        if idem is not None and found:
            return Admitted(_replayed(found, idem), replayed=True)
        self._check_room(order, queued=queued, outstanding=int(outstanding), held=int(held))
        position: Any = self._redis.hget(keys.queue(order.card.queue), "admitted")
        job_id = new_id()
        pipe.multi()
        self._write(order, job_id, int(position or 0), pipe)
        if idem is not None:
            record = json.dumps([job_id, idem.fingerprint])
            pipe.set(idem_key, record, ex=self._settings.idempotency_ttl_s)
            pipe.hset(keys.job(job_id), "idempotency", idem_key)
        self._queues.enqueue(
            order.card.queue,
            job_id,
            pipeline=pipe,
            description=f"{order.spec.kind} {order.card.name} ×{order.plan.images}",
            at_front=order.spec.priority == "high",
        )
        pipe.execute()
        return Admitted(job_id, replayed=False)

    def _write(self, order: Order, job_id: str, position: int, pipe: Any) -> None:
        spec, plan, card = order.spec, order.plan, order.card
        reserved = plan.output_bytes + len(order.inputs)
        pipe.incr(keys.ADMISSIONS)
        pipe.hset(keys.job(job_id), mapping=self._record(order, job_id, position))
        if order.inputs:
            pipe.set(keys.inputs(job_id), order.inputs)
        for index in (keys.JOBS, keys.by_model(card.name), keys.by_status(Status.QUEUED)):
            pipe.zadd(index, {job_id: 0})
        pipe.zadd(keys.in_queue(card.queue, Status.QUEUED), {job_id: 0})
        pipe.sadd(keys.QUEUES, card.queue)
        pipe.hincrby(keys.queue(card.queue), "admitted", plan.evaluations)
        pipe.hincrby(keys.CLIENTS, order.client, plan.evaluations)
        pipe.hincrby(keys.TOTALS, "output_bytes", reserved)
        pipe.hincrby(keys.TOTALS, f"admitted_{spec.kind}", 1)
        event = {"event": "status", "data": events.status_data(Status.QUEUED)}
        pipe.xadd(keys.events(job_id), event)

    def _record(self, order: Order, job_id: str, position: int) -> dict[str, Any]:
        spec, plan, card = order.spec, order.plan, order.card
        record = {
            "id": job_id,
            "status": Status.QUEUED,
            "kind": spec.kind,
            "spec": spec.model_dump_json(),
            "model": card.name,
            "digest": card.digest,
            "queue": card.queue,
            "client": order.client,
            "shape": json.dumps(card.shape),
            "unit": card.plane_bytes,
            "images": plan.images,
            "work": plan.evaluations,
            "position": position + plan.evaluations,
            "bytes": plan.output_bytes + len(order.inputs),
            "created_at": time.time(),
            "ttl_s": spec.ttl_s or self._settings.ttl_s,
            "events": 1,
            "maxlen": self._settings.events_maxlen,
            "webhook": int(spec.webhook_url is not None),
        }
        if isinstance(spec, NoiseSpec):
            record["levels"] = json.dumps(_levels(card, spec.t))
        return record

    def _check_size(self, order: Order) -> None:
        limits = self._settings
        size = order.plan.output_bytes + len(order.inputs)
        if size > limits.max_output_bytes:
            detail = f"{size} bytes of output: the service holds {limits.max_output_bytes}"
            raise SpecError("", detail)
        if limits.client_quota and order.plan.evaluations > limits.client_quota:
            detail = f"{order.plan.evaluations} image-steps: the quota is {limits.client_quota}"
            raise SpecError("/steps", detail)

    def _check_room(self, order: Order, *, queued: int, outstanding: int, held: int) -> None:
        limits = self._settings
        work = order.plan.evaluations
        if limits.client_quota and outstanding + work > limits.client_quota:
            over = outstanding + work - limits.client_quota
            detail = f"{outstanding} of {limits.client_quota} image-steps are outstanding"
            raise Refused("quota_exceeded", detail, retry_after(over, self._rate(order.card)))
        if queued >= limits.max_queued_jobs:
            wait = retry_after(self._mean_work(order.card, queued), self._rate(order.card))
            raise Refused("queue_full", f"{queued} jobs are waiting already", wait)
        if held + order.plan.output_bytes + len(order.inputs) > limits.max_output_bytes:
            detail = f"outputs hold {held} of {limits.max_output_bytes} bytes"
            raise Refused("storage_full", detail, self._next_expiry())

    def _rate(self, card: ModelCard) -> float | None:
        entries: Any = self._redis.hvals(keys.rates(card.name))
        return combined_rate(entries, time.time())

    def _mean_work(self, card: ModelCard, queued: int) -> float:
        """Image-steps until about one of the waiting jobs has left the queue."""
        ends: Any = self._redis.hmget(keys.queue(card.queue), ["admitted", "completed"])
        admitted, completed = (int(value or 0) for value in ends)
        return (admitted - completed) / max(queued, 1)

    def _next_expiry(self) -> int:
        """Seconds until the first outputs lapse (a minute if only running jobs hold any)."""
        due: Any = self._redis.zrange(keys.DUE, 0, 0, withscores=True)
        wait = due[0][1] - time.time() if due else 60.0
        return min(86_400, max(1, math.ceil(wait)))


def _idempotency_key(client: str, idempotency: Idempotency) -> str:
    digest = hashlib.sha256(f"{client}\0{idempotency.key}".encode()).hexdigest()
    return keys.idempotency(digest)


def _replayed(found: bytes, idempotency: Idempotency) -> str:
    job_id, fingerprint = json.loads(found)
    if fingerprint != idempotency.fingerprint:
        detail = f"Idempotency-Key {idempotency.key!r} came with another request before"
        raise Refused("idempotency_conflict", detail)
    return str(job_id)


def _levels(card: ModelCard, ts: tuple[int, ...]) -> dict[str, tuple[float, float]]:
    """t → (ᾱ_t, SNR_t), as the model's schedule is now."""
    tables = schedule_tables(card)
    return {str(t): (tables["alpha_bar"][t - 1], tables["snr"][t - 1]) for t in ts}
