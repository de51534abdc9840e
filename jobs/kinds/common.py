"""What all kinds of job share.

A spec goes through three hands: `parse` (fields and types), `check` (against the model's card and
the limits) and `fill` (defaults that depend on the model, and the seed). What `fill` returns says
everything: posted again, with the same model digest, it makes the same images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from jobs import chance
from jobs.cards import ModelCard
from jobs.errors import SpecError
from jobs.formats import IMAGES, OneOf
from jobs.outputs import image_name
from jobs.settings import Settings

PRODUCT_COST = 1  # of a product with the network's Jacobian, in evaluations, as measured
MAX_DEADLINE_S = 30 * 86_400
SEED_BITS = 53  # whole numbers that JSON holds
MAX_SEED = 2**SEED_BITS - 1

MOST_NAMES = 20  # of classes, that an error lists


def _label(value: object) -> object:
    if isinstance(value, str) or (type(value) is int and value >= 0):
        return value
    raise ValueError(f"{value!r:.60}: must be a label, 0 or more, or the name of a class")


# A number, or until `fill` the name of a class.
Label = Annotated[
    int,
    PlainValidator(_label),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]}),
]
Timestep = Annotated[int, Field(ge=1, description="the paper's t: 1..T")]
SnapshotKind = Literal["x_t", "x_start", "eps"]
# An `x_t` and a `y` are uploaded as arrays; a `snapshot` is an x_t that another job kept.
Input = Literal["pictures", "x_t", "y", "snapshot"]
Shape = tuple[int, int, int]
ARRAYS: tuple[Input, ...] = ("x_t", "y")
Gift = Literal["images", "snapshots", "numbers"]


@dataclass(frozen=True)
class Plan:
    """What a job costs, known before it starts.

    evaluations: images × network evaluations (image-steps). output_bytes: float32 images and
    snapshots, the most there can be.
    """

    images: int
    evaluations: int
    output_bytes: int


@dataclass(frozen=True)
class Place:
    """An x_t that another job kept: of image `index`, at t; and the fields that say so."""

    t: int
    index: int
    t_pointer: str = "/source/t"
    index_pointer: str = "/source/index"


class SpecWarning(BaseModel):
    """What is unlikely to be wanted, of one field of a request that was taken in."""

    model_config = ConfigDict(frozen=True)

    pointer: str
    detail: str


class Strict(BaseModel):
    """Unknown fields are errors, and a number is a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _reachable(address: str) -> str:
    """The address, if it names a host and a port that there can be."""
    try:
        parts = urlsplit(address)
        there_can_be = bool(parts.hostname) and parts.port != 0
        (parts.hostname or "").encode("idna").decode("idna")
    except ValueError:  # no port, no address within [ ], no name (UnicodeError)
        there_can_be = False
    if not there_can_be or not address.isprintable() or " " in address:
        raise ValueError(f"{address:.60}: must be http(s)://HOST, with a PORT of 1..65535 if any")
    return address


class JobSpec(Strict):
    """Fields of every kind of job, and what a kind declares of itself.

    Nothing outside of a kind's own files asks for its class: what differs between kinds is told
    here, by class attributes and by the properties below, with the answer that suits most.

    takes: what a request can bring for the job to work on: exactly one of these, none of it for
    a kind that starts from noise. gives: what it leaves. result_models: of the numbers it gives.
    runs_network: a kind that does not needs neither a prepared network nor the engine.
    work_field, bytes_field, count_field: pointers of the fields that make a job large. film_rises:
    its film goes from the image to the noise. summarized: its images are samples of one thing, so
    that their mean and deviation mean something. clips: whether its chains clip x̂_0.
    """

    takes: ClassVar[frozenset[Input]] = frozenset()
    most_pictures: ClassVar[int | None] = None  # None: as many as a job may have images
    gives: ClassVar[frozenset[Gift]] = frozenset({"images", "snapshots"})
    result_models: ClassVar[tuple[type[BaseModel], ...]] = ()
    runs_network: ClassVar[bool] = True
    film_rises: ClassVar[bool] = False
    summarized: ClassVar[bool] = False
    clips: ClassVar[bool] = True
    count_field: ClassVar[str] = "/images"

    kind: str
    model: str | None = Field(None, description="a name from GET /models")
    model_digest: str | None = Field(
        None, description="run only with exactly this model (SHA-256 from a job's manifest)"
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="image i uses the noise of (seed, i); drawn if absent"
    )
    deterministic: bool = Field(
        False,
        description="the same bytes in any batch, and at any later time on the same kind of "
        "machine: eager float32 in one batch shape. Without it equal requests may differ by "
        "rounding: batch shape and compiled code are what is fast at the time",
    )
    format: Annotated[str, OneOf(IMAGES)] = Field("png", description="what `images[].url` gives")
    ttl_s: int | None = Field(None, ge=1, description="seconds to keep the outputs")
    deadline_s: float | None = Field(
        None,
        gt=0,
        le=MAX_DEADLINE_S,
        description="seconds from now; a job that has not ended by then fails",
    )
    webhook_url: Annotated[str, AfterValidator(_reachable)] | None = Field(
        None, max_length=2000, pattern=r"^https?://", description="told when the job ends"
    )
    priority: Literal["normal", "high"] = Field("normal", description="high: front of the queue")
    provenance: dict[str, Any] | None = Field(
        None,
        exclude=True,
        description="of a manifest, so that it can be posted as it is: refused if its `noise` is "
        "of another version than the model draws, or its `table` is not the one that the model has "
        "of its sampler now, and else ignored",
    )

    # What a kind says of one request

    @property
    def input(self) -> Input | None:
        """Which of `takes` this request works on, as the worker gets it."""
        return next(iter(self.takes), None)

    def input_shape(self, shape: Shape) -> Shape:
        """[C, H, W] of what comes in, for a model of this shape. Raises SpecError."""
        return shape

    def after(self, source: JobSpec) -> Self:
        """The same request, for states that a job of this spec kept."""
        return self

    @property
    def places(self) -> list[Place]:
        """(t, index) of the x_t that it takes from another job, where it does."""
        return []

    @property
    def snapshot_kinds(self) -> tuple[SnapshotKind, ...]:
        """The kinds of snapshot that are kept."""
        return ()

    @property
    def preview_px(self) -> int:
        """Side of the picture in a snapshot's event; 0: none."""
        return 0

    @property
    def level_ts(self) -> tuple[int, ...]:
        """The t whose ᾱ_t and SNR_t are part of the answer."""
        return ()

    @property
    def work_field(self) -> str:
        """Pointer of the field that makes the work large."""
        return "/steps"

    @property
    def bytes_field(self) -> str:
        """Pointer of the field that makes the outputs large."""
        return self.count_field

    def grid(self, images: int) -> list[str]:
        """Names of the outputs that are the job's one picture, row by row; [] for numbers."""
        return [image_name(i) for i in range(images)] if "images" in self.gives else []

    @property
    def grid_columns(self) -> int:
        """Pictures in a row of the grid; 0: about as many as there are rows."""
        return 0

    def beyond(self, card: ModelCard) -> str | None:
        """What this asks for that a worker with this card of the model has never heard of.

        Another version has: the worker that the request was checked against.
        """
        return None

    # The three hands

    def check(self, card: ModelCard, settings: Settings) -> None:
        """Raise SpecError for what this model or these limits do not allow."""
        if self.model_digest is not None and self.model_digest != card.digest:
            said = f"{self.model_digest:.64}: model {card.name} is {card.digest} now"
            raise SpecError("/model_digest", said)
        made_with = (self.provenance or {}).get("noise", 1)
        if self.provenance is not None and made_with != card.noise:
            raise SpecError(
                "/provenance/noise",
                f"{made_with!r:.100}: made with another version of the noise, and "
                f"model {card.name} draws version {card.noise}, so they cannot be made again here; "
                "without `provenance`, others like them can",
            )
        if self.ttl_s is not None and self.ttl_s > settings.max_ttl_s:
            raise SpecError("/ttl_s", f"{self.ttl_s}: must be at most {settings.max_ttl_s}")
        if self.webhook_url is not None and settings.webhook_secret is None:
            raise SpecError("/webhook_url", "webhooks are off here: DDPM_WEBHOOK_SECRET is not set")

    def check_inputs(self, count: int) -> None:
        """Raise SpecError unless so many pictures are what this kind works on."""

    def check_content(self, content: NDArray[Any]) -> None:
        """Raise SpecError for what came in: uint8 [H, W, C], or of an array float32 [C, H, W]."""

    def plain(self, card: ModelCard) -> Self:
        """The same request without what stands for other fields. Raises SpecError."""
        return self

    def warnings(self, card: ModelCard) -> tuple[SpecWarning, ...]:
        """What a filled request is unlikely to want."""
        return ()

    def fill(self, card: ModelCard, settings: Settings) -> Self:
        """The same request with every default written out."""
        return self.model_copy(update=self.defaults(card, settings))

    def defaults(self, card: ModelCard, settings: Settings) -> dict[str, Any]:
        """Values for the fields that were left out."""
        return {
            "model": card.name,
            "seed": chance.below_power(SEED_BITS) if self.seed is None else self.seed,
            "ttl_s": settings.ttl_s if self.ttl_s is None else self.ttl_s,
        }

    def plan(self, card: ModelCard, num_inputs: int) -> Plan:
        """Cost of a filled spec for so many pictures."""
        raise NotImplementedError


def check_timestep(pointer: str, t: int, card: ModelCard) -> None:
    """Raise SpecError unless 1 ≤ t ≤ T."""
    if not 1 <= t <= card.T:
        raise SpecError(pointer, f"{t}: must be 1..{card.T} for model {card.name}")


def label_of(label: object, card: ModelCard) -> int | None:
    """The number of a class that is given by number or name; None for none.

    A name that is a number is that of its class, whatever its place. Raises SpecError unless the
    model takes it.
    """
    if label is None:
        if card.num_classes and card.null_label is None:
            raise SpecError("/class_label", f"model {card.name} needs a label")
        return None
    if not card.num_classes:
        raise SpecError("/class_label", f"model {card.name} has no classes")
    if isinstance(label, int) and label < card.num_classes:
        return label
    if label in card.class_names:
        return card.class_names.index(str(label))
    allowed = f"must be 0..{card.num_classes - 1}"
    if isinstance(label, str):
        more = ", …" if card.num_classes > MOST_NAMES else ""
        allowed = f"must be one of {', '.join(card.class_names[:MOST_NAMES])}{more}"
    raise SpecError("/class_label", f"{label!s:.60}: {allowed}")
