"""What a job is asked to do: what kinds share, and the first of them.

A spec goes through three hands: `parse` (fields and types), `check` (against the model's card and
the limits) and `fill` (defaults that depend on the model, and the seed). What `fill` returns says
everything: posted again, with the same model digest, it makes the same images. The other kinds,
and the union of all, are in `jobs.kinds.table`.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jobs.cards import ModelCard
from jobs.errors import SpecError
from jobs.settings import Settings

MAX_SEED = 2**53 - 1
DEFAULT_STEPS = 100

Timestep = Annotated[int, Field(ge=1, description="the paper's t: 1..T")]
Kind = Literal["x_t", "x_start", "eps"]


@dataclass(frozen=True)
class Plan:
    """What a job costs, known before it starts.

    evaluations: images × network evaluations (image-steps). output_bytes: float32 images and
    snapshots, the most there can be.
    """

    images: int
    evaluations: int
    output_bytes: int


class Strict(BaseModel):
    """Unknown fields are errors, and a number is a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


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


class CommonSpec(Strict):
    """Fields of every kind of job."""

    model: str | None = Field(None, description="a name from GET /models")
    model_digest: str | None = Field(
        None, description="run only with exactly this model (SHA-256 from a job's manifest)"
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="image i uses the noise of (seed, i); drawn if absent"
    )
    deterministic: bool = Field(False, description="the same bytes in any batch, on one backend")
    format: Literal["png", "webp", "npy"] = Field("png", description="what `images[].url` gives")
    ttl_s: int | None = Field(None, ge=1, description="seconds to keep the outputs")
    webhook_url: str | None = Field(
        None, max_length=2000, pattern=r"^https?://", description="told when the job ends"
    )
    priority: Literal["normal", "high"] = Field("normal", description="high: front of the queue")
    provenance: dict[str, Any] | None = Field(
        None, exclude=True, description="ignored, so that a manifest can be posted as it is"
    )

    def check_common(self, card: ModelCard, settings: Settings) -> None:
        """Raise SpecError for what this model or these limits do not allow."""
        if self.model_digest is not None and self.model_digest != card.digest:
            raise SpecError("/model_digest", f"model {card.name} is {card.digest} now")
        if self.ttl_s is not None and self.ttl_s > settings.max_ttl_s:
            raise SpecError("/ttl_s", f"{self.ttl_s}: must be at most {settings.max_ttl_s}")
        if self.webhook_url is not None and settings.webhook_secret is None:
            raise SpecError("/webhook_url", "webhooks are off here: DDPM_WEBHOOK_SECRET is not set")

    def check_inputs(self, count: int) -> None:
        """Raise SpecError unless so many images are what this kind works on."""

    def common_defaults(self, card: ModelCard, settings: Settings) -> dict[str, Any]:
        """Values for the common fields that were left out."""
        return {
            "model": card.name,
            "seed": secrets.randbelow(MAX_SEED + 1) if self.seed is None else self.seed,
            "ttl_s": settings.ttl_s if self.ttl_s is None else self.ttl_s,
        }


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


class GenerateSpec(ChainSpec):
    """The reverse chain: `num_images` images from noise."""

    kind: Literal["generate"] = "generate"
    num_images: int = Field(1, ge=1)

    @property
    def count(self) -> int:
        """`num_images`."""
        return self.num_images


class NoiseSpec(CommonSpec):
    """The forward process: x_t of uploaded images at many t. The results are snapshots."""

    work_field: ClassVar[str] = "/t"
    bytes_field: ClassVar[str] = "/t"
    kind: Literal["noise"] = "noise"
    t: tuple[Timestep, ...] = Field(min_length=1, max_length=10_000)
    mode: Literal["closed", "stepwise"] = Field(
        "closed", description="q(x_t|x_0) with one ε for all t, or the chain step by step"
    )
    kinds: tuple[Literal["x_t", "eps"], ...] = Field(("x_t",), min_length=1, max_length=2)

    def check(self, card: ModelCard, settings: Settings) -> None:
        """Raise SpecError for what this model or these limits do not allow."""
        self.check_common(card, settings)
        for i, t in enumerate(self.t):
            check_timestep(f"/t/{i}", t, card)
            if t in self.t[:i]:
                raise SpecError(f"/t/{i}", f"{t}: is there twice")

    def fill(self, card: ModelCard, settings: Settings) -> NoiseSpec:
        """The same request with every default written out."""
        return self.model_copy(update=self.common_defaults(card, settings))

    def plan(self, card: ModelCard, num_inputs: int) -> Plan:
        """Cost of a filled spec for so many images: no network evaluation at all."""
        planes = len(self.t) * len(set(self.kinds))
        return Plan(
            images=num_inputs, evaluations=0, output_bytes=num_inputs * planes * card.plane_bytes
        )


def check_timestep(pointer: str, t: int, card: ModelCard) -> None:
    """Raise SpecError unless 1 ≤ t ≤ T."""
    if not 1 <= t <= card.T:
        raise SpecError(pointer, f"{t}: must be 1..{card.T} for model {card.name}")


def check_label(label: int | None, card: ModelCard) -> None:
    """Raise SpecError unless the model takes this label, or none."""
    if label is None:
        if card.num_classes and card.null_label is None:
            raise SpecError("/class_label", f"model {card.name} needs a label")
        return
    if not card.num_classes:
        raise SpecError("/class_label", f"model {card.name} has no classes")
    if label >= card.num_classes:
        raise SpecError("/class_label", f"{label}: must be 0..{card.num_classes - 1}")
