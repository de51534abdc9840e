"""Maintenance, run every few seconds by the API, and harmless to run anywhere and at any time.

- registries: RQ's own cleaning, which requeues the jobs of dead workers
- reconcile: our record follows RQ's; what RQ has lost is never called done
- sweep: outputs and records past their time
- recount: counters from the records
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import redis

from jobs.rates import parse_rate
from jobs.states import ACTIVE, Status
from jobs.store import events, keys, scripts
from jobs.store.events import JobFault
from jobs.store.rq_queue import ENDED, Queues
from jobs.store.tolerance import is_data_fault, number, text
from jobs.store.writer import JobStore

log = logging.getLogger(__name__)
_SWEEP_AT_ONCE = 500
_LATE_S = 30.0  # a worker has so long to end a job that is late
_CONFIRM_S = 5.0  # two looks this far apart: a worker ends a job with us first, then with RQ
_WORKER_FORGET_S = 3600.0
_RECOUNT_S = 300.0  # it looks at every record in one script


class Janitor:
    """Keeps the store honest. Synchronous: run it in a thread."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._redis = store.redis
        self.queues = Queues(store.redis)
        self._sweep = store.redis.register_script(scripts.SWEEP)
        self._recount = store.redis.register_script(scripts.RECOUNT)
        self._recounted = -_RECOUNT_S
        self._requeue = store.redis.register_script(scripts.REQUEUE)

    def run(self) -> None:
        """One round; does nothing where another process is at it."""
        with self._store.lock("janitor") as ours:
            if not ours:
                return
            for queue in self._queue_names():
                _alone(f"cleaning queue {queue}", partial(self.clean_registries, queue))
                _alone(f"comparing queue {queue}", partial(self.reconcile, queue))
            _alone("ending what is late", self.end_late)
            _alone("the sweep", self.sweep)
            _alone("forgetting workers", self.forget_workers)
            if time.monotonic() - self._recounted >= _RECOUNT_S:
                _alone("the recount", self.recount)

    def clean_registries(self, queue: str) -> None:
        """RQ's cleaning under the lock that workers take too."""
        with self._store.lock("registries") as ours:
            if ours:
                self.queues.clean(queue)

    def reconcile(self, queue: str) -> None:
        """Follow RQ where the two records disagree for longer than a moment."""
        for status in (Status.RUNNING, Status.QUEUED):
            members: Any = self._redis.zrange(keys.in_queue(queue, status), 0, -1)
            ids = [text(member) for member in members]
            pairs = list(zip(ids, self.queues.statuses(ids), strict=True))
            agreed = [job_id for job_id, theirs in pairs if not _disagree(status, theirs)]
            if agreed and self._redis.exists(keys.SUSPECTS):
                self._redis.hdel(keys.SUSPECTS, *agreed)
            for job_id, theirs in pairs:
                if _disagree(status, theirs) and self._confirmed(job_id):
                    _alone(f"job {job_id}", partial(self._follow, job_id, theirs))

    def _follow(self, job_id: str, theirs: str | None) -> None:
        if theirs == "queued":
            self._take_back(job_id)
        elif theirs == "canceled":
            self._store.finish(job_id, "", Status.CANCELED)
        else:
            detail = f"the queue no longer has this job ({theirs or 'gone'}), and it never ended"
            fault = JobFault(code="lost", detail=detail)
            self._store.finish(job_id, "", Status.FAILED, fault=fault)

    def _confirmed(self, job_id: str) -> bool:
        now = time.time()
        self._redis.hsetnx(keys.SUSPECTS, job_id, str(now))
        since: Any = self._redis.hget(keys.SUSPECTS, job_id)
        try:
            return since is not None and now - number(since) >= _CONFIRM_S
        except ValueError:
            self._redis.hdel(keys.SUSPECTS, job_id)
            return False

    def _take_back(self, job_id: str) -> None:
        """Its worker died and RQ has queued it again."""
        record = self._store.record(job_id)
        if record is not None and record.cancel_requested:
            self.queues.cancel(job_id)
            self._store.finish(job_id, "", Status.CANCELED)
            return
        self._requeue(args=[job_id, "", events.status_data(Status.QUEUED)])
        self._redis.hdel(keys.SUSPECTS, job_id)

    def end_late(self) -> None:
        """Fail the jobs that still wait at their deadline; those that run are their workers'
        business, unless those are gone."""
        now = time.time()
        due: Any = self._redis.zrangebyscore(keys.DEADLINES, "-inf", now, 0, _SWEEP_AT_ONCE)
        for job_id in (text(entry) for entry in due):
            record = self._store.record(job_id)
            if record is not None and record.status in ACTIVE and record.deadline is not None:
                if record.status is Status.RUNNING and now < record.deadline + _LATE_S:
                    continue
                self._store.finish(job_id, "", Status.FAILED, fault=record.late)
                self.queues.cancel(job_id)
            self._redis.zrem(keys.DEADLINES, job_id)

    def sweep(self) -> None:
        """Delete outputs and records whose time is over, and first what RQ keeps of them."""
        now = time.time()
        args = [now, self._store.settings.record_ttl_s, _SWEEP_AT_ONCE]
        handled = _SWEEP_AT_ONCE
        while handled == _SWEEP_AT_ONCE:
            due: Any = self._redis.zrangebyscore(keys.DUE, "-inf", now, 0, _SWEEP_AT_ONCE)
            self.queues.forget([text(entry).partition(":")[2] for entry in due])
            handled, *gone = self._sweep(args=args)
            self._store.outputs.delete([text(job_id) for job_id in gone])

    def recount(self) -> None:
        """Recompute every counter from the records."""
        self._recounted = time.monotonic()
        self._recount(args=self._queue_names())

    def forget_workers(self) -> None:
        """Drop workers long unheard of. A model's newest rate stays: an estimate is better
        than none."""
        limit = time.time() - _WORKER_FORGET_S
        known = self._store.workers()
        gone = [info.name for info in known if info.at < limit]
        if gone:
            for of_workers in (keys.WORKERS, keys.SLOTS, keys.BEGUN):
                self._redis.hdel(of_workers, *gone)
        self._forget_begun({info.name for info in known})
        for model in self._store.cards():
            entries: Any = self._redis.hgetall(keys.rates(model))
            # An entry that cannot be read is no measurement: the oldest of all.
            ages = {name: (parse_rate(entry) or (0.0, 0.0))[1] for name, entry in entries.items()}
            stale = [name for name in sorted(ages, key=ages.__getitem__)[:-1] if ages[name] < limit]
            if stale:
                self._redis.hdel(keys.rates(model), *stale)

    def _forget_begun(self, known: set[str]) -> None:
        """What stock workers began that died: they send no heartbeat, and go by the job's end."""
        begun: Any = self._redis.hgetall(keys.BEGUN)
        for name, job_id in begun.items():
            if text(name) not in known:
                record = self._store.record(text(job_id))
                if record is None or record.status not in ACTIVE:
                    self._redis.hdel(keys.BEGUN, name)

    def _queue_names(self) -> list[str]:
        members: Any = self._redis.smembers(keys.QUEUES)
        return sorted(text(member) for member in members)


def _alone(what: str, work: Callable[[], object]) -> None:
    """One part of a round: what is wrong with the data it meets holds up no other part."""
    try:
        work()
    except redis.RedisError as error:
        if not is_data_fault(error):
            raise
        log.error("maintenance: %s: %s", what, error)
    except Exception:
        log.exception("maintenance: %s", what)


def _disagree(status: Status, theirs: str | None) -> bool:
    """Whether RQ's status says that ours is out of date."""
    if theirs is None or theirs in ENDED:
        return True
    return status is Status.RUNNING and theirs == "queued"
