"""Images that agree with a measurement."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from jobs.cards import ModelCard
from jobs.errors import SpecError
from jobs.kinds.chain import ChainSpec
from jobs.kinds.common import PRODUCT_COST, Input, Shape
from jobs.kinds.operators import OperatorSpec
from jobs.pictures import GREY_LEVELS
from jobs.settings import Settings

STEPS = 50
TRAVEL = 5
SOLVER_STEPS = 1
SAMPLER = "ddim"
_ROUNDING = 0.3  # grey levels: what rounding to 8 bits does to a value, 1/√12
_MOST_DEVIATIONS = 6.0  # a value of y further from what A can give is no noise


class RestoreSpec(ChainSpec):
    """Samples of x_0 given y = A x_0 + σ_y n: fill in, make larger, colour, sharpen, denoise.

    Several samples show several answers; their mean is the best single one, and their standard
    deviation shows where they differ (`urls.mean`, `urls.std`).
    """

    takes: ClassVar[frozenset[Input]] = frozenset({"pictures", "y"})
    most_pictures: ClassVar[int | None] = 1
    summarized: ClassVar[bool] = True
    table_fields: ClassVar[tuple[str, ...]] = (*ChainSpec.table_fields, "travel")

    kind: Literal["restore"] = "restore"
    num_images: int = Field(1, ge=1, description="samples given the one measurement")
    operator: OperatorSpec
    source: Literal["image", "y"] = Field(
        "image", description="`image`: the measurement is a picture; `y`: an array, in [−1, 1]"
    )
    noise: float | None = Field(
        None,
        ge=0,
        le=2550,
        description="σ_y, the deviation of the measurement's noise, in grey levels (of 0..255). "
        f"Default 0; for a blurred picture {_ROUNDING}, its rounding",
    )
    method: Literal["projection", "moment"] = Field(
        "projection",
        description="how x̂_0 is corrected before each update. `projection`: cheap, and good with "
        "travel; `moment`: by products with the network's Jacobian, right where the model is",
    )
    solver_steps: int | None = Field(
        None,
        ge=0,
        le=5,
        description="moment only: steps of conjugate gradients, each a product that costs as much "
        f"as an evaluation; default {SOLVER_STEPS}, and 0 is ΠGDM",
    )
    travel: int | None = Field(
        None,
        ge=1,
        le=100,
        description="how often each jump of the chain is walked, down and up and down again: "
        f"(steps − 1)·travel + 1 rows an image; default {TRAVEL}, for moment 1",
    )
    steps: int | None = Field(
        None, ge=1, description=f"timesteps that the chain visits; default {STEPS}"
    )

    @property
    def count(self) -> int:
        """`num_images`."""
        return self.num_images

    @property
    def input(self) -> Input:
        """A picture, or an array."""
        return "pictures" if self.source == "image" else "y"

    @property
    def sigma(self) -> float:
        """σ_y where images lie in [−1, 1]."""
        return (self.noise or 0.0) / GREY_LEVELS

    def input_shape(self, shape: Shape) -> Shape:
        """That of what A gives of an image."""
        return self.operator.measured(shape)

    def own_sampler(self, card: ModelCard) -> str:
        """ddim, which restores best."""
        return SAMPLER if SAMPLER in card.samplers else super().own_sampler(card)

    def check(self, card: ModelCard, settings: Settings) -> None:
        """Raise SpecError for what this model or these limits do not allow."""
        super().check(card, settings)
        self.operator.check(card.shape)
        if self.solver_steps is not None and self.method != "moment":
            raise SpecError("/solver_steps", f"is for method moment, not {self.method}")
        if self._travel == 1:
            return
        sampler = card.samplers[self.chosen_sampler(card)]
        if sampler.corrector_only or self.corrector_steps:
            field = "/corrector_steps" if self.corrector_steps else "/sampler"
            raise SpecError(field, "Langevin steps do not travel: ask for travel = 1")
        own = card.sampling.variance if "variance" in sampler.options else None
        if (self.variance or own) == "learned":
            raise SpecError("/variance", "learned: does not travel: ask for travel = 1")

    def check_inputs(self, count: int) -> None:
        """One measurement."""
        if count != 1:
            raise SpecError("/images", f"{count} pictures: must be one")

    def check_content(self, content: NDArray[Any]) -> None:
        """Raise SpecError for values that A cannot give of any image."""
        y = content if self.source == "y" else content / GREY_LEVELS - 1.0
        noise = self.noise if self.noise is not None else _ROUNDING
        most = self.operator.bound * (1 + 1e-3) + _MOST_DEVIATIONS * noise / GREY_LEVELS
        if self.operator.name == "mask":  # the rest is nobody's
            h, w = y.shape[-2:] if self.source == "y" else y.shape[:2]
            known = self.operator.known((1, h, w))
            y = y * (known if self.source == "y" else known[..., None])
        furthest = float(np.abs(y).max())
        if furthest > most:
            field = "/y" if self.source == "y" else "/images/0"
            raise SpecError(
                field,
                f"a value of {furthest:.4g}: of images in [−1, 1] the operator gives at most "
                f"{self.operator.bound:.4g}, and `noise` explains {most:.4g}",
            )

    def defaults(self, card: ModelCard, settings: Settings) -> dict[str, Any]:
        """Values for the fields that were left out."""
        defaults = super().defaults(card, settings)
        if self.steps is None:
            defaults["steps"] = min(STEPS, card.T)
        if defaults["sampler"] == SAMPLER and self.eta is None:
            defaults["eta"] = 1.0
        defaults["travel"] = self._travel
        if self.method == "moment" and self.solver_steps is None:
            defaults["solver_steps"] = SOLVER_STEPS
        if self.noise is None:
            rounded = self.operator.name == "blur" and self.source == "image"
            defaults["noise"] = _ROUNDING if rounded else 0.0
        return defaults

    @property
    def _travel(self) -> int:
        return self.travel or (1 if self.method == "moment" else TRAVEL)

    @property
    def evaluations_a_row(self) -> int:
        """With the products."""
        products = max(self.solver_steps or 0, 1) if self.method == "moment" else 0
        return super().evaluations_a_row * (1 + PRODUCT_COST * products)

    def rows(self, card: ModelCard) -> int:
        """Rows of the filled spec's table."""
        assert self.steps is not None and self.travel is not None
        return (self.steps - 1) * self.travel + 1 if self.travel > 1 else super().rows(card)
