from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from jobs.store.writer import JobStore
from tests.app.conftest import CARD, Worker, later, png, when_queued

PICTURES = sorted((Path(__file__).parents[1] / "pictures").glob("*.[jp][pn]g"))


def test_generate_is_taken_in_at_once(client: httpx.Client, store: JobStore) -> None:
    reply = client.post("/generate", json={"class_label": 7})
    assert reply.status_code == 202
    job = reply.json()
    assert reply.headers["location"] == job["urls"]["self"] == f"/jobs/{job['id']}"
    assert job["status"] == "queued" and job["queue_position"] == 0
    request = job["request"]
    assert request["steps"] == 100 and request["sampler"] == "ddpm" and request["model"] == "mnist"
    assert 0 <= request["seed"] < 2**53 and request["ttl_s"] == 86_400
    rq_job = Job.fetch(job["id"], connection=store.redis, serializer=JSONSerializer)
    assert rq_job.func_name == "worker.run.run_job" and rq_job.args == [job["id"]]
    assert rq_job.timeout == -1 and rq_job.retries_left == 1000
    assert rq_job.enqueue_at_front_on_retry
    assert client.get(job["urls"]["self"]).json()["request"] == request


def test_too_few_steps_are_taken_in_and_warned_of(client: httpx.Client) -> None:
    asked = {"sampler": "langevin", "steps": 20}
    made = client.post("/generate", json=asked).json()
    detail = "20 evaluations are few for langevin, which wants 200 or more here"
    assert made["warnings"] == [{"pointer": "/steps", "detail": detail}]
    assert client.get(f"/jobs/{made['id']}").json()["warnings"] == made["warnings"]
    assert "warnings" not in client.post("/generate", json={}).json()


def test_a_preset_is_asked_for_by_name(client: httpx.Client) -> None:
    [model] = client.get("/models").json()["data"]
    fast = model["presets"]["fast"]
    made = client.post("/generate", json={"preset": "fast", "num_images": 2}).json()
    assert made["request"]["preset"] is None
    for field in ("sampler", "steps", "spacing"):
        assert made["request"][field] == fast[field]
    assert fast["evaluations"] == fast["steps"]
    refused = client.post("/generate", json={"preset": "fast", "steps": 3})
    assert refused.status_code == 422 and "/steps" in refused.text


def test_high_priority_goes_to_the_front(client: httpx.Client, store: JobStore) -> None:
    ids = [client.post("/generate", json={}).json()["id"] for _ in range(2)]
    first = client.post("/generate", json={"priority": "high"}).json()["id"]
    queue = Queue("ddpm", connection=store.redis, serializer=JSONSerializer)
    assert queue.job_ids == [first, *ids]


@pytest.mark.parametrize(
    ("body", "pointer", "says"),
    [
        ({"num_image": 1}, "/num_image", "no such field"),
        ({"num_images": 65}, "/num_images", "at most 64"),
        ({"num_images": 0}, "/num_images", "greater than or equal to 1"),
        ({"num_images": "2"}, "/num_images", "valid integer"),
        ({"steps": 1001}, "/steps", "T = 1000"),
        ({"seed": 2**53}, "/seed", "less than or equal"),
        ({"model": "cats"}, "/model", "must be one of mnist"),
        ({"class_label": 10}, "/class_label", "0..9"),
        ({"guidance": 2.0}, "/guidance", "class_label"),
        ({"eta": 0.5}, "/eta", "ddim"),
        ({"sampler": "euler"}, "/sampler", "ddpm, ddim, dpmpp_2m, langevin"),
        ({"sampler": ""}, "/sampler", "ddpm, ddim, dpmpp_2m, langevin"),
        ({"num_images": None}, "/num_images", "null: Input should be"),
        ({"snapshots": {"at": []}}, "/snapshots/at", "[]: List should have at least 1 item"),
        ({"webhook_url": "http://"}, "/webhook_url", "http://: must be http(s)://HOST"),
        ({"webhook_url": "http:///x"}, "/webhook_url", "must be http(s)://HOST"),
        ({"webhook_url": "http://a:99999/"}, "/webhook_url", "PORT of 1..65535"),
        ({"webhook_url": "http://a:0/"}, "/webhook_url", "PORT of 1..65535"),
        ({"webhook_url": "https://exa mple.com"}, "/webhook_url", "must be http(s)://HOST"),
        ({"webhook_url": "http://[::1/"}, "/webhook_url", "must be http(s)://HOST"),
        ({"sampler": "ddim", "variance": "small"}, "/variance", "ddpm"),
        ({"variance": "learned"}, "/variance", "no learned variance"),
        ({"snapshots": {"at": [0]}}, "/snapshots/at/0", "greater than or equal to 1"),
        ({"snapshots": {"at": [1001]}}, "/snapshots/at/0", "1..1000"),
        ({"snapshots": {"every": 1, "at": [1]}}, "/snapshots", "either"),
        ({"snapshots": {"at": [1] * 10_001}}, "/snapshots/at", "at most 10000"),
        ({"ttl_s": 10**9}, "/ttl_s", "at most"),
        ({"deadline_s": 0}, "/deadline_s", "greater than 0"),
        ({"webhook_url": "https://example.org"}, "/webhook_url", "DDPM_WEBHOOK_SECRET"),
        ({"model_digest": "other"}, "/model_digest", "other: model mnist is dddd"),
        ({"kind": "noise"}, "/kind", "generate"),
    ],
)
def test_a_bad_value_names_field_and_limit(
    client: httpx.Client, body: dict[str, Any], pointer: str, says: str
) -> None:
    reply = client.post("/generate", json=body)
    assert reply.status_code == 422
    assert reply.headers["content-type"] == "application/problem+json"
    problem = reply.json()
    assert problem["code"] == "invalid_request" and problem["status"] == 422
    assert problem["request_id"] == reply.headers["x-request-id"]
    [error] = problem["errors"]
    assert error["pointer"] == pointer and says in error["detail"]
    assert "Value error" not in error["detail"]


def test_an_error_repeats_the_value_if_it_is_short(client: httpx.Client) -> None:
    reply = client.post("/generate", json={"seed": -1, "sampler": "x" * 500, "steps": [2]})
    details = {error["pointer"]: error["detail"] for error in reply.json()["errors"]}
    assert details["/seed"].startswith("-1: Input should be greater")
    assert details["/sampler"].startswith('"xxx') and len(details["/sampler"]) < 150
    assert details["/steps"].startswith("Input should be a valid integer")


def test_outputs_that_are_too_large_are_refused_whole(client: httpx.Client) -> None:
    body = {"num_images": 64, "steps": 1000, "snapshots": {"every": 1, "kinds": ["x_t"]}}
    assert client.post("/generate", json=body).status_code == 202
    body["snapshots"] = {"every": 1, "kinds": ["x_t", "x_start", "eps"]}
    # 64 images × (1 + 3000) planes × 256 bytes = 49 MB here; with 32×32×3 it would be 2.3 GB
    assert client.post("/generate", json=body).status_code == 202
    listed = client.get("/jobs").json()["data"]
    assert len(listed) == 2


def test_job_limits(store: JobStore, serve: Callable[..., httpx.Client]) -> None:
    client = serve(max_job_bytes=3 * 256, max_job_evaluations=500)
    large = client.post("/generate", json={"num_images": 4, "steps": 1})
    assert large.status_code == 422 and large.json()["errors"][0]["pointer"] == "/num_images"
    kept = client.post("/generate", json={"steps": 3, "snapshots": {"every": 1}})
    assert kept.status_code == 422 and kept.json()["errors"][0]["pointer"] == "/snapshots"
    long = client.post("/generate", json={"num_images": 3, "steps": 200})
    assert long.status_code == 422 and "image-steps" in long.json()["detail"]
    assert client.get("/jobs").json()["data"] == []


def test_queue_full_says_when_to_come_back(
    store: JobStore, serve: Callable[..., httpx.Client]
) -> None:
    client = serve(max_queued_jobs=2)
    for _ in range(2):
        assert client.post("/generate", json={"steps": 50}).status_code == 202
    reply = client.post("/generate", json={})
    assert reply.status_code == 503 and reply.json()["code"] == "queue_full"
    assert 1 <= int(reply.headers["retry-after"]) <= 3600


def test_storage_full(store: JobStore, serve: Callable[..., httpx.Client]) -> None:
    client = serve(max_output_bytes=3 * 256)
    assert client.post("/generate", json={"num_images": 2}).status_code == 202
    reply = client.post("/generate", json={"num_images": 2})
    assert reply.status_code == 503 and reply.json()["code"] == "storage_full"
    assert "retry-after" in reply.headers
    never = client.post("/generate", json={"num_images": 4})
    assert never.status_code == 422
    assert client.post("/generate", json={"num_images": 1}).status_code == 202


def test_quota(store: JobStore, worker: Worker, serve: Callable[..., httpx.Client]) -> None:
    client = serve(client_quota=150)
    first = client.post("/generate", json={"steps": 100}).json()["id"]
    reply = client.post("/generate", json={"steps": 100})
    assert reply.status_code == 429 and reply.json()["code"] == "quota_exceeded"
    assert int(reply.headers["retry-after"]) >= 1
    assert client.post("/generate", json={"steps": 200}).status_code == 422
    worker.finish(first)
    assert client.post("/generate", json={"steps": 100}).status_code == 202


def test_without_a_model_the_service_is_not_ready(serve: Callable[..., httpx.Client]) -> None:
    client = serve()
    for reply in (client.post("/generate", json={}), client.get("/readyz")):
        assert reply.status_code == 503 and reply.json()["code"] == "no_models"
        assert reply.headers["retry-after"] == "5"
    assert client.get("/healthz").json()["status"] == "ok"


def test_idempotent_replay(store: JobStore, serve: Callable[..., httpx.Client]) -> None:
    client = serve()
    headers = {"Idempotency-Key": "k1"}
    first = client.post("/generate", json={"steps": 5, "class_label": 1}, headers=headers)
    again = client.post("/generate", json={"class_label": 1, "steps": 5}, headers=headers)
    assert first.status_code == again.status_code == 202
    assert first.json()["id"] == again.json()["id"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    other = client.post("/generate", json={"steps": 6}, headers=headers)
    assert other.status_code == 422 and other.json()["code"] == "idempotency_conflict"
    store.retire_card("mnist")  # what happened since does not matter
    store.publish_card(CARD.model_copy(update={"name": "other"}))
    third = client.post("/generate", json={"steps": 5, "class_label": 1}, headers=headers)
    assert third.json()["id"] == first.json()["id"]
    assert len(client.get("/jobs").json()["data"]) == 1
    client.delete(first.json()["urls"]["self"])
    fresh = client.post("/generate", json={"steps": 5, "class_label": 1}, headers=headers)
    assert fresh.json()["id"] != first.json()["id"]


def test_concurrent_requests_with_one_key_make_one_job(client: httpx.Client) -> None:
    ids: list[str] = []

    def post() -> None:
        reply = client.post("/generate", json={}, headers={"Idempotency-Key": "same"})
        ids.append(reply.json()["id"])

    threads = [later(0, post) for _ in range(8)]
    for thread in threads:
        thread.join()
    assert len(ids) == 8 and len(set(ids)) == 1


def test_a_job_that_is_deleted_while_its_request_waits_is_gone(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.waiting._LOOK_S", 0.1)
    thread = when_queued(client, lambda job_id: client.delete(f"/jobs/{job_id}"))
    reply = client.post("/generate", json={}, headers={"Prefer": "wait=60"})
    thread.join()
    assert (reply.status_code, reply.json()["code"]) == (410, "expired")
    assert client.get(reply.headers["location"]).status_code == 404


def test_prefer_wait(client: httpx.Client, worker: Worker) -> None:
    thread = when_queued(client, worker.finish)
    reply = client.post("/generate", json={"num_images": 2}, headers={"Prefer": "wait=60"})
    thread.join()
    assert reply.status_code == 200 and reply.headers["preference-applied"] == "wait=60"
    job = reply.json()
    assert job["status"] == "succeeded" and [i["index"] for i in job["images"]] == [0, 1]
    assert job["progress"]["total"] == 200
    late = client.post("/generate", json={}, headers={"Prefer": "respond-async, wait=0"})
    assert late.status_code == 202 and late.headers["preference-applied"] == "wait=0"
    most = client.get(f"/jobs/{job['id']}", params={"wait": 60})
    assert most.json()["status"] == "succeeded"


def test_a_picture_in_one_call(client: httpx.Client, worker: Worker) -> None:
    headers = {"Prefer": "wait=60", "Accept": "image/png"}
    for n, size in ((1, (8, 8)), (3, (18, 18))):
        thread = when_queued(client, worker.finish)
        reply = client.post("/generate", json={"num_images": n, "seed": 3}, headers=headers)
        thread.join()
        assert reply.status_code == 200 and reply.headers["content-type"] == "image/png"
        picture = Image.open(io.BytesIO(reply.content))
        assert picture.size == size
        manifest = json.loads(picture.info["ddpm"])
        assert manifest["seed"] == 3 and manifest["model_digest"] == CARD.digest
        assert reply.headers["location"].startswith("/jobs/")
    again = client.post("/generate", json=manifest)
    assert again.status_code == 202 and again.json()["request"]["num_images"] == 3


def test_any_picture_is_asked_for_by_a_star(client: httpx.Client, worker: Worker) -> None:
    headers = [("Prefer", "wait=60"), ("Accept", "text/html"), ("Accept", "image/*")]
    thread = when_queued(client, worker.finish)
    reply = client.post("/generate", json={}, headers=headers)
    thread.join()
    assert reply.status_code == 200 and reply.headers["content-type"] == "image/png"


@pytest.mark.parametrize("media", ["image/gif", "application/x-npy, image/bmp;q=0.5"])
def test_a_picture_that_there_is_not_is_refused_before_a_job_is_made(
    client: httpx.Client, media: str
) -> None:
    reply = client.post("/generate", json={}, headers={"Accept": media})
    assert reply.status_code == 406 and "image/png, image/webp" in reply.json()["detail"]
    assert client.get("/jobs").json()["data"] == []
    either = {"Accept": f"{media}, */*;q=0.1"}
    assert client.post("/generate", json={}, headers=either).status_code == 202


def test_an_unknown_wish_is_told_so(client: httpx.Client) -> None:
    reply = client.post("/generate?cancelOnDisconnect=true", json={})
    [error] = reply.json()["errors"]
    assert reply.status_code == 422 and error["pointer"] == "/query/cancelOnDisconnect"
    assert "cancel_on_disconnect" in error["detail"]
    keys = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    reply = client.post("/generate", json={}, headers=keys)
    assert reply.status_code == 422 and "came 2 times" in reply.json()["detail"]


def test_a_field_that_comes_twice_is_told_so(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    reply = client.post("/generate", content=b'{"steps": 2, "steps": 1}', headers=headers)
    [error] = reply.json()["errors"]
    assert reply.status_code == 422 and error["pointer"] == "/steps"
    assert "came twice" in error["detail"]
    inside = ", ".join(f'"{i}": 1' for i in range(11_000))
    began = time.monotonic()  # which does not grow with the square of them
    reply = client.post("/generate", content=f'{{"provenance": {{{inside}}}}}', headers=headers)
    assert reply.status_code in (202, 422) and time.monotonic() - began < 1


@pytest.mark.parametrize("charset", ["utf-7", "undefined", "idna", "unicode_escape", "punycode"])
def test_a_form_is_utf_8_whatever_it_says(client: httpx.Client, charset: str) -> None:
    part = b'Content-Disposition: form-data; name="request"\r\n\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary=X; charset={charset}"}
    picture = b'Content-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + png()

    def post(request: bytes) -> httpx.Response:
        parts = b"--X\r\n" + part + request + b"\r\n--X\r\n" + picture + b"\r\n--X--\r\n"
        return client.post("/noise", content=parts, headers=headers)

    assert post(b'{"t": [1], "model": "+2AA-"}').status_code == 422
    assert post(b'{"t": [1], "model": "\xff"}').status_code == 422
    assert "unicode" in post(b'{"t": [1], "model": "\xff"}').json()["detail"]
    assert post(b'{"t": [1]}').status_code == 202


def test_a_failed_job_is_no_picture(client: httpx.Client, worker: Worker) -> None:
    def fail(job_id: str) -> None:
        worker.start(job_id)
        worker.store.fail(job_id, "e", code="worker_error", detail="it broke")

    thread = when_queued(client, fail)
    headers = {"Prefer": "wait=60", "Accept": "image/png"}
    reply = client.post("/generate", json={}, headers=headers)
    thread.join()
    assert reply.status_code == 500 and reply.json()["code"] == "job_failed"
    assert reply.json()["detail"] == "it broke"
    job = client.get(reply.headers["location"]).json()
    assert job["error"] == {"code": "worker_error", "detail": "it broke"}


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_pictures_that_once_failed_are_taken(client: httpx.Client, path: Path) -> None:
    files: Any = {
        "image": path.read_bytes(),
        "request": (None, '{"t": [1], "fit": "resize"}', "application/json"),
    }
    reply = client.post("/noise", files=files)
    assert reply.status_code == 202, reply.text


def test_a_jpeg_of_a_thousand_scans_is_too_large(client: httpx.Client) -> None:
    raw = png(8, 8, "L", "JPEG")
    scan = raw[raw.rindex(b"\xff\xda") : -2]
    files: Any = {
        "image": raw[:-2] + 1000 * scan + raw[-2:],
        "request": (None, '{"t": [1]}', "application/json"),
    }
    reply = client.post("/noise", files=files)
    assert reply.status_code == 413 and "more than 40 scans" in reply.text


@pytest.mark.parametrize("lines", [base64.encodebytes, lambda raw: b"\r\n ".join(wrapped(raw))])
def test_base64_may_have_line_breaks(client: httpx.Client, lines: Callable[[bytes], bytes]) -> None:
    picture = lines(png()).decode()
    assert "\n" in picture
    for text in (picture, f"data:image/png;base64,{picture}"):
        assert client.post("/noise", json={"t": [1], "images": [text]}).status_code == 202


def wrapped(raw: bytes) -> list[bytes]:
    whole = base64.b64encode(raw)
    return [whole[i : i + 64] for i in range(0, len(whole), 64)]


def test_noise_multipart_and_base64(client: httpx.Client, worker: Worker) -> None:
    request = {"t": [1, 500], "seed": 1, "kinds": ["x_t", "eps"]}
    files: Any = {
        "image": ("a.png", png()),
        "request": (None, json.dumps(request), "application/json"),
    }
    job = client.post("/noise", files=files).json()
    assert job["kind"] == "noise" and "images" not in job["request"]
    started = worker.start(job["id"])
    assert started.inputs is not None
    assert started.inputs.shape == (1, 8, 8, 1) and started.inputs.min() == 255
    for t in (1, 500):
        for kind in ("x_t", "eps"):
            worker.snapshot(started, t, kind)
    worker.store.succeed(job["id"], "e")
    done = client.get(job["urls"]["self"]).json()
    bars = np.cumprod(1 - np.array(CARD.betas))
    first = done["snapshots"][0]
    assert first["t"] == 500 and first["alpha_bar"] == pytest.approx(bars[499])
    assert first["snr"] == pytest.approx(bars[499] / (1 - bars[499]))
    npy = client.get(first["url"].replace(".png", ".npy"))
    assert np.load(io.BytesIO(npy.content)).shape == (1, 8, 8)
    assert client.get(done["urls"]["grid"]).status_code == 200 and "images" not in done["urls"]
    body = {**request, "images": [base64.b64encode(png()).decode()]}
    assert client.post("/noise", json=body).status_code == 202


@pytest.mark.parametrize(
    ("body", "files", "status", "says"),
    [
        ({"t": [1]}, [], 422, "at least one picture"),
        ({"t": [1]}, [b"no picture"], 415, "PNG, JPEG or WebP"),
        ({"t": [1]}, [png(9, 8)], 422, "must be 8 × 8"),
        ({"t": [1]}, [png(2000, 1001)], 413, "2002000 pixels"),
        ({"t": [1001]}, [png()], 422, "1..1000"),
        ({"t": [2, 2]}, [png()], 422, "twice"),
        ({"t": [1], "images": ["%%%"]}, [], 422, "base64"),
        ({"t": [1], "images": ["AAAA"]}, [png()], 422, "not both"),
        ({"t": [1]}, [png()] * 65, 422, "at most 64"),
    ],
)
def test_noise_refuses(
    store: JobStore,
    serve: Callable[..., httpx.Client],
    body: dict[str, Any],
    files: list[bytes],
    status: int,
    says: str,
) -> None:
    client = serve(max_upload_pixels=2_000_000)
    parts: list[Any] = [("image", ("x.png", file)) for file in files]
    parts.append(("request", (None, json.dumps(body), "application/json")))
    reply = client.post("/noise", files=parts)
    assert reply.status_code == status and says in reply.json()["detail"]
    assert client.get("/jobs").json()["data"] == []


def test_a_part_that_is_no_file_or_comes_twice_is_told_so(client: httpx.Client) -> None:
    request = ("request", (None, '{"t": [5]}', "application/json"))
    text = client.post("/noise", files=[("image", (None, "seven.png")), request])
    assert text.json()["detail"] == "/image: came as text: must be a file (image=@FILE with curl)"
    twice = client.post("/noise", files=[("image", ("a.png", png())), request, request])
    assert twice.json()["detail"] == "/request: came twice: must be one part"


def test_fit(client: httpx.Client, worker: Worker) -> None:
    body = {"t": [1], "images": [base64.b64encode(png(4, 8, "RGB", "JPEG")).decode()]}
    for fit, corner in (("pad", 0), ("resize", 255)):
        job = client.post("/noise", json={**body, "fit": fit}).json()
        started = worker.start(job["id"])
        assert started.inputs is not None
        assert started.inputs[0, 0, 0, 0] == corner and started.inputs[0, 4, 4, 0] >= 254


def test_bodies_are_limited_and_typed(store: JobStore, serve: Callable[..., httpx.Client]) -> None:
    client = serve(max_upload_bytes=1000)
    large = client.post("/generate", json={"model": "m" * 2000})
    assert large.status_code == 413 and large.json()["code"] == "too_large"

    def chunks() -> Any:
        for _ in range(20):
            yield b" " * 100

    headers = {"content-type": "application/json"}
    endless = client.post("/generate", content=chunks(), headers=headers)
    assert endless.status_code == 413
    text = client.post("/generate", content="{}", headers={"content-type": "text/plain"})
    assert text.status_code == 415 and "application/json" in text.json()["detail"]
    broken = client.post("/generate", content="{", headers=headers)
    assert broken.status_code == 422 and "JSON" in broken.json()["detail"]


def test_a_body_nested_beyond_reason_is_a_bad_value(client: httpx.Client) -> None:
    headers = {"content-type": "application/json", "Idempotency-Key": "k"}
    reply = client.post("/generate", content="[" * 10_000, headers=headers)
    assert reply.status_code == 422 and "JSON" in reply.json()["detail"]
