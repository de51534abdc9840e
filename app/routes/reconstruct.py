"""POST /reconstruct: a chain that starts at an image noised to t, or at any x_t there is."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from app import documents
from app.bodies import Body, from_base64, read_body
from app.problems import documented, field_problem
from app.routes.create import (
    CancelOnDisconnect,
    Desk,
    Inline,
    PicturesBody,
    answer,
    choose_card,
    decode_all,
    picture_problem,
    uploaded,
)
from app.services import Services, services
from jobs.cards import ModelCard
from jobs.errors import OutputExpired, PictureError
from jobs.kinds.reconstruct import ReconstructSpec, SnapshotSource
from jobs.store import keys
from jobs.store.reader import JobState
from jobs.uploads import decode_x_t

router = APIRouter(tags=["create"])


class ReconstructBody(ReconstructSpec, PicturesBody):
    """A reconstruction: the spec, and the image or the x_t where it is uploaded."""

    x_t: str | None = Field(None, description="base64 .npy, float [C,H,W]: the state at t itself")


@router.post(
    "/reconstruct",
    openapi_extra=documents.RECONSTRUCT,
    responses={
        **documents.CREATED,
        **documented(*documents.CREATE_ERRORS, "not_found", "expired"),
    },
    status_code=202,
)
async def reconstruct(
    request: Request, cancel_on_disconnect: CancelOnDisconnect = False, inline: Inline = False
) -> Response:
    """Denoise from any point of a chain: an image noised to t, a snapshot of a job, or an x_t.

    `num_images` samples of p(x_0|x_t) come from the one x_t; `steps` counts the evaluations from
    there down to the image."""
    held = services(request)
    limit = held.settings.max_upload_bytes
    body = await read_body(request, limit=limit, most_files=1, takes_x_t=True)
    desk = Desk(held, request, "reconstruct", body)
    admitted = await desk.replay()
    if admitted is None:
        parsed = ReconstructBody.model_validate_json(body.text)
        source = which_source(parsed, body)
        card, inputs = await starting_point(held, parsed, body, source)
        spec = parsed.spec(ReconstructSpec).model_copy(update={"source": source})
        admitted = await desk.admit(spec, card, inputs=inputs, num_inputs=1)
    return await answer(held, request, admitted, cancel=cancel_on_disconnect, inline=inline)


def which_source(parsed: ReconstructBody, body: Body) -> str | SnapshotSource:
    """`image`, `x_t` or a snapshot: what came must agree with what `source` says, if it does."""
    came = {
        "image": bool(parsed.images or body.files),
        "x_t": parsed.x_t is not None or body.x_t is not None,
        "job": isinstance(parsed.source, SnapshotSource),
    }
    given = [name for name, is_there in came.items() if is_there]
    if len(given) != 1:
        what = " and ".join(given) or "nothing"
        wanted = "one of `images` (or an `image` file), `x_t`, or source {job, t, index}"
        raise field_problem("/source", f"{what} came: must be {wanted}")
    [found] = given
    if found == "job":
        return parsed.source
    if "source" in parsed.model_fields_set and parsed.source != found:
        raise field_problem("/source", f"{parsed.source}: but {found} came")
    return found


async def starting_point(
    held: Services, parsed: ReconstructBody, body: Body, source: str | SnapshotSource
) -> tuple[ModelCard, bytes]:
    """The model, and what the worker starts from: uint8 [1,H,W,C], or float32 [C,H,W] bytes."""
    cards = await held.reader.cards()
    if isinstance(source, SnapshotSource):
        state = await held.job(source.job)
        card = choose_card(parsed.model or state.record.model, cards, held)
        return card, await snapshot_plane(held, state, source, card)
    card = choose_card(parsed.model, cards, held)
    if source == "image":
        files = uploaded(parsed.images, body.files, most=1)
        pixels = held.settings.max_upload_pixels
        decoding = held.pools.decoding.run(decode_all, files, card, fit=parsed.fit, pixels=pixels)
        return card, await decoding
    if parsed.x_t is not None and body.x_t is not None:
        raise field_problem("/x_t", "give an `x_t` file or base64, not both")
    raw = body.x_t if body.x_t is not None else from_base64(parsed.x_t or "", "/x_t")
    try:
        return card, decode_x_t(raw, card.shape).astype("<f4").tobytes()
    except PictureError as error:
        raise picture_problem("/x_t", error) from error


async def snapshot_plane(
    held: Services, state: JobState, source: SnapshotSource, card: ModelCard
) -> bytes:
    """The x_t that a job kept. Raises OutputExpired, or Problem 422 that says what there is."""
    record = state.record
    gone = OutputExpired(f"the outputs of job {record.id} have expired")
    if record.outputs_gone:
        raise gone
    if record.shape != card.shape:
        detail = f"its images have shape {record.shape}: model {card.name} takes {card.shape}"
        raise field_problem("/source/job", detail)
    kept = [(t, index) for t, kind, index in state.snapshots if kind == "x_t"]
    if (source.t, source.index) not in kept:
        ts = [t for t, index in kept if index == source.index]
        if ts:
            there = ", ".join(map(str, ts))
            raise field_problem("/source/t", f"{source.t}: image {source.index} has x_t at {there}")
        indices = ", ".join(str(i) for i in sorted({index for _, index in kept}))
        there = f"of image {indices}" if kept else "at all"
        verb = "has x_t" if kept else "has no x_t"
        raise field_problem("/source/index", f"{source.index}: job {record.id} {verb} {there}")
    field = keys.snapshot_field(source.t, "x_t", source.index)
    [plane] = await held.reader.planes(record.id, [field])
    if plane is None:  # expired in this moment
        raise gone
    return plane
