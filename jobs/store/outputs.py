"""Where the bytes of images and snapshots are: three verbs, by job and name.

The order that keeps "nothing lost, nothing doubled": on the way in the bytes, then the entry in
the job's index with its event, both only for the execution that holds the job; on the way out
the index, then the bytes. So whatever the index names is there. What a crash leaves in between is
bytes that nobody names: each implementation lets them lapse by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import redis

from jobs.settings import Settings
from jobs.store import keys, scripts
from jobs.store.sending import send_all


class Put(NamedTuple):
    """Outputs of one job: name (`jobs.outputs`) → bytes."""

    job_id: str
    execution: str
    outputs: Mapping[str, bytes]


class OutputStore(Protocol):
    """Written by workers, read by the API."""

    def put(self, puts: Sequence[Put]) -> None:
        """Keep these bytes, of any number of jobs. Done twice, it is done once.

        Of an execution that no longer holds its job nothing may replace what another has put: it
        has seen other batches, and a last bit can differ.
        """

    async def get(self, job_id: str, names: Sequence[str]) -> list[bytes | None]:
        """The bytes, None where there are none."""

    def delete(self, job_ids: Sequence[str]) -> None:
        """Drop all that these jobs have."""


class RedisOutputs:
    """In Redis, a hash a job.

    connection: for `put` and `delete`; reading: an asynchronous one, for `get`.
    """

    def __init__(
        self, settings: Settings, connection: redis.Redis | None = None, reading: Any = None
    ) -> None:
        self._redis: Any = connection
        self._reading = reading
        # Nobody may be there to delete them: longer than any job may run and keep what it made.
        self._lapse_s = round(settings.max_ttl_s + settings.job_deadline_s)

    def put(self, puts: Sequence[Put]) -> None:
        """One script a job, fenced by its execution; all in one round trip."""
        calls = [
            [job_id, execution, self._lapse_s, *(part for pair in found.items() for part in pair)]
            for job_id, execution, found in puts
        ]
        for reply in send_all(self._redis, scripts.PUT, calls):
            if isinstance(reply, Exception):
                raise reply

    async def get(self, job_id: str, names: Sequence[str]) -> list[bytes | None]:
        """One HMGET."""
        found: list[bytes | None] = await self._reading.hmget(keys.outputs(job_id), list(names))
        return found

    def delete(self, job_ids: Sequence[str]) -> None:
        """One UNLINK."""
        if job_ids:
            self._redis.unlink(*(keys.outputs(job_id) for job_id in job_ids))


def open_outputs(
    settings: Settings, connection: redis.Redis | None = None, reading: Any = None
) -> OutputStore:
    """The store of outputs. Another kind of store is another class here, chosen here."""
    return RedisOutputs(settings, connection, reading)
