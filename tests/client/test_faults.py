"""What the network and a busy service do to a client, and that no job is made twice or lost."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, formatdate
from typing import Any

import httpx
import pytest

import ddpm_client
from ddpm_client import AsyncClient, Client
from ddpm_client.errors import problem_of
from ddpm_client.flows import Retry
from tests.app.conftest import Worker, until
from tests.client.conftest import Impostor, Proxy, answer

Between = Callable[[str, list[int]], Proxy]
Impostors = Callable[..., Impostor]
QUEUES = answer("200 OK", '{"queues": [], "workers": []}')


def job_as(status: str, code: str = "200 OK") -> bytes:
    """An answer that is a job."""
    urls = {name: f"/jobs/j/{name}" for name in ("self", "events", "cancel")}
    fixed = {"id": "j", "kind": "generate", "model": "mnist", "request": {}, "urls": urls}
    return answer(code, json.dumps({**fixed, "status": status, "created_at": "2026-01-01T00:00Z"}))


def test_an_answer_that_is_lost_makes_no_second_job(client: httpx.Client, between: Between) -> None:
    proxy = between(str(client.base_url), [0, 40])  # nothing of the answer, then its first line
    with Client(proxy.url) as ours:
        job = ours.generate(wait=False)
        assert proxy.connections == 3
        assert [one.id for one in ours.jobs()] == [job.id]


def test_a_service_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with (
        Client(f"http://127.0.0.1:{port}", retries=1) as ours,
        pytest.raises(ddpm_client.ConnectionFailed, match=r"GET /models: .*refused"),
    ):
        ours.models()


def test_a_stream_goes_on_where_it_broke(
    client: httpx.Client, worker: Worker, between: Between
) -> None:
    with Client(str(client.base_url)) as plain:
        job = plain.generate(num_images=4, wait=False)
        worker.finish(job.id)
        whole = [(event.id, event.name) for event in plain.stream(job)]
    assert len(whole) > 5

    async def read(url: str) -> list[tuple[str | None, str]]:
        async with AsyncClient(url) as ours:
            return [(event.id, event.name) async for event in ours.stream(job.id)]

    # In the head, and in the middle of several events.
    proxy = between(str(client.base_url), [300, 700, 900])
    with Client(proxy.url) as ours:
        assert [(event.id, event.name) for event in ours.stream(job.id)] == whole
    assert proxy.connections == 4
    proxy = between(str(client.base_url), [300, 700, 900])
    assert asyncio.run(read(proxy.url)) == whole
    assert proxy.connections == 4


def test_a_stream_that_is_refused_is_an_error(client: httpx.Client) -> None:
    with Client(str(client.base_url)) as ours, pytest.raises(ddpm_client.NotFound):
        next(iter(ours.stream("0" * 28)))


def test_a_job_is_waited_for_and_canceled(client: httpx.Client) -> None:
    with Client(str(client.base_url)) as ours:
        job = ours.generate(wait=False)
        with pytest.raises(ddpm_client.WaitTimeout, match="is queued after 1 s") as late:
            job.wait(timeout=1)
        assert late.value.job.id == job.id
        with pytest.raises(ddpm_client.NotReady):
            job.image()
        assert job.cancel().status == "canceled"
        with pytest.raises(ddpm_client.JobCanceled) as canceled:
            job.wait()
        assert canceled.value.job.id == job.id
        assert ours.pause("ddpm").paused and ours.queues().queues[0].paused
        assert not ours.resume("ddpm").paused


def test_a_job_that_fails_says_why(client: httpx.Client) -> None:
    with (
        Client(str(client.base_url)) as ours,
        pytest.raises(ddpm_client.JobFailed, match="deadline") as failed,
    ):
        ours.generate(deadline_s=0.1)
    assert failed.value.code == "deadline_exceeded"


def test_a_handle_knows_what_was_heard_while_it_was_waited_for(
    client: httpx.Client, worker: Worker
) -> None:
    with Client(str(client.base_url)) as ours:
        job = ours.generate(wait=False)
        worker.start(job.id)
        with pytest.raises(ddpm_client.WaitTimeout):
            job.wait(timeout=0.5)
        assert job.status == "running" and job.progress is not None
        job = ours.generate(deadline_s=0.1, wait=False)
        with pytest.raises(ddpm_client.JobFailed):
            job.wait()
        assert job.ended and job.error is not None and job.error.code == "deadline_exceeded"

    async def fail(url: str) -> None:
        async with AsyncClient(url) as ours:
            job = await ours.generate(deadline_s=0.1, wait=False)
            with pytest.raises(ddpm_client.JobFailed):
                await job.wait()
            assert job.status == "failed"

    asyncio.run(fail(str(client.base_url)))


def test_a_handle_knows_what_was_heard_before_the_service_went(impostor: Impostors) -> None:
    gone = answer("500 Gone", "")
    there = impostor(job_as("queued", "202 Accepted"), job_as("running"), gone)
    with Client(there.url) as ours:
        job = ours.generate(wait=False)
        with pytest.raises(ddpm_client.ServerFault):
            job.wait()
        assert job.status == "running"


def test_a_full_queue_is_waited_out(serve: Callable[..., httpx.Client], worker: Worker) -> None:
    url = str(serve(max_queued_jobs=1).base_url)
    with Client(url, retries=0) as hasty:
        first = hasty.generate(wait=False)
        with pytest.raises(ddpm_client.QueueFull) as full:
            hasty.generate(wait=False)
        assert full.value.retry_after is not None
    with Client(url) as patient:
        made: list[Any] = []
        asking = threading.Thread(target=lambda: made.append(patient.generate(wait=False)))
        asking.start()
        worker.finish(first.id)
        asking.join()
        until(lambda: made)
        assert made[0].id != first.id


def test_keys(serve: Callable[..., httpx.Client], worker: Worker) -> None:
    url = str(serve(api_keys="secret").base_url)
    with Client(url) as stranger, pytest.raises(ddpm_client.Unauthorized) as refused:
        stranger.models()
    assert refused.value.code == "unauthorized"
    with Client(url, key="secret") as ours:
        assert ours.models()[0].name == "mnist"


def test_pages_are_turned(client: httpx.Client, worker: Worker) -> None:
    with Client(str(client.base_url)) as ours:
        made = [ours.generate(wait=False).id for _ in range(5)]
        worker.finish(made[0])
        assert [job.id for job in ours.jobs(page=2)] == made[::-1]
        assert [job.id for job in ours.jobs(status="queued", page=2)] == made[:0:-1]
        assert [job.id for job in ours.jobs(model="another")] == []


def test_the_same_key_gives_the_same_job(client: httpx.Client) -> None:
    with Client(str(client.base_url)) as ours:
        first = ours.generate(seed=1, wait=False, idempotency_key="k")
        assert ours.generate(seed=1, wait=False, idempotency_key="k").id == first.id
        with pytest.raises(ddpm_client.IdempotencyConflict):
            ours.generate(seed=2, wait=False, idempotency_key="k")


def test_pauses_grow_and_honour_what_was_asked() -> None:
    retry = Retry(times=3, patience_s=60)
    pauses = [retry.pause(tried) for tried in (1, 2, 3)]
    assert all(0 < (pause or 0) <= 0.25 * 2**i for i, pause in enumerate(pauses))
    assert retry.pause(4) is None
    assert 5 < (retry.pause(1, 5) or 0) <= 5.25
    assert retry.pause(1, 61) is None


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [
        ("7", 7, 7),
        ("-3", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        (formatdate(time.time() + 9000, usegmt=True), 5000, 9000),
        (format_datetime(datetime.now(UTC) + timedelta(seconds=9000)), 5000, 9000),
        ("Wed, 21 Oct 2015 07:28:00", None, None),  # of no time zone
        ("soon", None, None),
        ("nan", None, None),
        ("inf", None, None),
        ("Wed, 21 Oct 99999999999 07:28:00 GMT", None, None),
        ("", None, None),
    ],
    # Numbers: a test with the time in its name is another one in each process.
    ids=range(11),
)
def test_retry_after_as_seconds_and_as_a_date(
    said: str, least: float | None, most: float | None
) -> None:
    found = problem_of(httpx.Response(503, headers={"Retry-After": said})).retry_after
    if least is None or most is None:
        assert found is None
    else:
        assert found is not None and least <= found <= most


def test_a_date_is_waited_for(impostor: Impostors) -> None:
    """A proxy that says when it is back, and is."""
    back = time.time() + 2
    date = formatdate(back, usegmt=True)  # of whole seconds, so up to one earlier
    away = impostor(answer("503 Away", "", f"Retry-After: {date}"), QUEUES)
    with Client(away.url) as ours:
        assert ours.queues().queues == []
    assert time.time() >= back - 1


@pytest.mark.parametrize(
    "errors",
    ['[{"code": 1000, "message": "the origin is down"}]', '{"origin": "down"}', '"down"', "5"],
    ids=range(4),
)
def test_errors_of_a_gateway_pass_by_like_those_of_the_service(
    impostor: Impostors, errors: str
) -> None:
    away = impostor(answer("502 Bad Gateway", f'{{"code": null, "errors": {errors}}}'), QUEUES)
    with Client(away.url) as ours:
        assert ours.queues().queues == []
        assert len(away.asked) == 2
    for_ever = impostor(answer("502 Bad Gateway", f'{{"code": null, "errors": {errors}}}'))
    with Client(for_ever.url, retries=0) as ours:
        with pytest.raises(ddpm_client.Unavailable, match="502 Bad Gateway") as refused:
            ours.queues()
        assert (refused.value.code, refused.value.errors) == ("http_502", [])


def test_errors_that_are_understood_are_kept_beside_others() -> None:
    body = {"errors": [{"pointer": "/steps", "detail": "too many"}, {"message": "another"}]}
    found = problem_of(httpx.Response(422, json=body)).errors
    assert [(one.pointer, one.detail) for one in found] == [("/steps", "too many")]


PAGE = answer("200 OK", "<html>\ndata: sign in\n\n</html>", media="text/HTML; charset=utf-8")


@pytest.mark.parametrize("other", [PAGE, answer("200 OK", '{"status": "signed out"}')])
def test_a_good_answer_of_something_else_is_an_error(impostor: Impostors, other: bytes) -> None:
    asks: list[Callable[[Client], object]] = [
        lambda ours: ours.models(),
        lambda ours: ours.pause("ddpm"),
        lambda ours: ours.generate(wait=False),
        lambda ours: list(ours.jobs()),
        lambda ours: list(ours.stream("j")),
    ]
    with Client(impostor(other).url) as ours:
        for ask in asks:
            with pytest.raises(ddpm_client.ServerFault, match="200 OK, but no answer of") as fault:
                ask(ours)
            assert (fault.value.status, fault.value.code) == (200, "http_200")
    waited = impostor(job_as("queued", "202 Accepted"), other)
    with Client(waited.url) as ours, pytest.raises(ddpm_client.ServerFault, match="GET /jobs/j"):
        ours.generate()
    assert len(waited.asked) == 2


def test_a_page_is_no_file_and_deletes_nothing(impostor: Impostors) -> None:
    with Client(impostor(job_as("succeeded", "202 Accepted"), PAGE).url) as ours:
        job = ours.generate()
        for ask in (job.image, job.array, lambda: job.images, job.delete):
            with pytest.raises(ddpm_client.ServerFault, match="no answer of this service"):
                ask()


def test_a_page_is_no_stream_for_the_twin_either(impostor: Impostors) -> None:
    async def watch(url: str) -> None:
        async with AsyncClient(url) as ours:
            with pytest.raises(ddpm_client.ServerFault, match="no answer of this service"):
                await anext(ours.stream("j"))

    asyncio.run(watch(impostor(PAGE).url))


def test_an_answer_that_cannot_be_unpacked_is_a_failed_connection(impostor: Impostors) -> None:
    broken = answer("200 OK", "no gzip", "Content-Encoding: gzip")
    events = answer("200 OK", "none", "Content-Encoding: gzip", media="text/event-stream")
    failed = ddpm_client.ConnectionFailed
    with (
        Client(impostor(broken).url, retries=0) as ours,
        pytest.raises(failed, match="GET /models"),
    ):
        ours.models()
    with (
        Client(impostor(events).url, retries=0) as ours,
        pytest.raises(failed, match="the events of job j"),
    ):
        list(ours.stream("j"))

    async def ask(url: str) -> None:
        async with AsyncClient(url, retries=0) as ours:
            with pytest.raises(failed):
                await ours.models()

    asyncio.run(ask(impostor(broken).url))


AWAY = answer("503 Away", '{"code": "store_unavailable", "detail": "no store"}', "Retry-After: 9")
NONE = b""


def test_a_timeout_is_told_as_it_was_given(client: httpx.Client) -> None:
    with (
        Client(str(client.base_url)) as ours,
        pytest.raises(ddpm_client.WaitTimeout, match=r"is queued after 0\.3 s$"),
    ):
        ours.generate(timeout=0.3)


def test_a_pause_ends_with_the_timeout(impostor: Impostors) -> None:
    away = impostor(job_as("queued", "202 Accepted"), AWAY)
    with Client(away.url) as ours:
        job = ours.generate(wait=False)
        with pytest.raises(ddpm_client.WaitTimeout, match=r"is queued after 1 s$") as late:
            job.wait(timeout=1)
        assert isinstance(late.value.__cause__, ddpm_client.Unavailable)
        assert len(away.asked) == 2  # none earlier than the service said


def test_no_job_is_asked_for_after_the_timeout(impostor: Impostors) -> None:
    away = impostor(AWAY)
    with Client(away.url) as ours:
        with pytest.raises(ddpm_client.Unavailable, match="no store"):
            ours.generate(timeout=5)
        assert len(away.asked) == 1


def test_a_later_attempt_is_held_for_what_is_left(impostor: Impostors) -> None:
    soon = answer("503 Away", "", "Retry-After: 1")
    away = impostor(soon, job_as("succeeded", "202 Accepted"))
    with Client(away.url) as ours:
        ours.generate(timeout=3.9)
    first, second = (int(re.findall(r"prefer: wait=(\d+)", a.lower())[0]) for a in away.asked)
    assert first <= 3 and second <= 2


def test_a_service_that_hangs_does_not_outlast_the_timeout(impostor: Impostors) -> None:
    hung = impostor(job_as("queued", "202 Accepted"), NONE)
    with Client(hung.url) as ours:
        job = ours.generate(wait=False)
        with pytest.raises(ddpm_client.WaitTimeout, match=r"after 0\.5 s$"):
            job.wait(timeout=0.5)
        assert len(hung.asked) == 2

    async def wait(url: str) -> None:
        async with AsyncClient(url, retries=0) as ours:
            job = await ours.job("j")
            with pytest.raises(ddpm_client.WaitTimeout, match=r"after 0\.5 s$") as late:
                await job.wait(timeout=0.5)
            assert isinstance(late.value.__cause__, ddpm_client.ConnectionFailed)

    asyncio.run(wait(impostor(job_as("queued"), NONE).url))
