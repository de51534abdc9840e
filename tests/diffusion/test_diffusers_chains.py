"""Whole chains: the same images as diffusers draws, on the way in and on the way out.

The network is a function here, so that long chains are quick. Their ᾱ is replaced by the float64
one (theirs has three digits of 1 − ᾱ left near t = 0), and compared as it is where said.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import diffusion
from diffusion import CheckpointError, Model, ModelConfig, UNet, UNetConfig
from diffusion.diffusers.folder import export_diffusers
from diffusion.diffusers.scheduler import read_scheduler, write_scheduler
from diffusion.samplers import SAMPLERS, SamplingDefaults, build_table
from diffusion.spacings import SPACINGS, spaced_timesteps
from diffusion.table import clip_x_start, update
from tests.diffusion.networks import build_model

SHAPE = (2, 1, 4, 4)
NETWORK = UNetConfig(8, 1, channels=(8, 16), attention=(False, True), groups=4)
# All sorts: divisors of T or not, rounding ties, and those whose trailing overshoots by a row.
STEPS = (7, 10, 13, 48, 61, 96, 103, 122, 250, 999)
FEW = (7, 61)
either = pytest.mark.parametrize(
    "numbers", [FEW, pytest.param(STEPS, marks=pytest.mark.slow)], ids=["few", "all"]
)


def draw(key: int) -> Tensor:
    """The noise of a timestep, in both programs."""
    generator = torch.Generator().manual_seed(key)
    return torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def network(x: Tensor, t: int) -> Tensor:
    """An output that depends on all of x and on t, and leads some x̂_0 beyond [−1, 1]."""
    return 0.9 * torch.tanh(x + 0.3 * x.roll(1, -1)) + 0.2 * torch.sin(x * 5 + t / 100)


def model_of(config: ModelConfig) -> Model:
    """A model whose network is not used."""
    return Model(config, UNet(NETWORK))


def our_chain(model: Model, steps: int, eta: float = 0.0) -> Tensor:
    way = model.config.sampling.options(model.schedule.T, steps=steps)
    table = build_table(model.schedule, eta=eta, **way)
    coefficients = torch.from_numpy(table.coefficients)
    x = draw(-1)
    for row, t in enumerate(table.t.tolist()):
        rows = coefficients[row].expand(len(x), -1)
        found = model.read(network(x, t), x, torch.full((len(x),), t))
        x_start = clip_x_start(rows, found.x_start)
        zero = torch.zeros_like(x)
        x = update(rows, x, x_start=x_start, eps=found.eps, x_start_prev=zero, z=draw(t))
    return x


def their_chain(scheduler: Any, steps: int, exact: Model | None = None, **options: Any) -> Tensor:
    """exact: take ᾱ of this model in place of their own."""
    if exact is not None:
        scheduler.alphas_cumprod = torch.tensor(exact.schedule.alphas_cumprod)
    scheduler.set_timesteps(steps)
    ts = [t for t in scheduler.timesteps.tolist() if t >= 0]
    assert len(ts) == steps
    x = draw(-1)
    for t in ts:
        generator = torch.Generator().manual_seed(t)
        x = scheduler.step(network(x, t), t, x, generator=generator, **options).prev_sample
    return x


def imports() -> Iterator[tuple[str, dict[str, Any]]]:
    """Scheduler configs of diffusers that we take."""
    clips, spacings = (True, False), ("leading", "linspace", "trailing")
    for clip, spacing in itertools.product(clips, spacings):
        said = {"clip_sample": clip, "timestep_spacing": spacing}
        yield "DDIMScheduler", said
        for variance in ("fixed_small", "fixed_small_log", "fixed_large"):
            if spacing != "trailing" or variance != "fixed_large":
                yield "DDPMScheduler", {**said, "variance_type": variance}


@either
@pytest.mark.parametrize(("name", "fields"), list(imports()), ids=str)
def test_what_is_imported_draws_their_images(
    diffusers: ModuleType, name: str, fields: dict[str, Any], numbers: tuple[int, ...]
) -> None:
    scheduler = getattr(diffusers, name)(**fields)
    process = read_scheduler({"_class_name": name, **scheduler.config}, "here")
    model = model_of(
        ModelConfig(NETWORK, process.schedule, process.prediction, sampling=process.sampling)
    )
    for steps in numbers:
        found, wanted = our_chain(model, steps), their_chain(scheduler, steps, model)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)
    if name == "DDIMScheduler":
        found = our_chain(model, numbers[1], eta=0.4)
        torch.testing.assert_close(found, their_chain(scheduler, numbers[1], model, eta=0.4))


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_their_float32_tables_change_little(diffusers: ModuleType, name: str) -> None:
    scheduler = getattr(diffusers, name)(timestep_spacing="linspace")
    process = read_scheduler({"_class_name": name, **scheduler.config}, "here")
    model = model_of(ModelConfig(NETWORK, process.schedule, sampling=process.sampling))
    found, wanted = our_chain(model, 50), their_chain(scheduler, 50)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


def all_defaults() -> Iterator[SamplingDefaults]:
    for spacing, clip in itertools.product(SPACINGS, (True, False)):
        for variance in ("small", "large"):
            yield SamplingDefaults("ddpm", variance, clip, spacing)
        for rederive, landing in itertools.product((True, False), ("next", "stride")):
            yield SamplingDefaults("ddim", "large", clip, spacing, rederive, landing)
        for sampler in sorted(SAMPLERS.keys() - {"ddpm", "ddim"}):
            yield SamplingDefaults(sampler, "large", clip, spacing)


def refused_field(sampling: SamplingDefaults) -> str | None:
    """The field that diffusers lacks, if any."""
    if sampling.sampler not in ("ddpm", "ddim"):
        return "sampler"
    if sampling.spacing not in ("uniform", "leading", "trailing"):
        return "spacing"
    if sampling.sampler == "ddpm":
        both = sampling.spacing == "trailing" and sampling.variance == "large"
        return "spacing" if both else None
    if sampling.clip and sampling.rederive_eps:
        return "rederive_eps"
    if sampling.landing == "next" and sampling.spacing != "leading":
        return "landing"
    return None


@either
@pytest.mark.parametrize("sampling", list(all_defaults()), ids=str)
def test_what_is_exported_draws_our_images_or_is_refused_by_field(
    diffusers: ModuleType, sampling: SamplingDefaults, numbers: tuple[int, ...]
) -> None:
    model = model_of(ModelConfig(NETWORK, sampling=sampling))
    field = refused_field(sampling)
    if field is not None:
        message = re.escape(f"sampling: {field} = {getattr(sampling, field)!r}: diffusers would")
        with pytest.raises(CheckpointError, match=message):
            write_scheduler(model.config)
        return
    raw = write_scheduler(model.config)
    scheduler = getattr(diffusers, raw["_class_name"]).from_config(raw)
    for steps in numbers:
        found, wanted = our_chain(model, steps), their_chain(scheduler, steps, model)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("T", [1000, 100, 999])
def test_timesteps_are_theirs_at_every_number_of_steps(diffusers: ModuleType, T: int) -> None:
    for theirs, ours in (("linspace", "uniform"), ("leading", "leading"), ("trailing", "trailing")):
        scheduler = diffusers.DDIMScheduler(num_train_timesteps=T, timestep_spacing=theirs)
        for steps in range(2, T + 1):
            scheduler.set_timesteps(steps)
            wanted = [t for t in scheduler.timesteps.tolist() if t >= 0]
            assert spaced_timesteps(T, steps, ours) == wanted


# Schedules that leave no signal


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_zero_terminal_snr_draws_their_images(
    diffusers: ModuleType, name: str, spacing: str, prediction: str
) -> None:
    scheduler = getattr(diffusers, name)(
        rescale_betas_zero_snr=True, prediction_type=prediction, timestep_spacing=spacing
    )
    process = read_scheduler({"_class_name": name, **scheduler.config}, "here")
    schedule = process.schedule.build()
    assert schedule.betas[-1] == 1 and schedule.alphas_cumprod[-1] == 0
    torch.testing.assert_close(
        torch.tensor(schedule.alphas_cumprod), scheduler.alphas_cumprod.double(), rtol=0, atol=1e-6
    )
    config = ModelConfig(NETWORK, process.schedule, process.prediction, sampling=process.sampling)
    model = model_of(config)
    back = getattr(diffusers, name).from_config(write_scheduler(config))
    assert float(back.alphas_cumprod[-1]) == 0
    for steps in (7, 50):
        found = our_chain(model, steps)
        torch.testing.assert_close(found, their_chain(scheduler, steps), rtol=0, atol=2e-3)
        torch.testing.assert_close(found, their_chain(back, steps, model), rtol=0, atol=1e-8)


# Pipelines


@pytest.mark.parametrize(
    ("made", "other", "unread"),
    [
        ("DDIMScheduler", "DDPMScheduler", {"variance_type": "fixed_large"}),
        ("DDPMScheduler", "DDIMScheduler", {"set_alpha_to_one": False}),
    ],
)
def test_a_scheduler_made_of_the_other_class_is_read(
    diffusers: ModuleType, tmp_path: Path, made: str, other: str, unread: dict[str, Any]
) -> None:
    """diffusers saves with it what it leaves unread of the other's config."""
    first = getattr(diffusers, other)(timestep_spacing="leading", **unread)
    getattr(diffusers, made).from_config(first.config).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert raw["_class_name"] == made and raw.items() >= unread.items()
    plain = {"_class_name": made, **getattr(diffusers, made)(timestep_spacing="leading").config}
    assert read_scheduler(raw, "here") == read_scheduler(plain, "here")


@pytest.mark.parametrize(
    ("pipeline", "written", "index"),
    [
        ("DDPMPipeline", "DDPMScheduler", "DDPMScheduler"),
        ("DDIMPipeline", "DDIMScheduler", "DDIMScheduler"),
        ("DDIMPipeline", "DDPMScheduler", "DDPMScheduler"),  # it makes its own of it
        ("DDPMPipeline", "DDIMScheduler", "DDIMScheduler"),  # which it calls with η = 0
        ("DDPMPipeline", "DDPMScheduler", "DDIMScheduler"),  # the index chooses the class
        ("DDPMPipeline", "DDIMScheduler", "DDPMScheduler"),
    ],
)
@torch.inference_mode()
def test_the_pipeline_chooses_the_sampler(
    diffusers: ModuleType, tmp_path: Path, pipeline: str, written: str, index: str
) -> None:
    export_diffusers(build_model(NETWORK, sampling=SamplingDefaults(variance="small")), tmp_path)
    path = tmp_path / "model_index.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "_class_name": pipeline, "scheduler": ["diffusers", index]}))
    fields = {"num_train_timesteps": 100, "beta_end": 0.1, "timestep_spacing": "leading"}
    getattr(diffusers, written)(**fields).save_pretrained(tmp_path / "scheduler")

    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(theirs).__name__ == pipeline
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    wanted = theirs(2, generator, num_inference_steps=10, output_type="np").images

    model = diffusion.load(tmp_path)
    way = model.config.sampling.options(model.schedule.T, steps=10)
    table = build_table(model.schedule, **way)
    generator.manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    for row, t in enumerate(table.t.tolist()):
        found = model.estimate(x, torch.full((2,), t))
        rows = torch.from_numpy(table.coefficients[row]).float().expand(2, -1)
        x_start, zero = clip_x_start(rows, found.x_start), torch.zeros_like(x)
        noisy = table.coefficients[row, 4] > 0
        z = torch.randn(2, 1, 8, 8, generator=generator) if noisy else zero
        x = update(rows, x, x_start=x_start, eps=found.eps, x_start_prev=zero, z=z)
    images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(images, torch.from_numpy(wanted), rtol=0, atol=1e-4)
