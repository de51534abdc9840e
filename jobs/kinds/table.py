"""The kinds of job that work on what a client sends, and the union of all kinds."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, TypeAdapter

from jobs.cards import ModelCard
from jobs.errors import SpecError
from jobs.kinds.common import (
    ChainSpec,
    CommonSpec,
    GenerateSpec,
    NoiseSpec,
    Plan,
    Strict,
    Timestep,
    check_label,
    check_timestep,
)
from jobs.settings import Settings

DEFAULT_SAMPLES = 20
NUMBERS_A_TERM = 2  # nats and squared error, float64 each


class SnapshotSource(Strict):
    """An x_t that another job kept."""

    job: str = Field(max_length=100, description="id of the job")
    t: Timestep
    index: int = Field(0, ge=0, description="of the image in that job")


class ReconstructSpec(ChainSpec):
    """Denoise from any point of a chain: `num_images` samples of p_θ(x_0|x_t) from one x_t."""

    kind: Literal["reconstruct"] = "reconstruct"
    num_images: int = Field(1, ge=1, description="samples from the one x_t")
    source: Literal["image", "x_t"] | SnapshotSource = Field(
        "image",
        description="`image`: an uploaded picture, noised to t with the ε that POST /noise gives "
        "its first image at the same seed; `x_t`: an uploaded array; or a snapshot of a job",
    )
    t: Timestep | None = Field(
        None, description="where the chain starts: 1..T; a snapshot brings its own"
    )

    @property
    def count(self) -> int:
        """`num_images`."""
        return self.num_images

    @property
    def from_x_t(self) -> bool:
        """Whether the input is an x_t already, and no picture."""
        return self.source != "image"

    def first_t(self, card: ModelCard) -> int:
        """t of the one x_t."""
        if isinstance(self.source, SnapshotSource):
            if self.t not in (None, self.source.t):
                raise SpecError("/t", f"{self.t}: the source is at t = {self.source.t}")
            check_timestep("/source/t", self.source.t, card)
            return self.source.t
        if self.t is None:
            raise SpecError("/t", f"is needed: where the chain starts, 1..{card.T}")
        check_timestep("/t", self.t, card)
        return self.t

    def check_inputs(self, count: int) -> None:
        """One image or x_t."""
        if count != 1:
            raise SpecError("/images", f"{count} pictures: must be one")

    def fill(self, card: ModelCard, settings: Settings) -> ReconstructSpec:
        """The same request with every default written out."""
        filled = super().fill(card, settings)
        return filled.model_copy(update={"t": self.first_t(card)})


class InterpolateSpec(ChainSpec):
    """Two images noised to t with one ε, mixed there, and decoded: image i is of lambdas[i].

    x̄_t = (1−λ)x_t + λx'_t. All chains share their noise too, that of (seed, 0): what differs
    between two images is λ alone.
    """

    count_field: ClassVar[str] = "/lambdas"
    kind: Literal["interpolate"] = "interpolate"
    t: Timestep = Field(description="where the images are mixed: 1..T")
    lambdas: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        min_length=1, description="shares of the second image; one output each, in this order"
    )

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


class LikelihoodSpec(CommonSpec):
    """The bound on −log p_θ(x_0) of uploaded images in bits/dim, by term."""

    kind: Literal["likelihood"] = "likelihood"
    mode: Literal["full", "monte_carlo"] = Field(
        "monte_carlo", description="full: all T terms; monte_carlo: an unbiased estimate"
    )
    samples: int | None = Field(
        None,
        ge=2,
        le=100_000,
        description="monte_carlo only: evaluations an image, L_0 and samples − 1 draws of t; "
        f"default {DEFAULT_SAMPLES}",
    )
    variance: Literal["large", "small", "learned"] | None = Field(
        None,
        description="σ² of the reverse steps; default: learned where the model has it, else small",
    )
    class_label: int | None = Field(None, ge=0, description="of all images; absent: none")
    indices: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] | None = Field(
        None,
        description="what keys each image's noise, by default 0, 1, …: with the positions in a "
        "data set, parts of it give the numbers of the whole",
    )
    terms: tuple[Timestep, ...] | None = Field(
        None, min_length=1, max_length=10_000, description="full only: tell the terms at these t"
    )

    @property
    def work_field(self) -> str:
        """Pointer of the field that makes the work large, and with it the saved numbers."""
        return "/mode" if self.mode == "full" else "/samples"

    @property
    def bytes_field(self) -> str:
        """The same."""
        return self.work_field

    def check(self, card: ModelCard, settings: Settings) -> None:
        """Raise SpecError for what this model or these limits do not allow."""
        self.check_common(card, settings)
        check_label(self.class_label, card)
        if self.mode == "full" and self.samples is not None:
            raise SpecError("/samples", "is for mode monte_carlo, not full")
        if self.mode == "monte_carlo" and self.terms is not None:
            raise SpecError("/terms", "is for mode full, not monte_carlo")
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

    def fill(self, card: ModelCard, settings: Settings) -> LikelihoodSpec:
        """The same request with every default written out."""
        defaults = self.common_defaults(card, settings)
        defaults["variance"] = self.variance or ("learned" if card.learned_variance else "small")
        if self.mode == "monte_carlo":
            defaults["samples"] = self.samples or DEFAULT_SAMPLES
        return self.model_copy(update=defaults)

    def plan(self, card: ModelCard, num_inputs: int) -> Plan:
        """Cost of a filled spec for so many images; the bytes are those of its saved numbers."""
        each = self.samples or card.T
        return Plan(
            images=num_inputs,
            evaluations=num_inputs * each,
            output_bytes=num_inputs * each * NUMBERS_A_TERM * 8,
        )


# A new kind is one more class, and one more case in the worker.
JobSpec = GenerateSpec | NoiseSpec | ReconstructSpec | InterpolateSpec | LikelihoodSpec
_adapter: TypeAdapter[JobSpec] = TypeAdapter(Annotated[JobSpec, Field(discriminator="kind")])


def parse(text: str | bytes) -> JobSpec:
    """The spec of a JSON text with a `kind`. Raises pydantic.ValidationError."""
    return _adapter.validate_json(text)


def admit(
    spec: JobSpec, card: ModelCard, settings: Settings, num_inputs: int = 0
) -> tuple[JobSpec, Plan]:
    """Check, fill and cost a spec. Raises SpecError: all or nothing, never silently less."""
    spec.check(card, settings)
    spec.check_inputs(num_inputs)
    filled = spec.fill(card, settings)
    plan = filled.plan(card, num_inputs)
    if plan.images > settings.max_images:
        raise SpecError("/images", f"{plan.images}: must be at most {settings.max_images}")
    if plan.evaluations > settings.max_job_evaluations:
        raise SpecError(
            filled.work_field,
            f"{plan.evaluations} image-steps: a job may take {settings.max_job_evaluations}",
        )
    if plan.output_bytes > settings.max_job_bytes:
        raise SpecError(
            filled.bytes_field,
            f"{plan.output_bytes} bytes of output: a job may keep {settings.max_job_bytes}",
        )
    return filled, plan
