"""Request bodies cost memory before anything is known of them: limits of time and of all together.

Keys are checked before (app/middleware.py), and what a body may hold after (app/bodies.py).
"""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.problems import Problem
from jobs.settings import Settings


class Uploads:
    """ASGI layer: counts what unfinished requests hold of their bodies."""

    def __init__(self, app: ASGIApp, *, settings: Settings) -> None:
        self._app = app
        self._most = settings.max_upload_memory
        self._seconds = settings.body_timeout_s
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not has_body(scope):
            await self._app(scope, receive, send)
            return
        upload = Upload(self, receive, declared=declared(scope))
        scope["upload"] = upload

        async def send_and_release(message: Message) -> None:
            upload.release()  # a body is read before its request is answered
            await send(message)

        try:
            await self._app(scope, upload.receive, send_and_release)
        finally:
            upload.release()

    def take(self, size: int) -> None:
        """Count bytes in. Raises Problem 503 where that would be too many."""
        if self._held + size > self._most:
            detail = f"uploads hold {self._held} of {self._most} bytes: try again"
            raise Problem("busy", detail, headers={"Retry-After": "1"})
        self._held += size

    def give_back(self, size: int) -> None:
        """Count bytes out."""
        self._held -= size

    @property
    def seconds(self) -> float:
        """How long a body may take."""
        return self._seconds


class Upload:
    """The body of one request. declared: its length, where it is said; else 0."""

    def __init__(self, uploads: Uploads, receive: Receive, *, declared: int) -> None:
        self._uploads = uploads
        self._receive = receive
        self._declared = declared
        self._began = time.monotonic()
        self._size = 0
        self._over = False

    async def receive(self) -> Message:
        """The next message. Raises Problem 408 or 503."""
        if self._over:
            return await self._receive()
        if not self._size:  # what cannot fit need not come
            self._take(self._declared)
            self._give_back(self._declared)
        left = self._began + self._uploads.seconds - time.monotonic()
        try:
            async with asyncio.timeout(max(left, 0)):
                message = await self._receive()
        except TimeoutError as error:
            self._over = True
            detail = f"the body of a request may take {self._uploads.seconds:g} s"
            raise Problem("timeout", detail) from error
        self._over = message["type"] != "http.request" or not message.get("more_body")
        self._take(len(message.get("body", b"")))
        return message

    def release(self) -> None:
        """Nobody holds the body any more: what still comes of it is only looked at for the client's
        leaving, and passes uncounted."""
        self._over = True
        self._give_back(self._size)

    def _take(self, size: int) -> None:
        self._uploads.take(size)
        self._size += size

    def _give_back(self, size: int) -> None:
        self._uploads.give_back(size)
        self._size -= size


def has_body(scope: Scope) -> bool:
    """Whether a request says that a body follows."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in scope["headers"]
    )


def declared(scope: Scope) -> int:
    """The Content-Length, 0 where there is none."""
    text = header(scope, b"content-length")
    return int(text) if text.isdecimal() and len(text) < 20 else 0


def header(scope: Scope, name: bytes) -> str:
    """The first value of a request's header, "" where there is none. name: in small letters."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def release(scope: Scope) -> None:
    """Say that the body of a request is needed no longer, where its answer takes a while."""
    upload: Upload | None = scope.get("upload")
    if upload is not None:
        upload.release()
