from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import CheckpointError, Model, load, sample, save
from diffusion.about import About, read_about, write_about
from diffusion.noise import Purpose, image_normals
from diffusion.presets import Preset
from diffusion.samplers import SAMPLERS, FewStepsWarning, SamplingDefaults, build_table
from diffusion.sampling import Step, chain, guided_estimate
from diffusion.speed import prepare
from diffusion.table import SamplerError
from jobs.cards import SamplerTraits
from tests.diffusion.networks import TINY, build_model

FAST: dict[str, Any] = {"steps": 6, "dtype": torch.float32}


def close(first: Tensor, second: Tensor) -> bool:
    """Equal but for the rounding of convolutions that see another batch size."""
    return bool((first - second).abs().max() < 1e-3)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_an_image_depends_on_seed_and_index_only(model: Model, sampler: str) -> None:
    whole = sample(model, 5, sampler=sampler, seed=3, **FAST)
    assert whole.shape == (5, 1, 8, 8)
    assert whole.dtype == torch.float32
    assert whole.abs().max() <= 1
    assert close(sample(model, 5, sampler=sampler, seed=3, batch_size=2, **FAST), whole)
    assert close(sample(model, 2, sampler=sampler, seed=3, **FAST), whole[:2])
    assert not close(sample(model, 5, sampler=sampler, seed=4, **FAST), whole)
    assert not close(whole[:1], whole[1:2])


def test_a_preset_stands_for_sampler_steps_and_spacing(model: Model, tmp_path: Path) -> None:
    presets = {name: dataclasses.astuple(its) for name, its in model.presets.items()}
    T = model.schedule.T
    assert presets["fast"] == ("ddim", min(20, T), "uniform")
    assert presets["faithful"] == ("ddpm", T, "uniform")
    # A model says its own beside its weights, and is the same model.
    save(model, tmp_path)
    own = {"fast": Preset("unipc", 6, "trailing")}
    before = load(tmp_path).digest
    write_about(About(presets=own), tmp_path)
    found = load(tmp_path)
    assert found.presets["fast"] == own["fast"] and found.digest == before
    options: dict[str, Any] = {"seed": 1, "dtype": torch.float32}
    fast = sample(found, 2, preset="fast", **options)
    wanted = sample(found, 2, sampler="unipc", steps=6, spacing="trailing", **options)
    assert torch.equal(fast, wanted)
    # One that cannot be run, as after the weights have changed, is none.
    for sampler, steps in (("tuned", 4), ("consistency", 2)):
        write_about(About(presets={"fast": Preset(sampler, steps)}), tmp_path)
        assert load(tmp_path).presets == model.presets
    with pytest.raises(SamplerError, match="steps = 3: not beside a preset"):
        sample(found, 2, preset="fast", steps=3)
    with pytest.raises(SamplerError, match="preset = 'quick': must be one of fast, balanced"):
        sample(found, 2, preset="quick")


@pytest.mark.parametrize(
    ("presets", "message"),
    [
        ({"quick": {}}, "presets = 'quick': must be one of fast, balanced, faithful"),
        ({"fast": {"sampler": "euler", "steps": 3}}, "presets: fast: sampler = 'euler'"),
        ({"fast": {"sampler": "ddim"}}, "presets: fast: must be sampler, steps and spacing"),
        ({"fast": {"sampler": "ddim", "steps": 0}}, "presets: fast: steps = 0: must be an integer"),
        ([], r"presets = \[\]: must be an object"),
    ],
)
def test_presets_that_are_none_are_named(
    model: Model, tmp_path: Path, presets: object, message: str
) -> None:
    save(model, tmp_path)
    (tmp_path / "card.json").write_text(json.dumps({"presets": presets}))
    with pytest.raises(CheckpointError, match=message):
        read_about(tmp_path)
    assert load(tmp_path).presets == model.presets  # which is none the worse


def test_too_few_steps_are_warned_of(model: Model) -> None:
    with pytest.warns(FewStepsWarning, match="4 evaluations are few for langevin, which wants 200"):
        sample(model, 1, sampler="langevin", steps=4)
    traits = {
        name: SamplerTraits(least=its.least, corrector_only=its.corrector_only)
        for name, its in SAMPLERS.items()
    }
    for name, its in SAMPLERS.items():  # the service's rule is the same
        for length in (1, 7, 400, 1000):
            assert its.needs(length, 1000) == traits[name].needs(length, 1000)


def test_the_same_call_gives_the_same_bits(model: Model) -> None:
    first, second = (sample(model, 2, seed=2**53 - 1, **FAST) for _ in range(2))
    assert torch.equal(first, second)


def test_no_global_random_state_is_used(model: Model) -> None:
    state = torch.get_rng_state()
    sample(model, 2, **FAST)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_leaves_the_model_as_it_was(model: Model) -> None:
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    sample(model, 1, steps=2, dtype=torch.bfloat16)
    for name, weight in model.network.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name])


def test_the_dtype_is_probed_where_none_is_given(model: Model) -> None:
    images = sample(model, 1, steps=2)
    assert images.dtype == torch.float32


def test_labels_may_differ_by_image(model: Model) -> None:
    mixed = sample(model, 3, class_label=[2, 0, 1], **FAST)
    assert close(sample(model, 3, class_label=2, **FAST)[:1], mixed[:1])
    assert close(sample(model, 3, class_label=torch.tensor([0, 0, 1]), **FAST)[1:], mixed[1:])
    assert not close(sample(model, 3, class_label=0, **FAST)[:1], mixed[:1])


def test_guidance_extrapolates_from_no_label_to_the_label(model: Model) -> None:
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([10, 90]), torch.tensor([0, 2])
    eps_u, eps_c = model.eps(x, t), model.eps(x, t, labels)
    for guidance in (0.0, 1.0, 2.5):
        found = guided_estimate(model, x, t, class_label=labels, guidance=guidance).eps
        torch.testing.assert_close(found, eps_u + guidance * (eps_c - eps_u), rtol=1e-4, atol=1e-5)


def test_the_models_own_defaults_hold_where_nothing_is_said() -> None:
    asked: dict[str, Any] = {
        "sampler": "ddpm",
        "variance": "small",
        "clip": False,
        "spacing": "leading",
    }
    plain = build_model()
    model = Model(
        dataclasses.replace(plain.config, sampling=SamplingDefaults(**asked)),  # type: ignore[arg-type]
        plain.network,
    )
    assert torch.equal(sample(model, 2, **FAST), sample(plain, 2, **asked, **FAST))
    others: dict[str, Any] = {"variance": "large", "clip": True, "spacing": "uniform"}
    for name, value in others.items():
        said = sample(model, 2, **{name: value}, **FAST)
        assert torch.equal(said, sample(plain, 2, **{**asked, name: value}, **FAST))
        assert not close(said, sample(model, 2, **FAST))


def test_a_chain_yields_what_each_step_found(model: Model) -> None:
    table = build_table(model.schedule, sampler="dpmpp_2m", steps=5)
    x = image_normals(0, torch.arange(2), row=0, purpose=Purpose.X_T, shape=model.shape)
    steps = list(chain(model, table, x))
    assert [step.row for step in steps] == [0, 1, 2, 3, 4]
    assert [step.t for step in steps] == table.t.tolist()
    assert torch.equal(steps[0].x_t, x)
    for step, following in pairwise(steps):
        assert torch.equal(step.x_next, following.x_t)
    for step in steps:
        t = torch.tensor([step.t, step.t])
        assert torch.equal(step.eps, model.eps(step.x_t, t))
        bar = model.schedule.alphas_cumprod[step.t]
        x_start = ((step.x_t - (1 - bar) ** 0.5 * step.eps) / bar**0.5).clamp(-1, 1)
        torch.testing.assert_close(step.x_start, x_start, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(steps[-1].x_next, steps[-1].x_start)


def test_sample_is_the_chain_from_x_T_of_its_seed(model: Model) -> None:
    indices, seed = torch.tensor([3, 4]), 2**40
    x = image_normals(seed, indices, row=0, purpose=Purpose.X_T, shape=model.shape)
    table = build_table(model.schedule, steps=6)
    *_, last = chain(model, table, x, seed=seed, indices=indices)
    found = sample(model, 5, seed=seed, **FAST)[3:]
    assert close(found, last.x_next.clamp(-1, 1))


def test_on_step_hears_of_every_evaluation(model: Model) -> None:
    heard: list[tuple[int, int]] = []

    def on_step(first: int, done: int, step: Step) -> None:
        heard.append((first, done))
        assert step.row == done - 1
        assert step.x_next.shape[0] == (2 if first == 0 else 1)

    sample(model, 3, batch_size=2, on_step=on_step, steps=4, dtype=torch.float32)
    assert heard == [(0, 1), (0, 2), (0, 3), (0, 4), (2, 1), (2, 2), (2, 3), (2, 4)]


def test_a_prepared_copy_gives_the_same_output(model: Model) -> None:
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 80])
    found = prepare(model).eps(x, t)
    torch.testing.assert_close(found, model.eps(x, t), rtol=1e-4, atol=1e-5)
    half = prepare(model, dtype=torch.bfloat16).eps(x, t)
    error = (half - model.eps(x, t)).abs().max() / model.eps(x, t).abs().max()
    assert 0 < error < 0.05


def test_x_t_reaches_a_bfloat16_network_unrounded(model: Model) -> None:
    """1 + δ with δ far below the 2⁻⁷ that bfloat16 resolves there: what the first layer makes of
    it is seen, and only then rounded, 16 channels on their own."""
    seen: list[torch.Tensor] = []
    half = prepare(model, dtype=torch.bfloat16)
    half.network.conv_in.register_forward_hook(lambda layer, given, out: seen.append(out))
    x, delta = torch.ones(1, 1, 8, 8), 1e-3 * torch.randn(1, 1, 8, 8)
    assert torch.equal((x + delta / 1000).bfloat16(), x.bfloat16())
    for entered in (x, x + delta):
        half.eps(entered, torch.tensor([1]))
    wanted = [model.network.conv_in(entered) for entered in (x, x + delta)]
    for found, exact in zip(seen, wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
    assert half.network.down[0].res[0].conv1.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "num_images = 0: must be 1 or more"),
        ({"batch_size": 0}, "batch_size = 0: must be 1 or more"),
        ({"steps": 101}, r"steps = 101: must be 1\.\.100"),
        ({"sampler": "euler"}, "sampler = 'euler': must be one of ddpm, ddim, dpmpp_2m"),
        ({"spacing": "log"}, "spacing = 'log'"),
        ({"sampler": "ddim", "landing": "far"}, "landing = 'far': must be one of next, stride"),
        ({"landing": "far"}, "landing = 'far': must be one of next, stride"),
        ({"landing": "stride"}, "landing = 'stride': is for sampler ddim, not ddpm"),
        ({"rederive_eps": False}, "rederive_eps = False: is for sampler ddim, not ddpm"),
        ({"sampler": "ddim", "rederive_eps": "no"}, "rederive_eps = 'no': must be true or false"),
        ({"clip": "no"}, "clip = 'no': must be true or false"),
        ({"compile": "no"}, "compile = 'no': must be true or false"),
        ({"dtype": "fp32"}, "dtype = 'fp32': must be a floating dtype, such as torch.bfloat16"),
        ({"dtype": torch.int8}, "dtype = torch.int8: must be a floating dtype"),
        ({"sampler": "ddim", "eta": 2.0}, "eta = 2.0"),
        ({"variance": "learned"}, "variance = 'learned': this model has no learned variance"),
        ({"seed": -1}, "seed = -1"),
        ({"class_label": 3}, r"class_label = 3: must be 0\.\.2"),
        ({"class_label": -1}, "class_label = -1"),
        ({"class_label": [0, 1]}, "class_label: 2 labels for 1 images"),
        ({"guidance": 2.0}, "guidance = 2.0: needs a class_label"),
    ],
)
def test_bad_options_are_named(model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(model, **{"num_images": 1, **FAST, **options})  # type: ignore[arg-type]


def test_labels_and_guidance_need_a_network_that_has_them() -> None:
    unconditional = build_model(dataclasses.replace(TINY, num_classes=0, null_class=False))
    with pytest.raises(ValueError, match="class_label: this model is unconditional"):
        sample(unconditional, 1, class_label=0, **FAST)
    no_null = build_model(dataclasses.replace(TINY, null_class=False))
    with pytest.raises(ValueError, match=r"class_label: this model has no null label.*0\.\.2"):
        sample(no_null, 1, **FAST)
    with pytest.raises(ValueError, match=r"guidance = 2.0: needs a model with a null label"):
        sample(no_null, 1, class_label=0, guidance=2.0, **FAST)


def test_a_models_own_steps_hold_for_its_own_sampler(tmp_path: Path) -> None:
    """They are kept in its folder; a config without them stays as it was."""
    model = build_model(sampling=SamplingDefaults(sampler="ddim", steps=4))
    assert "steps" not in build_model().config.to_dict()["sampling"]
    save(model, tmp_path / "own")
    loaded = load(tmp_path / "own")
    assert loaded.config == model.config

    def steps_of(**options: Any) -> int:
        heard: list[int] = []
        sample(loaded, 1, dtype=torch.float32, on_step=lambda *a: heard.append(a[1]), **options)
        return heard[-1]

    assert steps_of() == steps_of(sampler="ddim") == 4
    assert steps_of(sampler="ddpm") == 100 and steps_of(steps=7) == 7
    with pytest.raises(SamplerError, match="steps = 0: must be an integer, 1 or more"):
        SamplingDefaults(steps=0)
    with pytest.raises(CheckpointError, match="sampling: steps = 101: must be at most T = 100"):
        build_model(sampling=SamplingDefaults(steps=101))
