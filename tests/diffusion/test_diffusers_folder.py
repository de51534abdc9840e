"""Reading diffusers' folders: every field is honoured or refused by name."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import diffusion
from diffusion import CheckpointError, Model, UNetConfig
from diffusion.about import About, read_about, write_about
from diffusion.checkpoint import WEIGHTS_NAME, convert
from diffusion.diffusers.config import read_network
from diffusion.diffusers.folder import export_diffusers, load_diffusers
from diffusion.diffusers.scheduler import read_scheduler
from diffusion.files import digest_of
from diffusion.presets import Preset
from diffusion.samplers import SamplingDefaults
from diffusion.tuned import Tuned, write_tuned
from tests.diffusion.networks import TINY, build_model

UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(model: Model, tmp_path: Path) -> Path:
    """Our tiny model in their form."""
    export_diffusers(model, tmp_path / "pipeline")
    return tmp_path / "pipeline"


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((folder / name).read_text())
    change(raw)
    (folder / name).write_text(json.dumps(raw))


def put(folder: Path, name: str, **fields: Any) -> None:
    edit(folder, name, lambda raw: raw.update(fields))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        diffusion.load(folder)


# The network's config


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("_class_name", "UNet2DConditionModel", "UNet2DModel"),
        ("act_fn", "gelu", "'silu' or 'swish'"),
        ("add_attention", False, "True"),
        ("attention_head_dim", 3, "None or a divisor of 16"),
        ("attention_head_dim", "8", "a positive integer or null"),
        ("attn_norm_num_groups", 2, "None or 4"),
        ("block_out_channels", [8, 18], "multiples of groups = 4"),
        ("block_out_channels", "8", "a list of widths"),
        ("center_input_sample", True, "False"),
        ("class_embed_type", "timestep", "None"),
        ("down_block_types", ["DownBlock2D", "SkipDownBlock2D"], "a list of 2, each DownBlock2D"),
        ("down_block_types", ["DownBlock2D"], "a list of 2"),
        ("downsample_padding", 2, "0 or 1"),
        ("downsample_type", "resnet", "'conv'"),
        ("dropout", 1.5, "0 ≤ dropout < 1"),
        ("flip_sin_to_cos", "no", "true or false"),
        ("freq_shift", 4.0, "below 4"),
        ("in_channels", 0, "a positive integer"),
        ("layers_per_block", 0, "a positive integer"),
        ("mid_block_scale_factor", 1.4, "1"),
        ("mid_block_type", None, "'UNetMidBlock2D'"),
        ("norm_eps", "small", "a number"),
        ("norm_num_groups", None, "a positive integer"),
        ("num_class_embeds", 1, "2 or more, as the last means no label"),
        ("out_channels", 3, "1 or 2"),
        ("resnet_time_scale_shift", "scale_shift", "'default'"),
        ("sample_size", None, "one side"),
        ("sample_size", [8, 16], "one side"),
        ("sample_size", 7, "a multiple of 2 for 2 levels"),
        ("time_embedding_dim", 100, "None or 32"),
        ("time_embedding_type", "fourier", "'positional'"),
        ("up_block_types", ["UpBlock2D", "AttnUpBlock2D"], "mirrors down_block_types"),
        ("upsample_type", "resnet", "'conv'"),
        ("encoder_hid_dim", 7, "absent: this field is not known here"),
    ],
)
def test_network_fields_are_refused_by_name(
    folder: Path, field: str, value: object, allowed: str
) -> None:
    put(folder, UNET, **{field: value})
    wrong = value[1] if field == "block_out_channels" and isinstance(value, list) else value
    refused(folder, rf"{UNET}: {field} = {wrong!r}: must be .*{allowed}".replace("[", r"\["))


@pytest.mark.parametrize(
    ("field", "value", "ours", "wanted"),
    [
        ("act_fn", "swish", "groups", 4),
        ("sample_size", [16, 16], "image_size", 16),
        ("dropout", 0.25, "dropout", 0.25),
        ("norm_eps", 1e-3, "norm_eps", 1e-3),
        ("downsample_padding", 1, "downsample_padding", 1),
        ("flip_sin_to_cos", True, "cos_first", True),
        ("freq_shift", 0, "freq_shift", 0),
        ("attention_head_dim", 4, "head_dim", 4),
        ("attn_norm_num_groups", 4, "groups", 4),
        ("time_embedding_dim", 32, "channels", (8, 16)),
        ("num_train_timesteps", 1000, "image_size", 8),
        ("_name_or_path", "/somewhere", "image_size", 8),
    ],
)
def test_network_fields_are_honoured(
    folder: Path, field: str, value: object, ours: str, wanted: object
) -> None:
    put(folder, UNET, **{field: value})
    assert getattr(diffusion.load(folder).config.network, ours) == wanted


def test_absent_fields_have_their_defaults(diffusers: ModuleType) -> None:
    """The defaults of their classes, not those of our own config."""

    def defaults(name: str) -> dict[str, Any]:
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        found = {p.name: p.default for p in parameters.values() if p.name != "self"}
        return {"_class_name": name, **found}

    written = {"_class_name": "UNet2DModel", "sample_size": 8}
    full = {**defaults("UNet2DModel"), "sample_size": 8}
    assert read_network(written, "here") == read_network(full, "here")
    for name in ("DDPMScheduler", "DDIMScheduler"):
        written = {"_class_name": name}
        assert read_scheduler(written, "here") == read_scheduler(defaults(name), "here")


# The scheduler's config


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("_class_name", "EulerDiscreteScheduler", "DDPMScheduler or DDIMScheduler"),
        ("_class_name", "UniPCMultistepScheduler", "DDPMScheduler or DDIMScheduler"),
        ("_class_name", "DPMSolverMultistepScheduler", "DDPMScheduler or DDIMScheduler"),
        ("beta_schedule", "laplace", "'linear' or 'scaled_linear' or 'squaredcos_cap_v2'"),
        ("beta_start", -0.1, "between 0 and 1"),
        ("beta_end", 1.5, "between 0 and 1"),
        ("clip_sample", 1, "true or false"),
        ("clip_sample_range", 2.0, "1.0"),
        ("dynamic_thresholding_ratio", "high", "a number"),
        ("num_train_timesteps", 0, "an integer 1..10000"),
        ("prediction_type", "flow_prediction", "'epsilon' or 'sample' or 'v_prediction'"),
        ("predict_epsilon", False, "True"),
        ("rescale_betas_zero_snr", "yes", "true or false"),
        ("sample_max_value", None, "a number"),
        ("steps_offset", 1, "0"),
        ("thresholding", True, "False"),
        ("timestep_spacing", "karras", "'linspace' or 'leading' or 'trailing'"),
        ("trained_betas", [0.1, 0.2], "null or a list of num_train_timesteps = 100 numbers"),
        ("variance_type", "learned", "'fixed_small' or .* or 'learned_range'"),
        ("variance_type", "fixed_large_log", "'fixed_small' or .* or 'learned_range'"),
        ("variance_type", "learned_range", "fixed_small or fixed_large"),
        ("use_karras_sigmas", False, "absent: this field is not known here"),
        ("use_lu_lambdas", True, "absent: this field is not known here"),
        ("solver_order", 3, "absent: this field is not known here"),
    ],
)
def test_scheduler_fields_are_refused_by_name(
    folder: Path, field: str, value: object, allowed: str
) -> None:
    put(folder, SCHEDULER, **{field: value})
    refused(folder, rf"{SCHEDULER}: {field} = {value!r}: must be .*{allowed}".replace("[", r"\["))


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_noise_on_the_finished_image_is_refused(folder: Path, variance: str) -> None:
    put(folder, SCHEDULER, timestep_spacing="trailing", variance_type=variance)
    refused(
        folder,
        f"timestep_spacing = 'trailing': must be leading or linspace with "
        f"variance_type = '{variance}': .* adds noise to the finished image",
    )


def test_ddim_has_no_sigmoid_schedule(folder: Path) -> None:
    edit(folder, SCHEDULER, lambda raw: raw.pop("variance_type"))
    put(folder, SCHEDULER, _class_name="DDIMScheduler", beta_schedule="sigmoid")
    put(folder, "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    refused(folder, "beta_schedule = 'sigmoid': must be 'linear' or")


def test_ddim_must_end_at_the_image(folder: Path) -> None:
    edit(folder, SCHEDULER, lambda raw: raw.pop("variance_type"))
    put(folder, SCHEDULER, _class_name="DDIMScheduler", set_alpha_to_one=False)
    put(folder, "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    refused(folder, "set_alpha_to_one = False: must be True")
    put(folder, SCHEDULER, set_alpha_to_one=True)
    assert diffusion.load(folder).config.sampling.sampler == "ddim"


def test_betas_out_of_range_are_refused(folder: Path) -> None:
    put(folder, SCHEDULER, trained_betas=[0.1] * 99 + [1.2])
    refused(folder, rf"{SCHEDULER}: betas\[99\] = 1.2: must lie between 0 and 1")


@pytest.mark.parametrize(
    "fields", [{"trained_betas": [0.1] * 99 + [1.0]}, {"rescale_betas_zero_snr": True}], ids=str
)
def test_a_schedule_that_leaves_no_signal_needs_another_prediction(
    folder: Path, fields: dict[str, Any]
) -> None:
    put(folder, SCHEDULER, **fields)
    refused(folder, "prediction_type and betas: prediction = 'epsilon': no x̂_0 follows")
    put(folder, SCHEDULER, prediction_type="v_prediction")
    assert diffusion.load(folder).schedule.alphas_cumprod[-1] == 0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"beta_start": 0.001, "beta_end": 0.3, "num_train_timesteps": 50},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 200},
        {"beta_schedule": "sigmoid"},
        {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3},
    ],
    ids=str,
)
def test_schedules_have_their_betas(
    diffusers: ModuleType, folder: Path, fields: dict[str, Any]
) -> None:
    scheduler = diffusers.DDPMScheduler(**fields)
    scheduler.save_pretrained(folder / "scheduler")
    model = diffusion.load(folder)
    np.testing.assert_allclose(model.schedule.betas, scheduler.betas.numpy(), rtol=2e-4, atol=1e-7)
    export_diffusers(model, folder.parent / "back")
    back = diffusers.DDPMScheduler.from_pretrained(folder.parent / "back" / "scheduler")
    torch.testing.assert_close(back.betas, scheduler.betas, rtol=2e-4, atol=1e-7)
    assert diffusion.load(folder.parent / "back").config == model.config


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, SamplingDefaults("ddpm", "small", clip=True, spacing="leading")),
        (
            {"variance_type": "fixed_small_log"},
            SamplingDefaults(variance="small", spacing="leading"),
        ),
        ({"variance_type": "fixed_large"}, SamplingDefaults(variance="large", spacing="leading")),
        (
            {"clip_sample": False, "clip_sample_range": 3.0},
            SamplingDefaults("ddpm", "small", False, "leading"),
        ),
        ({"timestep_spacing": "trailing"}, SamplingDefaults("ddpm", "small", spacing="trailing")),
        ({"timestep_spacing": "linspace"}, SamplingDefaults("ddpm", "small", spacing="uniform")),
    ],
)
def test_ways_of_sampling_become_the_models_defaults(
    diffusers: ModuleType, folder: Path, theirs: dict[str, Any], ours: SamplingDefaults
) -> None:
    diffusers.DDPMScheduler(num_train_timesteps=20, **theirs).save_pretrained(folder / "scheduler")
    model = diffusion.load(folder)
    assert model.config.sampling == ours
    by_default = diffusion.sample(model, 1, steps=5, dtype=torch.float32)
    said = {**vars(ours), "steps": 5}
    del said["rederive_eps"], said["landing"]  # of ddim alone
    told = diffusion.sample(model, 1, dtype=torch.float32, **said)
    assert torch.equal(by_default, told)


@pytest.mark.parametrize(
    ("theirs", "ours"), [("epsilon", "epsilon"), ("sample", "sample"), ("v_prediction", "v")]
)
def test_prediction_types(folder: Path, theirs: str, ours: str) -> None:
    put(folder, SCHEDULER, prediction_type=theirs)
    assert diffusion.load(folder).config.prediction == ours


def test_a_learned_variance_needs_a_scheduler_that_reads_it(tmp_path: Path) -> None:
    network = UNetConfig(**{**vars(TINY), "learned_variance": True})
    for sampling, field in (
        (SamplingDefaults("ddim", rederive_eps=False, landing="stride"), "sampler = 'ddim'"),
        (SamplingDefaults("ddpm", "small"), "variance = 'small'"),
    ):
        with pytest.raises(CheckpointError, match=f"sampling: {field}: .*learned"):
            export_diffusers(build_model(network, sampling=sampling), tmp_path)
    model = build_model(network, sampling=SamplingDefaults("ddpm", "learned"))
    export_diffusers(model, tmp_path)
    scheduler = json.loads((tmp_path / SCHEDULER).read_text())
    assert scheduler["_class_name"] == "DDPMScheduler"  # DDIMScheduler cannot read one
    assert scheduler["variance_type"] == "learned_range"
    assert diffusion.load(tmp_path).config == model.config
    put(tmp_path, SCHEDULER, variance_type="fixed_small")
    refused(
        tmp_path, "variance_type: must be learned_range .* out_channels = 2 and in_channels = 1"
    )


# The folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "LDMPipeline"}, "_class_name = 'LDMPipeline': must be DDPMPipeline or"),
        (
            {"vqvae": ["diffusers", "VQModel"]},
            r"vqvae = \['diffusers', 'VQModel'\]: must be absent",
        ),
        (
            {"unet": ["diffusers", "UNet1DModel"]},
            r"unet = .*: must be \['diffusers', 'UNet2DModel'\]",
        ),
        ({"scheduler": ["my_code", "DDPMScheduler"]}, r"scheduler = \['my_code', "),
    ],
)
def test_other_pipelines_are_refused(folder: Path, fields: dict[str, Any], message: str) -> None:
    put(folder, "model_index.json", **fields)
    refused(folder, f"model_index.json: {message}")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.ckpt"])
def test_pickles_are_never_opened(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / "unet" / name)
    refused(folder, rf"{name}: a pickle, which can run code when it is read, is never opened")


def test_a_lone_variant_is_read_and_several_are_not(
    diffusers: ModuleType, folder: Path, model: Model
) -> None:
    theirs = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    (folder / WEIGHTS).unlink()
    theirs.half().save_pretrained(folder / "unet", variant="fp16")
    back = diffusion.load(folder)
    assert back.network.conv_in.weight.dtype == torch.float32
    wanted = model.network.conv_in.weight.half().float()
    assert torch.equal(back.network.conv_in.weight, wanted)
    theirs.save_pretrained(folder / "unet", variant="ema")
    refused(folder, "no diffusion_pytorch_model.safetensors, and several variants of it: ema, fp16")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_read_and_a_single_file_beside_them_is_not(
    diffusers: ModuleType, folder: Path, model: Model, variant: str | None
) -> None:
    """An index counts first, as in diffusers: the single file may be from an older save."""
    theirs = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    (folder / WEIGHTS).unlink()
    theirs.save_pretrained(folder / "unet", max_shard_size="20KB", variant=variant)
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    if variant is None:
        (folder / WEIGHTS).write_bytes(b"an older one")
    back = diffusion.load(folder)
    assert same_weights(back, model)
    digest = back.digest
    shards[1].write_bytes(shards[0].read_bytes())
    refused(folder, r"index(\.fp16)?\.json: weights do not fit the network: .* is missing")
    shards[1].unlink()
    refused(
        folder, f"{shards[1].name}: no such file, but diffusion_pytorch_model.safetensors.index"
    )
    for path in (folder / "unet").glob("*.index*.json"):
        path.unlink()
    (folder / WEIGHTS).unlink(missing_ok=True)
    refused(folder, r"-of-\d+\.safetensors: a part of weights, but there is no diffusion_")
    assert digest == back.digest


@pytest.mark.parametrize(
    "weight_map", [None, {}, [], {"a": "../other.safetensors"}, {"a": "b.bin"}]
)
def test_a_bad_index_of_shards_is_refused(folder: Path, weight_map: object) -> None:
    path = folder / (WEIGHTS + ".index.json")
    path.write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, "index.json: weight_map: ")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_of_wrapped_networks_are_known(folder: Path, model: Model, prefix: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS)
    save_file({prefix + name: tensor for name, tensor in weights.items()}, folder / WEIGHTS)
    assert same_weights(diffusion.load(folder), model)
    save_file({**weights, prefix + "conv_in.bias": torch.zeros(8)}, folder / WEIGHTS)
    refused(folder, "conv_in.bias is there twice, with a prefix and without")


def test_an_averaged_network_of_a_training_is_read(diffusers: ModuleType, tmp_path: Path) -> None:
    """As examples of diffusers save it: unet_ema with the fields of EMAModel, unet beside it."""
    from diffusers.training_utils import EMAModel

    export_diffusers(build_model(TINY), tmp_path / "pipeline")
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "pipeline" / "unet")
    averaged = EMAModel(
        theirs.parameters(), model_cls=diffusers.UNet2DModel, model_config=theirs.config
    )
    averaged.save_pretrained(tmp_path / "checkpoint" / "unet_ema")
    raw = json.loads((tmp_path / "checkpoint" / "unet_ema" / "config.json").read_text())
    assert {"decay", "inv_gamma", "min_decay", "optimization_step", "power"} < raw.keys()
    assert {"update_after_step", "use_ema_warmup"} < raw.keys()
    theirs.save_pretrained(tmp_path / "checkpoint" / "unet")
    found = diffusion.load(tmp_path / "checkpoint" / "unet_ema")
    assert torch.equal(found.network.conv_in.weight, theirs.conv_in.weight)
    refused(tmp_path / "checkpoint", "no model_index.json, .*give a network of it: .*unet_ema or ")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS)
    weights["down_blocks.0.resnets.0.conv1.weight"][0, 0, 1, 1] = value
    save_file(weights, folder / WEIGHTS)
    refused(
        folder,
        r"safetensors: weights: down.0.res.0.conv1.weight: 1 of its 576 numbers are NaN",
    )


def same_weights(first: Model, second: Model) -> bool:
    mine, other = first.network.state_dict(), second.network.state_dict()
    return all(torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.parametrize("name", [UNET, SCHEDULER, WEIGHTS])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, rf"{name}: no such file")


def test_broken_files_are_named(folder: Path) -> None:
    (folder / SCHEDULER).write_text("{")
    refused(folder, rf"{SCHEDULER}: cannot be read")
    (folder / "model_index.json").write_text("{")
    refused(folder, "model_index.json: cannot be read")


def test_weights_that_do_not_fit_are_named(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS)
    key = "mid_block.attentions.0.to_k.bias"
    save_file({**weights, "extra.weight": torch.zeros(1)}, folder / WEIGHTS)
    refused(folder, "safetensors: weights do not fit the network: extra.weight is not part of it")
    save_file({**weights, key: torch.zeros(3)}, folder / WEIGHTS)
    refused(folder, r"mid_attn.qkv.bias has the shape \[35\], must be \[48\]")
    del weights[key]
    save_file(weights, folder / WEIGHTS)
    refused(folder, f"safetensors: weights do not fit the network: {key} is missing")


def test_the_digest_is_that_of_configs_and_weights(folder: Path) -> None:
    names = ["model_index.json", UNET, SCHEDULER, "ddpm.json", WEIGHTS]
    content = b"".join((folder / name).read_bytes() for name in names)
    assert load_diffusers(folder).digest == hashlib.sha256(content).hexdigest()


# What diffusers has no field for


def test_extras_come_back(tmp_path: Path) -> None:
    model = build_model(
        class_names=("null", "eins", "zwei"),
        crop=(6, 8),
        sampling=SamplingDefaults("ddim", "small", spacing="leading", clip=False),
    )
    export_diffusers(model, tmp_path)
    assert diffusion.load(tmp_path).config == model.config
    # What changes nothing of a chain of ddim that neither clips nor lands elsewhere.
    assert json.loads((tmp_path / "ddpm.json").read_text())["sampling"] == {
        "variance": "small",
        "rederive_eps": True,
        "landing": "next",
    }
    (tmp_path / "ddpm.json").unlink()
    config = diffusion.load(tmp_path).config
    assert config.network.num_classes == 4  # the null label is then a label like any other
    assert config.network.null_label is None
    assert config.class_names == ()
    assert config.crop is None
    assert config.sampling == SamplingDefaults("ddim", "large", False, "leading", False, "stride")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 2}, "format = 2: must be 1"),
        ({"class_names": [1, 2, 3]}, r"class_names = \[1, 2, 3\]: must be a list of names"),
        ({"class_names": ["a"]}, "class_names: 1 names for num_classes = 3"),
        ({"null_class": "yes"}, "null_class = 'yes': must be true or false"),
        ({"crop": [3]}, r"crop = \[3\]: must be \[height, width\] or null"),
        ({"sampling": {"sampler": "euler"}}, "sampler = 'euler'"),
        ({"sampling": {"speed": 3}}, "speed"),
        ({"colour": "red"}, "colour = 'red': must be absent"),
    ],
)
def test_bad_extras_are_refused(folder: Path, fields: dict[str, Any], message: str) -> None:
    put(folder, "ddpm.json", **fields)
    refused(folder, message)


def test_the_mean_parameterisation_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="prediction = 'mean': a diffusers scheduler knows"):
        export_diffusers(build_model(prediction="mean"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Conversion


def test_conversion_takes_along_what_is_said_and_tuned(tmp_path: Path) -> None:
    source = tmp_path / "ours"
    diffusion.save(build_model(), source)
    about = About("Digits", presets={"fast": Preset("tuned", 1)})
    write_about(about, source)
    table = Tuned((99.0,), ((1.0, -0.3, 0.5, 0.0),))
    write_tuned([table], source, weights=digest_of([source / WEIGHTS_NAME]))
    convert(source, tmp_path / "again")
    found = diffusion.load(tmp_path / "again")
    assert read_about(tmp_path / "again") == about
    assert [*found.tuned] == [1] and found.presets == diffusion.load(source).presets
    convert(source, tmp_path / "theirs", "diffusers")
    assert read_about(tmp_path / "theirs") == about


def test_conversion_never_overwrites(model: Model, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already exists"):
        convert(folder, folder)
    with pytest.raises(CheckpointError, match="to = 'onnx': must be ours or diffusers"):
        convert(folder, tmp_path / "new", "onnx")
    (tmp_path / "empty").mkdir()
    convert(folder, tmp_path / "empty")
    with pytest.raises(CheckpointError, match="sampling: speed: must be one of sampler, variance"):
        convert(folder, tmp_path / "new", sampling={"speed": 3})
    with pytest.raises(CheckpointError, match="sampling: spacing = 'log': must be one of uniform"):
        convert(folder, tmp_path / "new", sampling={"spacing": "log"})
    convert(
        folder, tmp_path / "new", "diffusers", sampling={"spacing": "trailing", "variance": "small"}
    )
    assert diffusion.load(tmp_path / "new").config.sampling.spacing == "trailing"
    diffusion.save(build_model(sampling=SamplingDefaults("unipc", steps=8)), tmp_path / "few")
    convert(tmp_path / "few", tmp_path / "other", sampling={"sampler": "ddpm"})
    assert diffusion.load(tmp_path / "other").config.sampling == SamplingDefaults("ddpm")
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([5])
    assert torch.equal(diffusion.load(tmp_path / "empty").eps(x, t), model.eps(x, t))
