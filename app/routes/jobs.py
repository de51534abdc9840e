"""GET /jobs, GET and DELETE /jobs/{id}, POST /jobs/{id}/cancel, GET /jobs/{id}/events."""

from __future__ import annotations

import asyncio
import functools
import re
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response

from app import documents, signing
from app.problems import documented, field_problem
from app.routes.operation import Operation
from app.services import services
from app.streams import EventStream, has_ended, job_frames
from app.views import JobList, JobView, dump, job_view
from app.waiting import until_ended
from jobs.states import Status
from jobs.store.reader import JobState

router = APIRouter(tags=["jobs"], route_class=Operation)
_CURSOR = re.compile(r"[0-9a-f]{28}")


def json_response(text: str, status: int = 200) -> Response:
    """A response with a JSON text."""
    return Response(text, status, media_type="application/json")


@router.get(
    "/jobs",
    response_model=JobList,
    responses=documented("unauthorized", "invalid_request", "store_unavailable"),
)
async def list_jobs(
    request: Request,
    status: Annotated[Status | None, Query()] = None,
    model: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(description="next_cursor of the page before")] = None,
) -> Response:
    """Jobs, newest first, without their outputs."""
    if cursor is not None and not _CURSOR.fullmatch(cursor):
        raise field_problem("/query/cursor", f"{cursor!r} is no cursor of ours")
    reader = services(request).reader
    page = await reader.page(status=status, model=model, limit=limit, cursor=cursor)
    views = []
    for state in page.jobs:
        views.append(job_view(state, full=False))
        await asyncio.sleep(0)  # between two of them others go on
    return json_response(dump(JobList(data=views, next_cursor=page.cursor)))


@router.get(
    "/jobs/{job_id}",
    response_model=JobView,
    responses=documented("unauthorized", "not_found", "invalid_request", "store_unavailable"),
)
async def get_job(
    request: Request,
    job_id: str,
    wait: Annotated[float, Query(ge=0, le=60, description="hold until the job ends")] = 0,
    sign: Annotated[
        int | None,
        Query(
            ge=1,
            le=signing.MOST_S,
            description="where the service has keys: addresses of outputs and events that open "
            "without one for so many seconds, as in the `src` of a picture",
        ),
    ] = None,
) -> Response:
    """A job."""
    held = services(request)
    state = await until_ended(held, request, await held.job(job_id), seconds=wait)
    key = held.keyring.signing(request.scope)
    if sign is None or key is None:
        return json_response(await held.told(state))
    name, digest = key

    def view(state: JobState) -> JobView:
        return signing.with_signed_urls(job_view(state), name=name, digest=digest, seconds=sign)

    return json_response(await held.told(state, view))


@router.delete(
    "/jobs/{job_id}",
    status_code=204,
    response_class=Response,
    responses=documented("unauthorized", "not_found", "store_unavailable"),
)
async def delete_job(request: Request, job_id: str) -> Response:
    """Delete a job and its outputs; a running one stops."""
    await services(request).purge(job_id)
    return Response(status_code=204)


@router.post(
    "/jobs/{job_id}/cancel",
    response_model=JobView,
    responses=documented("unauthorized", "not_found", "store_unavailable"),
)
async def cancel_job(request: Request, job_id: str) -> Response:
    """Cancel a job. A waiting one is canceled at once, a running one between two steps, and keeps
    its latest x_t and x̂_0 as snapshots; one that has ended stays as it is."""
    held = services(request)
    await held.cancel(job_id)
    return json_response(await held.told(await held.job(job_id)))


@router.get(
    "/jobs/{job_id}/events",
    response_class=Response,
    responses={
        200: documents.EVENT_STREAM,
        204: {"description": "The job has ended and Last-Event-ID was its last event"},
        **documented("unauthorized", "not_found", "store_unavailable"),
    },
)
async def get_events(
    request: Request,
    job_id: str,
    last_event_id: Annotated[str | None, Header(description="resume after this event")] = None,
    last_event_id_said: Annotated[
        str | None,
        Query(alias="lastEventId", description="the same, from what cannot send the header"),
    ] = None,
    inline: Annotated[bool, Query(description="pictures as base64 PNG in their events")] = False,
    cancel_on_disconnect: Annotated[bool, Query()] = False,
) -> Response:
    """What happens to a job, as server-sent events from its beginning (or Last-Event-ID) on."""
    held = services(request)
    last_event_id = last_event_id or last_event_id_said
    state = await held.job(job_id)
    if await has_ended(held, state.record, last_event_id):
        return Response(status_code=204)  # tells EventSource not to come back
    frames = job_frames(held, state, last_event_id=last_event_id, inline=inline, new=False)
    leave = functools.partial(held.cancel, job_id) if cancel_on_disconnect else None
    return EventStream(frames, services=held, on_disconnect=leave)
