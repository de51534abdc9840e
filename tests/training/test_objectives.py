"""Every objective: its value against the library, its gradients, its place in a training run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffusion
from diffusion.bound import bound_table
from diffusion.forward import q_sample
from diffusion.likelihood import evaluate_output
from diffusion.parameterization import PREDICTIONS, target, to_x_start
from diffusion.schedule import Schedule, linear_schedule
from diffusion.weights import eps_weight
from tests.diffusion.networks import TINY, build_model
from training.config import ConfigError, load_config
from training.objectives import OBJECTIVES, Objective, Pass, balanced, hybrid, min_snr, simple, vlb
from training.state import load_state
from training.timesteps import ImportanceTimesteps, UniformTimesteps
from training.trainer import Trainer

SCHEDULE = linear_schedule(20, 1e-3, 0.4)
N = 6
DIMS = 16


def draws(seed: int, channels: int = 1) -> torch.Tensor:
    return torch.randn(N, channels, 4, 4, generator=torch.Generator().manual_seed(seed))


def make_pass(
    prediction: str = "epsilon", variance: str = "large", error: float = 0.3, **more: Any
) -> Pass:
    """A batch with an output that is nearly right; v in the second half if Σ is learned."""
    levels = torch.randint(0, 256, (N, 1, 4, 4), generator=torch.Generator().manual_seed(9))
    x_start, eps, t = levels / 127.5 - 1, draws(1), torch.tensor([0, 1, 5, 10, 18, 19])
    x_t = q_sample(SCHEDULE, x_start, t, eps)
    right = (
        eps
        if prediction == "epsilon"
        else target(SCHEDULE, prediction, x_start=x_start, x_t=x_t, t=t)
    )
    out = right + error * draws(2)
    if variance == "learned":
        out = torch.cat([out, 0.3 * draws(3)], dim=1)
    return Pass(
        schedule=SCHEDULE,
        table=bound_table(SCHEDULE),
        prediction=prediction,
        variance=variance,
        x_start=x_start,
        x_t=x_t,
        t=t,
        eps=eps,
        out=out.requires_grad_(),
        **more,
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_simple_is_the_mean_square_of_the_target(prediction: str) -> None:
    found = make_pass(prediction)
    wanted = (0.3 * draws(2)).square().flatten(1).mean(1)
    torch.testing.assert_close(simple(found), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["large", "small", "learned"])
def test_vlb_is_the_term_that_evaluation_reports(prediction: str, variance: str) -> None:
    found = make_pass(prediction, variance)
    network = dataclasses.replace(
        TINY, image_size=4, learned_variance=variance == "learned", num_classes=0, null_class=False
    )
    model = build_model(network, prediction=prediction, schedule=SCHEDULE_CONFIG)
    evaluation = evaluate_output(
        model,
        found.table,
        row=found.t,
        x_start=found.x_start,
        x_t=found.x_t,
        out=found.out,
        variance=variance,
        clip=False,
    )
    bits = evaluation.nats / (DIMS * math.log(2))
    torch.testing.assert_close(vlb(found).double(), bits, rtol=1e-4, atol=1e-6)


SCHEDULE_CONFIG = diffusion.ScheduleConfig.from_betas(SCHEDULE.betas)


def test_vlb_of_epsilon_is_the_weighted_square() -> None:
    found = make_pass(variance="small")
    weight = torch.from_numpy(eps_weight(SCHEDULE, "small"))[found.t]
    wanted = weight * (0.3 * draws(2)).square().flatten(1).sum(1) / (DIMS * math.log(2))
    torch.testing.assert_close(vlb(found)[1:].double(), wanted[1:], rtol=1e-4, atol=1e-7)


def test_predictions_of_one_network_have_one_bound() -> None:
    """The same x̂_0 told as ε, x_0, v or μ̃ costs the same bits."""
    base = make_pass("epsilon")
    x_start_hat = to_x_start(SCHEDULE, "epsilon", x_t=base.x_t, t=base.t, out=base.out)
    for prediction in PREDICTIONS:
        out = target(SCHEDULE, prediction, x_start=x_start_hat, x_t=base.x_t, t=base.t)
        other = dataclasses.replace(base, prediction=prediction, out=out)
        torch.testing.assert_close(vlb(other), vlb(base), rtol=1e-3, atol=1e-5)


def test_hybrid_trains_the_mean_by_l_simple_alone() -> None:
    found = make_pass(variance="learned", hybrid_weight=0.5)
    hybrid(found).sum().backward()
    both = found.out.grad
    alone = make_pass(variance="learned")
    simple(alone).sum().backward()
    assert both is not None and alone.out.grad is not None
    torch.testing.assert_close(both[:, :1], alone.out.grad[:, :1])
    assert torch.all(alone.out.grad[:, 1:] == 0) and both[:, 1:].abs().max() > 1e-4
    bound = make_pass(variance="learned")
    vlb(bound).sum().backward()
    assert bound.out.grad is not None
    torch.testing.assert_close(both[:, 1:], 0.5 * SCHEDULE.T * bound.out.grad[:, 1:])
    value = simple(found) + 0.5 * SCHEDULE.T * vlb(found)
    torch.testing.assert_close(hybrid(found), value)


SNR = SCHEDULE.snr
WEIGHTS = [(min_snr, np.minimum(SNR, 2.0)), (balanced, np.where(SNR > 1, SNR, SNR**0.5))]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("objective", "weight"), WEIGHTS, ids=["min_snr", "balanced"])
def test_an_objective_weighs_the_error_of_x_start(
    objective: Objective, weight: np.ndarray, prediction: str
) -> None:
    found = make_pass(prediction, gamma=2.0)
    x_start_hat = to_x_start(SCHEDULE, prediction, x_t=found.x_t, t=found.t, out=found.out)
    wanted = torch.from_numpy(weight)[found.t]
    wanted = wanted * (found.x_start - x_start_hat).square().flatten(1).mean(1)
    torch.testing.assert_close(objective(found).double(), wanted, rtol=1e-3, atol=1e-5)


def test_balanced_is_l_simple_where_signal_prevails() -> None:
    found = make_pass()
    signal = torch.from_numpy(SNR > 1)[found.t]
    assert signal.any() and not signal.all()
    torch.testing.assert_close(balanced(found)[signal], simple(found)[signal])
    assert torch.all(balanced(found)[~signal] > simple(found)[~signal])


def test_importance_draws_follow_the_losses_and_keep_the_mean() -> None:
    T, n = 8, 40_000
    steps = ImportanceTimesteps(T, torch.device("cpu"))
    words = torch.randint(0, 2**32, (n,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(steps.draw(words), UniformTimesteps(T).draw(words))
    losses = torch.arange(1.0, T + 1) ** 2
    for _ in range(10):
        steps.record(torch.arange(T), losses)
    p = steps.probabilities()
    torch.testing.assert_close(p, 0.999 * losses.double() / losses.sum() + 0.001 / T)
    t = steps.draw(words)
    share = torch.bincount(t, minlength=T) / n
    assert torch.all((share - p).abs() < 4.5 * (p / n).sqrt())
    weighted = steps.weight(t) * losses[t]
    standard_error = float(weighted.std()) / math.sqrt(n)
    assert abs(float(weighted.mean() - losses.mean())) < 4.5 * standard_error + 1e-6
    # What it is for: the weighted losses hardly vary.
    assert float(weighted.std()) < 0.05 * float(losses.std())
    again = ImportanceTimesteps(T, torch.device("cpu"))
    again.load(steps.state())
    assert torch.equal(again.draw(words), t)


def test_importance_forgets_old_losses() -> None:
    steps = ImportanceTimesteps(2, torch.device("cpu"))
    for _ in range(10):
        steps.record(torch.tensor([0, 1, 1]), torch.tensor([3.0, 1.0, 2.0]))
    torch.testing.assert_close(steps.square, torch.tensor([9.0, 2.5], dtype=torch.float64))
    for _ in range(60):
        steps.record(torch.tensor([0, 1]), torch.tensor([0.1, 1.0]))
    assert float(steps.square[0]) == pytest.approx(0.01, rel=2)


CASES = {
    "vlb": ("objective=vlb",),
    "vlb-importance": ("objective=vlb", "timesteps=importance"),
    "vlb-learned": ("objective=vlb", "variance=learned", "network.learned_variance=true"),
    "hybrid": ("objective=hybrid", "variance=learned", "network.learned_variance=true"),
    "mean": ("objective=vlb", "variance=small", "prediction=mean"),
    "min_snr": ("objective=min_snr",),
    "balanced": ("objective=balanced",),
    "learned": ("objective=vlb", "schedule.kind=learned"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_objective_trains_saves_and_resumes(
    case: str, config_file: Path, tmp_path: Path
) -> None:
    config = load_config(config_file, CASES[case])
    whole = Trainer(config, tmp_path / "whole", progress=False)
    whole.run()
    half = Trainer(config.model_copy(update={"steps": 4}), tmp_path / "half", progress=False)
    half.run()
    resumed = Trainer(config, tmp_path / "half", progress=False)
    assert resumed.resume() == 4
    resumed.run()
    models = [diffusion.load(tmp_path / name) for name in ("whole", "half")]
    assert models[0].digest == models[1].digest
    x = torch.zeros(2, 1, 8, 8)
    assert torch.isfinite(models[0].output(x, torch.tensor([0, 19]))).all()


def test_a_learned_schedule_is_kept_as_betas_and_moves(config_file: Path, tmp_path: Path) -> None:
    options = ("objective=vlb", "schedule.kind=learned", "steps=30", "optimizer.learning_rate=2e-2")
    trainer = Trainer(load_config(config_file, options), tmp_path / "run", progress=False)
    trainer.run()
    raw = json.loads((tmp_path / "run" / "config.json").read_text())
    assert raw["schedule"]["kind"] == "betas"
    betas = np.array(raw["schedule"]["betas"])
    Schedule(betas)
    start = linear_schedule(20).betas
    assert np.abs(betas / start - 1).max() > 0.05
    model = diffusion.load(tmp_path / "run")
    np.testing.assert_allclose(model.schedule.betas, betas)


def test_the_trained_schedule_lowers_the_bound(config_file: Path, tmp_path: Path) -> None:
    """With the network held still, γ alone must descend on L."""
    options = ("objective=vlb", "schedule.kind=learned", "batch_size=64")
    trainer = Trainer(load_config(config_file, options), tmp_path / "run")
    process = trainer.objective.process
    assert process is not None
    optimizer = torch.optim.Adam(process.parameters(), lr=0.05)
    trainer.network.requires_grad_(False)
    process.requires_grad_(True)
    batch = trainer.batches.at(0, 64)
    found = []
    for _ in range(25):
        loss = trainer.objective(trainer.network, batch, dtype=torch.float32).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.8 * found[0]


def test_importance_is_part_of_the_state(config_file: Path, tmp_path: Path) -> None:
    trainer = Trainer(
        load_config(config_file, CASES["vlb-importance"]), tmp_path / "run", progress=False
    )
    trainer.run()
    assert isinstance(trainer.timesteps, ImportanceTimesteps)
    assert float(trainer.timesteps.count.sum()) == 6 * 4
    fresh = ImportanceTimesteps(20, torch.device("cpu"))
    load_state(
        tmp_path / "run",
        network=trainer.network,
        ema=trainer.ema,
        optimizer=trainer.optimizer,
        timesteps=fresh,
    )
    assert torch.equal(fresh.square, trainer.timesteps.square)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("objective=best",), "objective = 'best'"),
        (("variance=learned",), "network.learned_variance must be true"),
        (("network.learned_variance=true",), "network.learned_variance must be false"),
        (("objective=hybrid",), "objective = 'hybrid'"),
        (("variance=learned", "network.learned_variance=true"), "objective = 'simple'"),
        (("schedule.kind=learned",), "schedule.kind = 'learned'"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(
    config_file: Path, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, options)


def test_the_registry_is_what_the_config_allows(config_file: Path) -> None:
    for name in OBJECTIVES:
        options = [f"objective={name}"]
        if name == "hybrid":
            options += ["variance=learned", "network.learned_variance=true"]
        assert load_config(config_file, options).objective == name


def test_training_in_bfloat16_sees_x_t_unrounded() -> None:
    """Under autocast the first layer stays in float32, as it does where the network is evaluated;
    the others do not."""
    network = build_model().network.requires_grad_(True)
    seen: dict[str, torch.dtype] = {}
    for name, layer in (("first", network.conv_in), ("second", network.down[0].res[0].conv1)):
        layer.register_forward_hook(lambda _, given, out, name=name: seen.update({name: out.dtype}))
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(x_t, t, torch.tensor([0, 1])).float().square().mean().backward()
    assert seen == {"first": torch.float32, "second": torch.bfloat16}
    assert network.conv_in.weight.grad is not None
