"""Learned tables: the student begins as the table it comes from, gets better, and goes on."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import diffusion
from diffusion import ScheduleConfig, cores
from diffusion.samplers import build_table
from diffusion.speed import prepare
from diffusion.table import SamplerError
from diffusion.tuned import TUNED_NAME
from tests.diffusion.networks import TINY, build_model
from training.options import numbers_of
from training.partial import PartialError
from training.tune import Options, Pairs, Student, Tuner, run
from training.tune_command import tune as command
from training.tune_run import TuneOptions, tune

LEARNING = Options(iterations=32, batch=8, rate=0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 100 steps whose ε̂ depends on x_t a little."""
    model = build_model(schedule=ScheduleConfig(T=100, beta_start=1e-3, beta_end=0.2))
    made = tmp_path_factory.mktemp("models") / "tiny"
    diffusion.save(model, made)
    return made


def options(folder: Path, out: Path) -> TuneOptions:
    return TuneOptions(
        folder, out, (3,), pairs=16, held=8, teacher_steps=20, quiet=True, learning=LEARNING
    )


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "dpmpp_3m", "unipc"])
def test_a_student_begins_as_its_table(folder: Path, sampler: str) -> None:
    model = diffusion.load(folder)
    table = build_table(model.schedule, sampler=sampler, steps=5, spacing="lambda")
    student = Student(model.schedule, table)
    again = student.tuned().table(model.schedule.T)
    np.testing.assert_allclose(again.coefficients, table.coefficients, atol=1e-9)
    np.testing.assert_allclose(again.time, table.time, atol=0.05)  # the last is not quite at 0
    x = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        found = student(model, x, labels)
    torch.testing.assert_close(found, run(model, again, x, labels), rtol=0, atol=1e-4)


def test_what_is_tuned_is_nearer_and_is_a_sampler_of_the_model(
    folder: Path, tmp_path: Path
) -> None:
    before = diffusion.load(folder).digest
    said: list[str] = []
    tune(options(folder, tmp_path), said.append)
    assert said[0].startswith("3 evaluations: RMSE to the teacher 0.")
    model = diffusion.load(folder)
    assert [*model.tuned] == [3] and model.digest == before
    table = model.table(sampler="tuned", steps=3)
    assert len(table) == 3 and table.t[0] == 99 and not table.coefficients[-1, 2]
    images = diffusion.sample(model, 2, sampler="tuned", class_label=1, dtype=torch.float32)
    again = diffusion.sample(model, 2, sampler="tuned", steps=3, class_label=1, dtype=torch.float32)
    assert torch.equal(images, again)
    with pytest.raises(SamplerError, match="steps = 4: this model's tuned tables are of 3"):
        diffusion.sample(model, 1, sampler="tuned", steps=4)
    with pytest.raises(SamplerError, match="neither Langevin steps nor travel"):
        diffusion.sample(model, 1, sampler="tuned", steps=3, corrector_steps=1)
    assert prepare(model).table(sampler="tuned", steps=3) is table  # a copy has them too
    # Of other weights they are none.
    other = build_model(replace(TINY, channels=(8, 8)), schedule=model.config.schedule)
    diffusion.save(other, tmp_path / "other")
    (tmp_path / "other" / TUNED_NAME).write_bytes((folder / TUNED_NAME).read_bytes())
    assert not diffusion.load(tmp_path / "other").tuned
    with pytest.raises(SamplerError, match="this model has no tuned tables"):
        diffusion.sample(other, 1, sampler="tuned")


def test_what_was_learned_otherwise_is_not_taken_for_this(folder: Path, tmp_path: Path) -> None:
    short = replace(options(folder, tmp_path), learning=Options(iterations=2, batch=8))
    tune(short, lambda _: None)
    for changed, message in (
        ({"learning": Options(iterations=2, batch=8, radius=0.9)}, "radius = 0.05, not 0.9"),
        ({"learning": Options(iterations=4, batch=8)}, "iterations = 2, not 4"),
        ({"pairs": 8, "held": 16}, "pairs = 16, not 8"),
    ):
        with pytest.raises(PartialError, match=message):
            tune(replace(short, **changed), lambda _: None)  # type: ignore[arg-type]
    kept = tmp_path / "3.pt"
    kept.write_bytes(kept.read_bytes()[:1000])
    with pytest.raises(PartialError, match=r"3\.pt: cannot be read: .*; remove it"):
        tune(short, lambda _: None)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_table(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[str] = []
    tune(options(folder, tmp_path / "whole"), whole.append)
    wanted = diffusion.load(folder).tuned[3]
    judged = Tuner.judge
    calls = []

    def interrupted(tuner: Tuner) -> float:
        calls.append(tuner.iteration)
        if tuner.iteration == 32:
            raise KeyboardInterrupt
        return judged(tuner)

    monkeypatch.setattr(Tuner, "judge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(options(folder, tmp_path / "part"), whole.append)
    monkeypatch.undo()
    tune(options(folder, tmp_path / "part"), whole.append)
    assert whole[0] == whole[1] and calls == [0, 16, 32]
    found = diffusion.load(folder).tuned[3]
    np.testing.assert_array_equal(found.coefficients, wanted.coefficients)
    with pytest.raises(ValueError, match="holds results of another evaluation"):
        tune(replace(options(folder, tmp_path / "part"), teacher_steps=10), whole.append)


def test_rows_dealt_to_cores_lose_no_gradient_of_the_times(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = diffusion.load(folder)
    model.network.time1.weight.mul_(10)  # so that it hears the time
    table = build_table(model.schedule, sampler="dpmpp_2m", steps=3, spacing="lambda")
    x = torch.randn(8, *model.shape, generator=torch.Generator().manual_seed(0))

    def slope() -> torch.Tensor:
        student = Student(model.schedule, table)
        image = student(model, x.clone().requires_grad_(), torch.zeros(8, dtype=torch.long))
        image.square().mean().backward()
        assert student.shares.grad is not None
        return student.shares.grad

    found = slope()
    monkeypatch.setattr(cores, "evaluate", lambda network, *given, large: network(*given))
    wanted = slope()
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-9)


def test_what_a_student_learns_does_not_depend_on_the_cores(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = diffusion.load(folder)
    table = build_table(model.schedule, sampler="dpmpp_2m", steps=3, spacing="lambda")
    generator = torch.Generator().manual_seed(0)
    x_T, images = (torch.randn(8, *model.shape, generator=generator) for _ in range(2))
    pairs = Pairs(x_T, images.clamp(-1, 1), torch.arange(8) % 3)
    found, threads = [], set()
    asked = model.network.forward

    def forward(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        threads.add(threading.get_ident())
        return asked(x, t, labels)

    monkeypatch.setattr(model.network, "forward", forward)
    for count in (1, 2, 3):
        monkeypatch.setattr(cores, "_cores", count)
        threads.clear()
        tuner = Tuner(model, table, pairs, pairs, replace(LEARNING, batch=6))
        losses = [tuner.step() for _ in range(2)]
        assert len(threads) == count
        found.append([torch.tensor(losses), tuner.moved, *tuner.student.parameters()])
    assert all(bool(value.abs().max() > 0) for value in found[0][:2])
    for one, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)


def test_numbers_of_evaluations() -> None:
    assert numbers_of("--evaluations", "6, 4,6") == (6, 4)
    with pytest.raises(ValueError, match="--evaluations 'x'"):
        numbers_of("--evaluations", "4,x")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--rate", "0"),
        ("--rate", "nan"),
        ("--rate", "inf"),
        ("--radius", "-1"),
        ("--radius", "nan"),
    ],
)
def test_what_is_no_rate_and_no_radius(option: str, value: str) -> None:
    result = CliRunner().invoke(command, ["models/mnist", option, value])
    assert result.exit_code == 2 and f"'{option}'" in result.output and value in result.output
