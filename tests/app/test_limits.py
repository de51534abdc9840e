"""What strangers can make the server hold: connections, heads, bodies. All of it over sockets."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import httpx
import pytest

from app import protocol
from jobs.store.writer import JobStore
from tests.app.conftest import Worker, png, until

Serve = Callable[..., httpx.Client]
JSON = {"Content-Type": "application/json"}
PATIENCE_S = 60


class Line:
    """A socket that speaks HTTP by hand."""

    def __init__(self, client: httpx.Client) -> None:
        url = client.base_url
        self.socket = socket.create_connection((url.host, url.port), timeout=PATIENCE_S)

    def say(self, *lines: str, body: bytes = b"") -> None:
        self.socket.sendall("\r\n".join((*lines, "", "")).encode() + body)

    def drip(self, *, every_s: float) -> None:
        """A byte now and then, in a thread, until the server hangs up."""

        def drip() -> None:
            with contextlib.suppress(OSError):
                while True:
                    self.socket.sendall(b"x")
                    time.sleep(every_s)

        threading.Thread(target=drip, daemon=True).start()

    def heard(self) -> str:
        """All that comes until the server hangs up."""
        chunks = []
        with contextlib.suppress(ConnectionResetError):
            while chunk := self.socket.recv(2**18):
                chunks.append(chunk)
        return b"".join(chunks).decode(errors="replace")

    def answer(self) -> str:
        """What comes first."""
        return self.socket.recv(65536).decode()


@pytest.fixture
def line() -> Iterator[Callable[[httpx.Client], Line]]:
    with contextlib.ExitStack() as stack:

        def dial(client: httpx.Client) -> Line:
            line = Line(client)
            stack.callback(line.socket.close)
            return line

        yield dial


Dial = Callable[[httpx.Client], Line]


def begun(line: Line, path: str = "/generate", *, length: int = 1000, sent: bytes = b"{") -> None:
    head = (f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json")
    line.say(*head, f"Content-Length: {length}", body=sent)


def test_slow_bodies_come_to_an_end(store: JobStore, serve: Serve, line: Dial) -> None:
    client = serve(body_timeout_s=1)
    lines = [line(client) for _ in range(50)]
    for each in lines:
        begun(each)
        each.drip(every_s=0.2)
    for each in lines:
        heard = each.heard()
        assert heard.startswith("HTTP/1.1 408") and '"code":"timeout"' in heard
    assert client.post("/generate", json={}).status_code == 202


def test_a_body_that_nobody_reads_comes_to_an_end(
    client: httpx.Client, line: Dial, worker: Worker
) -> None:
    job_id = client.post("/generate", json={}).json()["id"]
    one = line(client)
    begun(one, f"/jobs/{job_id}/cancel", length=10_000_000)
    one.drip(every_s=0.1)
    assert one.heard().startswith("HTTP/1.1 200")


def test_all_bodies_together_are_limited(store: JobStore, serve: Serve, line: Dial) -> None:
    client = serve(max_upload_memory=1_000_000, body_timeout_s=3)
    size = 300_000
    lines = [line(client) for _ in range(8)]
    for each in lines:
        begun(each, length=size, sent=b"x" * (size - 1))
        time.sleep(0.05)
    answers = sorted(each.heard()[:12] for each in lines)
    assert answers == ["HTTP/1.1 408"] * 3 + ["HTTP/1.1 503"] * 5
    # What they held is free again, and what a job needed is not held while it is waited for.
    big = {"provenance": {"a": "x" * 900_000}}
    threads = [
        threading.Thread(
            target=client.post,
            args=("/generate?",),
            kwargs={"json": big, "headers": {"Prefer": "wait=5"}},
        )
        for _ in range(2)
    ]
    for i, thread in enumerate(threads):
        thread.start()
        until(lambda i=i: len(client.get("/jobs").json()["data"]) == i + 1)  # type: ignore[misc]
    for job in client.get("/jobs").json()["data"]:
        client.post(f"/jobs/{job['id']}/cancel")
    for thread in threads:
        thread.join()


def test_a_body_that_cannot_fit_need_not_come(store: JobStore, serve: Serve, line: Dial) -> None:
    client = serve(max_upload_memory=1_000_000)
    one = line(client)
    begun(one, length=2_000_000)
    answer = one.answer()
    assert answer.startswith("HTTP/1.1 503") and '"code":"busy"' in answer
    assert "retry-after: 1" in answer.lower()


@pytest.mark.parametrize("part", ["X: y\r\n", "y"], ids=["many headers", "one header"])
def test_an_endless_head_is_not_read(client: httpx.Client, line: Dial, part: str) -> None:
    one = line(client)
    one.socket.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: ")
    sent, piece = 0, (part * 10_000).encode()
    with contextlib.suppress(OSError):
        while sent < 50_000_000:
            one.socket.sendall(piece)
            sent += len(piece)
    assert sent < 20_000_000  # what fits into the buffers of two sockets


@pytest.mark.parametrize("size", [70_000, 3_000_000])
def test_a_long_head_is_refused(client: httpx.Client, size: int) -> None:
    with contextlib.suppress(httpx.NetworkError):  # where it was hung up on while it still sent
        reply = client.get("/healthz", headers={"A": "y" * size})
        assert reply.status_code == 431 and reply.json()["code"] == "headers_too_large"
    assert client.get("/healthz", headers={"A": "y" * 50_000}).status_code == 200


def test_a_slow_head_comes_to_an_end(
    client: httpx.Client, line: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", 0.5)
    silent, dripping, empty = line(client), line(client), line(client)
    dripping.socket.sendall(b"GET / HTTP/1.1\r\nA: ")
    dripping.drip(every_s=0.1)
    for _ in range(3):
        empty.socket.sendall(b"\r\n")
    assert silent.heard() == ""
    assert empty.heard().startswith("HTTP/1.1 408") and dripping.heard().startswith("HTTP/1.1 408")


@pytest.mark.parametrize("reads", [True, False])
def test_a_client_that_does_not_read_is_hung_up_on(
    client: httpx.Client, line: Dial, monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    monkeypatch.setattr(protocol, "STALL_S", 1)
    path, count = "/static/docs/swagger-ui-bundle.js", 16  # more than a kernel holds for a socket
    whole = len(client.get(path).content)
    one = line(client)
    for left in reversed(range(count)):
        ending = "close" if left == 0 else "keep-alive"
        one.say(f"GET {path} HTTP/1.1", "Host: x", f"Connection: {ending}")
    if not reads:
        time.sleep(4)
    heard = len(one.heard().encode())
    assert (heard > count * whole) == reads and whole > 1_000_000


def test_what_is_no_http_is_told_so(client: httpx.Client, line: Dial) -> None:
    one = line(client)
    one.socket.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    head, _, body = one.heard().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 400") and json.loads(body)["code"] == "bad_request"


def test_keys_come_before_bodies(store: JobStore, serve: Serve, line: Dial) -> None:
    client = serve(api_keys="secret")
    one = line(client)
    begun(one, length=10_000_000, sent=b"")
    assert one.answer().startswith("HTTP/1.1 401")
    assert one.heard() == ""  # and hangs up, a moment later


def test_a_connection_goes_on_after_a_long_wait(
    store: JobStore, serve: Serve, line: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held requests, and requests behind them, are no slow ones."""
    for name in ("HEAD_S", "_LATER_S"):
        monkeypatch.setattr(protocol, name, 0.3)
    one = line(serve(body_timeout_s=0.3))
    head = ("POST /generate HTTP/1.1", "Host: x", "Content-Type: application/json")
    one.say(*head, "Prefer: wait=2", "Content-Length: 2", body=b"{}")
    one.say(*head, "Connection: close", "Content-Length: 2", body=b"{}")
    heard = one.heard()
    assert heard.count("HTTP/1.1 202") == 2, heard


def test_an_upgrade_is_ignored_and_the_body_read(client: httpx.Client, line: Dial) -> None:
    """Java's HttpClient asks for one with every request, and `curl --http2`; RFC 9110, 7.8."""
    h2c = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQ")
    post = ("POST /generate HTTP/1.1", "Host: x", "Content-Type: application/json", *h2c)
    body = b'{"seed": 7}'
    length = f"Content-Length: {len(body)}"
    at_once, later, chunked = line(client), line(client), line(client)
    at_once.say(*post, length, body=body)
    later.say(*post, length)
    chunked.say(*post, "Transfer-Encoding: chunked", body=b"b\r\n" + body + b"\r\n0\r\n\r\n")
    time.sleep(0.2)
    later.socket.sendall(body)
    for one in (at_once, later, chunked):
        heard = one.answer()
        assert heard.startswith("HTTP/1.1 202") and '"seed":7' in heard, heard
        # And the connection goes on as it would have.
        one.say("GET /jobs?limit=1 HTTP/1.1", "Host: x", *h2c)
        assert one.answer().startswith("HTTP/1.1 200")
        one.say("GET /healthz HTTP/1.1", "Host: x", "Connection: close")
        heard = one.heard()
        assert heard.startswith("HTTP/1.1 200") and heard.count("HTTP/1.1") == 1, heard
    behind = line(client)
    behind.say(
        *post, length, body=body + b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    heard = behind.heard()
    assert heard.count("HTTP/1.1 202") == 1 and heard.count("HTTP/1.1 404") == 1, heard


def test_a_bad_chunk_is_told_so(client: httpx.Client, line: Dial) -> None:
    one = line(client)
    head = ("POST /generate HTTP/1.1", "Host: x", "Content-Type: application/json")
    one.say(*head, "Transfer-Encoding: chunked", body=b"zz\r\n")
    heard = one.heard()
    assert heard.startswith("HTTP/1.1 400") and heard.count("HTTP/1.1") == 1, heard


def test_a_client_that_leaves_with_a_request_behind_is_noticed(
    client: httpx.Client, line: Dial
) -> None:
    one = line(client)
    head = ("POST /generate?cancel_on_disconnect=true HTTP/1.1", "Host: x")
    one.say(
        *head, "Content-Type: application/json", "Prefer: wait=60", "Content-Length: 2", body=b"{}"
    )
    one.say("GET /jobs HTTP/1.1", "Host: x")
    until(lambda: client.get("/jobs").json()["data"])
    time.sleep(0.3)
    one.socket.close()
    until(lambda: client.get("/jobs").json()["data"][0]["status"] == "canceled", seconds=20)


def test_the_body_of_a_held_get_is_nobodys(store: JobStore, serve: Serve, line: Dial) -> None:
    """It takes no room of uploads, and that it is slow is no leaving."""
    client = serve(max_upload_memory=4000, max_upload_bytes=3000, body_timeout_s=1)
    job_id = client.post("/generate", json={}).json()["id"]
    path = f"GET /jobs/{job_id}?wait=4 HTTP/1.1"
    full, slow = line(client), line(client)
    full.say(path, "Host: x", "Content-Length: 3900", body=b"x" * 3900)
    slow.say(path, "Host: x", "Content-Length: 3900")
    began = time.monotonic()
    time.sleep(0.5)
    for _ in range(5):
        body = {"seed": 1, "provenance": {"a": "x" * 2000}}
        assert client.post("/generate", json=body).status_code == 202
    for one in (full, slow):
        assert one.answer().startswith("HTTP/1.1 200")
        assert time.monotonic() - began > 3.5


# Content-Encoding


def test_a_gzip_body_is_taken(client: httpx.Client) -> None:
    headers = {**JSON, "Content-Encoding": "gzip"}
    body = json.dumps({"seed": 5, "provenance": {"a": "x" * 1_000_000}}).encode()
    reply = client.post("/generate", content=gzip.compress(body), headers=headers)
    assert reply.status_code == 202 and reply.json()["request"]["seed"] == 5
    form = httpx.Request("POST", "http://x", files={"image": png()}, data={"request": '{"t":[1]}'})
    headers = {"Content-Type": form.headers["content-type"], "Content-Encoding": "gzip"}
    reply = client.post("/noise", content=gzip.compress(form.read()), headers=headers)
    assert reply.status_code == 202


@pytest.mark.parametrize(
    ("coding", "body", "status", "says"),
    [
        ("gzip", gzip.compress(b" " * 100_000_000), 413, "more than"),
        ("gzip", gzip.compress(b"{}" * 1000)[:-9], 422, "cut short"),
        ("gzip", gzip.compress(b"{}") + b"more", 422, "goes on"),
        ("gzip", b"{}", 422, "no gzip"),
        ("gzip", b"", 422, "cut short"),
        ("deflate", zlib.compress(b"{}"), 415, "must be gzip"),
        ("gzip, gzip", gzip.compress(gzip.compress(b"{}")), 415, "must be gzip"),
    ],
    # A gzip has the time in it, and the name of a test must be the same in every process.
    ids=["bomb", "cut", "more", "none", "empty", "deflate", "twice"],
)
def test_other_encodings_are_refused(
    client: httpx.Client, coding: str, body: bytes, status: int, says: str
) -> None:
    reply = client.post("/generate", content=body, headers={**JSON, "Content-Encoding": coding})
    assert reply.status_code == status and says in reply.json()["detail"], reply.text
    if status == 415:
        assert reply.headers["accept-encoding"] == "gzip"
