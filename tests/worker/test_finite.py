"""What leaves the finite numbers fails; what only starts without a signal does not."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffusion
from diffusion import Model, ScheduleConfig
from diffusion.sampling import NotFiniteError
from tests.worker.test_engine import SAMPLERS, Harness, task
from tests.worker.test_likelihood import Harness as TermHarness
from tests.worker.test_likelihood import term_task
from worker.engine.tasks import Failed, Finished, NotFinite
from worker.models import ModelFolder

MakeModel = Callable[..., Model]
STEPS: dict[str, Any] = {"steps": 6}


def overflowing(make_model: MakeModel) -> Model:
    """Every weight is finite, the output is infinite in places: x̂_0 would be clipped to ±1."""
    model = make_model(seed=3)
    model.network.conv_out.weight.fill_(0.0)
    model.network.conv_out.weight[:, 0, 1, 1] = 3e38  # of one channel: no ∞ − ∞
    model.network.conv_out.bias.fill_(3e38)
    return model


@pytest.mark.parametrize("options", SAMPLERS, ids=str)
def test_an_output_that_is_not_finite_fails_its_chain(
    make_model: MakeModel, options: dict[str, Any]
) -> None:
    bad = overflowing(make_model)
    harness = Harness()
    harness.run(task(bad, "bad", n=2, **STEPS, **options), task(make_model(), "good", **STEPS))
    (failed,) = harness.of(Failed, "bad")
    assert isinstance(failed.error, NotFinite)
    assert str(failed.error) == "image 0: not finite after the step at t = 50"
    assert not harness.images("bad")
    assert harness.of(Finished, "good")
    with pytest.raises(NotFiniteError, match="t = 50: the network's output is not finite"):
        diffusion.sample(bad, 2, dtype=torch.float32, **STEPS, **options)


def test_an_infinite_v_fails_as_well(make_model: MakeModel) -> None:
    """exp(−∞) = 0 would make it a chain without noise."""
    model = make_model(learned_variance=True)
    model.network.conv_out.weight[1:].fill_(0.0)
    model.network.conv_out.bias[1:].fill_(-3e38)
    model.network.conv_out.weight[1:, 0, 1, 1] = -3e38
    harness = Harness()
    harness.run(task(model, "a", variance="learned", **STEPS))
    assert isinstance(harness.of(Failed, "a")[0].error, NotFinite)


def test_a_term_that_is_not_finite_fails_its_likelihood(make_model: MakeModel) -> None:
    harness = TermHarness()
    harness.run(term_task(overflowing(make_model), "bad"), term_task(make_model(), "good"))
    assert harness.ended("bad") is Failed
    assert harness.ended("good") is Finished


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_served(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    model = make_model()
    diffusion.save(model, tmp_path / "good")
    model.network.mid1.conv1.weight[0, 0, 0, 0] = value
    diffusion.save(model, tmp_path / "bad")
    folder = ModelFolder(tmp_path, queue="q")
    with caplog.at_level(logging.ERROR):
        folder.rescan()
    assert set(folder.served) == {"good"}
    assert "model bad cannot be served: " in caplog.text
    assert (
        "bad/model.safetensors: weights: mid1.conv1.weight: 1 of its 576 numbers are NaN or "
        "infinite: the training that wrote them had diverged" in caplog.text
    )


# Schedules that end without a signal


def no_signal(make_model: MakeModel, prediction: str, **options: Any) -> Model:
    """β_T = 1, so ᾱ_T = 0."""
    model = make_model(prediction=prediction, **options)
    schedule = ScheduleConfig.from_betas(np.append(np.linspace(0.001, 0.3, 49), 1.0))
    return Model(replace(model.config, schedule=schedule), model.network, f"{prediction:0<64}")


@pytest.mark.parametrize("prediction", ["v", "sample", "mean"])
def test_every_sampler_starts_where_there_is_no_signal(
    make_model: MakeModel, prediction: str
) -> None:
    model = no_signal(make_model, prediction)
    harness = Harness()
    for i, options in enumerate(SAMPLERS):
        harness.run(task(model, f"t{i}", n=2, label=1, guidance=2.0, seed=4, **STEPS, **options))
        assert not harness.of(Failed, f"t{i}"), harness.of(Failed, f"t{i}")
        expected = diffusion.sample(
            model, 2, class_label=1, guidance=2.0, seed=4, dtype=torch.float32, **STEPS, **options
        )
        for index, image in harness.images(f"t{i}").items():
            torch.testing.assert_close(image.clamp(-1, 1), expected[index], atol=1e-4, rtol=0)
    learned = no_signal(make_model, prediction, learned_variance=True)
    harness.run(task(learned, "learned", variance="learned", **STEPS))
    assert harness.of(Finished, "learned")


def test_a_likelihood_holds_where_there_is_no_signal(make_model: MakeModel) -> None:
    model = no_signal(make_model, "v")
    harness = TermHarness()
    work = term_task(model, "a")
    harness.run(work)
    assert harness.ended("a") is Finished
    assert np.isfinite(harness.nats(work)).all()


def test_an_eps_network_is_refused_when_it_is_loaded(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    diffusion.save(no_signal(make_model, "v"), tmp_path / "bad")
    path = tmp_path / "bad" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction": "epsilon"}))
    ModelFolder(tmp_path, queue="q").rescan()
    assert "model bad cannot be served: " in caplog.text
    assert "prediction = 'epsilon': no x̂_0 follows from ε where x_T holds no signal" in caplog.text
