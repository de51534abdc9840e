"""What is printed, what browsers are told, what is left in Redis."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import click
import httpx
import pytest
from rq.registry import CanceledJobRegistry
from rq.serializers import JSONSerializer

from jobs.settings import load_settings, shown
from jobs.store.rq_queue import Queues
from jobs.store.writer import JobStore
from tests.app.conftest import Worker, until

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (f"redis://:{SECRET}@host:6379/0", "redis://:***@host:6379/0"),
        (f"rediss://me:{SECRET}@host/1?db=2", "rediss://me:***@host/1?db=2"),
        (f"redis://:{SECRET}:@:{SECRET}@host", "redis://:***@host"),
        (
            f"unix:///tmp/redis.sock?db=0&password={SECRET}",
            "unix:///tmp/redis.sock?db=0&password=***",
        ),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("unix:///tmp/redis.sock", "unix:///tmp/redis.sock"),
        (f"redis://:{SECRET}@[::1", "redis://:***@[::1"),
        (f"redis://:{SECRET}/{SECRET}@host", "redis://:***@host"),
        ("redis://me@host", "redis://me@host"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, expected: str) -> None:
    assert shown(url) == expected


AWAY = {"REDIS_URL": f"redis://:{SECRET}@127.0.0.1:1/0"}
WRONG = {"REDIS_URL": f"http://:{SECRET}@127.0.0.1:1/0"}


@pytest.mark.parametrize(("command", "variables"), [("worker", AWAY), ("up", AWAY), ("api", WRONG)])
def test_no_command_prints_the_password(command: str, variables: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ddpm", command, *([] if command == "worker" else ["--port", "0"])],
        env={**os.environ, **variables}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "***@127.0.0.1" in done.stderr
    assert SECRET not in done.stdout + done.stderr


def test_an_error_in_a_setting_repeats_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_API_KEYS", SECRET)
    with pytest.raises(click.ClickException, match="DDPM_SLOTS = 'many'"):
        load_settings(slots="many")
    for name in ("api_keys", "webhook_secret"):
        with pytest.raises(click.ClickException, match=f"DDPM_{name.upper()}") as caught:
            load_settings(**{name: [[SECRET]]})
        assert SECRET not in str(caught.value)


def test_what_browsers_are_told(client: httpx.Client, worker: Worker) -> None:
    job_id = client.post("/generate", json={}).json()["id"]
    worker.finish(job_id)
    for path in ("/", "/docs", "/healthz", "/jobs", f"/jobs/{job_id}/images/0.png", "/nothing"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert ("sandbox" in policy) == (path not in ("/", "/docs"))
        scripts = re.search(r"script-src ([^;]*)", policy)
        assert scripts is None or "unsafe" not in scripts[1]


def test_rq_keeps_nothing_longer_than_we_do(
    store: JobStore, worker: Worker, client: httpx.Client
) -> None:
    ids = [client.post("/generate", json={"ttl_s": 1}).json()["id"] for _ in range(4)]
    queues = Queues(store.redis)
    job = queues._fetch(ids[0])
    assert job is not None and job.result_ttl == job.failure_ttl == 1
    for job_id in ids[:2]:
        client.post(f"/jobs/{job_id}/cancel")
    # RQ ends the other two as its worker would: after our record has ended.
    for job_id in ids[2:]:
        worker.finish(job_id)
        job = queues._fetch(job_id)
        assert job is not None
        with store.redis.pipeline() as pipe:
            job.set_status("finished", pipeline=pipe)  # type: ignore[arg-type]
            job.cleanup(job.result_ttl, pipeline=pipe)
            pipe.execute()

    def left() -> list[bytes]:
        return [key for key in store.redis.scan_iter("rq:*") if any(i.encode() in key for i in ids)]

    until(lambda: not left())
    registry = CanceledJobRegistry("ddpm", connection=store.redis, serializer=JSONSerializer)
    until(lambda: registry.get_job_ids() == [])
    assert client.get(f"/jobs/{ids[0]}").json()["status"] == "expired"


def test_the_server_may_open_many_connections() -> None:
    code = (
        "import resource; from app.server import raise_file_limit; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2000)); raise_file_limit(); "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2000"
