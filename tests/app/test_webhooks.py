from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import httpx
import pytest

from app.webhooks import AddressRefused, checked_address, signing_key
from jobs.store import keys
from jobs.store.writer import JobStore
from tests.app.conftest import Worker, until

KEY = b"0123456789abcdef01234567"
SECRET = "whsec_" + base64.b64encode(KEY).decode()


class Received(NamedTuple):
    headers: Any
    body: bytes


class Receiver:
    """An HTTP server that answers with the statuses it was given, then 200."""

    def __init__(self) -> None:
        self.got: list[Received] = []
        self.statuses: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append(Received(self.headers, body))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                self.send_header("retry-after", "0")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"

    def wait(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.got) < count:
            assert time.monotonic() < deadline, f"{len(self.got)} of {count} webhooks came"
            time.sleep(0.02)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever)
    thread.start()
    yield receiver
    receiver.server.shutdown()
    thread.join()
    receiver.server.server_close()


def test_a_signed_webhook_at_the_end(
    store: JobStore, worker: Worker, receiver: Receiver, serve: Callable[..., httpx.Client]
) -> None:
    client = serve(webhook_secret=SECRET, webhook_private_addresses=True)
    receiver.statuses = [503, 429]  # tried again, and only then delivered
    job_id = client.post("/generate", json={"webhook_url": receiver.url}).json()["id"]
    worker.finish(job_id)
    receiver.wait(3)
    ids = {received.headers["webhook-id"] for received in receiver.got}
    assert ids == {f"msg_{job_id}"}
    headers, body = receiver.got[-1]
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    event = json.loads(body)
    assert event["type"] == "job.succeeded"
    assert event["data"] == client.get(f"/jobs/{job_id}").json()
    settled(store)
    assert 'ddpm_webhooks_total{outcome="delivered"} 1.0' in client.get("/metrics").text


def settled(store: JobStore) -> None:
    until(lambda: not store.redis.zcard(keys.WEBHOOKS))


def test_a_refusal_is_final(
    store: JobStore, receiver: Receiver, serve: Callable[..., httpx.Client]
) -> None:
    client = serve(webhook_secret=SECRET, webhook_private_addresses=True)
    receiver.statuses = [400]
    job_id = client.post("/generate", json={"webhook_url": receiver.url}).json()["id"]
    client.post(f"/jobs/{job_id}/cancel")
    receiver.wait(1)
    settled(store)
    assert json.loads(receiver.got[0].body)["type"] == "job.canceled"
    assert len(receiver.got) == 1


def test_private_addresses_are_refused(
    store: JobStore, receiver: Receiver, serve: Callable[..., httpx.Client]
) -> None:
    client = serve(webhook_secret=SECRET)
    job_id = client.post("/generate", json={"webhook_url": receiver.url}).json()["id"]
    client.post(f"/jobs/{job_id}/cancel")
    settled(store)
    assert receiver.got == []
    assert 'ddpm_webhooks_total{outcome="given_up"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "::1", "fd00::1", "0.0.0.0",
     "::ffff:10.0.0.1", "224.0.0.1", "100.64.0.1", "localhost"],
)  # fmt: skip
def test_which_addresses_are_private(host: str) -> None:
    with pytest.raises(AddressRefused):
        asyncio.run(checked_address(host, 80, private_too=False))
    assert asyncio.run(checked_address(host, 80, private_too=True))


def test_a_public_address_is_used_as_it_is() -> None:
    assert asyncio.run(checked_address("1.1.1.1", 443, private_too=False)) == "1.1.1.1"


def test_a_secret_that_is_none_stops_the_start() -> None:
    assert signing_key(SECRET) == KEY
    with pytest.raises(ValueError, match="DDPM_WEBHOOK_SECRET"):
        signing_key("not base64!")
