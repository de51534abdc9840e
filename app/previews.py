"""Pictures inside event streams: each is encoded once, for all who watch."""

from __future__ import annotations

import asyncio
import base64
from collections import OrderedDict
from collections.abc import Sequence

from app.metrics import Metrics
from app.pools import Pool
from jobs.marking import GENERATED, PROCESSED, marked
from jobs.pictures import encode_png, from_bytes, to_uint8
from jobs.store.reader import JobReader
from jobs.store.records import JobRecord

Key = tuple[str, str, int]  # job, field, longer side
_MOST_CHARACTERS = 32 * 2**20


class Previews:
    """Base64 PNGs by job, output field and size; the latest are kept, 32 MiB of them."""

    def __init__(
        self, reader: JobReader, pool: Pool, metrics: Metrics, *, mark: bool = True
    ) -> None:
        self._reader = reader
        self._pool = pool
        self._kept: OrderedDict[Key, str] = OrderedDict()
        self._making: dict[Key, asyncio.Task[dict[str, str]]] = {}
        self._size = 0
        self._metrics = metrics
        self._mark = mark

    async def of(self, record: JobRecord, fields: Sequence[str], px: int) -> dict[str, str]:
        """field → picture, for those whose output is there. Raises RedisError."""
        found: dict[str, str] = {}
        waited: set[asyncio.Task[dict[str, str]]] = set()
        missing = []
        for field in dict.fromkeys(fields):  # a step that is made again tells its picture again
            key = (record.id, field, px)
            if key in self._kept:
                self._kept.move_to_end(key)
                found[field] = self._kept[key]
            elif key in self._making:
                waited.add(self._making[key])
            else:
                missing.append(field)
        if missing:
            task = asyncio.create_task(self._make(record, missing, px))
            task.add_done_callback(_look)  # perhaps nobody is left to hear of its error
            self._making.update({(record.id, field, px): task for field in missing})
            waited.add(task)
        for task in waited:
            made = await asyncio.shield(task)  # a viewer that leaves takes it from no other
            found.update({field: made[field] for field in fields if field in made})
        return found

    async def _make(self, record: JobRecord, fields: list[str], px: int) -> dict[str, str]:
        try:
            planes = await self._reader.outputs.get(record.id, fields)
            there = {f: plane for f, plane in zip(fields, planes, strict=True) if plane is not None}
            made = await self._pool.run(_encode, there, record, px, mark=self._mark)
        finally:
            for field in fields:
                del self._making[record.id, field, px]
        self._metrics.previews.inc(len(made))
        for field, text in made.items():
            self._keep((record.id, field, px), text)
        return made

    def _keep(self, key: Key, text: str) -> None:
        self._kept[key] = text
        self._size += len(text)
        while self._size > _MOST_CHARACTERS:
            _, oldest = self._kept.popitem(last=False)
            self._size -= len(oldest)


def _look(task: asyncio.Task[dict[str, str]]) -> None:
    if not task.cancelled():
        task.exception()


def _encode(planes: dict[str, bytes], record: JobRecord, px: int, *, mark: bool) -> dict[str, str]:
    source = GENERATED if record.spec.runs_network else PROCESSED

    def encoded(plane: bytes) -> str:
        content = encode_png(to_uint8(from_bytes(plane, record.shape)), px=px)
        return base64.b64encode(marked(content, "png", source) if mark else content).decode()

    return {field: encoded(plane) for field, plane in planes.items()}
