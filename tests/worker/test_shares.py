"""One client's many jobs beside another's one: a real server, a real worker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from jobs.settings import Settings
from jobs.states import ACTIVE
from tests.app.conftest import serving

Service = Any  # of conftest.py; tests cannot import it
SLOTS = 8
CLIENTS = {name: {"Authorization": f"Bearer {name}-key"} for name in ("many", "one")}


@pytest.fixture
def shared(service: Service, nursery: Any) -> Iterator[httpx.Client]:
    """A server with two keys; jobs step eight at once."""
    nursery.worker(service, DDPM_SLOTS=str(SLOTS))
    settings = Settings(
        redis_url=service.url,
        models=service.models,
        api_keys=",".join(f"{name}-key" for name in CLIENTS),  # type: ignore[arg-type]
    )
    with serving(settings) as client:
        yield client


def post(client: httpx.Client, who: str, **body: Any) -> str:
    reply = client.post("/generate", json=body, headers=CLIENTS[who])
    assert reply.status_code == 202, reply.text
    return str(reply.json()["id"])


def test_one_small_job_is_among_the_next_few_behind_five_hundred(
    shared: httpx.Client, service: Service
) -> None:
    many = [post(shared, "many", steps=60) for _ in range(500)]
    service.until(lambda: any(service.record(job_id).done for job_id in many))
    job_id = post(shared, "one", steps=60)
    one = service.ended(job_id)
    ended = [record for record in map(service.record, many) if record.completed_at]
    between = [r for r in ended if one.created_at < r.completed_at < one.completed_at]
    # Those that were being stepped, what fits beside it in the same time, and as much for delay.
    assert len(between) < 4 * SLOTS, (len(ended), len(between))
    assert len(ended) < 500


def test_a_fresh_worker_estimates_what_it_takes(shared: httpx.Client, service: Service) -> None:
    """By the rate of full batches, though it has run none for anybody."""
    assert shared.post("/queue/ddpm/pause", headers=CLIENTS["one"]).status_code == 200
    service.until(lambda: service.redis.exists("ddpm:rates:tiny"))
    post(shared, "many", steps=500)  # of another client: to be reckoned with, but no more than that
    ids = [post(shared, "one", steps=100, num_images=4) for _ in range(12)]
    told = shared.get(f"/jobs/{ids[-1]}", headers=CLIENTS["one"]).json()["eta_s"]
    began = time.time()
    shared.post("/queue/ddpm/resume", headers=CLIENTS["one"])
    took = service.ended(ids[-1]).completed_at - began
    assert took / 20 < told < 4 * took  # a machine that is busy makes it later


def test_a_client_that_fills_every_seat_locks_nobody_out(
    shared: httpx.Client, service: Service
) -> None:
    long = {"steps": 1000, "num_images": 8, "corrector_steps": 9}
    many = [post(shared, "many", **long) for _ in range(4 * SLOTS + 4)]
    service.until(lambda: service.store.workers()[0].active >= 4 * SLOTS * 8)
    service.ended(post(shared, "one", steps=20))
    assert all(service.record(job_id).status in ACTIVE for job_id in many)
