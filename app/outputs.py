"""Outputs as files: fetched from the store as float32, encoded on the way out."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from fastapi.responses import Response

from app.problems import Problem, field_problem
from app.services import Services
from app.views import manifest
from jobs import pictures
from jobs.errors import OutputExpired
from jobs.formats import FORMATS
from jobs.marking import GENERATED, PROCESSED, marked
from jobs.outputs import image_name, snapshot_name
from jobs.pictures import Float32, UInt8, from_bytes, to_uint8
from jobs.states import ACTIVE
from jobs.store.reader import JobState
from jobs.store.records import JobRecord

# Of frames that are enlarged; an encoder takes some times as much.
_MOST_FILM_BYTES = 64 * 2**20
_KEEP_S = 3600


def file_response(content: bytes, suffix: str, name: str | None = None, *, cache: str) -> Response:
    """A file. name: what a browser that saves it should call it. cache: the Cache-Control."""
    headers = {"Cache-Control": cache}
    if name is not None:
        headers["Content-Disposition"] = f'inline; filename="{name}"'
    return Response(content, media_type=FORMATS[suffix].media, headers=headers)


def kept(record: JobRecord) -> str:
    """The Cache-Control of an output that is whole: it never changes, until it is deleted."""
    left = _KEEP_S if record.expires_at is None else int(record.expires_at - time.time())
    return f"private, max-age={max(0, min(left, _KEEP_S))}"


async def output_response(
    services: Services, record: JobRecord, content: bytes, suffix: str, *, whole: bool = True
) -> Response:
    """A picture or film of a job. whole: it will not grow."""
    if services.credentials is None:
        output = as_output(services, record, content, suffix)
    else:  # to sign takes milliseconds
        output = await services.pools.encoding.run(as_output, services, record, content, suffix)
    return file_response(output, suffix, cache=kept(record) if whole else "no-store")


def as_output(services: Services, record: JobRecord, content: bytes, suffix: str) -> bytes:
    """The file of an output, marked as what it is unless the settings say otherwise, and signed
    where they say with what."""
    source = GENERATED if record.spec.runs_network else PROCESSED
    if services.settings.mark_outputs:
        content = marked(content, suffix, source)
    if services.credentials is not None:
        content = services.credentials.signed(content, suffix, source, f"job {record.id}")
    return content


async def fetch(services: Services, record: JobRecord, fields: Sequence[str]) -> list[Float32]:
    """Output planes [C,H,W]. Raises OutputExpired, Problem not_ready or not_found."""
    if record.outputs_gone:
        raise OutputExpired(f"the outputs of job {record.id} have expired")
    planes = await services.reader.outputs.get(record.id, fields) if fields else []
    found = [from_bytes(plane, record.shape) for plane in planes if plane is not None]
    if found and len(found) == len(fields):
        return found
    if record.status in ACTIVE:
        raise Problem("not_ready", f"job {record.id} is {record.status}; this is not there yet")
    raise Problem("not_found", f"job {record.id} ({record.status}) has no such output")


def check_px(suffix: str, px: int | None) -> None:
    """Raise Problem 422 where `px` is asked for and has no effect."""
    if px is not None and FORMATS[suffix].array is not None:
        detail = f"{px}: an {suffix} is the array itself, of the model's size"
        raise field_problem("/query/px", detail)


def encode_image(record: JobRecord, index: int, x: Float32, *, suffix: str, px: int = 0) -> bytes:
    """One image: as a picture (with its manifest, where the format takes one), or as an array."""
    chosen = FORMATS[suffix]
    if chosen.array is not None:
        return chosen.array(x)
    assert chosen.picture is not None
    return chosen.picture(to_uint8(x), manifest(record, index=index), px=px)


def encode_grid(record: JobRecord, planes: Sequence[Float32], *, suffix: str, px: int = 0) -> bytes:
    """All pictures of a job in one, in as many columns as its kind asks for."""
    pixels = pictures.grid([to_uint8(x) for x in planes], columns=record.spec.grid_columns)
    encode = FORMATS[suffix].picture
    assert encode is not None
    return encode(pixels, manifest(record), px=px)


def check_grid(record: JobRecord, count: int, suffix: str) -> None:
    """Raise Problem for a grid of so many with more pixels a side than the format can hold."""
    _, height, width = record.shape
    size = pictures.grid_size(count, height, width, columns=record.spec.grid_columns)
    _check_sides(size, suffix)


def check_film(
    record: JobRecord, frames: Sequence[Sequence[str]], suffix: str, px: int, *, columns: int
) -> None:
    """Raise Problem for a film that would take too much memory, enlarged as it is asked for, or has
    frames with more pixels a side than the format can hold."""
    channels, height, width = record.shape
    size = pictures.grid_size(len(frames[0]), height, width, columns=columns)
    factor = _factor(size, px)
    _check_sides((size[0] * factor, size[1] * factor), suffix)
    each = size[0] * size[1] * channels
    if factor > 1 and len(frames) * each * factor**2 > _MOST_FILM_BYTES:
        most = max(1, math.isqrt(_MOST_FILM_BYTES // (len(frames) * each))) * max(size)
        detail = f"{px}: too large for a film of {len(frames)} frames; must be at most {most}"
        raise field_problem("/query/px", detail)


def _check_sides(size: tuple[int, int], suffix: str) -> None:
    (height, width), most = size, FORMATS[suffix].most
    if most and max(height, width) > most:
        raise Problem(
            "invalid_request",
            f"{width} × {height} pixels: {suffix} holds at most {most} a side; ask for png",
        )


async def picture(services: Services, state: JobState, suffix: str) -> Response:
    """The answer to a POST that takes a picture: the image, or the grid of several."""
    record = state.record
    planes = await fetch(services, record, record.spec.grid(record.images))
    check_grid(record, len(planes), suffix)
    pool = services.pools.encoding
    if len(planes) == 1:
        content = await pool.run(encode_image, record, 0, planes[0], suffix=suffix)
    else:
        content = await pool.run(encode_grid, record, planes, suffix=suffix)
    return await output_response(services, record, content, suffix)


def film_frames(state: JobState, kind: str, index: int | None) -> list[list[str]]:
    """For each frame of a film the fields of its pictures: t falls (noise: rises).

    Frames in which a picture is missing are left out; a finished chain ends with its images.
    """
    by_t: dict[int, list[int]] = {}
    for t, snapshot_kind, i in state.snapshots:
        if snapshot_kind == kind and index in (None, i):
            by_t.setdefault(t, []).append(i)
    most = max((len(indices) for indices in by_t.values()), default=0)
    rises = state.record.spec.film_rises
    frames = [
        [snapshot_name(t, kind, i) for i in sorted(indices)]
        for t, indices in sorted(by_t.items(), reverse=not rises)
        if len(indices) == most
    ]
    last = [i for i in state.images if index in (None, i)]
    if frames and kind != "eps" and len(last) == most:
        frames.append([image_name(i) for i in last])
    return frames


def film_columns(record: JobRecord, pictures_a_frame: int) -> int:
    """As in the job's grid, where a frame shows all that the grid does."""
    whole = pictures_a_frame == record.images and not record.spec.film_rises
    return record.spec.grid_columns if whole else 0


def encode_film(
    frames: Sequence[Sequence[Float32]], suffix: str, px: int, *, columns: int = 0
) -> bytes:
    """An animation with one grid a frame, enlarged to `px`."""
    grids = [pictures.grid([to_uint8(x) for x in planes], columns=columns) for planes in frames]
    encode = FORMATS[suffix].film
    assert encode is not None
    return encode([_enlarged(grid, px) for grid in grids])


def _factor(size: tuple[int, int], px: int) -> int:
    return max(1, px // max(size))


def _enlarged(pixels: UInt8, px: int) -> UInt8:
    height, width, _ = pixels.shape
    factor = _factor((height, width), px)
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
