"""The janitor among broken records: each is handled, or left, alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from jobs.states import Status
from jobs.store import keys
from jobs.store.janitor import Janitor
from jobs.store.records import FORMAT, parse_record
from jobs.store.writer import JobStore

Submit = Callable[..., str]


def spoil_with_text(store: JobStore, job_id: str) -> None:
    store.redis.delete(keys.job(job_id))
    store.redis.set(keys.job(job_id), "what is this")


def spoil_fields(store: JobStore, job_id: str) -> None:
    store.redis.delete(keys.job(job_id))
    store.redis.hset(keys.job(job_id), mapping={"status": "queued", "work": "many"})


def spoil_parts(store: JobStore, job_id: str) -> None:
    for key in (keys.outputs(job_id), keys.index(job_id), keys.events(job_id)):
        store.redis.delete(key)
        store.redis.set(key, "what is this")


SPOILS = [spoil_with_text, spoil_fields, spoil_parts]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_round_of_maintenance_goes_past_a_broken_record(
    store: JobStore, submit: Submit, spoil: Callable[[JobStore, str], None]
) -> None:
    broken, ended, waiting = submit(), submit(), submit()
    assert store.cancel(ended) == "canceled"
    store.redis.zadd(keys.DUE, {f"expire:{ended}": 0, f"forget:{broken}": 1, f"expire:{broken}": 0})
    store.redis.hset(keys.SUSPECTS, broken, "a while ago")
    spoil(store, broken)
    Janitor(store).run()
    after = [store.record(job_id) for job_id in (ended, waiting, broken)]
    assert [r and r.status for r in after] == [Status.EXPIRED, Status.QUEUED, None]
    ends = store.redis.hmget(keys.queue("ddpm"), ["admitted", "completed"])
    assert int(ends[0]) - int(ends[1]) == store.record(waiting).work  # type: ignore[arg-type,union-attr]
    assert not [key for key in store.redis.keys("ddpm:job:*") if broken.encode() in key]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_broken_record_can_be_canceled_and_deleted(
    store: JobStore, submit: Submit, spoil: Callable[[JobStore, str], None]
) -> None:
    broken = submit()
    spoil(store, broken)
    assert store.cancel(broken) == "canceled"
    assert store.purge(broken) and store.record(broken) is None
    assert not [key for key in store.redis.keys("ddpm:job:*") if broken.encode() in key]


def test_a_write_that_meets_broken_data_fails_that_job_alone(
    store: JobStore, submit: Submit
) -> None:
    jobs = [submit(), submit()]
    records = []
    for job_id in jobs:
        started = store.start(job_id, "e", worker="w", digest="d")
        assert started is not None
        records.append(started.record)
    spoil_parts(store, jobs[0])
    batch = store.batch()
    for record in records:
        batch.progress(record, "e", done=1, t=5)
    fates = batch.send()
    assert [fates[job_id].name for job_id in jobs] == ["LOST", "OK"]
    broken = store.record(jobs[0])
    assert broken is not None and broken.status is Status.FAILED
    assert broken.fault is not None and broken.fault.code == "broken_record"


def test_what_a_newer_version_added_is_told_from_what_is_broken() -> None:
    spec = {"kind": "generate", "seed": 1, "snapshots": {"every": 5, "kinds": ["x_t"]}}
    fields = {
        "status": "queued", "model": "m", "digest": "d", "queue": "q", "shape": "[1, 8, 8]",
        "images": "1", "work": "100", "bytes": "0", "created_at": str(time.time()), "ttl_s": "9",
    }  # fmt: skip

    def unread(changed: dict[str, object], **more: str) -> bool | None:
        """Whether it is for a newer version; None: it can be read."""
        text = json.dumps({**spec, **changed})
        raw = {k.encode(): v.encode() for k, v in {**fields, "spec": text, **more}.items()}
        found = parse_record("01a21573b51400002126f813a272", raw).unread
        return None if found is None else found.newer

    assert unread({}) is None
    assert unread({"style": None}) is None  # a field that says nothing
    assert unread({}, mood="fine") is None  # one of the hash, that may be ignored
    assert unread({}, format=str(FORMAT)) is None
    newer: Any
    for newer in ({"style": 1}, {"kind": "paint"}, {"variance": "wild"}, {"guidance": 1e3}):
        assert unread(newer) is True, newer
    assert unread({"snapshots": {"every": 5, "kinds": ["x_t"], "style": 1}}) is True
    assert unread({}, format=str(FORMAT + 1)) is True
    broken: Any
    for broken in ({"kind": 7}, {"seed": "one"}, {"snapshots": [1]}, {"snapshots": {}}):
        assert unread(broken) is False, broken
