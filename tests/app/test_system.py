from __future__ import annotations

import base64
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from app.auth import PublicWithoutKeys, check_bind
from app.main import create_app
from jobs.kinds.table import KINDS
from jobs.settings import Settings
from jobs.store import keys
from jobs.store.workers import WorkerInfo
from jobs.store.writer import JobStore
from tests.app.conftest import CARD, Worker, X, png

CREATE = ("/generate", "/noise", "/reconstruct", "/interpolate", "/likelihood")


def test_models_and_schedule(client: httpx.Client, store: JobStore) -> None:
    [model] = client.get("/models").json()["data"]
    assert model["name"] == "mnist" and model["T"] == 1000 and model["guidance"]
    assert "betas" not in model and not model["served"]
    store.heartbeat(WorkerInfo("w", "ddpm", ("mnist",)), rates={})
    assert client.get("/models/mnist").json()["served"]
    assert model["steps"] == 100 and model["sampling"]["sampler"] == "ddpm"
    schedule = client.get("/models/mnist/schedule").json()
    betas = np.array(CARD.betas)
    bars = np.cumprod(1 - betas)
    assert schedule["t"][0] == 1 and schedule["t"][-1] == 1000
    np.testing.assert_allclose(schedule["beta"], betas)
    np.testing.assert_allclose(schedule["alpha_bar"], bars)
    np.testing.assert_allclose(schedule["snr"], bars / (1 - bars), rtol=1e-9)
    previous = np.append(1.0, bars[:-1])
    expected = betas * (1 - previous) / (1 - bars)
    np.testing.assert_allclose(schedule["posterior_variance"], expected, rtol=1e-9)


def test_slots_of_workers_where_they_say_them(client: httpx.Client, store: JobStore) -> None:
    store.heartbeat(WorkerInfo("new", "ddpm", ("mnist",), active=3), rates={}, slots=64)
    store.heartbeat(WorkerInfo("old", "ddpm", ("mnist",)), rates={})
    store.redis.hset(keys.SLOTS, "old", "many")  # of no release: told of, and left out
    workers = client.get("/queue").json()["workers"]
    assert [(w["name"], w["active"], w["slots"]) for w in workers] == [
        ("new", 3, 64),
        ("old", 0, None),
    ]


def test_readiness_and_metrics(
    store: JobStore, worker: Worker, serve: Callable[..., httpx.Client]
) -> None:
    client = serve()
    assert client.get("/readyz").json() == {"status": "ready", "models": 1, "workers": 0}
    job_id = client.post("/generate", json={"steps": 10}).json()["id"]
    client.post("/generate", json={"steps": 10})
    started = worker.start(job_id)
    worker.progress(started, 10, 1)
    worker.image(started)
    store.succeed(job_id, "e")
    text = client.get("/metrics").text
    for line in (
        'ddpm_queue_jobs{queue="ddpm",status="queued"} 1.0',
        'ddpm_queue_jobs{queue="ddpm",status="running"} 0.0',
        'ddpm_queue_image_steps{queue="ddpm"} 10.0',
        'ddpm_jobs_total{status="succeeded"} 1.0',
        'ddpm_jobs_admitted_total{kind="generate"} 2.0',
        "ddpm_image_steps_total 10.0",
        "ddpm_output_bytes 512.0",
        'ddpm_http_requests_total{method="POST",route="/generate",status="202"} 2.0',
    ):
        assert line in text, line


def test_keys(store: JobStore, serve: Callable[..., httpx.Client]) -> None:
    client = serve(api_keys="first,second")
    for path in ("/healthz", "/readyz", "/", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200
    for path in ("/jobs", "/metrics", "/models", "/nothing"):
        reply = client.get(path)
        assert reply.status_code == 401, path
        assert reply.json()["code"] == "unauthorized"
        assert reply.headers["www-authenticate"] == "Bearer"
    for header in ("Bearer third", "Basic first", "Bearer", "first"):
        assert client.get("/jobs", headers={"Authorization": header}).status_code == 401
    for key in ("first", "second"):
        headers = {"Authorization": f"Bearer {key}"}
        assert client.get("/jobs", headers=headers).status_code == 200
    # One client's Idempotency-Key is not another's.
    ids = set()
    for key in ("first", "second"):
        headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "k"}
        ids.add(client.post("/generate", json={}, headers=headers).json()["id"])
    assert len(ids) == 2


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_public_address_needs_keys(host: str) -> None:
    with pytest.raises(PublicWithoutKeys, match="DDPM_API_KEYS"):
        check_bind(host, Settings())
    check_bind(host, Settings(api_keys="k"))  # type: ignore[arg-type]
    check_bind(host, Settings(allow_public_without_keys=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    check_bind(host, Settings())


def test_request_ids_are_echoed(client: httpx.Client) -> None:
    reply = client.get("/nothing", headers={"X-Request-ID": "abc-1"})
    assert reply.headers["x-request-id"] == reply.json()["request_id"] == "abc-1"
    odd = client.get("/healthz", headers={"X-Request-ID": "a b"})
    assert len(odd.headers["x-request-id"]) == 16


def test_openapi_is_complete() -> None:
    schema = create_app(Settings()).openapi()
    schemas = schema["components"]["schemas"]
    routes = {
        (method, path): operation
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    }
    assert len(routes) == 22 + len(KINDS)  # one route a kind
    for route, operation in routes.items():
        good = [r for status, r in operation["responses"].items() if status.startswith("2")]
        assert good and operation.get("description"), route
        for status, response in operation["responses"].items():
            for content in response.get("content", {}).values():
                shape = content["schema"]
                named = schemas.get(shape.get("$ref", "").removeprefix("#/components/schemas/"), {})
                is_file = shape.get("format") == "binary"
                assert is_file or {"example", "examples"} & {*content, *named}, (route, status)
            if not status.startswith("2"):
                examples = response["content"]["application/problem+json"]["examples"]
                for code, example in examples.items():
                    assert example["value"]["code"] == code
                    assert example["value"]["status"] == int(status)
    for reference in references(schema):
        assert reference.removeprefix("#/components/schemas/") in schemas, reference
    stream = routes["get", "/jobs/{job_id}/events"]["responses"]["200"]
    events = stream["content"]["text/event-stream"]["x-events"]
    assert set(events) == {"status", "progress", "snapshot", "image", "done", "error", "reset"}
    assert all(event["example"] for event in events.values())
    for path in CREATE:
        post = routes["post", path]["requestBody"]["content"]["application/json"]
        assert post["examples"] and all(example["value"] for example in post["examples"].values())


def references(node: Any) -> list[str]:
    if isinstance(node, dict):
        here = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return here + [ref for value in node.values() for ref in references(value)]
    if isinstance(node, list):
        return [ref for value in node for ref in references(value)]
    return []


def test_every_documented_example_is_accepted(client: httpx.Client, worker: Worker) -> None:
    """With real pictures, arrays and ids where the document abbreviates them."""
    schema = client.get("/openapi.json").json()
    job_id = client.post("/generate", json={"num_images": 2}).json()["id"]
    started = worker.start(job_id)
    worker.snapshot(started, 505)
    for index in range(2):
        worker.snapshot(started, 1000, index=index)
    for path in CREATE:
        body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for name, example in body["examples"].items():
            value = dict(example["value"])
            if "images" in value:
                value["images"] = [base64.b64encode(png()).decode()] * len(value["images"])
            if "source" in value:
                value["source"]["job"] = job_id
            if "x_t" in value:
                buffer = io.BytesIO()
                np.save(buffer, X)
                value["x_t"] = base64.b64encode(buffer.getvalue()).decode()
            reply = client.post(path, json=value)
            assert reply.status_code == 202, (path, name, reply.text)


def test_importing_the_api_loads_no_torch() -> None:
    code = "import sys, app.main, app.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
