"""The cost that the API admits is the number of rows that the worker runs."""

from __future__ import annotations

import pytest

from diffusion.samplers import SAMPLERS, build_table
from diffusion.schedule import linear_schedule
from jobs.cards import ModelCard, SamplerTraits
from jobs.errors import SpecError
from jobs.kinds.generate import GenerateSpec
from jobs.kinds.table import admit
from jobs.settings import Settings

SCHEDULE = linear_schedule(100, 1e-3, 0.1)
CARD = ModelCard(
    name="m",
    digest="d",
    queue="q",
    shape=(1, 8, 8),
    betas=tuple(SCHEDULE.betas.tolist()),
    samplers={
        name: SamplerTraits(options=sampler.options, corrector_only=sampler.corrector_only)
        for name, sampler in SAMPLERS.items()
    },
)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("corrector_steps", [None, 1, 3])
@pytest.mark.parametrize("steps", [1, 20])
def test_rows_are_known_at_admission(sampler: str, corrector_steps: int | None, steps: int) -> None:
    spec = GenerateSpec.model_validate(
        {"sampler": sampler, "steps": steps, "corrector_steps": corrector_steps, "num_images": 3}
    )
    _, plan = admit(spec, CARD, Settings())
    table = build_table(SCHEDULE, sampler=sampler, steps=steps, corrector_steps=corrector_steps)
    assert plan.evaluations == 3 * len(table)


def test_langevin_without_langevin_steps_is_refused() -> None:
    spec = GenerateSpec.model_validate({"sampler": "langevin", "corrector_steps": 0})
    with pytest.raises(SpecError, match="langevin needs 1"):
        admit(spec, CARD, Settings())
