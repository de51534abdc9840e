"""Consistency tuning: its loss where the right answer is known, its stages, its place in a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import diffusion
from diffusion.forward import gather, q_sample
from diffusion.parameterization import PREDICTIONS, target, to_x_start
from diffusion.schedule import Schedule, cosine_schedule, linear_schedule
from tests.training.test_trainer import same, state
from training.batches import Batch
from training.commands import train
from training.config import ConfigError, ConsistencyConfig, TrainConfig, load_config
from training.consistency import Stages, earlier, gap_weight, sigmas
from training.loss import Loss
from training.state import StateError
from training.trainer import Trainer

SCHEDULE = linear_schedule(20, 1e-3, 0.4)
PAPER = linear_schedule()
Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def config(prediction: str = "v", **more: object) -> TrainConfig:
    fields = {"data": {"source": "nowhere"}, "objective": "consistency", "prediction": prediction}
    return TrainConfig.model_validate(
        {**fields, "schedule": {"T": 20}, "sample_steps": 5, "consistency": more}
    )


def batch(gap: float, x_start: Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x_start = torch.rand(6, 1, 4, 4, generator=generator) if x_start is None else x_start
    t, eps = torch.tensor([0, 1, 5, 10, 18, 19]), torch.randn(6, 1, 4, 4, generator=generator)
    return Batch(x_start, t, eps, None, torch.from_numpy(earlier(SCHEDULE, gap))[t])


def losses(network: Network, of: Batch, prediction: str = "v") -> Tensor:
    found: Tensor = Loss(config(prediction), SCHEDULE)(network, of, dtype=torch.float32)
    return found


# What is learned


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_of_the_exact_function_of_a_single_image_is_zero(prediction: str) -> None:
    image = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)

    def exact(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        x_start = image.expand_as(x_t)
        if prediction != "epsilon":
            return target(SCHEDULE, prediction, x_start=x_start, x_t=x_t, t=t)
        signal = gather(SCHEDULE.sqrt_alphas_cumprod, t, x_t)
        return (x_t - signal * x_start) / gather(SCHEDULE.sqrt_one_minus_alphas_cumprod, t, x_t)

    def wrong(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return exact(x_t, t, label) + 0.1

    for gap in (1.0, 0.25):
        data = batch(gap, image.expand(6, 1, 4, 4))
        assert losses(exact, data, prediction).abs().max() < 1e-3
        assert losses(wrong, data, prediction).abs().max() > 1e-2


def test_the_best_answer_tends_to_the_flow_of_gaussian_data() -> None:
    """Data N(0, v): of all f(x_t) = k_t x_t, the squares are least for k_t = k_r Cov(x_r, x_t)/
    Var(x_t), and the flow has k_t = √(v/Var(x_t)): the error is of first order in the gap."""
    v = 0.25
    errors = []
    for gap in (1 / 4, 1 / 8, 1 / 16):
        # Steps of σ so fine that the indices do not matter.
        schedule = linear_schedule(20_000, 1e-4 / 20, 0.02 / 20)
        alpha_bar = np.append(schedule.alphas_cumprod, 1.0)
        rest = np.append(schedule.one_minus_alphas_cumprod, 0.0)
        slopes = np.ones(schedule.T + 1)  # the last is the image's, which −1 finds
        for t, r in enumerate(earlier(schedule, gap)):
            shared = math.sqrt(alpha_bar[t] * alpha_bar[r]) * v + math.sqrt(rest[t] * rest[r])
            slopes[t] = slopes[r] * shared / (alpha_bar[t] * v + rest[t])
        errors.append(slopes[-2] / math.sqrt(v / (alpha_bar[-2] * v + rest[-2])) - 1)
    assert abs(errors[2]) < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


def test_the_loss_is_the_weighted_pseudo_huber_distance_and_t_alone_learns() -> None:
    scale = torch.tensor(0.7, requires_grad=True)
    frozen = torch.tensor(0.7)
    data = batch(0.5)
    assert data.r is not None
    at_image = (data.r < 0).view(-1, 1, 1, 1)
    seen = []

    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        seen.append((x_t, t))
        return scale * x_t

    def x_start_hat(k: Tensor, t: Tensor) -> Tensor:
        x_t = q_sample(SCHEDULE, data.x_start, t, data.eps)  # the same ε at both
        return to_x_start(SCHEDULE, "v", x_t=x_t, t=t, out=k * x_t)

    found = losses(network, data)
    wanted = torch.where(at_image, data.x_start, x_start_hat(frozen, data.r.clamp(min=0)))
    square = (x_start_hat(scale, data.t) - wanted).square().flatten(1).mean(1)
    sigma = torch.from_numpy(np.append(np.sqrt(1 / SCHEDULE.alphas_cumprod - 1), 0.0)).float()
    gaps = 1 - sigma[data.r] / sigma[data.t]
    by_hand = sigma[data.t] ** -0.5 / gaps * ((square + 5.4e-4**2).sqrt() - 5.4e-4)
    torch.testing.assert_close(found, by_hand)
    mine, its = (torch.autograd.grad(v.sum(), scale)[0] for v in (found, by_hand))
    torch.testing.assert_close(mine, its)
    assert len(seen) == 2
    assert torch.equal(seen[1][1], data.t)


def test_both_passes_drop_the_same() -> None:
    drawn = []

    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        drawn.append(torch.nn.functional.dropout(torch.ones_like(x_t)))
        return x_t

    losses(network, batch(0.25))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], torch.nn.functional.dropout(torch.ones_like(drawn[1])))


def test_at_the_image_the_network_is_not_asked() -> None:
    calls = []

    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        calls.append(t)
        return x_t

    losses(network, batch(1.0))
    assert len(calls) == 1


# Stages


@pytest.mark.parametrize("schedule", [PAPER, cosine_schedule(1000), SCHEDULE])
@pytest.mark.parametrize("gap", [1.0, 0.5, 1 / 16, 1e-3])
def test_r_is_the_nearest_below_the_gap(schedule: Schedule, gap: float) -> None:
    sigma = sigmas(schedule)
    for t, r in enumerate(earlier(schedule, gap)):
        assert -1 <= r < t or r == t - 1
        if r < t - 1:
            assert sigma[r] <= (1 - gap) * sigma[t] * (1 + 1e-9) < sigma[r + 1] * (1 + 2e-9)
    weight = gap_weight(
        schedule, torch.arange(schedule.T), torch.from_numpy(earlier(schedule, gap)), power=1.0
    )
    differences = sigma[:-1] - sigma[earlier(schedule, gap)]
    np.testing.assert_allclose(weight.numpy(), 1 / differences, rtol=1e-9)


def test_a_stage_is_so_many_steps_and_the_last_goes_on() -> None:
    stages = Stages(ConsistencyConfig(gaps=(1, 0.5), stage_steps=3), SCHEDULE, batch_size=4)
    t, positions = torch.full((100,), 15), torch.arange(100)
    found = stages.earlier(t, positions)
    assert (found[:12] == -1).all()
    assert (found[12:] == earlier(SCHEDULE, 0.5)[15]).all()
    assert earlier(SCHEDULE, 0.5)[15] > -1


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("consistency.gaps=[]", "consistency.gaps"),
        ("consistency.gaps=[1.5]", "must be numbers above 0, and 1 at most"),
        ("consistency.stage_steps=0", "consistency.stage_steps"),
        ("variance=learned network.learned_variance=true", "must be one of vlb, hybrid"),
        ("schedule.kind=learned", "needs objective = 'vlb'"),
    ],
)
def test_what_cannot_be_is_refused(config_file: Path, key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, ["objective=consistency", *key.split()])


# In a run


@pytest.fixture
def first(config_file: Path, tmp_path: Path) -> Path:
    """A model to start from."""
    Trainer(load_config(config_file, ["steps=1"]), tmp_path / "first", progress=False).run()
    return tmp_path / "first"


TUNED = ("objective=consistency", "consistency.gaps=[1, 0.5]", "consistency.stage_steps=3")


def tune(
    config_file: Path, folder: Path, *overrides: str, init: Path | None = None
) -> dict[str, Tensor]:
    trainer = Trainer(
        load_config(config_file, [*TUNED, *overrides]), folder, init=init, progress=False
    )
    if init is None:
        trainer.resume()
    trainer.run()
    return state(folder)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resuming_within_a_stage_is_exact(
    config_file: Path, tmp_path: Path, dropout: float
) -> None:
    option = f"network.dropout={dropout}"
    Trainer(load_config(config_file, [option, "steps=1"]), tmp_path / "first", progress=False).run()
    whole = tune(config_file, tmp_path / "whole", option, init=tmp_path / "first")
    for cut in (2, 4):
        folder = tmp_path / f"cut-{cut}"
        part = tune(config_file, folder, option, f"steps={cut}", init=tmp_path / "first")
        assert not same(whole, part)
        assert same(whole, tune(config_file, folder, option))


def test_the_stages_are_those_of_steps_however_they_are_cut(
    config_file: Path, tmp_path: Path, first: Path
) -> None:
    whole = tune(config_file, tmp_path / "whole", init=first)
    parts = tune(config_file, tmp_path / "parts", "accumulate=2", init=first)
    for name in whole:
        if name.startswith("weights."):
            assert torch.allclose(whole[name], parts[name], atol=2e-3)


def test_the_checkpoint_says_how_it_is_sampled(
    config_file: Path, tmp_path: Path, first: Path
) -> None:
    folder = tmp_path / "fast"
    tune(config_file, folder, "sample_every=6", "sampling.clip=false", init=first)
    assert (folder / "samples" / "step-0000006.png").is_file()
    model, evaluations = diffusion.load(folder), []
    diffusion.sample(
        model, 1, class_label=0, dtype=torch.float32,
        on_step=lambda *args: evaluations.append(args[-1].t),
    )  # fmt: skip
    assert evaluations == [19, 9]
    sampling = json.loads((folder / "config.json").read_text())["sampling"]
    assert (sampling["sampler"], sampling["clip"]) == ("consistency", False)
    steps = ["objective=consistency", "sampling.steps=3"]
    assert load_config(config_file, steps).sampling.steps == 3


def test_without_weights_to_start_from_it_is_refused(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [str(config_file), *TUNED, "--out", str(folder), "--quiet"]
    refused = CliRunner().invoke(train, words)
    assert refused.exit_code == 1
    assert "objective = 'consistency': needs --init" in refused.output
    assert not folder.exists()
    with pytest.raises(StateError, match="holds no state"):
        tune(config_file, folder)
