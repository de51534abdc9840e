"""What the kinds that walk the reverse chain share: how to walk it, and what to keep of it."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from jobs.cards import ModelCard
from jobs.errors import SpecError
from jobs.kinds.common import CommonSpec, Kind, Plan, Strict, Timestep, check_label, check_timestep
from jobs.settings import Settings

DEFAULT_STEPS = 100


class Snapshots(Strict):
    """Which states of the chain to keep: each holds the x_t that enters a step, or what the
    network finds there (`x_start`, `eps`)."""

    every: int | None = Field(
        None, ge=1, description="every k-th step, counted from the first (the largest t)"
    )
    at: tuple[Timestep, ...] | None = Field(
        None,
        min_length=1,
        max_length=10_000,
        description="at these t; each taken at the nearest t the chain visits",
    )
    kinds: tuple[Kind, ...] = Field(("x_t",), min_length=1, max_length=3)
    preview_px: int | None = Field(
        None, ge=8, le=512, description="put a PNG with this longer side into each snapshot event"
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.every is None) == (self.at is None):
            raise ValueError("give either `every` or `at`")
        return self

    def count(self, steps: int) -> int:
        """How many times a chain of so many steps is looked at, at most."""
        if self.at is not None:
            return min(len(set(self.at)), steps)
        assert self.every is not None
        return -(-steps // self.every)


class ChainSpec(CommonSpec):
    """How to walk the reverse chain, from wherever it starts, and what to keep of it."""

    work_field: ClassVar[str] = "/steps"  # what makes the work large
    count_field: ClassVar[str] = "/num_images"
    sampler: Literal["ddpm", "ddim", "dpmpp_2m", "langevin"] | None = Field(
        None, description="default: the model's own, mostly ddpm"
    )
    steps: int | None = Field(
        None,
        ge=1,
        description="network evaluations an image, from the t where the chain starts down to the "
        "image (so at most that t); default 100, or all where there are fewer",
    )
    spacing: Literal["uniform", "quadratic", "leading", "trailing"] | None = Field(
        None, description="of the timesteps; default: the model's own, mostly uniform"
    )
    eta: float | None = Field(None, ge=0, le=1, description="ddim only: 0 deterministic (default)")
    variance: Literal["large", "small", "learned"] | None = Field(
        None, description="ddpm only: β, β̃ or the network's own; default: the model's own"
    )
    corrector_steps: int | None = Field(
        None, ge=0, le=100, description="Langevin steps after each step (langevin: a level)"
    )
    class_label: int | None = Field(None, ge=0, description="what to draw; absent: anything")
    guidance: float = Field(1.0, ge=0, le=50, description="ε_u + g(ε_c − ε_u); 1 is off")
    snapshots: Snapshots | None = None

    @property
    def count(self) -> int:
        """How many chains there are, which is how many images come out."""
        raise NotImplementedError

    def first_t(self, card: ModelCard) -> int:
        """The paper's t of the state that enters the first step."""
        return card.T

    @property
    def bytes_field(self) -> str:
        """Pointer of the field that makes the outputs large."""
        return "/snapshots" if self.snapshots is not None else self.count_field

    def check(self, card: ModelCard, settings: Settings) -> None:
        """Raise SpecError for what this model or these limits do not allow."""
        self.check_common(card, settings)
        if self.count > settings.max_images:
            raise SpecError(
                self.count_field, f"{self.count}: must be at most {settings.max_images}"
            )
        self._check_steps(card)
        self._check_sampler(card)
        check_label(self.class_label, card)
        if self.guidance != 1.0 and self.class_label is None:
            raise SpecError("/guidance", "needs a class_label")
        if self.guidance != 1.0 and card.null_label is None:
            raise SpecError("/guidance", f"model {card.name} was trained without label dropping")

    def _check_steps(self, card: ModelCard) -> None:
        first = self.first_t(card)
        whole = first == card.T
        if self.steps is not None and self.steps > first:
            limit = f"model {card.name} has T" if whole else "the chain starts at t"
            raise SpecError("/steps", f"{self.steps}: {limit} = {first}")
        for i, t in enumerate(self.snapshots.at or () if self.snapshots else ()):
            check_timestep(f"/snapshots/at/{i}", t, card)
            if t > first:
                raise SpecError(f"/snapshots/at/{i}", f"{t}: the chain starts at t = {first}")

    def _check_sampler(self, card: ModelCard) -> None:
        sampler = self.sampler or card.sampling.sampler
        if sampler not in card.samplers:
            raise SpecError(
                "/sampler", f"{sampler}: model {card.name} runs {', '.join(card.samplers)}"
            )
        if self.eta is not None and sampler != "ddim":
            raise SpecError("/eta", f"is for sampler ddim, not {sampler}")
        if self.variance is not None and sampler != "ddpm":
            raise SpecError("/variance", f"is for sampler ddpm, not {sampler}")
        if self.variance == "learned" and not card.learned_variance:
            raise SpecError("/variance", f"model {card.name} has no learned variance")
        if self.corrector_steps and "langevin" not in card.samplers:
            raise SpecError("/corrector_steps", f"model {card.name} runs no Langevin steps")
        if self.corrector_steps == 0 and sampler == "langevin":
            raise SpecError("/corrector_steps", "0: langevin needs 1 or more")

    def fill(self, card: ModelCard, settings: Settings) -> Self:
        """The same request with every default written out."""
        defaults = self.common_defaults(card, settings)
        sampler = self.sampler or card.sampling.sampler
        defaults["sampler"] = sampler
        defaults["spacing"] = self.spacing or card.sampling.spacing
        defaults["steps"] = self.steps or min(DEFAULT_STEPS, self.first_t(card))
        if sampler == "ddim" and self.eta is None:
            defaults["eta"] = 0.0
        if sampler == "ddpm" and self.variance is None:
            defaults["variance"] = card.sampling.variance
        if self.corrector_steps is None:
            defaults["corrector_steps"] = 1 if sampler == "langevin" else 0
        return self.model_copy(update=defaults)

    def plan(self, card: ModelCard, num_inputs: int) -> Plan:
        """Cost of a filled spec; the images come out of `count` chains."""
        assert self.steps is not None and self.corrector_steps is not None
        # A corrector follows every step but the last; langevin is made of nothing else.
        levels = self.steps if self.sampler == "langevin" else self.steps - 1
        predictors = 0 if self.sampler == "langevin" else self.steps
        rows = predictors + levels * self.corrector_steps
        nets = 2 if self.guidance != 1.0 else 1
        kept = 1
        if self.snapshots is not None:
            kept += self.snapshots.count(rows) * len(set(self.snapshots.kinds))
        return Plan(
            images=self.count,
            evaluations=self.count * rows * nets,
            output_bytes=self.count * kept * card.plane_bytes,
        )
