"""All kinds of job: reading a spec of any, and admitting it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, TypeAdapter

from jobs.cards import ModelCard
from jobs.errors import SpecError
from jobs.kinds.common import CommonSpec, Plan
from jobs.kinds.generate import GenerateSpec
from jobs.kinds.interpolate import InterpolateSpec
from jobs.kinds.likelihood import LikelihoodSpec
from jobs.kinds.noise import NoiseSpec
from jobs.kinds.reconstruct import ReconstructSpec
from jobs.settings import Settings

# A new kind is one more class, and one more case in the worker.
JobSpec = GenerateSpec | NoiseSpec | ReconstructSpec | InterpolateSpec | LikelihoodSpec
KINDS: dict[str, type[CommonSpec]] = {
    "generate": GenerateSpec,
    "noise": NoiseSpec,
    "reconstruct": ReconstructSpec,
    "interpolate": InterpolateSpec,
    "likelihood": LikelihoodSpec,
}
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
