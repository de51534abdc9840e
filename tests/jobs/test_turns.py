"""Whose turn it is among those that wait: each client's share by image-steps, within a priority."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from jobs.kinds.generate import GenerateSpec
from jobs.kinds.table import admit
from jobs.store import keys
from jobs.store.admission import Admission, Admitted, Order
from jobs.store.janitor import Janitor
from jobs.store.rq_queue import Queues, queue_key
from jobs.store.writer import JobStore
from tests.jobs.conftest import CARD

Submit = Callable[..., Admitted]


@pytest.fixture
def submit(store: JobStore) -> Submit:
    admission = Admission(store)

    def take_in(client: str, **fields: Any) -> Admitted:
        spec, plan = admit(GenerateSpec(**{"steps": 10, **fields}), CARD, store.settings)
        return admission.admit(Order(spec=spec, plan=plan, card=CARD, client=client))

    return take_in


def pop(store: JobStore) -> str | None:
    """What a worker does: let the next come to the head, take it, and start it."""
    store.next_turn(CARD.queue)
    raw: Any = store.redis.lpop(queue_key(CARD.queue))
    if raw is not None:
        store.start(raw.decode(), "x", worker="w", digest="")
    return None if raw is None else raw.decode()


def order(store: JobStore) -> list[str]:
    """Take all that wait."""
    found = []
    while (job_id := pop(store)) is not None:
        found.append(job_id)
    return found


def clients(store: JobStore, popped: list[str]) -> str:
    records = [store.record(job_id) for job_id in popped]
    return "".join(record.client for record in records if record is not None)


def test_one_job_waits_behind_few_of_another_client(store: JobStore, submit: Submit) -> None:
    for _ in range(100):
        submit("a")
    late = submit("b")
    assert late.queue_position == 1  # of equal places the older comes first
    assert late.ahead == 20
    popped = order(store)
    assert len(popped) == 101 and popped.index(late.job_id) == 1


def test_shares_are_of_image_steps(store: JobStore, submit: Submit) -> None:
    for _ in range(12):
        submit("a", num_images=4)
    for _ in range(12):
        submit("b", num_images=2)
    for _ in range(12):
        submit("c", num_images=1)
    assert clients(store, order(store)[:21]).count("a") == 3
    assert keys_of_turns(store) == 0


def test_who_comes_later_begins_now(store: JobStore, submit: Submit) -> None:
    """Neither ahead of what others had while it was not there, nor behind it."""
    for _ in range(10):
        submit("a")
    for _ in range(6):
        pop(store)
    for _ in range(4):
        submit("b")
    assert clients(store, order(store)) == "babababa"  # its equal is being run


def test_high_goes_first_and_is_shared_too(store: JobStore, submit: Submit) -> None:
    for client in "aaab":
        submit(client)
    urgent = [submit(client, priority="high") for client in "cccd"]
    assert [admitted.queue_position for admitted in urgent] == [0, 1, 2, 1]
    assert clients(store, order(store)) == "cdcc" + "abaa"


def test_what_was_put_back_is_next(store: JobStore, submit: Submit) -> None:
    ids = [submit("a").job_id for _ in range(3)]
    first = pop(store)
    submit("b", priority="high")
    store.redis.lpush(queue_key(CARD.queue), first or "")  # as RQ does at the end of a worker
    store.redis.rpush(queue_key(CARD.queue), "foreign")
    popped = order(store)
    assert [popped[0], *popped[2:]] == [*ids, "foreign"]


def test_what_is_canceled_or_deleted_costs_nothing(store: JobStore, submit: Submit) -> None:
    queues = Queues(store.redis)
    submit("b")
    unwanted = [submit("a", num_images=8).job_id for _ in range(4)]
    for job_id in unwanted[:3]:
        store.cancel(job_id)
        queues.cancel(job_id)
    store.purge(unwanted[3])
    queues.delete(unwanted[3])
    submit("b")
    submit("a")
    assert clients(store, order(store)) == "bab"
    assert keys_of_turns(store) == 0


def test_to_look_takes_nothing(store: JobStore, submit: Submit) -> None:
    """A worker that is full looks whose turn it is, and who comes then may yet be before that."""
    for _ in range(3):
        submit("a")
    pop(store)
    assert [store.next_turn(CARD.queue) for _ in range(2)] == ["a", "a"]
    late = submit("b").job_id
    assert store.next_turn(CARD.queue) == "b"
    assert order(store)[0] == late


def test_a_job_that_left_the_list_unseen_holds_up_nobody(store: JobStore, submit: Submit) -> None:
    """A stock RQ worker, or one of an older version, takes what is first in the list."""
    taken, left = submit("a").job_id, submit("a").job_id
    assert store.redis.lpop(queue_key(CARD.queue)) == taken.encode()
    assert order(store) == [left]
    assert store.next_turn(CARD.queue) is None


def test_what_has_no_record_has_its_turn_all_the_same(store: JobStore, submit: Submit) -> None:
    """It is the worker's to see what is wrong with it."""
    broken, gone, sound = (submit("a").job_id for _ in range(3))
    store.redis.delete(keys.job(gone), keys.job(broken))
    store.redis.set(keys.job(broken), "no hash")
    for job_id in (broken, gone):
        assert store.next_turn(CARD.queue) == ""
        assert store.redis.lpop(queue_key(CARD.queue)) == job_id.encode()
    assert store.next_turn(CARD.queue) == "a"
    assert order(store) == [sound]


def test_the_recount_forgets_who_has_had_all_it_asked_for(store: JobStore, submit: Submit) -> None:
    for i in range(20):
        submit(f"once-{i}")
    for _ in range(3):
        submit("a")
    for _ in range(22):
        pop(store)
    assert store.redis.hlen(keys.shares(CARD.queue, "normal")) == 21
    Janitor(store).recount()
    assert store.redis.hkeys(keys.shares(CARD.queue, "normal")) == [b"a"]


def test_estimates_are_of_a_clients_own_share(store: JobStore, submit: Submit) -> None:
    assert [submit("a").ahead for _ in range(3)] == [10, 20, 30]
    assert submit("b").ahead == 20
    assert submit("c", num_images=4).ahead == 40 + 30 + 10
    assert submit("b").ahead == 20 + 20 + 20
    assert submit("c", priority="high").ahead == 10 + 10 + 10  # its own normal one comes later


def keys_of_turns(store: JobStore) -> int:
    found: Any = store.redis.keys("ddpm:queue:*:turns:*") + store.redis.keys(
        "ddpm:queue:*:shares:*"
    )
    fields: Any = store.redis.hkeys(keys.queue(CARD.queue))
    return len(found) + sum(field.startswith(b"turn:") for field in fields)
