"""What every request passes: an id, the key check, the clock, HEAD. Plain ASGI: streams stream."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Mapping

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.auth import Keyring, key_name
from app.metrics import Metrics
from app.problems import Problem, internal, response
from app.receiving import header
from jobs import chance
from jobs.logs import REQUESTS

log = logging.getLogger(__name__)
# For browsers, on every answer: no page of ours in a frame, nothing run that is not a page.
_SAFE = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox",
    ),
)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Edge:
    """Outermost layer: `X-Request-ID` in and out, 401 without a key, metrics by route.

    HEAD is answered by what answers GET; the server that runs us leaves the body out. An event
    stream, which would not end, looks at `scope["head"]`.
    """

    def __init__(self, app: ASGIApp, *, keyring: Keyring, metrics: Metrics) -> None:
        self._app = app
        self._keyring = keyring
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        if method == "HEAD":  # a copy: the server must go on knowing that it is HEAD
            scope = {**scope, "method": "GET", "head": True}
        request_id = _request_id(scope)
        scope["request_id"] = request_id
        client = self._keyring.client(scope)
        scope["client_id"] = client or "unknown"
        began, started = time.perf_counter(), False
        told = {"status": 0, "first_s": 0.0}

        async def send_marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = marked(message.get("headers", ()), request_id)
                told.update(status=message["status"], first_s=time.perf_counter() - began)
                self._count(method, scope, message["status"], told["first_s"])
                self._metrics.of_clients.labels(key_name(scope["client_id"])).inc()
            await send(message)

        if client is None:
            problem = Problem(
                "unauthorized",
                "this service needs a key: Authorization: Bearer …",
                headers={"WWW-Authenticate": "Bearer"},
            )
            scope["problem"] = problem.code
            await response(problem, request_id)(scope, receive, send_marked)
            _log(method, scope, told, time.perf_counter() - began)
            return
        try:
            await self._app(scope, receive, send_marked)
        except ClientDisconnect:  # in the middle of its body: nobody is left to answer
            log.info("request %s: %s %s: the client left", request_id, method, scope["path"])
        except Exception:
            log.exception("request %s: %s %s", request_id, method, scope["path"])
            if started:
                raise
            scope["problem"] = "internal"
            await response(internal(), request_id)(scope, receive, send_marked)
        finally:
            _log(method, scope, told, time.perf_counter() - began)

    def _count(self, method: str, scope: Scope, status: int, seconds: float) -> None:
        # The route's template, never the path: ids would make a metric each.
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(method, route, str(status)).inc()
        exemplar = {"request_id": scope["request_id"]}
        self._metrics.seconds.labels(method, route).observe(seconds, exemplar)
        if code := scope.get("problem"):
            self._metrics.rejections.labels(code).inc()


def _log(method: str, scope: Scope, told: Mapping[str, float], seconds: float) -> None:
    """One line a request, once it is over. The path without its query, which may be signed."""
    status = int(told["status"])
    fields = {
        "request_id": scope["request_id"],
        "method": method,
        "path": scope["path"][:200],
        "status": status or None,
        "code": scope.get("problem"),
        "job_id": scope.get("job_id") or scope.get("path_params", {}).get("job_id"),
        "client": key_name(scope["client_id"]) or None,
        "first_byte_s": round(told["first_s"], 4),
        "seconds": round(seconds, 4),
    }
    said = status or "nobody listened"
    REQUESTS.info("%s %s: %s", method, fields["path"], said, extra={"fields": fields})


def marked(headers: Iterable[tuple[bytes, bytes]], request_id: str) -> list[tuple[bytes, bytes]]:
    """The headers of an answer with its id, and with those of _SAFE that it has no own for."""
    found = [*headers, (b"x-request-id", request_id.encode())]
    named = {name for name, _ in found}
    return [*found, *(header for header in _SAFE if header[0] not in named)]


def _request_id(scope: Scope) -> str:
    given = header(scope, b"x-request-id")
    return given if _REQUEST_ID.fullmatch(given) else chance.draw(8).hex()
