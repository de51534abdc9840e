"""How a job is begun: its record read, its model found, the store told; or why it is not."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import replace
from typing import Any, Protocol

import redis

from jobs.kinds.stored import Unread
from jobs.settings import Settings
from jobs.states import ACTIVE, Status
from jobs.store.records import JobRecord
from jobs.store.started import MAX_LONE_CRASHES, Started, StillSilent
from jobs.store.tolerance import is_data_fault, tell_once
from jobs.store.writer import JobStore
from worker.engine.loop import Engine
from worker.engine.tasks import EngineStopped
from worker.flights import AnyFlight, Ending
from worker.joblog import log_job
from worker.kinds.table import FLIGHTS
from worker.models import ModelFolder, Served
from worker.provenance import provenance
from worker.roster import Roster

log = logging.getLogger("ddpm.worker")
_ENDINGS = {
    Status.SUCCEEDED: Ending.SUCCEEDED,
    Status.EXPIRED: Ending.SUCCEEDED,
    Status.FAILED: Ending.FAILED,
    Status.CANCELED: Ending.CANCELED,
}


class JobRefused(Exception):
    """A job that cannot be run here, with a code for its record."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class Host(Protocol):
    """What runs the jobs that are begun."""

    engine: Engine
    flights: dict[str, AnyFlight]
    folder: ModelFolder
    roster: Roster
    settings: Settings
    store: JobStore

    def is_ready(self, record: JobRecord) -> bool:
        """Whether a job need not wait for its model."""

    def fly(self, flight: AnyFlight, started: Started) -> None:
        """Launch a flight, now or when its turn comes."""


class Starter:
    """Begins jobs for a host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._silent: set[str] = set()  # jobs that wait for workers that fell silent

    def begin(self, job_id: str, execution: str, worker: str) -> AnyFlight | Ending | None:
        """Start a job, or say how it stands already where there is nothing to run.

        None: ask again soon. Its model is being loaded (only with threads), or workers that fell
        silent over it may yet come back. One job must not end the worker, whatever its record
        holds.
        """
        record = self._host.store.record(job_id)
        if record is not None and _is_unread(record):
            return self._unread(record)
        try:
            return self._begin(record, job_id, execution, worker)
        except redis.exceptions.ResponseError as error:
            if not is_data_fault(error):
                raise
            self._host.store.refuse(job_id, str(error))
            return Ending.FAILED

    def _unread(self, record: JobRecord) -> Ending:
        """What becomes of a job that cannot be read here: another version's is for another."""
        unread = record.unread
        assert unread is not None
        if record.cancel_requested:
            self._host.store.finish(record.id, "", Status.CANCELED)
            return Ending.CANCELED
        if unread.newer:
            tell_once(f"the record of job {record.id}", f"{unread.why}; left for a newer worker")
            return Ending.UNREAD
        self._host.store.refuse(record.id, unread.why)
        return Ending.FAILED

    def _begin(
        self, record: JobRecord | None, job_id: str, execution: str, worker: str
    ) -> AnyFlight | Ending | None:
        if record is not None and not self._host.is_ready(record):
            return None
        served = None if record is None else self._host.folder.served.get(record.model)
        if record is not None and served is not None and record.status in ACTIVE:
            beyond = record.spec.beyond(served.card)
            record = record if beyond is None else replace(record, unread=Unread(True, beyond))
            if record.unread is not None:
                return self._unread(record)
        try:
            made = None if record is None or served is None else self._provenance(record, served)
            started = self._host.store.start(
                job_id,
                execution,
                worker=worker,
                digest="" if served is None else served.model.digest,
                provenance=made,
                in_batch=self._host.roster.at_start(
                    room=record is not None and self._has_room(record)
                ),
            )
            self._silent.discard(job_id)
            if started is None or record is None:
                now = self._host.store.record(job_id)
                return Ending.LOST if now is None else _ENDINGS.get(now.status, Ending.LOST)
            flight = self._flight(started, execution, served)
            self._host.fly(flight, started)
            return flight
        except redis.exceptions.RedisError:
            raise
        except StillSilent:
            self._tell_of_silence(job_id)
            return None
        except JobRefused as error:
            self._host.store.fail(job_id, execution, code=error.code, detail=str(error))
            if record is not None:
                log_job(record, "failed", 0.0, error)
        except EngineStopped:
            raise
        except Exception as error:  # one job must not end the worker
            log.exception("job %s cannot be started", job_id)
            self._host.store.fail(job_id, execution, code="worker_error", detail=str(error))
        return Ending.FAILED

    def _tell_of_silence(self, job_id: str) -> None:
        if job_id not in self._silent:
            self._silent.add(job_id)
            what = f"{MAX_LONE_CRASHES} workers fell silent while they ran it and no other"
            log.warning("job %s waits: %s; unless one comes back, it fails", job_id, what)

    def _provenance(self, record: JobRecord, served: Served) -> dict[str, Any]:
        spec, network = record.spec, None
        if spec.runs_network:
            mode = FLIGHTS[spec.kind].mode(spec)
            with contextlib.suppress(Exception):  # to submit the job then says why it cannot be
                network = self._host.engine.networks.prepare(
                    served.model, exact=spec.deterministic, mode=mode
                )
        return provenance(served, spec, network)

    def _has_room(self, record: JobRecord) -> bool:
        """Whether a job would be stepped at once."""
        if not record.spec.runs_network:  # beside the engine
            return True
        rows = self._host.engine.options.max_rows
        images = sum(flight.record.images for flight in list(self._host.flights.values()))
        return self._host.engine.waiting_rows < rows and images < rows

    def _flight(self, started: Started, execution: str, served: Served | None) -> AnyFlight:
        record = started.record
        return FLIGHTS[record.spec.kind](
            started,
            execution,
            _runnable(started, served),
            spec=record.spec,
            deadline=time.monotonic() + self._seconds_for(record),
        )

    def _seconds_for(self, record: JobRecord) -> float:
        limit = self._host.settings.job_deadline_s
        if record.deadline is None:
            return limit
        left = record.deadline - time.time()
        if left <= 0:
            raise JobRefused(record.late.code, record.late.detail)
        return min(limit, left)


def _is_unread(record: JobRecord) -> bool:
    """Whether a job has to be told of; one that has ended well, with another version, has not."""
    unread = record.unread
    return unread is not None and (record.status in ACTIVE or not unread.newer)


def _runnable(started: Started, served: Served | None) -> Served:
    """The model, or JobRefused with the reason why the job cannot run."""
    record: JobRecord = started.record
    if started.lone_crashes >= MAX_LONE_CRASHES:
        raise JobRefused(
            "gave_up", f"{started.lone_crashes} workers died while they ran this job and no other"
        )
    if served is None:
        raise JobRefused("model_unavailable", f"no model {record.model} in this worker's folder")
    pinned = record.spec.model_digest
    if pinned is not None and pinned != served.model.digest:
        digest = served.model.digest
        raise JobRefused("model_changed", f"model {record.model} is {digest} now, not {pinned}")
    if served.model.shape != record.shape:
        shape = served.model.shape
        raise JobRefused("model_changed", f"model {record.model} makes images of shape {shape} now")
    return served
