"""Data that others wrote into the store: each item fails, or waits, alone.

A real API, a real worker and a real Redis; everything else goes on being served.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from redis.exceptions import ResponseError

import diffusion
from app.problems import CODES, Problem, from_error, read_json
from diffusion import ScheduleConfig
from jobs.store import keys
from jobs.store.events import JobFault
from jobs.store.records import FORMAT
from jobs.store.rq_queue import Queues
from tests.diffusion.networks import build_model
from tests.stack import Stack

WAIT = {"Prefer": "wait=60"}
Spoiled = tuple[Stack, httpx.Client, subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def running(redis_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spoiled]:
    """An API and one worker, which live as long as this module."""
    place = tmp_path_factory.mktemp("broken")
    diffusion.save(build_model(schedule=ScheduleConfig(T=1000)), place / "models" / "tiny")
    stack = Stack(redis_server, place / "models", place / "log")
    stack.redis.flushall()
    client, worker = stack.api(), stack.worker()
    yield stack, client, worker
    stack.close()


def spoil(stack: Stack, job_id: str, how: str) -> None:
    """What each sort of broken record looks like."""
    key = keys.job(job_id)
    spec = json.loads(stack.redis.hget(key, "spec") or b"{}")
    match how:
        case "unknown field":
            stack.redis.hset(key, "spec", json.dumps({**spec, "style": "baroque"}))
        case "unknown value":
            stack.redis.hset(key, "spec", json.dumps({**spec, "sampler": "heun"}))
        case "unknown kind":
            stack.redis.hset(key, "spec", json.dumps({"kind": "paint", "model": "tiny", "x": 1}))
        case "future format":
            stack.redis.hset(key, "format", "99")
        case "missing field":
            stack.redis.hdel(key, "shape")
        case "missing queue":
            stack.redis.hdel(key, "queue", "client")
        case "missing spec field":
            spec.pop("kind")
            stack.redis.hset(key, "spec", json.dumps(spec))
        case "no JSON":
            stack.redis.hset(key, "spec", b"\xff{")
        case "nonsense":
            stack.redis.hset(key, mapping={"work": "many", "created_at": "yesterday"})
        case "unknown status":
            stack.redis.hset(key, "status", "asleep")
        case "no hash":
            stack.redis.delete(key)
            stack.redis.set(key, "what is this")
        case "empty":
            stack.redis.delete(key)
            stack.redis.hset(key, "a", "b")


NEWER = ("unknown field", "unknown value", "unknown kind", "future format")
BROKEN = (
    "missing field",
    "missing queue",
    "missing spec field",
    "no JSON",
    "nonsense",
    "unknown status",
    "no hash",
    "empty",
)


def waiting_job(client: httpx.Client, **fields: Any) -> str:
    reply = client.post("/generate", json={"model": "tiny", "steps": 4, **fields})
    assert reply.status_code == 202, reply.text
    return str(reply.json()["id"])


def all_is_well(client: httpx.Client, worker: subprocess.Popen[bytes]) -> None:
    """Jobs are made, and every page of the service answers."""
    reply = client.post("/generate", json={"model": "tiny", "steps": 4, "seed": 1}, headers=WAIT)
    assert reply.status_code == 200 and reply.json()["status"] == "succeeded", reply.text
    for path in ("/jobs", "/jobs?status=queued", "/readyz", "/queue", "/models", "/metrics"):
        reply = client.get(path)
        assert reply.status_code == 200, (path, reply.text)
    assert worker.poll() is None


def pause(stack: Stack, how: str = "set") -> None:
    """RQ's suspension: the worker takes nothing."""
    key = "rq:suspended"
    if how == "set":
        stack.redis.set(key, 1)
        stack.until(lambda: _states(stack) == {b"suspended"})
    else:
        stack.redis.delete(key)


def _states(stack: Stack) -> set[Any]:
    names = stack.redis.smembers("rq:workers")
    return {stack.redis.hget(name, "state") for name in names}


@pytest.fixture(scope="module")
def spoiled(running: Spoiled) -> dict[str, str]:
    """A job of each sort, all taken in before any other; sort → id."""
    stack, client, _ = running
    pause(stack)
    ids = {how: waiting_job(client, seed=5) for how in (*BROKEN, *NEWER)}
    for how, job_id in ids.items():
        spoil(stack, job_id, how)
    listed = {job["id"]: job for job in client.get("/jobs").json()["data"]}
    for how in BROKEN:
        assert listed[ids[how]]["error"]["code"] == "broken_record", how
        assert client.get(f"/jobs/{ids[how]}").json()["error"]["code"] == "broken_record", how
    for how in NEWER:
        assert listed[ids[how]]["status"] == "queued" and "error" not in listed[ids[how]], how
    pause(stack, "end")
    return ids


def status(stack: Stack, job_id: str) -> bytes | None:
    try:
        found: Any = stack.redis.hget(keys.job(job_id), "status")
    except ResponseError:  # no hash, so far
        found = None
    return found


def test_the_others_are_served(running: Spoiled, spoiled: dict[str, str]) -> None:
    _, client, worker = running
    for _ in range(3):
        all_is_well(client, worker)


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_record_fails_alone_and_is_told_of(
    running: Spoiled, spoiled: dict[str, str], how: str
) -> None:
    stack, client, worker = running
    broken = spoiled[how]
    stack.until(lambda: status(stack, broken) == b"failed", worker)
    shown = client.get(f"/jobs/{broken}").json()
    assert shown["status"] == "failed" and shown["error"]["code"] == "broken_record"
    # A record without a ttl_s is over at once, and with it goes what RQ keeps of the job.
    stack.until(lambda: Queues(stack.redis).statuses([broken])[0] in ("failed", None))
    assert broken in stack.log.read_text()
    assert client.delete(f"/jobs/{broken}").status_code == 204
    assert client.get(f"/jobs/{broken}").status_code == 404
    assert not [key for key in stack.redis.keys("ddpm:*") if broken.encode() in key]


def test_records_of_a_newer_version_wait_for_one(running: Spoiled, spoiled: dict[str, str]) -> None:
    """They are put back again and again, and that counts as no attempt."""
    stack, client, worker = running
    newer = {how: spoiled[how] for how in NEWER}
    ids, queues = list(newer.values()), Queues(stack.redis)
    stack.until(lambda: set(queues.statuses(ids)) == {"queued"}, worker)  # put back
    stack.until(lambda: set(queues.statuses(ids)) == {"started"}, worker)  # and seen again
    for how, job_id in newer.items():
        shown = client.get(f"/jobs/{job_id}").json()
        assert shown["status"] == "queued" and "error" not in shown and "started_at" not in shown
        assert shown["kind"] == ("paint" if how == "unknown kind" else "generate")
        asked = json.loads(stack.redis.hget(keys.job(job_id), "spec") or b"")
        assert asked.items() <= shown["request"].items()
        assert stack.redis.hget(keys.job(job_id), "attempts") is None
        assert stack.log.read_text().count(f"the record of job {job_id}") == 1


def test_a_newer_job_can_be_canceled(running: Spoiled, spoiled: dict[str, str]) -> None:
    stack, client, worker = running
    newer = spoiled["unknown kind"]
    assert client.post(f"/jobs/{newer}/cancel").json()["status"] == "canceled"
    stack.until(lambda: Queues(stack.redis).statuses([newer]) == ["canceled"], worker)


def test_who_can_read_a_newer_job_runs_it(running: Spoiled, spoiled: dict[str, str]) -> None:
    stack, client, worker = running
    newer = spoiled["future format"]
    stack.redis.hset(keys.job(newer), "format", FORMAT)  # as good as a worker that can
    stack.until(lambda: status(stack, newer) == b"succeeded", worker)
    all_is_well(client, worker)


def test_strange_entries_beside_the_records_harm_nobody(running: Spoiled) -> None:
    """Model cards, heartbeats, rates and what is due: each is read alone, or not at all."""
    stack, client, worker = running
    card = json.loads(stack.redis.hget(keys.MODELS, "tiny") or b"")
    newer = {**card, "name": "newer", "mood": 1, "sampling": {**card["sampling"], "style": "b"}}
    cards: Any = {"newer": json.dumps(newer), "torn": "{", "odd": '{"name": 5}', "list": "[]"}
    stack.redis.hset(keys.MODELS, mapping=cards)
    stack.redis.hset(keys.MODELS_MORE, mapping={"newer": "{", "torn": "{", "none": "[]"})
    beat = json.loads(stack.redis.hvals(keys.WORKERS)[0])
    beats: Any = {
        "newer": json.dumps({**beat, "name": "newer", "mood": 1}),
        "torn": "{",
        "list": "[]",
    }
    stack.redis.hset(keys.WORKERS, mapping=beats)
    rates: Any = {"torn": "fast", "odd": '["a", 1]', "list": "{}", "more": "[1, 2, 3]"}
    stack.redis.hset(keys.rates("tiny"), mapping=rates)
    stack.redis.zadd(keys.DUE, {"garbage": 0, "forget:nobody": 0, "expire:": 0})
    all_is_well(client, worker)

    def models() -> set[str]:
        return {model["name"] for model in client.get("/models").json()["data"]}

    stack.until(lambda: models() == {"tiny", "newer"})  # an API remembers them for a second
    assert client.get("/models/newer").json()["T"] == 1000
    stack.until(lambda: stack.redis.zrangebyscore(keys.DUE, "-inf", 1) == [])
    another = stack.worker()  # reads all of it before it serves
    stack.stop(another)
    stack.redis.hdel(keys.MODELS, *cards)
    stack.redis.hdel(keys.MODELS_MORE, *cards, "none")
    stack.redis.hdel(keys.WORKERS, *beats)


def test_a_counter_that_holds_no_number_begins_again(running: Spoiled) -> None:
    """Each of the counters that all jobs share, with each sort of nonsense."""
    stack, client, worker = running
    all_is_well(client, worker)
    stack.until(lambda: bool(stack.redis.exists(keys.BATCHES)), worker)
    hashes = (keys.TOTALS, keys.SECONDS, keys.BATCHES, keys.CLIENTS, keys.queue("ddpm"))
    nonsense: Any
    for nonsense in ("nine", "1e999", "9" * 19, b"\xff"):
        stack.redis.set(keys.ADMISSIONS, nonsense)
        for name in (*hashes, keys.shares("ddpm", "normal"), keys.shares("ddpm", "high")):
            fields = (*stack.redis.hkeys(name), b"strange", b"address 127.0.0.1", b"\xfe")
            stack.redis.hset(name, mapping=dict.fromkeys(fields, nonsense))
        stack.redis.hset(keys.queue("ddpm"), mapping={"turn:high": nonsense, "turn:normal": "x"})
        stack.redis.hset(keys.SUSPECTS, "strange", nonsense)
        all_is_well(client, worker)
        stack.until(lambda: (stack.redis.hget(keys.BATCHES, "tiny:sum") or b"0").isdigit(), worker)
    assert int(stack.redis.hget(keys.TOTALS, "jobs_succeeded") or 0) >= 1
    stack.redis.delete(*hashes)


def test_a_strange_idempotency_record_is_none(running: Spoiled) -> None:
    stack, client, _ = running
    asked: dict[str, Any] = {
        "json": {"model": "tiny", "steps": 2},
        "headers": {"Idempotency-Key": "mine"},
    }
    first = client.post("/generate", **asked)
    [key] = stack.redis.keys("ddpm:idempotency:*")
    stack.redis.set(key, "{}")
    second = client.post("/generate", **asked)
    assert (first.status_code, second.status_code) == (202, 202)
    assert second.json()["id"] != first.json()["id"]
    again = client.post("/generate", **asked)
    assert again.json()["id"] == second.json()["id"]


@pytest.mark.slow
def test_a_strange_event_stream_holds_up_no_other(running: Spoiled) -> None:
    """One key that is no stream fails the XREAD that waits for all of them."""
    stack, client, worker = running
    pause(stack)
    spoiled_job, other = waiting_job(client), waiting_job(client)
    stack.redis.xadd(keys.events(other), {"what": "is this"})
    stack.redis.xadd(keys.events(other), {"event": "a\nb", "data": "c\n\nd"})
    with client.stream("GET", f"/jobs/{spoiled_job}/events") as stream:
        lines = stream.iter_lines()
        assert any("queued" in line for line in lines)  # it is being followed
        stack.redis.delete(keys.events(spoiled_job))
        stack.redis.set(keys.events(spoiled_job), "no stream")
        pause(stack, "end")
        with client.stream("GET", f"/jobs/{other}/events") as whole:
            text = whole.read().decode()
    assert "event: done" in text and "event: unknown" in text and "c\n" not in text
    stack.until(lambda: status(stack, spoiled_job) in (b"succeeded", b"failed"), worker)
    all_is_well(client, worker)


@pytest.mark.slow
def test_a_job_that_rq_cannot_read_fails_alone(running: Spoiled) -> None:
    stack, client, worker = running
    pause(stack)
    spoiled_jobs = [waiting_job(client), waiting_job(client)]
    stack.redis.hset(f"rq:job:{spoiled_jobs[0]}", "created_at", "yesterday")
    stack.redis.delete(f"rq:job:{spoiled_jobs[1]}")
    stack.redis.set(f"rq:job:{spoiled_jobs[1]}", "no hash")
    pause(stack, "end")
    all_is_well(client, worker)
    for job_id in spoiled_jobs:
        stack.until(lambda j=job_id: status(stack, j) == b"failed", worker)
        assert client.get(f"/jobs/{job_id}").json()["error"]["code"] == "broken_record"
        assert not stack.redis.exists(f"rq:job:{job_id}")


def test_an_error_of_our_data_is_not_the_clients() -> None:
    """Only what a request itself holds is answered with 422."""
    with pytest.raises(ValidationError) as caught:
        JobFault.model_validate_json("{}")
    assert from_error(caught.value) is None  # which becomes a 500
    with pytest.raises(Problem) as refused:
        read_json(JobFault, b"{}")
    assert CODES[refused.value.code] == 422
