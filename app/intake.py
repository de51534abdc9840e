"""From a request to a spec and what it brings: pictures, an x_t, or a snapshot of another job.

What a request may bring is what its kind `takes`; one code serves all kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import Field, create_model

from app.bodies import Body, from_base64
from app.problems import Problem, field_problem, read_json
from app.services import Services
from jobs.cards import ModelCard
from jobs.errors import OutputExpired, PictureError, PictureMedia, PictureTooLarge
from jobs.kinds.chain import Kept
from jobs.kinds.common import ARRAYS, Input, JobSpec, Place, Shape, Strict
from jobs.outputs import snapshot_name
from jobs.pictures import Float32, UInt8
from jobs.settings import MODEL_OF_NO_NAME
from jobs.store.reader import JobState
from jobs.uploads import Fit, decode, decode_array

_LONG = 64 * 1024  # bytes of JSON that take a few milliseconds to read


class PicturesBody(Strict):
    """What a request about pictures has beside its spec."""

    images: tuple[str, ...] = Field((), description="base64 PNG, JPEG or WebP")
    fit: Fit = Field("error", description="what to do with a picture of another size")


_ARRAYS = {
    "x_t": "base64 .npy, float [C,H,W]: the state at t itself",
    "y": "base64 .npy, float [C,H,W]: the measurement, of images that lie in [−1, 1]",
}


def body_model(kind: type[JobSpec]) -> type[JobSpec]:
    """The JSON body of a kind's route: its spec, and the fields that bring what it takes."""
    if not kind.takes:
        return kind
    name = kind.__name__.replace("Spec", "Body")
    fields: dict[str, Any] = {
        array: (str | None, Field(None, description=about))
        for array, about in _ARRAYS.items()
        if array in kind.takes
    }
    bases: Any = (kind, PicturesBody) if "pictures" in kind.takes else kind
    made: Any = create_model(name, __base__=bases, __doc__=kind.__doc__, **fields)
    return cast("type[JobSpec]", made)


@dataclass(frozen=True)
class Intake:
    """A request understood. inputs: uint8 [N,H,W,C] or float32 [C,H,W] bytes for the worker."""

    spec: JobSpec
    card: ModelCard
    inputs: bytes = b""
    num_pictures: int = 0


async def take_in(
    held: Services, kind: type[JobSpec], body_type: type[JobSpec], body: Body
) -> Intake:
    """Read a request of this kind. Raises Problem."""
    parsed = await read(held, body_type, body.text)
    cards = await held.reader.cards()
    if not kind.takes:
        return Intake(parsed, choose_card(parsed.model, cards, held))
    spec = kind.model_construct(**{name: getattr(parsed, name) for name in kind.model_fields})
    source = which_input(parsed, body, kind.takes)
    if isinstance(source, Kept):
        state = await held.job(source.job)
        card = choose_card(parsed.model or state.record.model, cards, held)
        planes = [await snapshot_plane(held, state, place, card) for place in spec.places]
        return Intake(spec.after(state.record.spec), card, b"".join(planes), len(planes))
    card = choose_card(parsed.model, cards, held)
    if source is not None:
        spec = spec.model_copy(update={"source": source})
    shape = spec.input_shape(card.shape)
    if source in ARRAYS:
        array = await held.pools.decoding.run(uploaded_array, source, parsed, body, shape)
        spec.check_content(array)
        return Intake(spec, card, array.astype("<f4").tobytes(), 1)
    settings = held.settings
    most = kind.most_pictures or settings.max_images
    texts = getattr(parsed, "images", ())
    files = await held.pools.decoding.run(uploaded, texts, body.files, most=most)
    fit: Fit = getattr(parsed, "fit", "error")
    pixels = settings.max_upload_pixels
    # One by one: between them the pictures of other requests have their turn.
    pictures = [
        await held.pools.decoding.run(decoded, f"/images/{i}", raw, shape, fit=fit, pixels=pixels)
        for i, raw in enumerate(files)
    ]
    for picture in pictures:
        spec.check_content(picture)
    return Intake(spec, card, b"".join(picture.tobytes() for picture in pictures), len(files))


async def read(held: Services, body_type: type[JobSpec], text: bytes) -> JobSpec:
    """The JSON as a body of this type; a long one in a thread. Raises Problem 422."""
    if len(text) < _LONG:
        return read_json(body_type, text)
    return await held.pools.decoding.run(read_json, body_type, text)


def which_input(parsed: Any, body: Body, takes: frozenset[Input]) -> str | Kept | None:
    """`image`, the name of an array, or a snapshot; None where a kind takes pictures alone.

    What came must agree with what `source` says, if it says anything.
    """
    if takes == {"pictures"}:
        return None
    arrays = [name for name in ARRAYS if name in takes]
    came = {"image": bool(parsed.images or body.files)}
    came |= {a: getattr(parsed, a) is not None or a in body.arrays for a in arrays}
    came["job"] = isinstance(parsed.source, Kept)
    given = [name for name, is_there in came.items() if is_there]
    if len(given) != 1:
        what = " and ".join(given) or "nothing"
        wanted = ["`images` (or an `image` file)", *(f"`{array}`" for array in arrays)]
        wanted += ["source {job, …}"] if "snapshot" in takes else []
        raise field_problem("/source", f"{what} came: must be one of {', '.join(wanted)}")
    [found] = given
    if found == "job":
        source: Kept = parsed.source
        return source
    if "source" in parsed.model_fields_set and parsed.source != found:
        raise field_problem("/source", f"{parsed.source}: but {found} came")
    return found


def choose_card(name: str | None, cards: dict[str, ModelCard], held: Services) -> ModelCard:
    """The card of the named model, or of the default one. Raises Problem 422 or 503."""
    if not cards:
        detail = "no worker has published a model yet"
        raise Problem("no_models", detail, headers={"Retry-After": "5"})
    known = ", ".join(sorted(cards))
    if name is None:
        only = next(iter(cards)) if len(cards) == 1 else MODEL_OF_NO_NAME
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


def decoded(pointer: str, raw: bytes, shape: Shape, *, fit: Fit, pixels: int) -> UInt8:
    """uint8 [H,W,C]. Raises Problem 413, 415 or 422 that names the picture."""
    try:
        return decode(raw, shape, fit=fit, max_pixels=pixels)
    except PictureError as error:
        raise picture_problem(pointer, error) from error


def uploaded_array(name: str, parsed: Any, body: Body, shape: Shape) -> Float32:
    """The array of this name that came with a request, from either place. Raises Problem."""
    text, pointer = getattr(parsed, name), f"/{name}"
    if text is not None and name in body.arrays:
        raise field_problem(pointer, f"give a file `{name}` or base64, not both")
    raw = body.arrays[name] if name in body.arrays else from_base64(text or "", pointer)
    try:
        return decode_array(raw, shape)
    except PictureError as error:
        raise picture_problem(pointer, error) from error


def picture_problem(pointer: str, error: PictureError) -> Problem:
    """The problem for one uploaded file."""
    problem = field_problem(pointer, str(error))
    if isinstance(error, PictureTooLarge):
        problem.code = "too_large"
    elif isinstance(error, PictureMedia):
        problem.code = "unsupported_media_type"
    return problem


async def snapshot_plane(held: Services, state: JobState, place: Place, card: ModelCard) -> bytes:
    """The x_t that a job kept at a place.

    Raises OutputExpired, or Problem 422 that says what there is.
    """
    record = state.record
    gone = OutputExpired(f"the outputs of job {record.id} have expired")
    if record.outputs_gone:
        raise gone
    if record.shape != card.shape:
        detail = f"its images have shape {record.shape}: model {card.name} takes {card.shape}"
        raise field_problem("/source/job", detail)
    kept = [(t, index) for t, kind, index in state.snapshots if kind == "x_t"]
    at, image = place.t, place.index
    if (at, image) not in kept:
        ts = [t for t, index in kept if index == image]
        if ts:
            there = ", ".join(map(str, ts))
            raise field_problem(place.t_pointer, f"{at}: image {image} has x_t at {there}")
        indices = ", ".join(str(i) for i in sorted({index for _, index in kept}))
        there = f"of image {indices}" if kept else "at all"
        verb = "has x_t" if kept else "has no x_t"
        raise field_problem(place.index_pointer, f"{image}: job {record.id} {verb} {there}")
    field = snapshot_name(at, "x_t", image)
    [plane] = await held.reader.outputs.get(record.id, [field])
    if plane is None:  # expired in this moment
        raise gone
    return plane
