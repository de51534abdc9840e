"""The store of outputs: fenced, bytes before the index, gone with their job; and another store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.outputs import image_name
from jobs.settings import Settings
from jobs.store import keys
from jobs.store.batch import Fate
from jobs.store.janitor import Janitor
from jobs.store.outputs import Put
from jobs.store.started import Started
from jobs.store.writer import JobStore

Submit = Callable[..., str]
X = np.zeros((1, 8, 8), dtype=np.float32)


def start(store: JobStore, job_id: str, execution: str = "e") -> Started:
    started = store.start(job_id, execution, worker="w", digest="d")
    assert started is not None
    return started


def write_image(store: JobStore, started: Started, execution: str, x: np.ndarray) -> Fate:
    batch = store.batch()
    batch.image(started.record, execution, index=0, x=x)
    return batch.send()[started.record.id]


def test_an_execution_that_lost_its_job_replaces_no_bytes(store: JobStore, submit: Submit) -> None:
    job_id = submit()
    first = start(store, job_id, "a")
    start(store, job_id, "b")  # another worker took over
    assert write_image(store, first, "b", X) is Fate.OK
    assert write_image(store, first, "a", X + 1) is Fate.LOST
    assert store.redis.hget(keys.outputs(job_id), image_name(0)) == X.tobytes()


def test_what_the_index_names_is_there(
    store: JobStore, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit()
    started = start(store, job_id)
    order: list[str] = []
    put = store.outputs.put

    def late(puts: Sequence[Put]) -> None:
        order.append(f"index {store.redis.hlen(keys.index(job_id))}")
        put(puts)
        order.append(f"bytes {store.redis.hlen(keys.outputs(job_id))}")

    monkeypatch.setattr(store.outputs, "put", late)
    write_image(store, started, "e", X)
    assert order == ["index 0", "bytes 1"] and store.redis.hlen(keys.index(job_id)) == 1


def test_bytes_that_cannot_be_kept_are_not_named(
    store: JobStore, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit()
    started = start(store, job_id)

    def fail(puts: Sequence[Put]) -> None:
        raise ConnectionError("the bucket is away")

    monkeypatch.setattr(store.outputs, "put", fail)
    events = store.redis.xlen(keys.events(job_id))
    with pytest.raises(ConnectionError):
        write_image(store, started, "e", X)
    assert store.redis.hlen(keys.index(job_id)) == 0
    assert store.redis.xlen(keys.events(job_id)) == events


def test_bytes_go_with_their_job(store: JobStore, submit: Submit) -> None:
    kept, purged = submit(ttl_s=1), submit()
    for job_id in (kept, purged):
        write_image(store, start(store, job_id), "e", X)
        assert int(store.redis.ttl(keys.outputs(job_id))) > 0  # even if nobody ever cleans
    assert store.purge(purged) and not store.redis.exists(keys.outputs(purged))
    store.succeed(kept, "e")
    store.redis.zadd(keys.DUE, {f"expire:{kept}": time.time() - 1})
    Janitor(store).sweep()
    assert not store.redis.exists(keys.outputs(kept))


class FolderOutputs:
    """Another store of outputs: a folder a job, for this test alone."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, puts: Sequence[Put]) -> None:
        for job_id, _, outputs in puts:
            (self.root / job_id).mkdir(exist_ok=True)
            for name, content in outputs.items():
                (self.root / job_id / name).write_bytes(content)

    async def get(self, job_id: str, names: Sequence[str]) -> list[bytes | None]:
        paths = [self.root / job_id / name for name in names]
        return [path.read_bytes() if path.exists() else None for path in paths]

    def delete(self, job_ids: Sequence[str]) -> None:
        for job_id in job_ids:
            for path in (self.root / job_id).glob("*"):
                path.unlink()


def test_another_store_is_one_class_and_one_line(
    store: JobStore, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_folder(settings: Settings, *args: Any, **kwargs: Any) -> FolderOutputs:
        return FolderOutputs(tmp_path)

    monkeypatch.setattr("jobs.store.writer.open_outputs", open_folder)
    other = JobStore(store.redis, store.settings)
    job_id = submit()
    write_image(other, start(other, job_id), "e", X)
    assert (tmp_path / job_id / image_name(0)).read_bytes() == X.tobytes()
    assert not store.redis.exists(keys.outputs(job_id)) and store.redis.hlen(keys.index(job_id))
    other.purge(job_id)
    assert list((tmp_path / job_id).iterdir()) == []
