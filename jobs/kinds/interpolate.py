"""From one image to another, by way of their noise."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from jobs.cards import ModelCard
from jobs.errors import SpecError
from jobs.kinds.chain import ChainSpec, Kept
from jobs.kinds.common import Input, Place, Shape, Timestep, check_timestep
from jobs.settings import Settings

_LONGEST_ROW = 16
SAMPLER = "ddim"
Index = Annotated[int, Field(ge=0)]


class PairSource(Kept):
    """Two x_t that another job kept, such as the x_T of POST /encode."""

    indices: tuple[Index, Index] = Field((0, 1), description="of the images in that job")


class InterpolateSpec(ChainSpec):
    """Two images noised to t with one ε, mixed there, and decoded: image i is of lambdas[i].

    x̄_t = (1−λ)x_t + λx'_t, or on the sphere that keeps the norm of noise. All chains share their
    noise too, that of (seed, 0): what differs between two images is λ alone.
    """

    takes: ClassVar[frozenset[Input]] = frozenset({"pictures", "snapshot"})
    count_field: ClassVar[str] = "/lambdas"

    kind: Literal["interpolate"] = "interpolate"
    t: Timestep = Field(description="where the images are mixed: 1..T")
    path: Literal["line", "sphere"] = Field(
        "line",
        description="`line`: straight; `sphere`: at the norm of noise, between two encodings (see "
        "`source`), by default with ddim, which draws no noise",
    )
    source: Literal["image"] | PairSource = Field(
        "image", description="`image`: two pictures; else two x_t at t of a job, mostly an `encode`"
    )
    lambdas: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        min_length=1, description="shares of the second image; one output each, in this order"
    )

    @property
    def input(self) -> Input:
        """Pictures, or two x_t."""
        return "pictures" if self.source == "image" else "x_t"

    @property
    def places(self) -> list[Place]:
        """Of a pair, both."""
        pair = self.source
        indices = pair.indices if isinstance(pair, PairSource) else ()
        return [Place(self.t, i, "/t", f"/source/indices/{n}") for n, i in enumerate(indices)]

    def input_shape(self, shape: Shape) -> Shape:
        """Of a pair, one after the other."""
        c, h, w = shape
        return (2 * c, h, w) if self.input == "x_t" else shape

    def own_sampler(self, card: ModelCard) -> str:
        """On the sphere ddim, which leads back to what was encoded."""
        return SAMPLER if self.path == "sphere" else super().own_sampler(card)

    @property
    def grid_columns(self) -> int:
        """One row, from the first image to the second, unless it would be very long."""
        return len(self.lambdas) if len(self.lambdas) <= _LONGEST_ROW else 0

    @property
    def count(self) -> int:
        """One image a λ."""
        return len(self.lambdas)

    def first_t(self, card: ModelCard) -> int:
        """t."""
        check_timestep("/t", self.t, card)
        return self.t

    def check(self, card: ModelCard, settings: Settings) -> None:
        """Raise SpecError for what this model or these limits do not allow."""
        super().check(card, settings)
        if self.path == "sphere" and self.source == "image":
            raise SpecError(
                "/source",
                "image: the sphere lies between two encodings: give the job "
                "of a POST /encode as {job, indices}",
            )

    def check_inputs(self, count: int) -> None:
        """Two images."""
        if count != 2:
            raise SpecError("/images", f"{count} pictures: must be two")
