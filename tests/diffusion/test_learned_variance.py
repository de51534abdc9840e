"""Sampling with Σ from the network: v = −1 is σ² small, v = 1 large, between them a power."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from diffusion import Model, sample
from diffusion.samplers import ancestral
from diffusion.sampling import guided_estimate
from diffusion.schedule import linear_schedule
from diffusion.table import COLUMNS, SamplerError, scale_noise
from tests.diffusion.networks import TINY, build_model

TS = [999, 500, 100, 3]


def constant_v(v: float) -> Model:
    model = build_model(dataclasses.replace(TINY, learned_variance=True))
    model.network.conv_out.weight.mul_(0.1)
    model.network.conv_out.weight[1:].zero_()
    model.network.conv_out.bias[1:] = v
    return model


def test_the_row_holds_the_geometric_mean_and_the_spread() -> None:
    schedule = linear_schedule()
    learned, small, large = (
        ancestral(schedule, TS, variance=name) for name in ("learned", "small", "large")
    )
    c = COLUMNS.index("c")
    assert learned.learned_variance and not small.learned_variance
    assert learned.spread[-1] == 0 and learned.coefficients[-1, c] == 0
    for v, fixed in ((-1.0, small), (1.0, large)):
        z = scale_noise(
            torch.from_numpy(learned.spread),
            torch.full((4, 2), v, dtype=torch.float64),
            torch.from_numpy(learned.coefficients[:, c])[:, None].expand(4, 2),
        )
        np.testing.assert_allclose(z[:, 0], fixed.coefficients[:, c], rtol=1e-9)
    np.testing.assert_array_equal(learned.coefficients[:, :c], small.coefficients[:, :c])
    half = scale_noise(torch.ones(1), torch.tensor([[0.0]]), torch.tensor([[3.0]]))
    assert float(half) == 3.0


@pytest.mark.parametrize(("v", "fixed"), [(-1.0, "small"), (1.0, "large")])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_ends_are_the_fixed_choices(v: float, fixed: str, guidance: float) -> None:
    model = constant_v(v)
    settings: dict[str, Any] = {
        "steps": 8,
        "seed": 1,
        "class_label": 2,
        "guidance": guidance,
        "dtype": torch.float32,
    }
    learned = sample(model, 3, variance="learned", **settings)
    torch.testing.assert_close(
        learned, sample(model, 3, variance=fixed, **settings), atol=1e-4, rtol=0
    )
    other = "small" if fixed == "large" else "large"
    assert not torch.allclose(learned, sample(model, 3, variance=other, **settings), atol=1e-2)


def test_the_learned_variance_steps_with_correctors() -> None:
    settings: dict[str, Any] = {"steps": 8, "seed": 1, "dtype": torch.float32, "corrector_steps": 1}
    learned = sample(constant_v(1.0), 2, variance="learned", **settings)
    fixed = sample(constant_v(1.0), 2, variance="large", **settings)
    torch.testing.assert_close(learned, fixed, atol=1e-4, rtol=0)


def test_guidance_leaves_v_alone() -> None:
    model = build_model(dataclasses.replace(TINY, learned_variance=True))
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, label = torch.tensor([5, 50, 90]), torch.tensor([0, 1, 2])
    found = guided_estimate(model, x, t, class_label=label, guidance=3.0)
    eps_u, eps_c = model.eps(x, t), model.eps(x, t, label)
    torch.testing.assert_close(found.eps, eps_u + 3.0 * (eps_c - eps_u))
    assert found.v is not None
    torch.testing.assert_close(found.v, model.output(x, t, label)[:, 1:])


def test_a_model_without_it_refuses() -> None:
    with pytest.raises(SamplerError, match="variance = 'learned'"):
        sample(build_model(), 1, steps=3, variance="learned")
