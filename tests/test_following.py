"""One request, followed by its id through log, job and metrics of a real service."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from redis import Redis

import diffusion
from diffusion import ScheduleConfig
from tests.diffusion.networks import build_model
from tests.stack import Stack

OPENMETRICS = {"Accept": "application/openmetrics-text"}
KEY = "a-key-that-no-log-has"


@pytest.fixture(scope="module")
def stack(
    redis_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Stack, httpx.Client]]:
    folder = tmp_path_factory.mktemp("following")
    diffusion.save(build_model(schedule=ScheduleConfig(T=10)), folder / "models" / "tiny")
    with Redis.from_url(redis_server) as redis:
        redis.flushall()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.closing(Stack(redis_server, folder / "models", folder / "log")) as stack,
    ):
        patch.setenv("DDPM_API_KEYS", KEY)
        client = stack.api()
        client.headers["Authorization"] = f"Bearer {KEY}"
        stack.worker()
        yield stack, client


def lines(stack: Stack, logger: str, **fields: Any) -> list[dict[str, Any]]:
    """The JSON lines of the log by this logger that have these fields."""
    found = []
    for line in stack.log.read_text("utf-8").splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and entry.get("logger") == logger:
                found.append(entry)
    return [one for one in found if fields.items() <= one.items()]


def metrics(client: httpx.Client) -> dict[str, Any]:
    reply = client.get("/metrics", headers=OPENMETRICS)
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    return {family.name: family for family in text_string_to_metric_families(reply.text)}


def counted(families: dict[str, Any], name: str, **labels: str) -> float:
    """The `_count` of a histogram."""
    samples = families[name].samples
    return sum(s.value for s in samples if s.name == f"{name}_count" and s.labels == labels)


def test_a_request_is_followed(stack: tuple[Stack, httpx.Client]) -> None:
    service, client = stack
    headers = {"X-Request-ID": "follow-me", "Prefer": "wait=60"}
    body = {"num_images": 2, "steps": 5, "class_label": 1}
    job = client.post("/generate", json=body, headers=headers).json()
    assert job["status"] == "succeeded" and job["request_id"] == "follow-me"

    for logger in ("ddpm.jobs", "ddpm.requests"):
        service.until(lambda logger=logger: lines(service, logger, request_id="follow-me"))
    [asked] = lines(service, "ddpm.requests", request_id="follow-me")
    assert asked["job_id"] == job["id"] and asked["status"] == 200
    assert (asked["method"], asked["path"]) == ("POST", "/generate")
    assert 0 < asked["first_byte_s"] <= asked["seconds"] < 60
    [ran] = lines(service, "ddpm.jobs", request_id="follow-me")
    assert (ran["job_id"], ran["kind"], ran["model"]) == (job["id"], "generate", "tiny")
    assert (ran["ending"], ran["images"], ran["image_steps"]) == ("succeeded", 2, 10)
    assert ran["wait_s"] >= 0 and ran["run_s"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", ran["time"])

    found = metrics(client)
    labels = {"kind": "generate", "model": "tiny"}
    assert counted(found, "ddpm_job_wait_seconds", **labels) == 1
    assert counted(found, "ddpm_job_run_seconds", **labels) == 1
    exemplars = [
        sample.exemplar.labels["request_id"]
        for sample in found["ddpm_http_request_seconds"].samples
        if sample.exemplar and sample.labels["route"] == "/generate"
    ]
    assert exemplars == ["follow-me"]
    service.until(
        lambda: "ddpm_batch_rows" in (f := metrics(client)) and f["ddpm_batch_rows"].samples
    )
    batches = metrics(client)["ddpm_batch_rows"].samples
    total = {s.name: s.value for s in batches if s.name.endswith(("_sum", "_count"))}
    assert total["ddpm_batch_rows_sum"] == 10 and total["ddpm_batch_rows_count"] >= 5


def test_what_is_refused_is_counted_and_told(stack: tuple[Stack, httpx.Client]) -> None:
    service, client = stack
    client.post("/generate", json={"num_images": 65}, headers={"X-Request-ID": "too-many"})
    client.get("/nothing?secret=yes", headers={"X-Request-ID": "no-route"})
    client.get("/jobs", headers={"Authorization": "Bearer wrong", "X-Request-ID": "no-key"})
    service.until(lambda: lines(service, "ddpm.requests", request_id="no-key"))
    codes = {"too-many": "invalid_request", "no-route": "not_found", "no-key": "unauthorized"}
    for request_id, code in codes.items():
        [line] = lines(service, "ddpm.requests", request_id=request_id)
        assert line["code"] == code
    samples = metrics(client)["ddpm_http_rejections"].samples
    counts = {s.labels["code"]: s.value for s in samples if s.name.endswith("_total")}
    assert counts == dict.fromkeys(codes.values(), 1.0)  # and nothing else was refused


def test_no_key_and_no_picture_is_in_the_log(stack: tuple[Stack, httpx.Client]) -> None:
    service, client = stack
    picture = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAC0lEQVR4nGNgQAUAABAAATk3"
    client.post("/noise", json={"images": [picture], "t": [1]})
    job = client.post("/generate", json={"steps": 2}, headers={"Prefer": "wait=60"}).json()
    signed = client.get(f"/jobs/{job['id']}", params={"sign": 60}).json()["images"][0]["url"]
    assert httpx.get(str(client.base_url.join(signed))).status_code == 200
    service.until(lambda: lines(service, "ddpm.requests", path=signed.partition("?")[0]))
    text = service.log.read_text("utf-8")
    for secret in (KEY, picture[:30], "signature="):
        assert secret not in text
