from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from jobs.cards import ModelCard
from jobs.errors import Refused
from jobs.kinds.generate import GenerateSpec
from jobs.kinds.table import admit
from jobs.settings import Settings
from jobs.store import keys
from jobs.store.admission import Admission, Admitted, Idempotency, Order
from jobs.store.janitor import Janitor
from jobs.store.records import new_id
from jobs.store.room import Room
from jobs.store.writer import JobStore

Submit = Callable[..., str]


def compete(settings: Settings, card: ModelCard, keys_: list[str | None]) -> list[str]:
    """What became of one request a thread, each as from a process of its own."""
    results: list[str] = []
    barrier = threading.Barrier(len(keys_))

    def one(key: str | None) -> None:
        store = JobStore.connect(settings)
        spec, plan = admit(GenerateSpec(seed=1), card, settings)
        idem = None if key is None else Idempotency(key, "same")
        order = Order(spec=spec, plan=plan, card=card, client="me", idempotency=idem)
        admission = Admission(store)
        barrier.wait()
        try:
            results.append(admission.admit(order).job_id)
        except Refused as refused:
            results.append(refused.code)
        store.redis.close()

    threads = [threading.Thread(target=one, args=(key,)) for key in keys_]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_limits_hold_exactly_between_processes(
    store: JobStore, settings: Settings, card: ModelCard
) -> None:
    limited = settings.model_copy(update={"max_queued_jobs": 5})
    results = compete(limited, card, [None] * 12)
    assert results.count("queue_full") == 7
    assert store.redis.zcard(keys.JOBS) == 5 == store.redis.llen("rq:queue:ddpm")


def test_one_key_makes_one_job_between_processes(
    store: JobStore, settings: Settings, card: ModelCard
) -> None:
    results = compete(settings, card, [*["k"] * 6, *["other"] * 6])
    assert len(set(results)) == 2 and store.redis.llen("rq:queue:ddpm") == 2


def test_a_stall_of_redis_makes_no_second_job(
    store: JobStore, card: ModelCard, stall: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to EXEC is lost and what it says is done: redis-py calls that a watched key that
    changed, and the transaction is tried again."""
    stalls = [stall]

    class Stalled(Room):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            if stalls:
                stalls.pop()()

    monkeypatch.setattr("jobs.store.admission.Room", Stalled)
    spec, plan = admit(GenerateSpec(steps=10), card, store.settings)
    orders = [Order(spec=spec, plan=plan, card=card, client="me") for _ in range(3)]
    admitted = Admission(store).admit_all(orders)
    ids = [order.job_id for order in orders]
    assert [one.job_id for one in admitted if isinstance(one, Admitted)] == ids
    assert all(one.record is not None for one in admitted if isinstance(one, Admitted))
    assert store.redis.zrange(keys.JOBS, 0, -1) == [job_id.encode() for job_id in ids]
    assert len(store.redis.lrange("rq:queue:ddpm", 0, -1)) == 3
    assert store.redis.hget(keys.CLIENTS, "me") == b"30"


def test_a_client_has_its_own_keys(store: JobStore, submit: Submit) -> None:
    idem = Idempotency("k", "f")
    first = submit(idempotency=idem)
    assert submit(idempotency=idem) == first
    assert submit(idempotency=idem, client="you") != first
    with pytest.raises(Refused, match="another request") as refused:
        submit(idempotency=Idempotency("k", "g"))
    assert refused.value.code == "idempotency_conflict"


def test_recount_repairs_every_counter(store: JobStore, submit: Submit) -> None:
    for _ in range(3):
        job_id = submit(steps=10)
    started = store.start(job_id, "e", worker="w", digest="d")
    assert started is not None
    batch = store.batch()
    batch.progress(started.record, "e", done=4, t=600)
    batch.send()
    right = counters(store)
    assert right == (26, 26, 3 * 256)
    store.redis.hset(keys.queue("ddpm"), "completed", -500)
    store.redis.hset(keys.CLIENTS, mapping={"me": 9, "ghost": 3})
    store.redis.hset(keys.TOTALS, "output_bytes", 1)
    Janitor(store).recount()
    assert counters(store) == right
    assert store.redis.hkeys(keys.CLIENTS) == [b"me"]


def counters(store: JobStore) -> tuple[int, int, int]:
    admitted, completed = store.redis.hmget(keys.queue("ddpm"), ["admitted", "completed"])
    outstanding = int(admitted or 0) - int(completed or 0)
    client = int(store.redis.hget(keys.CLIENTS, "me") or 0)
    return outstanding, client, int(store.redis.hget(keys.TOTALS, "output_bytes") or 0)


def test_records_are_forgotten_after_their_outputs(store: JobStore, submit: Submit) -> None:
    job_id = submit(ttl_s=1)
    store.cancel(job_id)
    janitor = Janitor(store)
    store.redis.zadd(keys.DUE, {f"expire:{job_id}": 1})
    janitor.sweep()
    record = store.record(job_id)
    assert record is not None and record.status == "expired"
    store.redis.zadd(keys.DUE, {f"forget:{job_id}": 1})
    janitor.sweep()
    assert store.record(job_id) is None and store.redis.zcard(keys.JOBS) == 0
    assert [key for key in store.redis.keys("ddpm:*") if job_id.encode() in key] == []


def test_ids_sort_by_time() -> None:
    ids = [new_id() for _ in range(5000)]
    assert ids == sorted(ids) and len(set(ids)) == 5000
    assert all(len(job_id) == 28 for job_id in ids)
