"""Webhooks that are due: a sorted set of job ids by the time of the next attempt.

A job enters it in the script that ends the job, so none is forgotten. Claiming moves it a lease
into the future: if the process that claimed it dies, another tries again.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import redis.asyncio as aioredis

from jobs.store import keys

LEASE_S = 60
DELAYS_S = (5, 30, 120, 600, 1800, 7200)  # after the first attempt, the second, …

# KEYS: due, attempts. ARGV: now, lease.
_CLAIM = """
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, 1)
if #due == 0 then return {} end
redis.call('ZADD', KEYS[1], ARGV[1] + ARGV[2], due[1])
return {due[1], redis.call('HINCRBY', KEYS[2], due[1], 1)}
"""
# The same, and the seconds until the next attempt: what was purged meanwhile stays so.
_PUT_BACK = """
if not redis.call('ZSCORE', KEYS[1], ARGV[3]) then return end
redis.call('ZADD', KEYS[1], ARGV[1] + ARGV[2], ARGV[3])
redis.call('HINCRBY', KEYS[2], ARGV[3], -1)
"""


class Claim(NamedTuple):
    """A webhook to send now. attempt: 1 for the first."""

    job_id: str
    attempt: int


class WebhookQueue:
    """Asynchronous; any number of API processes may share the work."""

    def __init__(self, connection: aioredis.Redis) -> None:
        self._redis: Any = connection
        self._claim: Any = connection.register_script(_CLAIM)
        self._put_back: Any = connection.register_script(_PUT_BACK)

    async def claim(self) -> Claim | None:
        """The next webhook that is due, or None."""
        found = await self._claim(
            keys=[keys.WEBHOOKS, keys.WEBHOOK_ATTEMPTS], args=[time.time(), LEASE_S]
        )
        return Claim(found[0].decode(), int(found[1])) if found else None

    async def settle(self, job_id: str) -> None:
        """It was delivered, or never will be."""
        async with self._redis.pipeline() as pipe:
            pipe.zrem(keys.WEBHOOKS, job_id)
            pipe.hdel(keys.WEBHOOK_ATTEMPTS, job_id)
            await pipe.execute()

    async def put_back(self, claim: Claim, seconds: float) -> None:
        """It was not tried: due again after so long, and no attempt counted."""
        await self._put_back(
            keys=[keys.WEBHOOKS, keys.WEBHOOK_ATTEMPTS], args=[time.time(), seconds, claim.job_id]
        )

    async def postpone(self, claim: Claim, seconds: float | None = None) -> bool:
        """Try again later. False: that was the last attempt, and it is given up."""
        if claim.attempt > len(DELAYS_S):
            await self.settle(claim.job_id)
            return False
        delay = DELAYS_S[claim.attempt - 1] if seconds is None else seconds
        await self._redis.zadd(keys.WEBHOOKS, {claim.job_id: time.time() + delay}, xx=True)
        return True
