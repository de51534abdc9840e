"""The files of a job: images, snapshots, grids, films, archives."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response

from app import documents, summary
from app.outputs import (
    as_output,
    check_film,
    check_grid,
    check_px,
    encode_film,
    encode_grid,
    encode_image,
    fetch,
    file_response,
    film_columns,
    film_frames,
    kept,
    output_response,
)
from app.problems import Problem, documented
from app.routes.operation import Operation
from app.services import Services, services
from app.views import manifest
from jobs import pictures
from jobs.errors import OutputExpired
from jobs.formats import FILMS, IMAGES, PICTURES, OneOf
from jobs.outputs import image_name, snapshot_name
from jobs.pictures import Float32
from jobs.states import ACTIVE
from jobs.store.records import JobRecord

router = APIRouter(tags=["outputs"], route_class=Operation)
ERRORS = documented(
    "unauthorized", "not_found", "not_ready", "expired", "invalid_request", "store_unavailable"
)
Index = Annotated[int, Path(ge=0)]
ImageSuffix = Annotated[str, OneOf(IMAGES)]
PictureSuffix = Annotated[str, OneOf(PICTURES)]
FilmSuffix = Annotated[str, OneOf(FILMS)]
Kind = Literal["x_t", "x_start", "eps"]
Px = Annotated[
    int | None,
    Query(ge=8, le=2048, description="the longer side, about; absent: as it is"),
]
_ALPHA_BAR = {
    "X-Alpha-Bar": {
        "description": "ᾱ_t, where the job is about noise levels (`/noise`)",
        "schema": {"type": "number"},
    }
}
FilmPx = Annotated[
    int,
    Query(ge=8, le=2048, description="enlarge by whole numbers while no side is longer than this"),
]


@router.get(
    "/jobs/{job_id}/images.zip",
    response_class=Response,
    responses={200: documents.files("zip"), **ERRORS},
)
async def get_images_zip(
    request: Request,
    job_id: str,
    suffix: Annotated[ImageSuffix | None, Query(alias="format")] = None,
) -> Response:
    """All images of a job, and `manifest.json`."""
    held = services(request)
    state = await held.job(job_id)
    record = state.record
    planes = await fetch(held, record, [image_name(i) for i in range(record.images)])
    chosen = suffix or record.spec.format
    content = await held.pools.encoding.run(_zip, held, record, planes, chosen)
    return file_response(content, "zip", f"{job_id}.zip", cache=kept(record))


def _zip(held: Services, record: JobRecord, planes: list[Float32], suffix: str) -> bytes:
    encoded = [encode_image(record, i, x, suffix=suffix) for i, x in enumerate(planes)]
    files = [
        (f"{i:04}.{suffix}", as_output(held, record, content, suffix))
        for i, content in enumerate(encoded)
    ]
    text = json.dumps(manifest(record), indent=2, ensure_ascii=False)
    return pictures.zip_files([*files, ("manifest.json", text.encode())])


@router.get(
    "/jobs/{job_id}/images/{index}.{suffix}",
    response_class=Response,
    responses={200: documents.files(*IMAGES), **ERRORS},
)
async def get_image(
    request: Request, job_id: str, index: Index, suffix: ImageSuffix, px: Px = None
) -> Response:
    """One image. A PNG carries the manifest that makes it again; npy is float32 [C,H,W]."""
    check_px(suffix, px)
    held = services(request)
    record = (await held.job(job_id)).record
    [x] = await fetch(held, record, [image_name(index)])
    encoding = held.pools.encoding.run(encode_image, record, index, x, suffix=suffix, px=px or 0)
    return await output_response(held, record, await encoding, suffix)


@router.get(
    "/jobs/{job_id}/grid.{suffix}",
    response_class=Response,
    responses={200: documents.files(*PICTURES), **ERRORS},
)
async def get_grid(request: Request, job_id: str, suffix: PictureSuffix, px: Px = None) -> Response:
    """All images of a job in one picture; of a noise job, x_t with t from left to right."""
    held = services(request)
    record = (await held.job(job_id)).record
    planes = await fetch(held, record, record.spec.grid(record.images))
    check_grid(record, len(planes), suffix)
    encoding = held.pools.encoding.run(encode_grid, record, planes, suffix=suffix, px=px or 0)
    return await output_response(held, record, await encoding, suffix)


@router.get(
    "/jobs/{job_id}/mean.{suffix}",
    response_class=Response,
    responses={200: documents.files(*IMAGES), **ERRORS},
)
async def get_mean(request: Request, job_id: str, suffix: ImageSuffix, px: Px = None) -> Response:
    """The mean of a job's images, which is the best single answer where they are samples of one."""
    return await _statistic(request, job_id, summary.mean, suffix=suffix, px=px)


@router.get(
    "/jobs/{job_id}/std.{suffix}",
    response_class=Response,
    responses={200: documents.files(*IMAGES), **ERRORS},
)
async def get_std(request: Request, job_id: str, suffix: ImageSuffix, px: Px = None) -> Response:
    """The standard deviation of a job's images: where they differ. A picture shows 0..1 as black to
    white, of images in [−1, 1]; npy is the deviation itself, float32 [C,H,W]."""
    return await _statistic(request, job_id, summary.std, suffix=suffix, px=px)


async def _statistic(
    request: Request, job_id: str, statistic: summary.Summary, *, suffix: str, px: int | None
) -> Response:
    check_px(suffix, px)
    held = services(request)
    record = (await held.job(job_id)).record
    names = [image_name(i) for i in range(record.images)] if "images" in record.spec.gives else []
    planes = await fetch(held, record, names)
    content = await held.pools.encoding.run(
        summary.encode, planes, statistic, suffix=suffix, px=px or 0
    )
    return await output_response(held, record, content, suffix)


@router.get(
    "/jobs/{job_id}/snapshots.{suffix}",
    response_class=Response,
    responses={200: documents.files(*FILMS), **ERRORS},
)
async def get_film(
    request: Request,
    job_id: str,
    suffix: FilmSuffix,
    kind: Annotated[Kind, Query()] = "x_t",
    index: Annotated[int | None, Query(ge=0, description="one image; else all in a grid")] = None,
    px: FilmPx = 128,
) -> Response:
    """The chain as a film: one frame a kept t, and the finished images at the end."""
    held = services(request)
    state = await held.job(job_id)
    if state.record.outputs_gone:
        raise OutputExpired(f"the outputs of job {job_id} have expired")
    frames = film_frames(state, kind, index)
    if not frames:
        of = "" if index is None else f" of image {index}"
        raise Problem("not_found", f"job {job_id} kept no snapshots of {kind}{of}")
    columns = film_columns(state.record, len(frames[0]))
    check_film(state.record, frames, suffix, px, columns=columns)
    planes = iter(await fetch(held, state.record, [field for f in frames for field in f]))
    grouped = [[next(planes) for _ in fields] for fields in frames]
    encoding = held.pools.encoding.run(encode_film, grouped, suffix, px, columns=columns)
    whole = state.record.status not in ACTIVE
    return await output_response(held, state.record, await encoding, suffix, whole=whole)


@router.get(
    "/jobs/{job_id}/snapshots/{t}/{index}.{suffix}",
    response_class=Response,
    responses={200: documents.files(*IMAGES) | {"headers": _ALPHA_BAR}, **ERRORS},
)
async def get_snapshot(
    request: Request,
    job_id: str,
    t: Annotated[int, Path(ge=1)],
    index: Index,
    suffix: ImageSuffix,
    kind: Annotated[Kind, Query()] = "x_t",
    px: Px = None,
) -> Response:
    """A kept state of the chain at t. A PNG shows −1..1 as black to white and clips the rest;
    npy is the float32 [C,H,W] itself."""
    check_px(suffix, px)
    held = services(request)
    record = (await held.job(job_id)).record
    [x] = await fetch(held, record, [snapshot_name(t, kind, index)])
    encoding = held.pools.encoding.run(encode_image, record, index, x, suffix=suffix, px=px or 0)
    response = await output_response(held, record, await encoding, suffix)
    levels = record.levels or {}
    if str(t) in levels:
        response.headers["X-Alpha-Bar"] = repr(levels[str(t)][0])
    return response
