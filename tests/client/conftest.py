"""A server whose jobs end as a test says, and a network that fails as it says."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from urllib.parse import urlsplit

import pytest

from tests.app.conftest import client, serve, shared_server, store, worker

__all__ = ["client", "serve", "shared_server", "store", "worker"]  # its fixtures


class Proxy:
    """Between a client and a server: passes bytes on, and breaks connections as `rules` say.

    rules: for each connection in turn, how many bytes of answers it lets through before it breaks;
    where there are no more, all of them. connections: how many there were.
    """

    def __init__(self, url: str, rules: list[int]) -> None:
        self.rules, self.connections = rules, 0
        parts = urlsplit(url)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self.connections += 1
                most = self.rules.pop(0) if self.rules else None
                far = socket.create_connection(self._target)
                self._open += [near, far]
                for source, sink, limit in ((near, far, None), (far, near, most)):
                    arguments = (source, sink, limit)
                    threading.Thread(target=self._pass_on, args=arguments, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, most: int | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while (most is None or passed < most) and (data := source.recv(4096)):
                if most is not None:
                    data = data[: most - passed]
                passed += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Break everything."""
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


class Impostor:
    """What answers where a service should be, on a new connection each time, as `answers` say.

    answers: whole ones, as bytes; the last is given for ever, and b"" is none: nothing is said, and
    the connection stays open. asked: the requests, as they came.
    """

    def __init__(self, answers: list[bytes]) -> None:
        self.asked: list[str] = []
        self._answers = answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._open.append(near)
                self.asked.append(near.recv(65536).decode())
                answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
                near.sendall(answer)
                if answer:
                    near.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Say nothing any more."""
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._thread.join()


def answer(status: str, body: str | bytes, *headers: str, media: str = "application/json") -> bytes:
    """One of HTTP, whole."""
    content = body.encode() if isinstance(body, str) else body
    head = (f"HTTP/1.1 {status}", f"Content-Type: {media}", *headers, "Connection: close")
    return "\r\n".join((*head, f"Content-Length: {len(content)}", "", "")).encode() + content


@pytest.fixture
def impostor() -> Iterator[Callable[..., Impostor]]:
    """Make an Impostor of its answers."""
    with contextlib.ExitStack() as stack:

        def make(*answers: bytes) -> Impostor:
            one: AbstractContextManager[Impostor] = contextlib.closing(Impostor([*answers]))
            return stack.enter_context(one)

        yield make


@pytest.fixture
def between() -> Iterator[Callable[[str, list[int]], Proxy]]:
    """Make a Proxy in front of a URL."""
    with contextlib.ExitStack() as stack:

        def make(url: str, rules: list[int]) -> Proxy:
            proxy: AbstractContextManager[Proxy] = contextlib.closing(Proxy(url, rules))
            return stack.enter_context(proxy)

        yield make
