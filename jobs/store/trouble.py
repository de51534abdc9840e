"""What Redis says when it cannot serve now: each case by its name, and all of them waited out."""

from __future__ import annotations

import re
from dataclasses import dataclass

from redis.exceptions import BusyLoadingError, ConnectionError, RedisError, TimeoutError


@dataclass(frozen=True)
class Trouble:
    """A state of Redis in which it serves some or all requests later. code: for the API."""

    code: str
    detail: str


AWAY = Trouble("store_unavailable", "Redis does not answer; jobs that were taken in are kept")
LOADING = Trouble("store_loading", "Redis is reading its data from disk")
# What Redis begins its refusal with; a script that met it has the word within its message.
_REFUSALS = {
    "OOM": Trouble("store_full", "Redis has used all the memory it may use (maxmemory)"),
    "READONLY": Trouble("store_read_only", "Redis is a replica, and takes no writes"),
    "MISCONF": Trouble("store_cannot_save", "Redis cannot save to its disk, and takes no writes"),
    "BUSY": Trouble("store_busy", "Redis is busy with a long script"),
    "UNBLOCKED": Trouble("store_read_only", "Redis has become a replica"),
    "NOREPLICAS": Trouble("store_read_only", "Redis has too few replicas to take writes"),
    "MASTERDOWN": Trouble("store_unavailable", "Redis is a replica, and its master is down"),
    "CLUSTERDOWN": Trouble("store_unavailable", "the Redis cluster is down"),
    "TRYAGAIN": Trouble("store_unavailable", "the Redis cluster is being changed"),
}
CODES = sorted({AWAY.code, LOADING.code, *(trouble.code for trouble in _REFUSALS.values())})
_WORD = re.compile(rf"(?:^|[\s-])({'|'.join(_REFUSALS)})\s")


def trouble_of(error: BaseException) -> Trouble | None:
    """The state of Redis that an error tells of; None: it tells of none, and waiting is of no use.

    redis-py takes the word off some refusals, and keeps it as their `status_code`.
    """
    if isinstance(error, BusyLoadingError):
        return LOADING
    if isinstance(error, ConnectionError | TimeoutError):
        return AWAY
    if not isinstance(error, RedisError):
        return None
    word = getattr(error, "status_code", None)
    if word in _REFUSALS:
        return _REFUSALS[word]
    found = _WORD.search(str(error))
    return _REFUSALS[found[1]] if found else None


def passes(error: BaseException) -> bool:
    """Whether it is worth the wait: Redis is away or refuses for now, and nothing is lost."""
    return trouble_of(error) is not None
