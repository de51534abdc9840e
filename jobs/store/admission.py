"""Admission: one MULTI writes the record, the idempotency record, the counters and RQ's job.

Either all of it is there or nothing is. Requests that come together share one MULTI: under load
that is what makes a thousand admissions a second out of a few hundred round trips. Admissions watch
one another (key ADMISSIONS), so the limits hold exactly even between several API processes; a job
that ends in between only makes room.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import redis

from jobs.errors import Refused, SpecError
from jobs.states import Status
from jobs.store import events, keys, scripts
from jobs.store.orders import Admitted, Idempotency, Order, idempotency_key, new_record, to_hash
from jobs.store.records import JobRecord
from jobs.store.room import Room
from jobs.store.rq_queue import Queues
from jobs.store.tolerance import each
from jobs.store.writer import JobStore

__all__ = ["Admission", "Admitted", "Idempotency", "Order"]

_ATTEMPTS = 200
Outcome = Admitted | Refused | SpecError
Made = tuple[str, str]  # a job that came with an Idempotency-Key: its id, the request's fingerprint


class Admission:
    """Takes jobs in. Synchronous, since RQ is; the API calls it from one thread of its own."""

    def __init__(self, store: JobStore) -> None:
        self._redis = store.redis
        self._store = store
        self._settings = store.settings
        self._queues = Queues(store.redis)

    def replay(self, client: str, idempotency: Idempotency) -> str | None:
        """The job that this key made, None if the key is new.

        Raises Refused (idempotency_conflict) if it came with another request.
        """
        made = self._known([idempotency_key(client, idempotency)])
        return next((_replayed(earlier, idempotency) for earlier in made.values()), None)

    def admit(self, order: Order) -> Admitted:
        """Take one job in, or raise Refused or SpecError (it could never fit)."""
        [outcome] = self.admit_all([order])
        if isinstance(outcome, Admitted):
            return outcome
        raise outcome

    def admit_all(self, orders: Sequence[Order]) -> list[Outcome]:
        """Take in what there is room for, in order, in one transaction."""
        for order in orders:
            self._queues.get(order.card.queue)  # asks for the server's version the first time
        with self._redis.pipeline() as pipe:
            for attempt in range(_ATTEMPTS):
                try:
                    return self._try(orders, pipe, again=attempt > 0)
                except redis.WatchError:  # redis-py's word for a lost answer too
                    pipe.reset()
        return [Refused("queue_full", "too many requests at once", 1) for _ in orders]

    def _try(self, orders: Sequence[Order], pipe: Any, *, again: bool) -> list[Outcome]:
        idem_keys = [_key_of(order) for order in orders]
        pipe.watch(keys.ADMISSIONS, *(key for key in idem_keys if key))
        # An EXEC whose answer came too late was carried out, or is about to be: the watch tells.
        if again and (there := self._there(orders)):
            left = [order for order in orders if order.job_id not in there]
            others = iter(self._try(left, pipe, again=False) if left else [])
            return [there.get(order.job_id) or next(others) for order in orders]
        known = self._known(idem_keys)
        room = Room(self._redis, self._settings, orders)
        pipe.multi()
        outcomes: list[Outcome] = []
        asked: list[tuple[int, Admitted, int]] = []  # order, and which reply says what is before it
        for order, key in zip(orders, idem_keys, strict=True):
            at = len(pipe)
            outcome = self._one(order, key, known, room=room, pipe=pipe)
            if isinstance(outcome, Admitted) and not outcome.replayed:
                asked.append((len(outcomes), outcome, at))
            outcomes.append(outcome)
        replies = pipe.execute() if asked else []
        for number, admitted, at in asked:
            before, ahead = replies[at]
            outcomes[number] = replace(admitted, queue_position=before, ahead=ahead)
        return outcomes

    def _there(self, orders: Sequence[Order]) -> dict[str, Admitted]:
        """Those that an earlier try has taken in; what is before them is not known any more."""
        with self._redis.pipeline(transaction=False) as pipe:
            for order in orders:
                pipe.exists(keys.job(order.job_id))
            found = pipe.execute()
        ids = [order.job_id for order, there in zip(orders, found, strict=True) if there]
        records = [record for job_id in ids if (record := self._store.record(job_id))]
        return {r.id: Admitted(r.id, replayed=False, record=r, ahead=r.work) for r in records}

    def _known(self, idem_keys: Sequence[str]) -> dict[str, Made]:
        asked = [key for key in idem_keys if key]
        found: Any = self._redis.mget(asked) if asked else []
        there = [(key, value) for key, value in zip(asked, found, strict=True) if value]
        return each("idempotency record", there, _parse_made)

    def _one(
        self, order: Order, idem_key: str, known: dict[str, Made], *, room: Room, pipe: Any
    ) -> Outcome:
        """Decide about one order; where it is taken in, put its commands into the pipeline."""
        idem = order.idempotency
        try:
            if idem is not None and idem_key in known:
                return Admitted(_replayed(known[idem_key], idem), replayed=True)
            room.check(order)
        except (Refused, SpecError) as refusal:
            return refusal
        record = new_record(order, room.take(order), self._settings)
        made = ""
        if idem is not None:
            known[idem_key] = (record.id, idem.fingerprint)
            made = json.dumps(known[idem_key])
        self._write(order, record, (idem_key, made), pipe)
        return Admitted(record.id, replayed=False, record=record)

    def _write(
        self, order: Order, record: JobRecord, idempotency: tuple[str, str], pipe: Any
    ) -> None:
        fields = to_hash(record, order, self._settings)
        fields["idempotency"] = idempotency[0]
        pipe.eval(
            scripts.ADMIT,
            0,
            record.id,
            record.queue,
            record.model,
            order.client,
            record.spec.kind,
            record.work,
            record.bytes,
            events.status_data(Status.QUEUED),
            *idempotency,
            self._settings.idempotency_ttl_s,
            record.spec.priority,
            *(part for field in fields.items() for part in field),
        )
        if record.deadline is not None:
            pipe.zadd(keys.DEADLINES, {record.id: record.deadline})
        if order.inputs:
            pipe.set(keys.inputs(record.id), order.inputs)
        self._queues.enqueue(
            record.queue,
            record.id,
            pipeline=pipe,
            description=f"{record.spec.kind} {record.model} ×{record.images}",
            at_front=order.at_front,
            ttl_s=record.ttl_s,
        )


def _key_of(order: Order) -> str:
    idem = order.idempotency
    return "" if idem is None else idempotency_key(order.client, idem)


def _parse_made(raw: bytes) -> Made:
    job_id, fingerprint = json.loads(raw)
    return str(job_id), str(fingerprint)


def _replayed(made: Made, idempotency: Idempotency) -> str:
    job_id, fingerprint = made
    if fingerprint != idempotency.fingerprint:
        detail = f"Idempotency-Key {idempotency.key!r} came with another request before"
        raise Refused("idempotency_conflict", detail)
    return job_id
