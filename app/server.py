"""uvicorn, with our socket and our way to stop."""

from __future__ import annotations

import gc
import logging
import resource
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from app.main import create_app
from app.protocol import protocol
from jobs import logs
from jobs.settings import Settings

_GRACE_S = 5  # for requests that are being answered when the server is told to stop


def configured(app: FastAPI, **options: Any) -> uvicorn.Config:
    """uvicorn's configuration for an application of ours. options: more of uvicorn's."""
    return uvicorn.Config(
        app,
        http=protocol(app.state.services.settings),
        ws="none",
        access_log=False,
        server_header=False,
        lifespan="on",
        **{"timeout_graceful_shutdown": _GRACE_S, **options},
    )


class Server(uvicorn.Server):
    """Ends event streams as soon as it is told to stop: clients come back with Last-Event-ID."""

    def __init__(self, app: FastAPI, *, log_level: str) -> None:
        super().__init__(configured(app, log_level=log_level, log_config=None))
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.state.services.end_streams()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop in good order; uvicorn then lets the signal end the process."""
        await super().shutdown(sockets)
        logs.flush()


def raise_file_limit() -> None:
    """Let the process open as many connections as it may: the usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def serve(settings: Settings, listener: socket.socket, *, log_level: str = "warning") -> None:
    """Serve until SIGINT or SIGTERM."""
    # The admission thread waits for this long to get the interpreter back after each reply of
    # Redis while the event loop is busy; the default is 5 ms.
    sys.setswitchinterval(0.001)
    logs.configure(settings.log_format, level=log_level, gather=True)
    # It says what is wrong with each form, which is the client's to hear and not the log's.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    raise_file_limit()
    server = Server(create_app(settings), log_level=log_level)
    # All that is imported stays: the garbage collector need not hold the event loop to look at it.
    gc.collect()
    gc.freeze()
    server.run(sockets=[listener])
