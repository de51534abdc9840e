"""A job as a worker takes it: what it needs to begin, or to go on where another stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jobs.kinds.common import ARRAYS
from jobs.pictures import Float32, UInt8, from_bytes
from jobs.store.batch import InBatch
from jobs.store.records import JobRecord
from jobs.store.tolerance import UNREADABLE, json_object, text

MAX_LONE_CRASHES = 3  # deaths of workers that ran nothing else, before a job is given up
# A worker that was silent for so long is dead, as far as a job is to be given up for it. RQ hands
# its jobs on after 20 s; but machines sleep, swap and are moved, and then go on.
SILENT_S = 300.0


class StillSilent(Exception):
    """Whether a job has killed those that ran it alone is not known yet: ask again."""


@dataclass(frozen=True)
class Started:
    """A job to run.

    inputs: uploaded images, uint8 [N,H,W,C], or None. array: an x_t to start from or a measurement,
    float32 [C,H,W], or None. states: image index → what `checkpoint`
    saved. finished: indices of images already stored. crashes: workers that died with the job in
    their batch since it was last cleared; lone_crashes: with nothing else in it. best: the most
    image-steps that were ever done. in_batch: as it is marked now. earlier_digest: the model of
    the attempt that left `states`; earlier_table: the digest of its tuned table, if it had one.
    """

    record: JobRecord
    crashes: int
    lone_crashes: int
    best: int
    in_batch: InBatch
    inputs: UInt8 | None
    array: Float32 | None
    states: dict[int, bytes]
    finished: frozenset[int]
    earlier_digest: str | None
    earlier_table: str | None


def read_started(
    record: JobRecord,
    *,
    crashes: tuple[int, int],
    best: int,
    in_batch: InBatch,
    inputs: bytes | None,
    states: Mapping[bytes, bytes],
    fields: Iterable[bytes],
    earlier: tuple[bytes | None, bytes | None],
) -> Started:
    """From what Redis holds. crashes: all and lone ones. inputs, states, fields: what was uploaded,
    the saved states, the names in the index. earlier: digest and provenance of the attempt before.
    Raises ValueError where it is damaged.
    """
    as_array = record.spec.input in ARRAYS
    shape = record.spec.input_shape(record.shape) if inputs is not None else record.shape
    return Started(
        record=record,
        crashes=crashes[0],
        lone_crashes=crashes[1],
        best=best,
        in_batch=in_batch,
        inputs=None if inputs is None or as_array else _pictures(inputs, shape),
        array=from_bytes(inputs, shape) if as_array and inputs is not None else None,
        states={int(index): value for index, value in states.items()},
        finished=frozenset(int(f[2:]) for f in fields if f.startswith(b"i:")),
        earlier_digest=earlier[0].decode() if earlier[0] else None,
        earlier_table=_table_of(earlier[1]),
    )


def _pictures(raw: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    c, h, w = shape
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, h, w, c)


def _table_of(provenance: bytes | None) -> str | None:
    with contextlib.suppress(*UNREADABLE):
        found = json_object(text(provenance or b"")).get("table")
        return found if isinstance(found, str) else None
    return None
