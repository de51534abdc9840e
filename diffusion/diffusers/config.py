"""Configs of diffusers' `UNet2DModel`, `DDPMScheduler` and `DDIMScheduler`, read and written.

Every field is honoured or refused by name; a field left out has diffusers' own default. Names that
start with an underscore are metadata.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from diffusion.diffusers.fields import Fields, is_integer, is_list, is_number
from diffusion.files import CheckpointError
from diffusion.model import ModelConfig
from diffusion.samplers import SamplingDefaults
from diffusion.schedule import MAX_T, ScheduleConfig, ScheduleError
from diffusion.unet import NetworkConfigError, UNetConfig

NETWORK_CLASS = "UNet2DModel"
SCHEDULER_CLASSES = ("DDPMScheduler", "DDIMScheduler")
# Names the version whose conventions are written, for diffusers' own migrations.
VERSION = {"_diffusers_version": "0.38.0"}

# Fields with one meaning that our network has; the first value is diffusers' default.
_NETWORK_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "downsample_type": ("conv",),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2D",),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "upsample_type": ("conv",),
}
_SCHEDULER_FIXED: dict[str, tuple[Any, ...]] = {
    "predict_epsilon": (True,),  # before prediction_type
    "rescale_betas_zero_snr": (False,),
    "steps_offset": (0,),
    "tensor_format": ("pt", "np"),  # once chose the array library
    "thresholding": (False,),
    "timestep_values": (None,),
}
_DOWN = {False: "DownBlock2D", True: "AttnDownBlock2D"}
_UP = {False: "UpBlock2D", True: "AttnUpBlock2D"}
_PREDICTIONS = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v"}
_SPACINGS = {"linspace": "uniform", "leading": "leading", "trailing": "trailing"}
_VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",  # the same numbers by way of a logarithm
    "fixed_large": "large",
    "learned_range": "learned",
}
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
_THEIR_FIELDS = {
    "image_size": "sample_size",
    "channels": "block_out_channels",
    "res_blocks": "layers_per_block",
    "groups": "norm_num_groups",
    "head_dim": "attention_head_dim",
}


def read_network(raw: dict[str, Any], where: str, *, null_class: bool = False) -> UNetConfig:
    """Our form of a `UNet2DModel` config. null_class: its last label means "no label"."""
    if raw.get("_class_name") != NETWORK_CLASS:
        raise Fields(raw, where).refuse("_class_name", raw.get("_class_name"), NETWORK_CLASS)
    fields = Fields(raw, where)
    fields.fixed(_NETWORK_FIXED)
    channels = fields.take(
        "block_out_channels",
        (224, 448, 672, 896),
        lambda v: is_list(v, is_integer),
        "a list of widths",
    )
    attention = _read_attention(fields, len(channels))
    groups = fields.integer("norm_num_groups", 32)
    fields.choice("attn_norm_num_groups", (None, groups), None)
    fields.choice("time_embedding_dim", (None, 4 * channels[0]), None)
    fields.integer("num_train_timesteps", None, optional=True)  # of learned time embeddings only
    in_channels = fields.integer("in_channels", 3)
    out_channels = fields.choice("out_channels", (in_channels, 2 * in_channels), 3)
    labels = _read_labels(fields, null_class)
    values = {
        "image_size": _read_side(fields),
        "in_channels": in_channels,
        "channels": channels,
        "attention": attention,
        "res_blocks": fields.integer("layers_per_block", 2),
        "groups": groups,
        "norm_eps": fields.number("norm_eps", 1e-5),
        "head_dim": fields.integer("attention_head_dim", 8, optional=True),
        "downsample_padding": fields.choice("downsample_padding", (0, 1), 1),
        "cos_first": fields.flag("flip_sin_to_cos", True),
        "freq_shift": fields.number("freq_shift", 0),
        "dropout": fields.number("dropout", 0.0),
        "num_classes": labels - null_class,
        "null_class": null_class,
        "learned_variance": out_channels == 2 * in_channels,
    }
    fields.done()
    try:
        return UNetConfig(**values)
    except NetworkConfigError as error:
        name, _, rest = str(error).partition(" = ")
        raise CheckpointError(f"{where}: {_THEIR_FIELDS.get(name, name)} = {rest}") from error


def _read_labels(fields: Fields, null_class: bool) -> int:
    """Rows of the label embedding; 0 without one."""
    if null_class:
        ok, allowed = (lambda v: is_integer(v) and v >= 2), "2 or more, as the last means no label"
        return int(fields.take("num_class_embeds", None, ok, allowed))
    return int(fields.integer("num_class_embeds", None, optional=True) or 0)


def _read_side(fields: Fields) -> int:
    """sample_size: an integer, or two equal ones."""

    def ok(value: Any) -> bool:
        return is_integer(value) or (
            is_list(value, is_integer) and len(value) == 2 and value[0] == value[1]
        )

    size = fields.take("sample_size", None, ok, "one side (images are square)")
    return int(size if is_integer(size) else size[0])


def _read_attention(fields: Fields, levels: int) -> tuple[bool, ...]:
    """One flag a level, finest first; the way up must mirror the way down."""
    down = fields.take(
        "down_block_types",
        ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        lambda v: is_list(v, lambda kind: kind in _DOWN.values()) and len(v) == levels,
        f"a list of {levels}, each {_DOWN[False]} or {_DOWN[True]}",
    )
    attention = tuple(kind == _DOWN[True] for kind in down)
    mirrored = [_UP[flag] for flag in reversed(attention)]
    default = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    fields.take(
        "up_block_types",
        default,
        lambda v: is_list(v, lambda _: True) and list(v) == mirrored,
        f"{mirrored}, which mirrors down_block_types",
    )
    return attention


def write_network(network: UNetConfig) -> dict[str, Any]:
    """Inverse of `read_network`."""
    labels = network.num_classes + network.null_class
    return {
        "_class_name": NETWORK_CLASS,
        **VERSION,
        **{name: allowed[0] for name, allowed in _NETWORK_FIXED.items()},
        "sample_size": network.image_size,
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "block_out_channels": list(network.channels),
        "down_block_types": [_DOWN[flag] for flag in network.attention],
        "up_block_types": [_UP[flag] for flag in reversed(network.attention)],
        "layers_per_block": network.res_blocks,
        "norm_num_groups": network.groups,
        "norm_eps": network.norm_eps,
        "attention_head_dim": network.head_dim,
        "downsample_padding": network.downsample_padding,
        "flip_sin_to_cos": network.cos_first,
        "freq_shift": network.freq_shift,
        "dropout": network.dropout,
        "num_class_embeds": labels or None,
    }


@dataclasses.dataclass(frozen=True)
class Process:
    """What a scheduler config says: forward process, parameterisation, way of sampling."""

    schedule: ScheduleConfig
    prediction: str
    sampling: SamplingDefaults


def read_scheduler(raw: dict[str, Any], where: str) -> Process:
    """Our form of a scheduler config."""
    fields = Fields(raw, where)
    kind = raw.get("_class_name")
    if kind not in SCHEDULER_CLASSES:
        raise fields.refuse("_class_name", kind, " or ".join(SCHEDULER_CLASSES))
    fields.fixed(_SCHEDULER_FIXED)
    for name, default in (("dynamic_thresholding_ratio", 0.995), ("sample_max_value", 1.0)):
        fields.number(name, default)  # act with thresholding only
    clip = fields.flag("clip_sample", True)
    bound = fields.number("clip_sample_range", 1.0)
    if clip and bound != 1:
        raise fields.refuse("clip_sample_range", bound, "1.0: images lie in [−1, 1]")
    variance = SamplingDefaults.variance
    if kind == "DDIMScheduler":
        fields.fixed({"set_alpha_to_one": (True,)})
    else:
        variance = _VARIANCES[fields.choice("variance_type", tuple(_VARIANCES), "fixed_small")]
    sampling = SamplingDefaults(
        sampler="ddim" if kind == "DDIMScheduler" else "ddpm",
        variance=variance,
        clip=clip,
        spacing=_SPACINGS[fields.choice("timestep_spacing", tuple(_SPACINGS), "leading")],
    )
    prediction = _PREDICTIONS[fields.choice("prediction_type", tuple(_PREDICTIONS), "epsilon")]
    schedule = _read_schedule(fields)
    fields.done()
    return Process(schedule, prediction, sampling)


def _read_schedule(fields: Fields) -> ScheduleConfig:
    T = int(fields.integer("num_train_timesteps", 1000, most=MAX_T))
    kind = fields.choice("beta_schedule", _BETA_SCHEDULES, "linear")
    start, end = (
        fields.take(name, default, lambda v: is_number(v) and 0 < v < 1, "between 0 and 1")
        for name, default in (("beta_start", 1e-4), ("beta_end", 0.02))
    )
    betas = fields.take(
        "trained_betas",
        None,
        lambda v: v is None or (is_list(v, is_number) and len(v) == T),
        f"null or a list of num_train_timesteps = {T} numbers",
    )
    try:
        config = _schedule_config(T, kind, start, end) if betas is None else _listed(betas)
        config.build()
    except ScheduleError as error:
        raise CheckpointError(f"{fields.where}: {error}") from error
    return config


def _listed(betas: Any) -> ScheduleConfig:
    return ScheduleConfig.from_betas(betas)


def _schedule_config(T: int, kind: str, start: float, end: float) -> ScheduleConfig:
    if kind == "linear":
        return ScheduleConfig("linear", T, start, end)
    if kind == "squaredcos_cap_v2":
        return ScheduleConfig("cosine", T)
    if kind == "scaled_linear":
        return _listed(np.linspace(math.sqrt(start), math.sqrt(end), T) ** 2)
    return _listed(start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, T))))  # sigmoid


def write_scheduler(config: ModelConfig) -> dict[str, Any]:
    """The scheduler config that says most of what a model's config says.

    Raises CheckpointError for a parameterisation that diffusers does not know.
    """
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    if config.prediction not in predictions:
        allowed = ", ".join(predictions)
        raise CheckpointError(
            f"prediction = {config.prediction!r}: a diffusers scheduler knows only {allowed}"
        )
    sampling, schedule = config.sampling, config.schedule
    learned = config.network.learned_variance
    # Only DDPMScheduler can split off the half of the output that holds a learned variance.
    is_ddim = sampling.sampler == "ddim" and not learned
    out: dict[str, Any] = {
        "_class_name": "DDIMScheduler" if is_ddim else "DDPMScheduler",
        **VERSION,
        "num_train_timesteps": schedule.T,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": "squaredcos_cap_v2" if schedule.kind == "cosine" else "linear",
        "trained_betas": None if schedule.betas is None else list(schedule.betas),
        "prediction_type": predictions[config.prediction],
        "clip_sample": sampling.clip,
        "clip_sample_range": 1.0,
        "timestep_spacing": "linspace" if sampling.spacing == "quadratic" else sampling.spacing,
    }
    if sampling.spacing == "uniform":
        out["timestep_spacing"] = "linspace"
    if is_ddim:
        return {**out, "set_alpha_to_one": True}
    return {**out, "variance_type": "learned_range" if learned else f"fixed_{sampling.variance}"}
