"""The sampler of consistency models: its algorithm, and chains of a known consistency function."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import diffusion
from diffusion import ScheduleConfig
from diffusion.forward import alpha_bars
from diffusion.model import Estimate
from diffusion.noise import Purpose, image_normals
from diffusion.presets import presets_of
from diffusion.samplers import SamplingDefaults, build_table
from diffusion.schedule import Schedule, linear_schedule
from diffusion.table import SamplerError, SamplerTable
from tests.diffusion.gaussian import GaussianDenoiser, assert_normal, run_chain
from tests.diffusion.networks import build_model

PAPER = linear_schedule()


@dataclass(frozen=True)
class GaussianFlow(GaussianDenoiser):
    """x̂_0 is where the flow of probability ends: all quantiles are kept."""

    def estimate(self, x_t: Tensor, t: Tensor, class_label: Tensor | None = None) -> Estimate:
        alpha_bar, rest = (v.view(-1, 1, 1, 1) for v in alpha_bars(self.schedule, t, t.double()))
        deviations = (x_t - alpha_bar.sqrt() * self.mean) / (
            alpha_bar * self.variance + rest
        ).sqrt()
        x_start = self.mean + math.sqrt(self.variance) * deviations
        return Estimate(x_start.to(x_t.dtype), torch.zeros_like(x_t))


def table_of(steps: int, schedule: Schedule = PAPER) -> SamplerTable:
    return build_table(schedule, sampler="consistency", steps=steps, spacing="trailing", clip=False)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_of_an_exact_consistency_function_have_the_datas_distribution(steps: int) -> None:
    flow = GaussianFlow(PAPER, variance=0.04, mean=-0.3)
    x = run_chain(flow, table_of(steps), images=2)
    # x_T has a little signal, which the chain's first x does not: √ᾱ_T m of the data's deviations.
    deviation = math.sqrt(PAPER.alpha_bar(999)) * 0.3 if steps == 1 else 0.0
    assert_normal(x, -0.3 + 0.2 * deviation, 0.04)
    with pytest.raises(AssertionError):  # the posterior's mean is another function
        assert_normal(run_chain(GaussianDenoiser(PAPER, 0.04, -0.3), table_of(steps)), -0.3, 0.04)


def test_a_chain_is_the_algorithm() -> None:
    """Song et al. 2023, algorithm 1: to the image, then with fresh noise to the next t."""
    own = SamplingDefaults("consistency", spacing="trailing")
    model = build_model(schedule=ScheduleConfig(T=20), sampling=own)
    found = diffusion.sample(model, 2, steps=3, seed=5, dtype=torch.float32)

    def noise(row: int, purpose: Purpose) -> Tensor:
        return image_normals(5, torch.arange(2), row=row, purpose=purpose, shape=model.shape)

    ts = [19, 12, 6]
    assert table_of(3, model.schedule).t.tolist() == ts
    x = noise(0, Purpose.X_T)
    with torch.no_grad():
        for t, s in zip(ts, [*ts[1:], None], strict=True):
            x_start = model.estimate(x, torch.full((2,), t)).x_start.clamp(-1, 1)
            if s is not None:
                alpha_bar = float(model.schedule.alphas_cumprod[s])
                z = noise(t, Purpose.STEP)
                x = math.sqrt(alpha_bar) * x_start + math.sqrt(1 - alpha_bar) * z
    torch.testing.assert_close(found, x_start, atol=2e-5, rtol=1e-4)


def test_a_model_that_is_not_trained_for_it_is_not_sampled_so() -> None:
    with pytest.raises(SamplerError, match="sampler = 'consistency': must be one of ddpm, ddim"):
        diffusion.sample(build_model(), sampler="consistency", steps=2)


def test_spacings_by_level_do_not_spend_an_evaluation_on_the_image() -> None:
    schedule = ScheduleConfig(T=1000).build()
    for spacing in ("lambda", "karras"):
        table = build_table(schedule, sampler="consistency", steps=3, spacing=spacing)
        whole = build_table(schedule, sampler="dpmpp_2m", steps=4, spacing=spacing)
        assert table.time.tolist() == whole.time[:3].tolist() and table.time[0] == 999
    one = build_table(schedule, sampler="consistency", steps=1, spacing="lambda")
    assert one.time.tolist() == [999]
    middle = build_table(schedule, sampler="consistency", steps=2, spacing="lambda").time[1]
    ends = schedule.lambda_at(999) + schedule.lambda_at(0)
    assert schedule.lambda_at(float(middle)) == pytest.approx(ends / 2, abs=0.01)
    whole = build_table(schedule, sampler="consistency", steps=1000, spacing="lambda")
    assert len(whole) == 1000


def test_presets_of_a_consistency_model_are_all_of_a_few_evaluations() -> None:
    own = SamplingDefaults("consistency", spacing="trailing", steps=2)
    found = presets_of(own, 1000)
    assert {name: (its.sampler, its.steps, its.spacing) for name, its in found.items()} == {
        "fast": ("consistency", 1, "trailing"),
        "balanced": ("consistency", 2, "trailing"),
        "faithful": ("consistency", 4, "trailing"),
    }
    assert presets_of(own, 3)["faithful"].steps == 3
    with pytest.raises(SamplerError, match="steps = 2: must be at most T = 1"):
        presets_of(own, 1, found)
