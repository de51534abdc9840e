"""HTTP/1.1 by uvicorn, with limits on what a client may make us hold: bytes of a head, the time
of a request, and answers that are not read.

Application code sees none of this: a request that is too slow or too long never gets to it, or
ends as if its client had gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from app.problems import Problem, response
from jobs.settings import Settings

MOST_HEAD = 64 * 1024  # bytes of a request line and its headers
HEAD_S = 10.0
STALL_S = 60.0  # between two looks at a client that does not read as fast as we write
_LEAST_READ = 64 * 1024  # bytes that it must have read meanwhile, or it is hung up on
_LATER_S = 5.0  # after the application's own deadline for a body, whose answer is better
_LINGER_S = 2.0  # for a client that still sends, to read the answer it got


class _HeadTooLong(Exception):
    """Stops the parser."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection. body_s: how long a body may take."""

    body_s: ClassVar[float] = 60.0
    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _unread = 0
    _answering: RequestResponseCycle | None = None  # the request that is; `cycle` is the latest
    _repeated = False  # whether the parser reads the framing of a head once more
    _in_head: bool
    _head_bytes: int
    _too_long: bool

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_head()
        self._expect(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self._stop_looking()
        if self._answering is not None:
            _leave(self._answering)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
        self._feed(data)
        # A header of any length is one event of the parser, which comes only when it has all of it.
        if self._in_head and self._head_bytes > MOST_HEAD and not self.transport.is_closing():
            self._too_long = True
            self.send_400_response("")

    def _feed(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._read_on(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _read_on(self, rest: bytes) -> None:
        """Ignore an upgrade (RFC 9110, 7.8), at which the parser ends: another one reads the body,
        and what follows, after a head that says of it what the real one did."""
        self.parser = httptools.HttpRequestParser(self)
        with contextlib.suppress(AttributeError):  # as uvicorn has it
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        framing = [
            b"%s: %s\r\n" % header
            for header in self.headers
            if header[0] in (b"content-length", b"transfer-encoding")
        ]
        version = self.scope["http_version"].encode()
        self._repeated = True
        self._feed(b"".join([b"POST / HTTP/", version, b"\r\n", *framing, b"\r\n"]))
        if rest and not self.transport.is_closing():
            self._feed(rest)

    # What the parser found

    def on_message_begin(self) -> None:
        if self._repeated:
            return
        super().on_message_begin()
        self._expect(HEAD_S)

    def on_url(self, url: bytes) -> None:
        if not self._repeated:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._repeated:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._repeated:
            self._repeated = False
            return
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MOST_HEAD:
            self._too_long = True
            raise _HeadTooLong
        self._in_head = False
        self._expect(self.body_s + _LATER_S)
        super().on_headers_complete()
        if not self.pipeline:
            self._answering = self.cycle

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():  # the body is yet to come
            return
        self._expect(None)
        self._begin_head()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._answering = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if not self._in_head:  # the rest of the body is nobody's: it is thrown away as it comes
            self._expect(_LINGER_S)
        elif self._timer is None:
            self._expect(self.timeout_keep_alive + HEAD_S)

    # What a client does not read

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.transport.get_write_buffer_size()
        self._stalled = self.loop.call_later(STALL_S, self._look_at_reader)

    def resume_writing(self) -> None:
        self._stop_looking()
        super().resume_writing()

    def _look_at_reader(self) -> None:
        left = self.transport.get_write_buffer_size()
        if left > self._unread - _LEAST_READ:
            self.transport.abort()
            return
        self._unread = left
        self._stalled = self.loop.call_later(STALL_S, self._look_at_reader)

    def _stop_looking(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    # What follows

    def _begin_head(self) -> None:
        self._in_head, self._head_bytes, self._too_long = True, 0, False

    def _expect(self, seconds: float | None) -> None:
        """Close the connection after so long; None: let it be."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds is not None:
            self._timer = self.loop.call_later(seconds, self._late, seconds)

    def _late(self, seconds: float) -> None:
        self._timer = None
        if self.pipeline:  # it may not even send: the request before is being answered
            self._expect(seconds)
        elif self._in_head and self._head_bytes:
            self._refuse(Problem("timeout", f"the head of a request may take {HEAD_S:g} s"))
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """The answer to what is no HTTP, or too much of it."""
        if self._too_long:
            detail = f"request line and headers: must be at most {MOST_HEAD} bytes"
            self._refuse(Problem("headers_too_large", detail))
        else:
            self._refuse(Problem("bad_request", msg))

    def _refuse(self, problem: Problem) -> None:
        answering = self._answering
        # Else it would land before another answer, or in the middle of one.
        nothing_said = answering is None or (
            answering is self.cycle and not self._in_head and not answering.response_started
        )
        if nothing_said:
            reply = response(problem, secrets.token_hex(8))
            lines = [STATUS_LINE[reply.status_code], b"connection: close\r\n"]
            lines += [b"%s: %s\r\n" % header for header in reply.raw_headers]
            self.transport.write(b"".join([*lines, b"\r\n", bytes(reply.body)]))
        if answering is not None:
            _leave(answering)
        self.transport.close()


def _leave(cycle: RequestResponseCycle) -> None:
    """Let the application know that nobody is there any more."""
    if not cycle.response_complete:
        cycle.disconnected = True
    cycle.message_event.set()


def protocol(settings: Settings) -> type[asyncio.Protocol]:
    """The class for these settings, as uvicorn wants it."""
    members: dict[str, Any] = {"body_s": settings.body_timeout_s}
    return type("LimitedProtocol", (LimitedProtocol,), members)
