"""The table of kinds: what reads a spec of any kind, and admits it.

A kind of job is a file here, one of the same name in `worker/kinds`, and its words in
`app/routes/words.py`; this table and the worker's name it, and nothing else does.
"""

from __future__ import annotations

import json

from pydantic import BaseModel

from jobs.cards import ModelCard
from jobs.errors import SpecError
from jobs.kinds.common import JobSpec, Plan
from jobs.kinds.encode import EncodeSpec
from jobs.kinds.generate import GenerateSpec
from jobs.kinds.interpolate import InterpolateSpec
from jobs.kinds.likelihood import LikelihoodSpec
from jobs.kinds.noise import NoiseSpec
from jobs.kinds.reconstruct import ReconstructSpec
from jobs.kinds.restore import RestoreSpec
from jobs.settings import Settings

KINDS: dict[str, type[JobSpec]] = {
    "generate": GenerateSpec,
    "noise": NoiseSpec,
    "reconstruct": ReconstructSpec,
    "restore": RestoreSpec,
    "encode": EncodeSpec,
    "interpolate": InterpolateSpec,
    "likelihood": LikelihoodSpec,
}


def result_models() -> list[type[BaseModel]]:
    """What the results of the kinds that give numbers look like."""
    return [model for kind in KINDS.values() for model in kind.result_models]


def parse(text: str | bytes) -> JobSpec:
    """The spec of a JSON text with a `kind`.

    Raises SpecError for no kind or an unknown one, else pydantic.ValidationError.
    """
    raw = json.loads(text)
    kind = raw.get("kind") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise SpecError("/kind", f"{kind!r}: must be one of {', '.join(KINDS)}")
    return KINDS[kind].model_validate_json(text)


def admit(
    spec: JobSpec, card: ModelCard, settings: Settings, num_inputs: int = 0
) -> tuple[JobSpec, Plan]:
    """Check, fill and cost a spec. Raises SpecError: all or nothing, never silently less."""
    spec = spec.plain(card)
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
