"""The POST routes that make jobs, one a kind, and how they are answered."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from app import documents, outputs
from app.bodies import Body, read_body
from app.intake import Intake, body_model, take_in
from app.negotiation import Wish, wish
from app.problems import Problem, documented, read_query
from app.routes.words import WORDS, Words
from app.services import Services, services
from app.streams import EventStream, job_frames
from app.waiting import until_ended
from jobs.errors import JobNotFound
from jobs.formats import FORMATS, PICTURES
from jobs.kinds.common import ARRAYS, JobSpec
from jobs.kinds.table import KINDS, admit
from jobs.states import ACTIVE, Status
from jobs.store.admission import Admitted, Idempotency, Order
from jobs.store.reader import JobState

_MOST_KEY = 255
Route = Callable[[Request], Awaitable[Response]]


class Asked(BaseModel):
    """What the query of a request may say.

    It is read here and not by FastAPI, which takes a tenth of a request's time for it.
    """

    model_config = ConfigDict(extra="forbid")

    cancel_on_disconnect: bool = Field(
        False, description="cancel the job if this client goes away before it ends"
    )
    inline: bool = Field(False, description="with an event stream: pictures as base64 in events")


_NOTHING_ASKED = Asked()


def router() -> APIRouter:
    """POST /{kind} for every kind of the table."""
    made = APIRouter(tags=["create"])
    for name, kind in KINDS.items():
        words = WORDS.get(name, Words())
        body_type = body_model(kind)
        more = ("not_found", "expired") if "snapshot" in kind.takes else ()
        made.add_api_route(
            f"/{name}",
            _route(name, kind, body_type),
            methods=["POST"],
            name=name,
            summary=name.capitalize(),
            description=words.description or kind.__doc__,
            status_code=202,
            openapi_extra=documents.create_request(kind, body_type, Asked, words.examples),
            responses={**documents.CREATED, **documented(*documents.CREATE_ERRORS, *more)},
        )
    return made


def body_models() -> list[type[BaseModel]]:
    """The bodies of all kinds, for the OpenAPI document."""
    return [body_model(kind) for kind in KINDS.values()]


def _route(name: str, kind: type[JobSpec], body_type: type[JobSpec]) -> Route:
    async def create(request: Request) -> Response:
        asked = read_query(Asked, request) if request.scope["query_string"] else _NOTHING_ASKED
        # The body is let go of before the answer, which may be held for a minute.
        admitted = await admitted_from(request)
        return await answer(services(request), request, admitted, asked)

    async def admitted_from(request: Request) -> Admitted:
        held = services(request)
        settings = held.settings
        most = (kind.most_pictures or settings.max_images) if "pictures" in kind.takes else 0
        body = await read_body(
            request,
            limit=settings.max_upload_bytes,
            most_files=most,
            arrays=[name for name in ARRAYS if name in kind.takes],
        )
        desk = Desk(held, request, name, body)
        admitted = await desk.replay()
        if admitted is None:
            admitted = await desk.admit(await take_in(held, kind, body_type, body))
        return admitted

    return create


class Desk:
    """Takes one request in: idempotency first, then checks, then admission."""

    def __init__(self, held: Services, request: Request, kind: str, body: Body) -> None:
        self._held = held
        self._client = str(request.scope["client_id"])
        self._asked = (request, body, kind)
        self._idempotency: Idempotency | None = None

    async def replay(self) -> Admitted | None:
        """The job an equal request made before, whatever has changed since."""
        request, body, kind = self._asked
        key = idempotency_key(request)
        if key is None:
            return None
        # In a thread, since it parses the whole body.
        fingerprint = await self._held.pools.decoding.run(body.fingerprint, kind)
        self._idempotency = idem = Idempotency(key, fingerprint)
        call = functools.partial(self._held.admission.replay, self._client, idem)
        job_id = await self._held.admitter.call(call)
        return None if job_id is None else Admitted(job_id, replayed=True)

    async def admit(self, found: Intake) -> Admitted:
        """Check, fill, cost and take in; SpecError or Refused."""
        filled, plan = admit(found.spec, found.card, self._held.settings, found.num_pictures)
        check_acceptable(filled, plan.images, wish(self._asked[0]))
        order = Order(
            spec=filled,
            plan=plan,
            card=found.card,
            client=self._client,
            inputs=found.inputs,
            idempotency=self._idempotency,
            request_id=str(self._asked[0].scope["request_id"]),
        )
        return await self._held.admitter.admit(order)


def check_acceptable(spec: JobSpec, images: int, wanted: Wish) -> None:
    """Raise Problem 406 where a job gives no picture, and who asks takes nothing else."""
    if wanted.media in PICTURES and not wanted.json and not spec.grid(images):
        detail = f"Accept: {FORMATS[wanted.media].media}: a {spec.kind} job gives numbers, "
        raise Problem("not_acceptable", detail + "application/json")


def idempotency_key(request: Request) -> str | None:
    """The Idempotency-Key, if there is one. Raises Problem 422."""
    keys = request.headers.getlist("idempotency-key")
    if len(keys) > 1:
        raise Problem("invalid_request", f"Idempotency-Key: came {len(keys)} times; must come once")
    for key in keys:
        if not 1 <= len(key) <= _MOST_KEY:
            detail = f"Idempotency-Key: {len(key)} characters: must have 1..{_MOST_KEY}"
            raise Problem("invalid_request", detail)
    return next(iter(keys), None)


async def answer(held: Services, request: Request, admitted: Admitted, asked: Asked) -> Response:
    """202 with the job, or what Prefer and Accept ask for."""
    wanted = wish(request)
    job_id = request.scope["job_id"] = admitted.job_id
    headers = {"Location": f"/jobs/{job_id}"}
    if admitted.replayed:
        headers["Idempotency-Replayed"] = "true"
    try:
        if wanted.media == "events":
            return await stream(held, job_id, headers, asked)
        state = await held.admitted(admitted)
        check_acceptable(state.record.spec, state.record.images, wanted)  # it may be a replay
        state = await until_ended(
            held,
            request,
            state,
            seconds=wanted.wait_s,
            cancel_on_disconnect=asked.cancel_on_disconnect,
        )
    except JobNotFound as error:  # not 404: the job was made
        detail = f"job {job_id} is gone: it was deleted, or its time was over before this answer"
        raise Problem("expired", detail, headers=headers) from error
    if wanted.applied is not None:
        headers["Preference-Applied"] = wanted.applied
    return await finished(held, state, wanted, headers)


async def stream(held: Services, job_id: str, headers: dict[str, str], asked: Asked) -> Response:
    """The job as server-sent events."""
    state = await held.job(job_id)
    frames = job_frames(held, state, last_event_id=None, inline=asked.inline, new=True)
    leave = functools.partial(held.cancel, job_id) if asked.cancel_on_disconnect else None
    return EventStream(frames, services=held, headers=headers, on_disconnect=leave)


async def finished(
    held: Services, state: JobState, wanted: Wish, headers: dict[str, str]
) -> Response:
    """The answer to a request that was (perhaps) held."""
    status = state.record.status
    pictures = state.record.spec.grid(state.record.images)
    if wanted.media == "json" or not pictures or (status in ACTIVE and wanted.json):
        code = 200 if wanted.wait_s and status not in ACTIVE else 202
        body = await held.told(state)
        return Response(body, code, headers=headers, media_type="application/json")
    if status in ACTIVE:  # whoever takes a picture alone must not find something else in its file
        detail = f"job {state.record.id} is {status}: {headers['Location']} has its pictures later"
        raise Problem("still_running", detail, headers=headers)
    if status is Status.FAILED:
        fault = state.record.fault
        raise Problem("job_failed", fault.detail if fault else "it failed", headers=headers)
    if status is Status.CANCELED:
        raise Problem("job_canceled", f"job {state.record.id} was canceled", headers=headers)
    response = await outputs.picture(held, state, wanted.media)
    response.headers.update(headers)
    return response
