"""From one image to another, by way of their noise."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from jobs.cards import ModelCard
from jobs.errors import SpecError
from jobs.kinds.chain import ChainSpec
from jobs.kinds.common import Input, Timestep, check_timestep

_LONGEST_ROW = 16


class InterpolateSpec(ChainSpec):
    """Two images noised to t with one ε, mixed there, and decoded: image i is of lambdas[i].

    x̄_t = (1−λ)x_t + λx'_t. All chains share their noise too, that of (seed, 0): what differs
    between two images is λ alone.
    """

    takes: ClassVar[frozenset[Input]] = frozenset({"pictures"})
    count_field: ClassVar[str] = "/lambdas"

    kind: Literal["interpolate"] = "interpolate"
    t: Timestep = Field(description="where the images are mixed: 1..T")
    lambdas: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        min_length=1, description="shares of the second image; one output each, in this order"
    )

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

    def check_inputs(self, count: int) -> None:
        """Two images."""
        if count != 2:
            raise SpecError("/images", f"{count} pictures: must be two")
