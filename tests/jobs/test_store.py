from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from redis.exceptions import ResponseError
from rq.job import Job
from rq.serializers import JSONSerializer

from jobs.states import TRANSITIONS, Status
from jobs.store import keys, writer
from jobs.store.batch import Fate, InBatch
from jobs.store.events import JobFault
from jobs.store.janitor import Janitor
from jobs.store.rq_queue import Queues
from jobs.store.started import MAX_LONE_CRASHES, Started, StillSilent
from jobs.store.workers import WorkerInfo
from jobs.store.writer import JobStore

Submit = Callable[..., str]
X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 8, 8)


def names(store: JobStore, job_id: str) -> list[str]:
    return [fields[b"event"].decode() for _, fields in store.redis.xrange(keys.events(job_id))]


def totals(store: JobStore) -> tuple[int, int, int]:
    """(outstanding image-steps of the queue, of the client, output bytes)."""
    ends = store.redis.hmget(keys.queue("ddpm"), ["admitted", "completed"])
    admitted, completed = (int(value or 0) for value in ends)
    client = int(store.redis.hget(keys.CLIENTS, "me") or 0)
    return admitted - completed, client, int(store.redis.hget(keys.TOTALS, "output_bytes") or 0)


def test_a_job_from_admission_to_success(store: JobStore, submit: Submit) -> None:
    job_id = submit(num_images=2, steps=10, seed=5)
    assert totals(store) == (20, 20, 2 * 256)
    made = {"torch": "2"}
    started = store.start(job_id, "e1", worker="w", digest="d1", provenance=made)
    assert started is not None and started.crashes == 0 and started.inputs is None
    record = started.record
    assert record.provenance == made  # the first image is about to carry it
    assert record.status is Status.RUNNING and record.spec.seed == 5 and record.work == 20
    batch = store.batch()
    batch.progress(record, "e1", done=12, t=400, eta_s=1.5)
    batch.checkpoint(record, "e1", index=0, state=b"zero")
    batch.checkpoint(record, "e1", index=1, state=b"one")
    batch.snapshot(record, "e1", t=500, kind="x_t", index=0, x=X)
    batch.image(record, "e1", index=0, x=X)
    assert batch.send() == {job_id: Fate.OK}
    assert batch.send() == {}
    assert totals(store)[:2] == (8, 8)
    resumed = store.start(job_id, "e1", worker="w", digest="d1", provenance=made)
    assert resumed is not None
    assert resumed.states == {1: b"one"} and resumed.finished == {0}
    batch.image(record, "e1", index=1, x=X)
    batch.send()
    assert store.succeed(job_id, "e1")
    after = store.record(job_id)
    assert after is not None and after.status is Status.SUCCEEDED
    assert after.provenance == made and after.done == 12
    assert totals(store) == (0, 0, 3 * 256)
    assert store.redis.exists(keys.state(job_id)) == 0
    assert names(store, job_id) == [
        "status", "status", "progress", "snapshot", "image", "image", "status", "done",
    ]  # fmt: skip
    assert store.succeed(job_id, "e1")  # said again, as when the answer is lost; nothing changes
    assert not store.succeed(job_id, "e2")
    assert not store.canceled(job_id, "e1")


def test_a_fenced_worker_writes_nothing(store: JobStore, submit: Submit) -> None:
    job_id = submit()
    first = store.start(job_id, "old", worker="a", digest="d")
    assert first is not None
    assert store.start(job_id, "new", worker="b", digest="d") is not None
    batch = store.batch()
    batch.image(first.record, "old", index=0, x=X)
    assert batch.send() == {job_id: Fate.LOST}
    assert not store.fail(job_id, "old", code="worker_error", detail="thawed")
    assert not store.requeue(job_id, "old")
    assert store.redis.exists(keys.outputs(job_id)) == 0
    record = store.record(job_id)
    assert record is not None and record.worker == "b" and record.status is Status.RUNNING


@pytest.mark.parametrize("status", [Status.CANCELED, Status.FAILED])
def test_what_another_ended_a_thawed_worker_did_not_end(
    store: JobStore, submit: Submit, status: Status
) -> None:
    """Even if it would have ended it so, too."""
    job_id = submit()
    assert store.start(job_id, "e", worker="a", digest="d") is not None
    fault = JobFault(code="lost", detail="gone") if status is Status.FAILED else None
    assert store.finish(job_id, "", status, fault=fault)
    if status is Status.CANCELED:
        assert not store.canceled(job_id, "e")
    else:
        assert not store.fail(job_id, "e", code="worker_error", detail="thawed")
    record = store.record(job_id)
    assert record is not None and (record.status, record.fault) == (status, fault)


def test_a_death_is_charged_to_what_was_in_the_batch(store: JobStore, submit: Submit) -> None:
    shared, waiting, begun = submit(), submit(), submit()
    for job_id, how in ((shared, InBatch.SHARED), (waiting, InBatch.NO), (begun, InBatch.NO)):
        assert store.start(job_id, "e", worker="dead", digest="d", in_batch=how) is not None
    found = [store.start(i, "f", worker="w", digest="d") for i in (shared, waiting, begun)]
    assert [started and started.crashes for started in found] == [1, 0, 1]
    assert store.start("other", "e", worker="w", digest="d") is None
    again = store.start(waiting, "g", worker="v", digest="d", in_batch=InBatch.SHARED)
    assert again is not None and again.crashes == 0 and again.in_batch is InBatch.SHARED


def test_a_suspect_is_alone_until_it_is_cleared(store: JobStore, submit: Submit) -> None:
    job_id = submit(steps=10)

    def start(worker: str, how: InBatch = InBatch.SHARED) -> Started:
        found = store.start(job_id, f"e-{worker}", worker=worker, digest="d", in_batch=how)
        assert found is not None
        return found

    start("a")
    suspect = start("b")
    assert suspect.crashes == 1 and suspect.in_batch is InBatch.NO
    batch = store.batch()
    batch.progress(suspect.record, "e-b", done=3, t=700)
    batch.in_batch(job_id, "e-b", InBatch.ALONE)
    assert batch.send() == {job_id: Fate.OK}
    suspect = start("c")
    assert (suspect.crashes, suspect.lone_crashes, suspect.best) == (2, 1, 3)
    batch.in_batch(job_id, "e-b", InBatch.CLEARED)  # of a worker that has lost it
    assert batch.send() == {job_id: Fate.LOST}
    batch.in_batch(job_id, "e-c", InBatch.CLEARED)
    batch.send()
    assert (start("d").crashes, start("e").lone_crashes) == (1, 0)


def test_who_gives_a_job_back_or_lives_on_blames_nobody(store: JobStore, submit: Submit) -> None:
    job_id = submit()
    how: dict[str, Any] = {"digest": "d", "in_batch": InBatch.SHARED}
    store.start(job_id, "e1", worker="a", **how)
    assert store.requeue(job_id, "e1")
    again = store.start(job_id, "e2", worker="b", **how)
    assert again is not None and again.crashes == 0
    same = store.start(job_id, "e3", worker="b", **how)  # it was only thought dead
    assert same is not None and same.crashes == 0
    assert store.requeue(job_id, "")  # by the janitor, which knows of no reason
    last = store.start(job_id, "e4", worker="c", **how)
    assert last is not None and last.crashes == 1


def alone(store: JobStore, job_id: str, *workers: str) -> None:
    """Each runs the job and no other, and falls silent."""
    for worker in workers:
        assert store.start(job_id, f"e-{worker}", worker=worker, digest="d") is not None
        batch = store.batch()
        batch.in_batch(job_id, f"e-{worker}", InBatch.ALONE)
        assert batch.send() == {job_id: Fate.OK}


def counts(store: JobStore, job_id: str) -> tuple[int, int]:
    found = store.redis.hmget(keys.job(job_id), "crashes", "lone_crashes")
    return int(found[0] or 0), int(found[1] or 0)


def test_who_comes_back_takes_its_blame_back_once(store: JobStore, submit: Submit) -> None:
    job_id = submit()
    alone(store, job_id, "a", "b", "c")
    assert counts(store, job_id) == (2, 2)  # of c nothing is known yet
    assert store.returned(job_id, "e-a", worker="a") and counts(store, job_id) == (1, 1)
    assert not store.returned(job_id, "e-a", worker="a")
    assert not store.returned(job_id, "e-c", worker="c")  # before it was blamed: it never is
    alone(store, job_id, "d")
    assert counts(store, job_id) == (1, 1)  # b is dead
    alone(store, job_id, "a")
    assert counts(store, job_id) == (2, 2)  # and d
    assert not store.returned(job_id, "e-d", worker="nobody") and counts(store, job_id) == (2, 2)


def test_an_old_execution_that_ends_says_nothing_of_the_new(
    store: JobStore, submit: Submit
) -> None:
    """A worker that was thought dead took the job again before it found that it had lost it."""
    job_id = submit()
    alone(store, job_id, "a", "b")
    started = store.start(job_id, "again", worker="a", digest="d", in_batch=InBatch.ALONE)
    assert started is not None and counts(store, job_id) == (2, 2)
    assert store.returned(job_id, "e-a", worker="a") and counts(store, job_id) == (1, 1)
    alone(store, job_id, "c")  # for a has died of it at last
    assert counts(store, job_id) == (2, 2)


def test_cleared_jobs_have_nothing_to_take_back(store: JobStore, submit: Submit) -> None:
    job_id = submit()
    alone(store, job_id, "a", "b")
    batch = store.batch()
    batch.in_batch(job_id, "e-b", InBatch.CLEARED)
    batch.send()
    assert counts(store, job_id) == (0, 0)
    alone(store, job_id, "c")
    assert not store.returned(job_id, "e-a", worker="a") and counts(store, job_id) == (1, 0)
    store.redis.hset(keys.job(job_id), "blamed:b", "no count")
    assert not store.returned(job_id, "e-b", worker="b")  # and still: damaged data stop nobody
    assert not store.returned("nobody", "e", worker="b")


def test_no_job_is_given_up_while_workers_may_come_back(
    store: JobStore, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit()
    alone(store, job_id, "a", "b", "c")
    before = len(names(store, job_id))
    for _ in range(2):
        with pytest.raises(StillSilent):
            store.start(job_id, "e-d", worker="d", digest="d")
    record = store.record(job_id)
    assert record is not None and record.status is Status.QUEUED and record.execution is None
    assert len(names(store, job_id)) == before + 1 and counts(store, job_id) == (3, 3)
    monkeypatch.setattr(writer, "SILENT_S", 0.0)
    dead = store.start(job_id, "e-d", worker="d", digest="d")
    assert dead is not None and dead.lone_crashes == MAX_LONE_CRASHES
    monkeypatch.undo()
    assert store.requeue(job_id, "e-d") and store.returned(job_id, "e-b", worker="b")
    lives = store.start(job_id, "e-d", worker="d", digest="d")
    assert lives is not None and lives.lone_crashes == MAX_LONE_CRASHES - 1


def test_cancel_reaches_a_running_job_between_writes(store: JobStore, submit: Submit) -> None:
    job_id = submit()
    started = store.start(job_id, "e", worker="w", digest="d")
    assert started is not None and store.cancel_requested([job_id]) == set()
    assert store.cancel(job_id) == "requested"
    assert store.cancel_requested([job_id, "nobody"]) == {job_id, "nobody"}
    batch = store.batch()
    batch.snapshot(started.record, "e", t=3, kind="x_start", index=0, x=X)
    assert batch.send() == {job_id: Fate.CANCEL}
    assert store.canceled(job_id, "e")
    assert store.cancel(job_id) == "ended"
    record = store.record(job_id)
    assert record is not None and record.status is Status.CANCELED
    assert totals(store) == (0, 0, 256)


def test_a_canceled_queued_job_is_never_started(store: JobStore, submit: Submit) -> None:
    job_id = submit()
    assert store.cancel(job_id) == "canceled"
    assert store.start(job_id, "e", worker="w", digest="d") is None
    assert names(store, job_id) == ["status", "status", "done"]
    assert store.cancel("nobody") == "missing"
    assert totals(store) == (0, 0, 0)


def test_a_dead_workers_canceled_job_ends_at_the_next_start(
    store: JobStore, submit: Submit
) -> None:
    job_id = submit()
    store.start(job_id, "dead", worker="w", digest="d")
    store.cancel(job_id)
    assert store.start(job_id, "next", worker="v", digest="d") is None
    record = store.record(job_id)
    assert record is not None and record.status is Status.CANCELED


def test_purge_leaves_no_key_and_no_debt(store: JobStore, submit: Submit) -> None:
    before = {key for key in store.redis.keys("ddpm:*") if b":job:" in key}
    job_id = submit(num_images=3)
    started = store.start(job_id, "e", worker="w", digest="d")
    assert started is not None
    batch = store.batch()
    batch.checkpoint(started.record, "e", index=0, state=b"s")
    batch.image(started.record, "e", index=1, x=X)
    batch.send()
    assert store.purge(job_id)
    assert not store.purge(job_id)
    assert {key for key in store.redis.keys("ddpm:*") if b":job:" in key} == before
    assert totals(store) == (0, 0, 0)
    assert store.redis.zcard(keys.JOBS) == 0
    batch.image(started.record, "e", index=2, x=X)
    assert batch.send() == {job_id: Fate.LOST}


def test_writes_survive_a_redis_that_forgot_its_scripts(store: JobStore, submit: Submit) -> None:
    started = store.start(submit(), "e", worker="w", digest="d")
    assert started is not None
    store.redis.script_flush()
    batch = store.batch()
    batch.image(started.record, "e", index=0, x=X)
    assert batch.send() == {started.record.id: Fate.OK}


def test_a_plane_of_the_wrong_shape_is_refused(store: JobStore, submit: Submit) -> None:
    started = store.start(submit(), "e", worker="w", digest="d")
    assert started is not None
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4\), must be \(1, 8, 8\)"):
        store.batch().image(started.record, "e", index=0, x=X[:, :4, :4])


def test_workers_and_locks(store: JobStore) -> None:
    info = WorkerInfo(name="w1", queue="ddpm", models=("mnist",), active=3)
    store.heartbeat(info, rates={"mnist": 100.0}, slots=64)
    assert store.redis.hgetall(keys.SLOTS) == {b"w1": b"64"}
    assert store.workers() == [info] and info.alive(time.time())
    assert not info.alive(time.time() + 60)
    store.goodbye("w1")
    assert store.workers() == [] and not store.redis.exists(keys.SLOTS)
    with store.lock("x") as first, store.lock("x") as second:
        assert first and not second
    with store.lock("x") as third:
        assert third


def test_only_models_that_nobody_serves_are_strangers(store: JobStore) -> None:
    [card] = store.cards().values()
    for name, queue in (("mine", "ddpm"), ("others", "ddpm"), ("gone", "ddpm"), ("far", "q2")):
        store.publish_card(card.model_copy(update={"name": name, "queue": queue}))
    store.heartbeat(WorkerInfo(name="w1", queue="ddpm", models=("others",)), rates={})
    dead = WorkerInfo(name="w2", queue="ddpm", models=("gone",), at=time.time() - 3600)
    store.heartbeat(dead, rates={})
    store.retire_strangers("ddpm", ["mine"])
    assert set(store.cards()) == {"mine", "others", "far"}


def test_every_move_is_in_the_table(store: JobStore, submit: Submit) -> None:
    def reach(status: Status) -> str:
        job_id = submit()
        if status is Status.QUEUED:
            return job_id
        store.start(job_id, "e", worker="w", digest="d")
        if status is not Status.RUNNING:
            ended = Status.SUCCEEDED if status is Status.EXPIRED else status
            store.finish(job_id, "e", ended)
        if status is Status.EXPIRED:
            store.redis.zadd(keys.DUE, {f"expire:{job_id}": 1})
            Janitor(store).sweep()
        return job_id

    moves = {
        Status.RUNNING: lambda i: store.start(i, "e2", worker="w", digest="d"),
        Status.QUEUED: lambda i: store.requeue(i, "e"),
        Status.CANCELED: lambda i: store.finish(i, "", Status.CANCELED),
        Status.FAILED: lambda i: store.finish(i, "", Status.FAILED),
    }
    for source in Status:
        for target, move in moves.items():
            job_id = reach(source)
            before = store.record(job_id)
            assert before is not None and before.status is source
            moved = bool(move(job_id))
            after = store.record(job_id)
            assert after is not None
            assert moved == (target in TRANSITIONS[source]), (source, target)
            assert after.status is (target if moved else source)


def test_a_move_outside_the_table_is_an_error(store: JobStore, submit: Submit) -> None:
    with pytest.raises(ResponseError, match="queued to succeeded"):
        store.finish(submit(), "", Status.SUCCEEDED)


@pytest.mark.parametrize("act", [Queues.delete, Queues.cancel])
def test_an_execution_that_rq_lists_and_no_longer_has_is_in_nobodys_way(
    store: JobStore, submit: Submit, act: Callable[[Queues, str], None]
) -> None:
    """As it is for a minute once a worker is dead: RQ itself stumbles over it."""
    job_id = submit()
    job = Job.fetch(job_id, connection=store.redis, serializer=JSONSerializer)
    store.redis.zadd(job.execution_registry.key, {"gone": time.time() + 60})
    with pytest.raises(ValueError, match="gone not found"):
        job.get_executions()
    act(Queues(store.redis), job_id)
    left = store.redis.hget(job.key, "status")
    assert left == (None if act is Queues.delete else b"canceled")


@pytest.mark.parametrize("act", [Queues.delete, Queues.cancel])
def test_a_job_that_expires_under_the_hands_of_rq_is_gone(
    store: JobStore,
    submit: Submit,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[Queues, str], None],
) -> None:
    fetch = Queues._fetch

    def fetch_and_expire(queues: Queues, job_id: str) -> Job | None:
        job = fetch(queues, job_id)
        store.redis.delete(Job.key_for(job_id))
        return job

    monkeypatch.setattr(Queues, "_fetch", fetch_and_expire)
    act(Queues(store.redis), submit())


def test_an_end_whose_answer_is_lost_is_told_as_it_is(
    store: JobStore, submit: Submit, stall: Callable[[], None]
) -> None:
    job_id = submit(steps=10)
    store.start(job_id, "e1", worker="w", digest="d")
    assert not store.succeed(job_id, "none")  # the script is known from now on
    stall()
    assert store.succeed(job_id, "e1")
    record = store.record(job_id)
    assert record is not None and record.status is Status.SUCCEEDED
    assert names(store, job_id).count("done") == 1
