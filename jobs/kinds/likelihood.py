"""The bound on −log p of uploaded images, or their density by the flow."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from jobs.cards import ModelCard
from jobs.errors import SpecError
from jobs.kinds.common import (
    PRODUCT_COST,
    Gift,
    Input,
    JobSpec,
    Label,
    Plan,
    Timestep,
    check_timestep,
    label_of,
)
from jobs.results import FlowResult, LikelihoodResult
from jobs.settings import Settings

DEFAULT_SAMPLES = 20
DEFAULT_DRAWS = 4
FLOW_STEPS = 100
NUMBERS_A_TERM = 2  # nats and squared error, float64 each
STATE_BYTES = 16  # of a strand of the flow, beside its x

_MODE_OF = {"samples": "monte_carlo", "terms": "full", "draws": "flow", "steps": "flow"}


class LikelihoodSpec(JobSpec):
    """The bound on −log p_θ(x_0) of uploaded images in bits/dim, by term; or their density by the
    probability flow, which is an estimate and no bound."""

    takes: ClassVar[frozenset[Input]] = frozenset({"pictures"})
    gives: ClassVar[frozenset[Gift]] = frozenset({"numbers"})
    result_models: ClassVar[tuple[type[BaseModel], ...]] = (LikelihoodResult, FlowResult)

    kind: Literal["likelihood"] = "likelihood"
    mode: Literal["full", "monte_carlo", "flow"] = Field(
        "monte_carlo",
        description="full: all T terms of the bound; monte_carlo: an unbiased estimate of it; "
        "flow: an estimate of the density itself",
    )
    samples: int | None = Field(
        None,
        ge=2,
        le=100_000,
        description="monte_carlo only: evaluations an image, a sixth for L_0 and the rest for "
        f"draws of t; default {DEFAULT_SAMPLES}",
    )
    variance: Literal["large", "small", "learned"] | None = Field(
        None,
        description="σ² of the reverse steps; default: learned where the model has it, else small",
    )
    class_label: Label | None = Field(
        None, description="of all images, by number or name; absent: none"
    )
    indices: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] | None = Field(
        None,
        description="what keys each image's noise, by default 0, 1, …: with the positions in a "
        "data set, parts of it give the numbers of the whole",
    )
    terms: tuple[Timestep, ...] | None = Field(
        None, min_length=1, max_length=10_000, description="full only: tell the terms at these t"
    )

    draws: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="flow only: of a probe of the divergence and of noise within a grey level; the "
        f"standard error of an image is over them; default {DEFAULT_DRAWS}",
    )
    steps: int | None = Field(
        None,
        ge=1,
        description="flow only: timesteps that a draw visits, in steps + 1 rows of two evaluations "
        "and a product with the network's Jacobian; "
        f"default {FLOW_STEPS}, or all where there are fewer",
    )

    @property
    def work_field(self) -> str:
        """Pointer of the field that makes the work large, and with it the saved numbers."""
        return {"full": "/mode", "monte_carlo": "/samples", "flow": "/draws"}[self.mode]

    @property
    def bytes_field(self) -> str:
        """The same."""
        return self.work_field

    def check(self, card: ModelCard, settings: Settings) -> None:
        """Raise SpecError for what this model or these limits do not allow."""
        super().check(card, settings)
        label_of(self.class_label, card)
        for field, mode in _MODE_OF.items():
            if self.mode != mode and getattr(self, field) is not None:
                raise SpecError(f"/{field}", f"is for mode {mode}, not {self.mode}")
        if self.mode == "flow" and self.variance is not None:
            raise SpecError("/variance", "is of the bound: the flow has none")
        if self.mode == "flow" and card.betas[-1] == 1:
            raise SpecError(
                "/mode",
                f"flow: model {card.name} has β_T = 1, so that the flow has no end; ask for full",
            )
        if self.steps is not None and self.steps > card.T:
            raise SpecError("/steps", f"{self.steps}: model {card.name} has T = {card.T}")
        if self.mode == "monte_carlo" and card.T < 2:
            raise SpecError(
                "/mode", f"monte_carlo: model {card.name} has T = {card.T}; ask for full"
            )
        if self.variance == "learned" and not card.learned_variance:
            raise SpecError("/variance", f"learned: model {card.name} has no learned variance")
        for i, t in enumerate(self.terms or ()):
            check_timestep(f"/terms/{i}", t, card)

    def check_inputs(self, count: int) -> None:
        """One or more images, and as many indices if any."""
        if count < 1:
            raise SpecError("/images", "at least one picture is needed")
        if self.indices is not None and len(self.indices) != count:
            raise SpecError("/indices", f"{len(self.indices)} for {count} pictures")

    def defaults(self, card: ModelCard, settings: Settings) -> dict[str, Any]:
        """Values for the fields that were left out."""
        defaults = super().defaults(card, settings)
        defaults["class_label"] = label_of(self.class_label, card)
        if self.mode == "flow":
            defaults["draws"] = self.draws or DEFAULT_DRAWS
            defaults["steps"] = self.steps or min(FLOW_STEPS, card.T)
            return defaults
        defaults["variance"] = self.variance or ("learned" if card.learned_variance else "small")
        if self.mode == "monte_carlo":
            defaults["samples"] = self.samples or DEFAULT_SAMPLES
        return defaults

    def plan(self, card: ModelCard, num_inputs: int) -> Plan:
        """Cost of a filled spec for so many images; the bytes are those of its saved numbers."""
        if self.mode == "flow":
            assert self.draws is not None and self.steps is not None
            strands, a_row = num_inputs * self.draws, 2 + PRODUCT_COST
            return Plan(
                images=num_inputs,
                evaluations=strands * (self.steps + 1) * a_row,
                output_bytes=strands * (card.plane_bytes + STATE_BYTES),
            )
        each = self.samples or card.T
        return Plan(
            images=num_inputs,
            evaluations=num_inputs * each,
            output_bytes=num_inputs * each * NUMBERS_A_TERM * 8,
        )
