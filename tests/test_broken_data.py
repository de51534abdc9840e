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
from redis.exceptions import ResponseError

import diffusion
from diffusion import ScheduleConfig
from jobs.store import keys
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
            stack.redis.hset(key, "spec", json.dumps({"kind": "restore", "model": "tiny", "x": 1}))
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
    reply = client.post("/generate", json={"steps": 4, **fields})
    assert reply.status_code == 202, reply.text
    return str(reply.json()["id"])


def all_is_well(client: httpx.Client, worker: subprocess.Popen[bytes]) -> None:
    """Jobs are made, and every page of the service answers."""
    reply = client.post("/generate", json={"steps": 4, "seed": 1}, headers=WAIT)
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


def _states(stack: Stack) -> set[bytes | None]:
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
        found: bytes | None = stack.redis.hget(keys.job(job_id), "status")
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
    stack.until(lambda: Queues(stack.redis).statuses([broken]) == ["failed"])
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
        assert shown["kind"] == ("restore" if how == "unknown kind" else "generate")
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
