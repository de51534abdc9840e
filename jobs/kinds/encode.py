"""From images to their x_T."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from jobs.cards import ModelCard
from jobs.errors import SpecError
from jobs.kinds.chain import DEFAULT_STEPS, PathSpec, few_steps
from jobs.kinds.common import Gift, Input, SpecWarning, Timestep, check_timestep
from jobs.outputs import snapshot_name
from jobs.settings import Settings

ITERATIONS = 1


class EncodeSpec(PathSpec):
    """The x_T of uploaded images, by the probability flow from the image up to the noise.

    They are the job's snapshots at t = T, and the source of a `/reconstruct` with ddim, which leads
    back to the images; two of them that of an `/interpolate` on the sphere.
    """

    takes: ClassVar[frozenset[Input]] = frozenset({"pictures"})
    gives: ClassVar[frozenset[Gift]] = frozenset({"snapshots"})
    film_rises: ClassVar[bool] = True
    clips: ClassVar[bool] = False
    reaches: ClassVar[str] = "the chain ends at t"

    kind: Literal["encode"] = "encode"
    t: Timestep | None = Field(None, description="where to encode to; default T")
    steps: int | None = Field(
        None, ge=1, description=f"timesteps; default {DEFAULT_STEPS}, or all where there are fewer"
    )
    order: Literal[1, 2] = Field(1, description="2 goes through x̂_0 of the row before")
    iterations: int | None = Field(
        None,
        ge=0,
        le=20,
        description="that make each step of order 1 the inverse of the step down, one evaluation "
        f"each; default {ITERATIONS}",
    )

    def chains(self, num_inputs: int) -> int:
        """One an image."""
        return num_inputs

    def first_t(self, card: ModelCard) -> int:
        """t, or T."""
        if self.t is not None:
            check_timestep("/t", self.t, card)
        return self.t or card.T

    def check(self, card: ModelCard, settings: Settings) -> None:
        """Raise SpecError for what this model or these limits do not allow."""
        super().check(card, settings)
        if self.order == 2 and self.iterations:
            raise SpecError("/iterations", f"{self.iterations}: are for order 1, not 2")

    def check_inputs(self, count: int) -> None:
        """One or more images."""
        if count < 1:
            raise SpecError("/images", "at least one picture is needed")

    def warnings(self, card: ModelCard) -> tuple[SpecWarning, ...]:
        """Fewer timesteps than ddim needs, whose inverse this is."""
        assert self.steps is not None
        return few_steps(card, "ddim", self.steps, self.first_t(card))

    def grid(self, images: int) -> list[str]:
        """What the images became."""
        return [] if self.t is None else [snapshot_name(self.t, "x_t", i) for i in range(images)]

    def defaults(self, card: ModelCard, settings: Settings) -> dict[str, Any]:
        """Values for the fields that were left out."""
        defaults = super().defaults(card, settings)
        defaults["t"] = self.first_t(card)
        defaults["steps"] = self.steps or min(DEFAULT_STEPS, defaults["t"])
        if self.iterations is None:
            defaults["iterations"] = ITERATIONS if self.order == 1 else 0
        return defaults

    def rows(self, card: ModelCard) -> int:
        """One a timestep, and its iterations."""
        assert self.steps is not None and self.iterations is not None
        return self.steps * (1 + self.iterations)
