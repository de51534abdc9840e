"""The worker's side of the store. Nothing outside this package spells a Redis key of ours.

When a worker calls what
------------------------
once            store = JobStore.connect(settings)
models loaded   store.retire_strangers(queue, names): what was taken away while no worker looked
a model found   store.publish_card(card); gone from the folder: store.retire_card(name)
every few s     store.heartbeat(WorkerInfo(...), rates={model: image-steps/s})
before a pop    store.next_turn(queue): whose turn it is stands at the head of RQ's list
a job popped    started = store.start(job_id, execution, worker=…, digest=…, provenance=…)
                None: drop it (canceled, ended or deleted; the store has written what is due).
                Else run started.record.spec, skip the images in `started.finished`, resume the
                others from `started.states`. If `started.crashes`, let nothing else be in the
                batch until it has made progress; refuse if `started.lone_crashes` has come to
                MAX_LONE_CRASHES. StillSilent: keep it, and ask again soon.
each tick       batch = store.batch(); batch.progress / image / snapshot / checkpoint for any
                number of jobs; fates = batch.send(): one round trip, one Lua script a job.
                LOST: not ours any more, drop it without another word. CANCEL: stop it, then
                put the latest x_t and x_start as snapshots and call store.canceled.
every 0.5 s     store.cancel_requested(ids), where ticks are rare
at the end      store.succeed / fail / canceled; False: it was not ours any more
on SIGTERM      store.requeue(job_id, execution), then RQ's own requeue
taken from us   store.returned(job_id, execution, worker=…): it was silent, and not dead
at exit         store.goodbye(worker)

Order: first the store, then RQ. A job that RQ ends while our record is still active counts as
lost, and the janitor (jobs/store/janitor.py) says so.
Every write names the execution id (RQ's `Execution.id`), and does nothing for another's job.
All registry cleaning, here and in workers, runs inside `store.lock("registries")`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Self

import redis

from jobs.cards import ModelCard, to_store
from jobs.observed import Batches
from jobs.settings import Settings
from jobs.states import Status
from jobs.store import events, keys, scripts
from jobs.store.batch import InBatch, WriteBatch
from jobs.store.cards import parse_cards
from jobs.store.connections import connect
from jobs.store.events import JobFault
from jobs.store.outputs import open_outputs
from jobs.store.records import JobRecord, parse_record, parse_reply
from jobs.store.rq_queue import queue_key
from jobs.store.sending import send_all
from jobs.store.started import MAX_LONE_CRASHES, SILENT_S, Started, StillSilent, read_started
from jobs.store.tolerance import each, is_data_fault, items, tell_once
from jobs.store.workers import WorkerInfo


class JobStore:
    """Synchronous access for workers and for the API's enqueue thread; safe between threads."""

    def __init__(self, connection: redis.Redis, settings: Settings) -> None:
        self.redis = connection
        self.settings = settings
        self._start = connection.register_script(scripts.START)
        self._finish = connection.register_script(scripts.FINISH)
        self._cancel = connection.register_script(scripts.CANCEL)
        self._purge = connection.register_script(scripts.PURGE)
        self._requeue = connection.register_script(scripts.REQUEUE)
        self._return = connection.register_script(scripts.RETURN)
        self._next = connection.register_script(scripts.NEXT)
        self._unlock = connection.register_script(scripts.UNLOCK)
        self.outputs = open_outputs(settings, connection)

    @classmethod
    def connect(cls, settings: Settings) -> Self:
        """A store on `settings.redis_url`."""
        return cls(connect(settings), settings)

    def start(
        self,
        job_id: str,
        execution: str,
        *,
        worker: str,
        digest: str,
        provenance: Mapping[str, Any] | None = None,
        in_batch: InBatch = InBatch.NO,
    ) -> Started | None:
        """Take a job. None: there is nothing to run (it ended, was canceled, or is gone).

        provenance: library versions, device, schedule: JSON. It is there before the first image,
        which carries it. in_batch: SHARED if it is to be stepped at once; not heeded for a job
        with crashes. Raises StillSilent.
        """
        earlier: Any = self.redis.hmget(keys.job(job_id), ["run_digest", "provenance"])
        done = events.last_event(Status.CANCELED, None)[1]
        running, canceled, queued = (
            events.status_data(s) for s in (Status.RUNNING, Status.CANCELED, Status.QUEUED)
        )
        entered = [job_id, execution, worker, str(time.time()), digest]
        said = [running, canceled, done, _dump(provenance), in_batch.value]
        limits: list[Any] = [queued, MAX_LONE_CRASHES, SILENT_S]
        what, crashes, lone_crashes, best = self._start(args=[*entered, *said, *limits])
        if what == b"silent":
            raise StillSilent
        if what != b"run":
            return None
        with self.redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(keys.job(job_id))
            pipe.get(keys.inputs(job_id))
            pipe.hgetall(keys.state(job_id))
            pipe.hkeys(keys.index(job_id))
            raw, inputs, states, fields = pipe.execute()
        if not raw:
            return None
        return read_started(
            parse_record(job_id, raw),
            crashes=(int(crashes), int(lone_crashes)),
            best=int(best),
            in_batch=InBatch.NO if crashes and in_batch is InBatch.SHARED else in_batch,
            inputs=inputs,
            states=states,
            fields=fields,
            earlier=earlier,
        )

    def batch(self) -> WriteBatch:
        """An empty batch of writes."""
        return WriteBatch(self.outputs, self.write)

    def write(self, calls: list[list[Any]]) -> list[int]:
        """Run the write script for each list of arguments, in one round trip."""
        replies = send_all(self.redis, scripts.WRITE, calls)
        return [self._fate(args[0], reply) for args, reply in zip(calls, replies, strict=True)]

    def _fate(self, job_id: str, reply: Any) -> int:
        """A script's reply; a job whose data do not let it be written fails, and is lost to us."""
        if isinstance(reply, Exception):
            if not is_data_fault(reply):
                raise reply
            self.refuse(job_id, str(reply))
            return 0
        return int(reply)

    def refuse(self, job_id: str, why: str) -> bool:
        """End an active job whose record is broken: no worker can do anything with it."""
        tell_once(f"the record of job {job_id}", why)
        fault = JobFault(code="broken_record", detail=f"the job's data are broken: {why}")
        return self.finish(job_id, "", Status.FAILED, fault=fault)

    def succeed(
        self, job_id: str, execution: str, *, result: Mapping[str, Any] | None = None
    ) -> bool:
        """Running → succeeded. result: what the job found in numbers: JSON."""
        return self.finish(job_id, execution, Status.SUCCEEDED, result=result)

    def fail(self, job_id: str, execution: str, *, code: str, detail: str) -> bool:
        """Running → failed, with a reason that a user can read."""
        fault = JobFault(code=code, detail=detail)
        return self.finish(job_id, execution, Status.FAILED, fault=fault)

    def canceled(self, job_id: str, execution: str) -> bool:
        """Running → canceled. Put the latest x_t and x_start as snapshots first."""
        return self.finish(job_id, execution, Status.CANCELED)

    def finish(
        self,
        job_id: str,
        execution: str,
        status: Status,
        *,
        fault: JobFault | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> bool:
        """End an active job. False: it was not this execution's. '' is any execution."""
        name, data = events.last_event(status, fault)
        error = "" if fault is None else fault.model_dump_json()
        entered = [job_id, execution, str(status), str(time.time()), events.status_data(status)]
        return bool(self._finish(args=[*entered, name, data, error, _dump(result)]))

    def requeue(self, job_id: str, execution: str) -> bool:
        """Running → queued, given back by its worker, which so has not died of it."""
        return bool(self._requeue(args=[job_id, execution, events.status_data(Status.QUEUED)]))

    def returned(self, job_id: str, execution: str, *, worker: str) -> bool:
        """A worker that finds an execution to be its own no more has not died of the job. True: it
        was thought so, and that is taken back."""
        return bool(self._return(args=[job_id, worker, execution]))

    def cancel_requested(self, job_ids: Iterable[str]) -> set[str]:
        """Those of the jobs that were asked to stop, or are no longer there."""
        ids = list(job_ids)
        with self.redis.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hmget(keys.job(job_id), ["status", "cancel"])
            rows = pipe.execute()
        return {
            job_id
            for job_id, (status, cancel) in zip(ids, rows, strict=True)
            if cancel == b"1" or status != Status.RUNNING.encode()
        }

    def cancel(self, job_id: str) -> str:
        """Ask a job to stop. `canceled` (it was waiting), `requested` (it runs: its worker will
        end it), `ended` (nothing to do) or `missing`. RQ's queue is the caller's business."""
        done = events.last_event(Status.CANCELED, None)[1]
        status = events.status_data(Status.CANCELED)
        reply: bytes = self._cancel(args=[job_id, str(time.time()), status, done])
        return reply.decode()

    def purge(self, job_id: str) -> bool:
        """Delete a job and everything of it, running or not. False: there was none."""
        there = bool(self._purge(args=[job_id]))
        self.outputs.delete([job_id])
        return there

    def record(self, job_id: str) -> JobRecord | None:
        """The record, or None."""
        try:
            reply: Any = self.redis.hgetall(keys.job(job_id))
        except redis.exceptions.ResponseError as error:
            reply = error
        return parse_reply(job_id, reply)

    def publish_card(self, card: ModelCard) -> None:
        """Make a model known. Cards persist: jobs are accepted while no worker lives."""
        known, more = to_store(card)
        with self.redis.pipeline() as pipe:
            pipe.hset(keys.MODELS, card.name, known)
            pipe.hset(keys.MODELS_MORE, card.name, more)
            pipe.sadd(keys.QUEUES, card.queue)
            pipe.execute()

    def retire_card(self, name: str) -> None:
        """Make a model unknown again (its folder is gone)."""
        with self.redis.pipeline() as pipe:
            pipe.hdel(keys.MODELS, name)
            pipe.hdel(keys.MODELS_MORE, name)
            pipe.execute()

    def retire_strangers(self, queue: str, served: Collection[str]) -> None:
        """Make those models of a queue unknown that neither are in `served` nor have a worker."""
        now = time.time()
        elsewhere = {name for info in self.workers() if info.alive(now) for name in info.models}
        for name, card in self.cards().items():
            if card.queue == queue and name not in elsewhere and name not in served:
                self.retire_card(name)

    def cards(self) -> dict[str, ModelCard]:
        """Every known model by name."""
        with self.redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(keys.MODELS)
            pipe.hgetall(keys.MODELS_MORE)
            return parse_cards(*pipe.execute())

    def heartbeat(
        self,
        info: WorkerInfo,
        rates: Mapping[str, float],
        *,
        cards: Iterable[ModelCard] = (),
        slots: int | None = None,
    ) -> None:
        """Say that a worker lives, and how fast each model runs here (image-steps/s).

        slots: images of one model that it steps together. Publishes again what of `cards` is not
        known: Redis may have come back empty.
        """
        with self.redis.pipeline() as pipe:
            pipe.hset(keys.WORKERS, info.name, json.dumps(asdict(info)))
            if slots is not None:  # beside it: release 0.1 refuses a heartbeat with another field
                pipe.hset(keys.SLOTS, info.name, slots)
            pipe.sadd(keys.QUEUES, info.queue)
            for model, rate in rates.items():
                pipe.hset(keys.rates(model), info.name, json.dumps([rate, info.at]))
            pipe.hkeys(keys.MODELS)
            known = {name.decode(errors="replace") for name in pipe.execute()[-1]}
        for card in cards:
            if card.name not in known:
                self.publish_card(card)

    def tell_batches(self, batches: Batches) -> None:
        """Add to the histograms what was stepped since it was told last."""
        counts = {f"{model}:{place}": steps for (model, place), steps in batches.counts.items()}
        counts |= {f"{model}:sum": rows for model, rows in batches.rows.items()}
        with self.redis.pipeline(transaction=False) as pipe:
            for name, more in counts.items():
                pipe.hincrby(keys.BATCHES, name, more)
            answers = pipe.execute(raise_on_error=False)
        for name, answer in zip(counts, answers, strict=True):
            if isinstance(answer, Exception) and not is_data_fault(answer):
                raise answer
            if isinstance(answer, Exception):  # no counter: it begins again
                self.redis.hdel(keys.BATCHES, name)

    def next_turn(self, queue: str) -> str | None:
        """Put the job whose turn it is to the head of RQ's list of a queue, where RQ's own pop
        finds it. Returns its client ("": not known); None: nothing waits."""
        client = self._next(args=[queue, queue_key(queue)])
        return None if client is None else str(client.decode(errors="replace"))

    def is_paused(self, queue: str) -> bool:
        """Whether no job is to be taken from a queue; those that run go on."""
        return bool(self.redis.sismember(keys.PAUSED, queue))

    def goodbye(self, worker: str) -> None:
        """Say that a worker is gone. Its measured rates stay until newer ones come."""
        with self.redis.pipeline() as pipe:
            for of_workers in (keys.WORKERS, keys.SLOTS, keys.BEGUN):
                pipe.hdel(of_workers, worker)
            pipe.execute()

    def excuse(self, worker: str) -> None:
        """The job that a worker began last has not ended it."""
        self.redis.hdel(keys.BEGUN, worker)

    def workers(self) -> list[WorkerInfo]:
        """Every worker that has not said goodbye, alive or not."""
        raw: Any = self.redis.hgetall(keys.WORKERS)
        return list(each("heartbeat of worker", items(raw), WorkerInfo.parse).values())

    @contextmanager
    def lock(self, name: str, *, seconds: float = 30.0) -> Iterator[bool]:
        """A lock that lapses by itself; yields whether we got it (it never waits)."""
        token = secrets.token_hex(8)
        got = self.redis.set(keys.lock(name), token, nx=True, px=round(seconds * 1000))
        try:
            yield bool(got)
        finally:
            if got:
                self._unlock(keys=[keys.lock(name)], args=[token])


def _dump(value: Mapping[str, Any] | None) -> str:
    return "" if value is None else json.dumps(value)
