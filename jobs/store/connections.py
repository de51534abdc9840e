"""Connections to Redis: none of them waits for ever for an answer."""

from __future__ import annotations

import logging
import time
from typing import Any

import redis
import redis.asyncio as aioredis
import redis.asyncio.retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from jobs.settings import Settings
from jobs.store import keys
from jobs.store.trouble import AWAY, trouble_of

log = logging.getLogger(__name__)

SOCKET_S = 5.0  # for an answer: a connection that was dropped without a word hangs nobody longer
_RETRIES = 3
_MOST = 64  # connections of a process
_IN_LINE_S = 30.0  # for one of them
_PROBE_S = 60


def connect(settings: Settings) -> redis.Redis:
    """A synchronous connection as RQ needs it: RESP2, bytes."""
    retry = Retry(ExponentialWithJitterBackoff(base=0.05, cap=1.0), _RETRIES)
    made = {"protocol": 2, "decode_responses": False, "retry": retry}
    return redis.Redis.from_url(settings.redis_url, **made, **_sockets(settings))


def connect_async(settings: Settings, **options: Any) -> aioredis.Redis:
    """Asynchronous connections with the protocol of the synchronous one.

    Who finds all of them in use waits for one: a thousand requests at once are no reason to say
    that Redis is away, which the pool that redis-py takes by itself would.
    """
    backoff = ExponentialWithJitterBackoff(base=0.05, cap=1.0)
    made = {"protocol": 2, "retry": redis.asyncio.retry.Retry(backoff, _RETRIES)}
    limits = {"max_connections": _MOST, "timeout": _IN_LINE_S}
    options = {**made, **limits, **_sockets(settings), **options}
    pool = aioredis.BlockingConnectionPool.from_url(settings.redis_url, **options)
    return aioredis.Redis.from_pool(pool)


def _sockets(settings: Settings) -> dict[str, Any]:
    limits: dict[str, Any] = {"socket_timeout": SOCKET_S, "socket_connect_timeout": SOCKET_S}
    if not settings.redis_url.startswith("unix:"):
        limits["socket_keepalive"] = True
    return limits


def wait_until_writable(connection: redis.Redis) -> None:
    """Return once Redis takes writes. Raises ConnectionError where it cannot be reached."""
    told = ""
    while True:
        try:
            connection.set(keys.PROBE, 1, ex=_PROBE_S)
            return
        except redis.exceptions.RedisError as error:
            trouble = trouble_of(error)
            if trouble is None or trouble == AWAY:
                raise
            if trouble.detail != told:
                told = trouble.detail
                log.warning("%s; waiting", told)
            time.sleep(1.0)


async def probe(connection: aioredis.Redis) -> None:
    """Raise the RedisError that says why Redis takes no writes, if it does not."""
    await connection.set(keys.PROBE, 1, ex=_PROBE_S)
