from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import httpx
import pytest

from app.addresses import AddressRefused, checked_address, is_public
from app.webhooks import _host, signing_key
from jobs.store import keys
from jobs.store.connections import connect_async
from jobs.store.writer import JobStore
from jobs.webhooks import DELAYS_S, Claim, WebhookQueue
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
        self.connections: set[tuple[str, int]] = set()
        self.statuses: list[int] = []
        self.retry_after = "0"
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # which keeps connections

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append(Received(self.headers, body))
                receiver.connections.add(self.client_address)
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                self.send_header("retry-after", receiver.retry_after)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("", 0), Handler)
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
    # The certificate of one name proves nothing of another at the same address.
    assert len(receiver.connections) == 3
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


def test_a_retry_after_that_is_no_number_counts_as_none(
    store: JobStore, receiver: Receiver, serve: Callable[..., httpx.Client]
) -> None:
    client = serve(webhook_secret=SECRET, webhook_private_addresses=True)
    receiver.statuses, receiver.retry_after = [503], "\u00b2"  # a digit to some, not to float()
    job_id = client.post("/generate", json={"webhook_url": receiver.url}).json()["id"]
    client.post(f"/jobs/{job_id}/cancel")
    metric = 'ddpm_webhooks_total{outcome="postponed"} 1.0'
    until(lambda: metric in client.get("/metrics").text)
    due = store.redis.zscore(keys.WEBHOOKS, job_id)
    assert due is not None and due - time.time() < DELAYS_S[0]


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


@pytest.mark.parametrize("url", ["http://xn--a/", "http://a..b/", f"http://{'a' * 64}.example/"])
def test_a_name_that_no_host_can_have_is_refused(client: httpx.Client, url: str) -> None:
    reply = client.post("/generate", json={"webhook_url": url})
    assert reply.status_code == 422 and reply.json()["errors"][0]["pointer"] == "/webhook_url"


def test_every_address_is_counted_by_something() -> None:
    """Also one that an earlier version took in: what fails here holds up everybody's."""
    assert _host("https://Name.example:8/x") == "name.example"
    for url in ("http://xn--a/", "http://a..b/", "http://[::1", f"http://{'a' * 64}.example/", ""):
        assert isinstance(_host(url), str)


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


# An address that stands for a private one, or for none that is public.
@pytest.mark.parametrize(
    "address",
    ["64:ff9b::7f00:1", "64:ff9b::10.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1",
     "2002:7f00:1::", "2002:a00:1::1", "2002:c0a8:101::1", "::127.0.0.1", "::10.0.0.1",
     "::ffff:127.0.0.1", "::ffff:0:127.0.0.1", "::", "fec0::1", "fe80::1%eth0", "ff02::1",
     "2001:db8::1", "2001::1", "100::1", "255.255.255.255", "198.18.0.1", "192.88.99.1"],
)  # fmt: skip
def test_no_private_address_slips_through(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "2606:4700::1111", "64:ff9b::1.1.1.1", "::ffff:1.1.1.1", "2002:101:101::"],
)
def test_public_addresses_pass(address: str) -> None:
    assert is_public(address)


def test_a_public_address_is_used_as_it_is() -> None:
    assert asyncio.run(checked_address("1.1.1.1", 443, private_too=False)) == "1.1.1.1"


def test_a_secret_that_is_none_stops_the_start() -> None:
    assert signing_key(SECRET) == KEY
    with pytest.raises(ValueError, match="DDPM_WEBHOOK_SECRET"):
        signing_key("not base64!")


class Rude:
    """A server that answers each request by `chunk`, again and again, `pause` seconds apart.

    It says at once how many bytes it got rid of.
    """

    def __init__(self, head: bytes, chunk: bytes, pause: float) -> None:
        self.connections = 0
        self.most_at_once = 0
        self.sent = 0
        self._open = 0
        rude = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                rude.connections += 1
                rude._open += 1
                rude.most_at_once = max(rude.most_at_once, rude._open)
                try:
                    self.request.recv(65536)
                    self.request.sendall(head)
                    while True:
                        self.request.sendall(chunk)
                        rude.sent += len(chunk)
                        time.sleep(pause)
                except OSError:  # it was hung up on
                    rude._open -= 1

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]


@pytest.fixture
def rude() -> Iterator[Callable[..., Rude]]:
    with contextlib.ExitStack() as stack:

        def start(head: bytes, chunk: bytes, pause: float) -> Rude:
            rude = Rude(head, chunk, pause)
            thread = threading.Thread(target=rude.server.serve_forever)
            thread.start()
            stack.callback(rude.server.server_close)
            stack.callback(thread.join)
            stack.callback(rude.server.shutdown)
            return rude

        yield start


HEAD = b"HTTP/1.1 200 OK\r\n"


def test_an_endless_answer_is_read_no_further_than_a_few_bytes(
    store: JobStore, rude: Callable[..., Rude], serve: Callable[..., httpx.Client]
) -> None:
    endless = rude(HEAD + b"\r\n", b"x" * 65536, 0)
    client = serve(webhook_secret=SECRET, webhook_private_addresses=True)
    url = f"http://127.0.0.1:{endless.port}/"
    job_id = client.post("/generate", json={"webhook_url": url}).json()["id"]
    client.post(f"/jobs/{job_id}/cancel")
    settled(store)
    until(lambda: endless._open == 0)
    assert endless.sent < 20_000_000  # what fits into the buffers of two sockets
    assert 'ddpm_webhooks_total{outcome="delivered"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("head", [HEAD, HEAD + b"\r\n"], ids=["headers", "body"])
def test_receivers_that_drip_hold_nobody_up(
    head: bytes,
    store: JobStore,
    receiver: Receiver,
    rude: Callable[..., Rude],
    serve: Callable[..., httpx.Client],
) -> None:
    dripping = rude(head, b"x", 0.1)
    client = serve(webhook_secret=SECRET, webhook_private_addresses=True, webhook_timeout_s=1)
    slow = f"http://127.0.0.1:{dripping.port}/"
    ids = [client.post("/generate", json={"webhook_url": slow}).json()["id"] for _ in range(6)]
    for job_id in ids:
        client.post(f"/jobs/{job_id}/cancel")
    until(lambda: dripping.connections >= 2)
    polite = receiver.url.replace("127.0.0.1", "localhost")
    job_id = client.post("/generate", json={"webhook_url": polite}).json()["id"]
    client.post(f"/jobs/{job_id}/cancel")
    receiver.wait(1)
    assert dripping.most_at_once <= 4  # two, and two whose end it has not noticed yet
    # Each is given up on after a second, and tried again later; to be put off is no attempt.
    until(lambda: dripping.connections >= 6)

    until(lambda: sum(map(int, store.redis.hvals(keys.WEBHOOK_ATTEMPTS))) <= dripping.connections)
    assert set(store.redis.hkeys(keys.WEBHOOK_ATTEMPTS)) == {job_id.encode() for job_id in ids}


def test_a_receiver_of_many_names_holds_half_of_the_couriers(
    store: JobStore,
    receiver: Receiver,
    rude: Callable[..., Rude],
    serve: Callable[..., httpx.Client],
) -> None:
    dripping = rude(HEAD, b"x", 0.1)
    client = serve(webhook_secret=SECRET, webhook_private_addresses=True, webhook_timeout_s=50)

    def tell(url: str) -> None:
        job_id = client.post("/generate", json={"webhook_url": url}).json()["id"]
        client.post(f"/jobs/{job_id}/cancel")

    # All of them are 127.0.0.1, as all names of a domain may be.
    names = ["0x7f.1", "127.1", "2130706433", "127.0.1", "0x7f.0.1", "0x7f.0.0.1", "0x7f000001"]
    for name in 2 * [*names, "localhost"]:
        tell(f"http://{name}:{dripping.port}/")
    until(lambda: dripping.connections >= 8)
    tell(receiver.url.replace("127.0.0.1", "127.0.0.2"))
    receiver.wait(1)
    assert dripping.most_at_once == 8


def test_what_was_purged_meanwhile_is_not_put_back(store: JobStore) -> None:
    async def put_back() -> None:
        connection = connect_async(store.settings)
        await WebhookQueue(connection).put_back(Claim("gone", 1), 5)
        await connection.aclose()

    asyncio.run(put_back())
    assert not store.redis.exists(keys.WEBHOOKS, keys.WEBHOOK_ATTEMPTS)
