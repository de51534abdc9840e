"""The POST routes that make jobs: what comes in, how it is taken in, how it is answered."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, TypeVar

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import Field

from app import documents, outputs
from app.bodies import Body, from_base64, read_body
from app.negotiation import Wish, wish
from app.problems import Problem, documented, field_problem
from app.services import Services, services
from app.streams import EventStream, job_frames
from app.views import dump, job_view
from app.waiting import until_ended
from jobs.cards import ModelCard
from jobs.errors import PictureError, PictureMedia, PictureTooLarge
from jobs.kinds.common import Strict
from jobs.kinds.generate import GenerateSpec
from jobs.kinds.interpolate import InterpolateSpec
from jobs.kinds.likelihood import LikelihoodSpec
from jobs.kinds.noise import NoiseSpec
from jobs.kinds.reconstruct import ReconstructSpec
from jobs.kinds.table import JobSpec, admit
from jobs.states import ACTIVE, Status
from jobs.store.admission import Admitted, Idempotency, Order
from jobs.store.reader import JobState
from jobs.uploads import Fit, decode

router = APIRouter(tags=["create"])
_MOST_KEY = 255
CancelOnDisconnect = Annotated[
    bool, Query(description="cancel the job if this client goes away before it ends")
]
Inline = Annotated[bool, Query(description="with an event stream: pictures as base64 in events")]


SpecT = TypeVar("SpecT", NoiseSpec, ReconstructSpec, InterpolateSpec, LikelihoodSpec)


class PicturesBody(Strict):
    """What a request about pictures has beside its spec."""

    images: tuple[str, ...] = Field((), description="base64 PNG, JPEG or WebP")
    fit: Fit = Field("error", description="what to do with a picture of another size")

    def spec(self, kind: type[SpecT]) -> SpecT:
        """The spec alone."""
        return kind.model_construct(**{name: getattr(self, name) for name in kind.model_fields})


class NoiseBody(NoiseSpec, PicturesBody):
    """A noise request: the spec, and the images it is about."""


class InterpolateBody(InterpolateSpec, PicturesBody):
    """An interpolation: the spec, and the two images."""


class LikelihoodBody(LikelihoodSpec, PicturesBody):
    """A likelihood request: the spec, and the images it is about."""


@router.post(
    "/generate",
    openapi_extra=documents.GENERATE,
    responses={**documents.CREATED, **documented(*documents.CREATE_ERRORS)},
    status_code=202,
)
async def generate(
    request: Request, cancel_on_disconnect: CancelOnDisconnect = False, inline: Inline = False
) -> Response:
    """Reverse chain: images from noise."""
    held = services(request)
    body = await read_body(request, limit=held.settings.max_upload_bytes)
    desk = Desk(held, request, "generate", body)
    admitted = await desk.replay()
    if admitted is None:
        spec = GenerateSpec.model_validate_json(body.text)
        card = choose_card(spec.model, await held.reader.cards(), held)
        admitted = await desk.admit(spec, card)
    return await answer(held, request, admitted, cancel=cancel_on_disconnect, inline=inline)


@router.post(
    "/noise",
    openapi_extra=documents.NOISE,
    responses={**documents.CREATED, **documented(*documents.CREATE_ERRORS)},
    status_code=202,
)
async def noise(
    request: Request, cancel_on_disconnect: CancelOnDisconnect = False, inline: Inline = False
) -> Response:
    """Forward process: x_t of uploaded images at many t."""
    admitted = await admit_pictures(request, NoiseBody, NoiseSpec)
    held = services(request)
    return await answer(held, request, admitted, cancel=cancel_on_disconnect, inline=inline)


@router.post(
    "/interpolate",
    openapi_extra=documents.INTERPOLATE,
    responses={**documents.CREATED, **documented(*documents.CREATE_ERRORS)},
    status_code=202,
)
async def interpolate(
    request: Request, cancel_on_disconnect: CancelOnDisconnect = False, inline: Inline = False
) -> Response:
    """Two images noised to t with one ε, mixed there by each λ, and denoised.

    All chains share their noise: image i differs from its neighbours by λ alone."""
    admitted = await admit_pictures(request, InterpolateBody, InterpolateSpec)
    held = services(request)
    return await answer(held, request, admitted, cancel=cancel_on_disconnect, inline=inline)


@router.post(
    "/likelihood",
    openapi_extra=documents.LIKELIHOOD,
    responses={**documents.CREATED, **documented(*documents.CREATE_ERRORS)},
    status_code=202,
)
async def likelihood(
    request: Request, cancel_on_disconnect: CancelOnDisconnect = False, inline: Inline = False
) -> Response:
    """The bound on −log p of images in bits/dim, by term. The numbers are the job's `result`."""
    admitted = await admit_pictures(request, LikelihoodBody, LikelihoodSpec)
    held = services(request)
    return await answer(held, request, admitted, cancel=cancel_on_disconnect, inline=inline)


async def admit_pictures(
    request: Request,
    body_type: type[NoiseBody] | type[InterpolateBody] | type[LikelihoodBody],
    kind: type[SpecT],
) -> Admitted:
    """Take in a request about uploaded pictures."""
    held = services(request)
    settings = held.settings
    body = await read_body(request, limit=settings.max_upload_bytes, most_files=settings.max_images)
    desk = Desk(held, request, kind.model_fields["kind"].default, body)
    admitted = await desk.replay()
    if admitted is not None:
        return admitted
    parsed = body_type.model_validate_json(body.text)
    card = choose_card(parsed.model, await held.reader.cards(), held)
    files = uploaded(parsed.images, body.files, most=settings.max_images)
    pixels = settings.max_upload_pixels
    inputs = await held.pools.decoding.run(decode_all, files, card, fit=parsed.fit, pixels=pixels)
    return await desk.admit(parsed.spec(kind), card, inputs=inputs, num_inputs=len(files))


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

    async def admit(
        self,
        spec: JobSpec,
        card: ModelCard,
        *,
        inputs: bytes = b"",
        num_inputs: int = 0,
    ) -> Admitted:
        """Check, fill, cost and take in; SpecError or Refused."""
        filled, plan = admit(spec, card, self._held.settings, num_inputs)
        order = Order(
            spec=filled,
            plan=plan,
            card=card,
            client=self._client,
            inputs=inputs,
            idempotency=self._idempotency,
        )
        return await self._held.admitter.admit(order)


def idempotency_key(request: Request) -> str | None:
    """The Idempotency-Key, if there is one. Raises Problem 422."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= _MOST_KEY:
        raise Problem("invalid_request", f"Idempotency-Key: must have 1..{_MOST_KEY} characters")
    return key


def choose_card(name: str | None, cards: dict[str, ModelCard], held: Services) -> ModelCard:
    """The card of the named model, or of the default one. Raises Problem 422 or 503."""
    if not cards:
        detail = "no worker has published a model yet"
        raise Problem("no_models", detail, headers={"Retry-After": "5"})
    known = ", ".join(sorted(cards))
    if name is None:
        only = next(iter(cards)) if len(cards) == 1 else "mnist"
        name = held.settings.default_model or only
        if name not in cards:
            raise field_problem("/model", f"is needed here: one of {known}")
    if name not in cards:
        raise field_problem("/model", f"{name}: must be one of {known}")
    return cards[name]


def uploaded(texts: tuple[str, ...], files: Sequence[bytes], *, most: int) -> Sequence[bytes]:
    """The pictures of a request, from either place."""
    if texts and files:
        raise field_problem("/images", "give `image` files or base64, not both")
    if not texts and not files:
        raise field_problem("/images", "at least one picture is needed")
    if len(texts) > most:
        raise field_problem("/images", f"{len(texts)} pictures: must be at most {most}")
    return [from_base64(text, f"/images/{i}") for i, text in enumerate(texts)] or files


def decode_all(files: Sequence[bytes], card: ModelCard, *, fit: Fit, pixels: int) -> bytes:
    """uint8 [N,H,W,C] bytes. Raises Problem 413, 415 or 422 that names the picture."""
    arrays = []
    for i, raw in enumerate(files):
        try:
            arrays.append(decode(raw, card.shape, fit=fit, max_pixels=pixels))
        except PictureError as error:
            raise picture_problem(f"/images/{i}", error) from error
    return np.stack(arrays).tobytes()


def picture_problem(pointer: str, error: PictureError) -> Problem:
    """The problem for one uploaded file."""
    problem = field_problem(pointer, str(error))
    if isinstance(error, PictureTooLarge):
        problem.code = "too_large"
    elif isinstance(error, PictureMedia):
        problem.code = "unsupported_media_type"
    return problem


async def answer(
    held: Services, request: Request, admitted: Admitted, *, cancel: bool, inline: bool
) -> Response:
    """202 with the job, or what Prefer and Accept ask for."""
    asked = wish(request)
    job_id = admitted.job_id
    headers = {"Location": f"/jobs/{job_id}"}
    if admitted.replayed:
        headers["Idempotency-Replayed"] = "true"
    if asked.media == "events":
        return await stream(held, job_id, headers=headers, cancel=cancel, inline=inline)
    state = await until_ended(
        held,
        request,
        await held.admitted(admitted),
        seconds=asked.wait_s,
        cancel_on_disconnect=cancel,
    )
    if asked.applied is not None:
        headers["Preference-Applied"] = asked.applied
    return await finished(held, state, asked, headers)


async def stream(
    held: Services, job_id: str, *, headers: dict[str, str], cancel: bool, inline: bool
) -> Response:
    """The job as server-sent events."""
    frames = job_frames(held, await held.job(job_id), last_event_id=None, inline=inline, new=True)
    leave = functools.partial(held.cancel, job_id) if cancel else None
    return EventStream(frames, services=held, headers=headers, on_disconnect=leave)


async def finished(
    held: Services, state: JobState, asked: Wish, headers: dict[str, str]
) -> Response:
    """The answer to a request that was (perhaps) held."""
    status = state.record.status
    pictureless = isinstance(state.record.spec, LikelihoodSpec)
    if asked.media == "json" or status in ACTIVE or pictureless:
        code = 200 if asked.wait_s and status not in ACTIVE else 202
        body = dump(job_view(state))
        return Response(body, code, headers=headers, media_type="application/json")
    if status is Status.FAILED:
        fault = state.record.fault
        raise Problem("job_failed", fault.detail if fault else "it failed", headers=headers)
    if status is Status.CANCELED:
        raise Problem("job_canceled", f"job {state.record.id} was canceled", headers=headers)
    response = await outputs.picture(held, state, asked.media)
    response.headers.update(headers)
    return response
