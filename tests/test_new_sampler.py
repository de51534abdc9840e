"""A sampler made for this test alone: a function and an entry, and everything knows it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import diffusion
from diffusion import ScheduleConfig
from diffusion.samplers import SAMPLERS, Sampler, ddim
from diffusion.schedule import Schedule
from diffusion.table import SamplerTable
from jobs.cards import from_store, to_store
from jobs.errors import SpecError
from jobs.kinds.generate import GenerateSpec
from jobs.kinds.table import admit
from jobs.settings import Settings
from tests.diffusion.networks import build_model
from worker.kinds.chains import spec_table
from worker.models import Served, card_of


def halfway(
    schedule: Schedule, timesteps: Sequence[int], *, eta: float, clip: bool = True
) -> SamplerTable:
    """DDIM with half of the noise that is asked for."""
    return ddim(schedule, timesteps, eta=eta / 2, clip=clip)


def test_a_new_sampler_is_one_function_and_one_entry(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setitem(SAMPLERS, "halfway", Sampler(halfway, ("eta",)))
    model = build_model(schedule=ScheduleConfig(T=20))
    options = {"steps": 5, "seed": 3, "dtype": torch.float32}
    mine = diffusion.sample(model, sampler="halfway", eta=0.8, **options)  # type: ignore[arg-type]
    same = diffusion.sample(model, sampler="ddim", eta=0.4, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(mine, same)
    card = from_store(*(part.encode() for part in to_store(card_of(model, "tiny", "ddpm"))))
    asked = GenerateSpec.model_validate({"sampler": "halfway", "steps": 5, "eta": 0.8})
    filled, plan = admit(asked, card, Settings())
    assert plan.evaluations == 5
    served = Served("tiny", model, card, tmp_path_factory.getbasetemp())
    assert isinstance(filled, GenerateSpec)
    table = spec_table(served, filled, from_noise=True)
    steps = [19, 14, 10, 5, 0]
    assert table.t.tolist() == steps
    wanted = ddim(model.schedule, steps, eta=0.4)
    assert (table.coefficients == wanted.coefficients).all()
    with pytest.raises(SpecError, match="is for sampler ddpm, not halfway"):
        admit(GenerateSpec(sampler="halfway", variance="large"), card, Settings())
    with pytest.raises(SpecError, match=r"runs ddpm, ddim, .*langevin, halfway"):
        admit(GenerateSpec(sampler="other"), card, Settings())
