"""How much room there is: the limits of the service against what it holds right now."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import redis

from jobs.cards import ModelCard
from jobs.errors import Refused, SpecError
from jobs.rates import combined_rate, retry_after
from jobs.settings import Settings
from jobs.states import Status
from jobs.store import keys
from jobs.store.orders import Order
from jobs.store.tolerance import count


@dataclass
class Lane:
    """One queue: jobs that wait, image-steps admitted and completed, ever."""

    waiting: int
    admitted: int
    completed: int


class Room:
    """Read once for a batch of orders, then kept up to date as they are taken in."""

    def __init__(
        self, connection: redis.Redis, settings: Settings, orders: Iterable[Order]
    ) -> None:
        self._redis = connection
        self._limits = settings
        self._read(
            sorted({order.card.queue for order in orders}),
            sorted({order.client for order in orders}),
        )

    def _read(self, queues: list[str], clients: list[str]) -> None:
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hget(keys.TOTALS, "output_bytes")
            pipe.hmget(keys.CLIENTS, clients)
            for name in queues:
                pipe.zcard(keys.in_queue(name, Status.QUEUED))
                pipe.hmget(keys.queue(name), ["admitted", "completed"])
            held, outstanding, *rows = pipe.execute()
        self._held = count(held)
        self._outstanding = {c: count(n) for c, n in zip(clients, outstanding, strict=True)}
        self.lanes = {
            name: Lane(waiting, *(count(n) for n in work))
            for name, waiting, work in zip(queues, rows[::2], rows[1::2], strict=True)
        }

    def check(self, order: Order) -> None:
        """Raise Refused where there is no room now, SpecError where there never will be."""
        self._check_size(order)
        self._check_quota(order)
        lane = self.lanes[order.card.queue]
        if lane.waiting >= self._limits.max_queued_jobs:
            each = (lane.admitted - lane.completed) / max(lane.waiting, 1)
            wait = retry_after(each, self._rate(order.card))
            raise Refused("queue_full", f"{lane.waiting} jobs are waiting already", wait)
        if self._held + order.bytes > self._limits.max_output_bytes:
            detail = f"outputs hold {self._held} of {self._limits.max_output_bytes} bytes"
            raise Refused("storage_full", detail, self._next_expiry())

    def take(self, order: Order) -> int:
        """Count an order in. Returns the image-steps its queue has ever admitted, with it."""
        lane = self.lanes[order.card.queue]
        lane.waiting += 1
        lane.admitted += order.plan.evaluations
        self._outstanding[order.client] += order.plan.evaluations
        self._held += order.bytes
        return lane.admitted

    def _check_size(self, order: Order) -> None:
        limits, work = self._limits, order.plan.evaluations
        if order.bytes > limits.max_output_bytes:
            detail = f"{order.bytes} bytes of output: the service holds {limits.max_output_bytes}"
            raise SpecError("", detail)
        if limits.client_quota and work > limits.client_quota:
            raise SpecError(
                order.spec.work_field, f"{work} image-steps: the quota is {limits.client_quota}"
            )

    def _check_quota(self, order: Order) -> None:
        quota, outstanding = self._limits.client_quota, self._outstanding[order.client]
        over = outstanding + order.plan.evaluations - quota
        if quota and over > 0:
            detail = f"{outstanding} of {quota} image-steps are outstanding"
            raise Refused("quota_exceeded", detail, retry_after(over, self._rate(order.card)))

    def _rate(self, card: ModelCard) -> float | None:
        entries: Any = self._redis.hvals(keys.rates(card.name))
        return combined_rate(entries, time.time())

    def _next_expiry(self) -> int:
        """Seconds until the first outputs lapse (a minute if only running jobs hold any)."""
        due: Any = self._redis.zrange(keys.DUE, 0, 0, withscores=True)
        wait = due[0][1] - time.time() if due else 60.0
        return math.ceil(min(86_400, max(1, wait)))
