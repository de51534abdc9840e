"""Configs of diffusers' `DDPMScheduler` and `DDIMScheduler`, read and written.

The chain is the same on both sides, or the field that makes it another is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from diffusion.diffusers.config import VERSION
from diffusion.diffusers.fields import Fields, is_list, is_number
from diffusion.files import CheckpointError
from diffusion.model import ModelConfig
from diffusion.samplers import SamplingDefaults
from diffusion.schedule import MAX_T, Float64, ScheduleConfig, ScheduleError

DDPM, DDIM = SCHEDULER_CLASSES = ("DDPMScheduler", "DDIMScheduler")

# Fields with one meaning that we have; the first value is diffusers' default.
_FIXED: dict[str, tuple[Any, ...]] = {
    "predict_epsilon": (True,),  # before prediction_type
    "steps_offset": (0,),
    "tensor_format": ("pt", "np"),  # once chose the array library
    "thresholding": (False,),
    "timestep_values": (None,),
}
# What a class leaves unread of the other's fields. They stay in the config of a scheduler that was
# made from one of the other class, whichever class then saved it.
_UNREAD = {DDPM: ("set_alpha_to_one",), DDIM: ("variance_type",)}
_PREDICTIONS = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v"}
_SPACINGS = {"linspace": "uniform", "leading": "leading", "trailing": "trailing"}
_VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",  # the same numbers by way of a logarithm
    "fixed_large": "large",
    "learned_range": "learned",
}
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


@dataclasses.dataclass(frozen=True)
class Process:
    """What a scheduler config says: forward process, parameterisation, way of sampling."""

    schedule: ScheduleConfig
    prediction: str
    sampling: SamplingDefaults


def read_scheduler(raw: dict[str, Any], where: str, kind: str | None = None) -> Process:
    """Our form of a scheduler config. kind: the class that is to read it, which a pipeline may
    choose; by default the one that wrote it."""
    fields = Fields(raw, where)
    written = raw.get("_class_name")
    if written not in SCHEDULER_CLASSES:
        raise fields.refuse("_class_name", written, " or ".join(SCHEDULER_CLASSES))
    kind = kind or written
    fields.ignore(_UNREAD[kind])
    fields.fixed(_FIXED)
    for name, default in (("dynamic_thresholding_ratio", 0.995), ("sample_max_value", 1.0)):
        fields.number(name, default)  # act with thresholding only
    clip = fields.flag("clip_sample", True)
    bound = fields.number("clip_sample_range", 1.0)
    if clip and bound != 1:
        raise fields.refuse("clip_sample_range", bound, "1.0: images lie in [−1, 1]")
    spacing = _SPACINGS[fields.choice("timestep_spacing", tuple(_SPACINGS), "leading")]
    sampling = _read_ddim(fields) if kind == DDIM else _read_ddpm(fields, spacing)
    sampling = dataclasses.replace(sampling, clip=clip, spacing=spacing)
    prediction = _PREDICTIONS[fields.choice("prediction_type", tuple(_PREDICTIONS), "epsilon")]
    schedule = _read_schedule(fields, kind)
    fields.done()
    return Process(schedule, prediction, sampling)


def _read_ddim(fields: Fields) -> SamplingDefaults:
    fields.fixed({"set_alpha_to_one": (True,)})
    return SamplingDefaults("ddim", rederive_eps=False, landing="stride")


def _read_ddpm(fields: Fields, spacing: str) -> SamplingDefaults:
    theirs = fields.choice("variance_type", tuple(_VARIANCES), "fixed_small")
    if spacing == "trailing" and _VARIANCES[theirs] != "small":
        raise fields.refuse(
            "timestep_spacing",
            spacing,
            f"leading or linspace with variance_type = {theirs!r}: in trailing DDPMScheduler ends "
            "above t = 1, and then adds noise to the finished image",
        )
    return SamplingDefaults("ddpm", _VARIANCES[theirs])


def _read_schedule(fields: Fields, scheduler: str) -> ScheduleConfig:
    T = int(fields.integer("num_train_timesteps", 1000, most=MAX_T))
    known = _BETA_SCHEDULES if scheduler == DDPM else _BETA_SCHEDULES[:-1]  # DDIM has no sigmoid
    kind = fields.choice("beta_schedule", known, "linear")
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
    rescale = fields.flag("rescale_betas_zero_snr", False)
    if rescale and T == 1:
        raise fields.refuse("rescale_betas_zero_snr", True, "false where num_train_timesteps = 1")
    try:
        config = (
            _schedule_config(T, kind, start, end)
            if betas is None
            else ScheduleConfig.from_betas(betas)
        )
        schedule = config.build()
    except ScheduleError as error:
        raise CheckpointError(f"{fields.where}: {error}") from error
    return ScheduleConfig.from_betas(zero_terminal_snr(schedule.betas)) if rescale else config


def zero_terminal_snr(betas: Float64) -> Float64:
    """√ᾱ shifted so that ᾱ_T = 0, and scaled so that ᾱ_1 stays (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    rescaled: Float64 = 1 - np.append(root[0], root[1:] / root[:-1]) ** 2
    return rescaled


def _schedule_config(T: int, kind: str, start: float, end: float) -> ScheduleConfig:
    if kind == "linear":
        return ScheduleConfig("linear", T, start, end)
    if kind == "squaredcos_cap_v2":
        return ScheduleConfig("cosine", T)
    if kind == "scaled_linear":
        roots = np.linspace(math.sqrt(start), math.sqrt(end), T)
        return ScheduleConfig.from_betas(roots**2)
    sigmoid = 1 / (1 + np.exp(-np.linspace(-6, 6, T)))
    return ScheduleConfig.from_betas(start + (end - start) * sigmoid)


def write_scheduler(config: ModelConfig) -> dict[str, Any]:
    """The scheduler config with which diffusers draws what a model's config says.

    Raises CheckpointError for a parameterisation or a way of sampling that diffusers lacks.
    """
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    if config.prediction not in predictions:
        allowed = ", ".join(predictions)
        raise CheckpointError(
            f"prediction = {config.prediction!r}: a diffusers scheduler knows only {allowed}"
        )
    _check_sampling(config.sampling, learned=config.network.learned_variance)
    sampling, schedule = config.sampling, config.schedule
    spacings = {ours: theirs for theirs, ours in _SPACINGS.items()}
    variance = "learned_range" if sampling.variance == "learned" else f"fixed_{sampling.variance}"
    own = {"set_alpha_to_one": True} if sampling.sampler == "ddim" else {"variance_type": variance}
    return {
        "_class_name": DDIM if sampling.sampler == "ddim" else DDPM,
        **VERSION,
        "num_train_timesteps": schedule.T,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": "squaredcos_cap_v2" if schedule.kind == "cosine" else "linear",
        "trained_betas": None if schedule.betas is None else list(schedule.betas),
        "prediction_type": predictions[config.prediction],
        "clip_sample": sampling.clip,
        "clip_sample_range": 1.0,
        "timestep_spacing": spacings[sampling.spacing],
        **own,
    }


def _check_sampling(sampling: SamplingDefaults, *, learned: bool) -> None:
    """Raise CheckpointError unless a pipeline of diffusers draws these very images."""
    allowed = _allowed(sampling, learned)
    if allowed is not None:
        name, must_be = allowed
        raise CheckpointError(
            f"sampling: {name} = {getattr(sampling, name)!r}: diffusers would draw other images; "
            f"must be {must_be}"
        )


def _allowed(sampling: SamplingDefaults, learned: bool) -> tuple[str, str] | None:
    """The first field that diffusers has no such value for, and what it may be."""
    if learned and sampling.sampler != "ddpm":
        return "sampler", "ddpm for a model with a learned variance, which only DDPMScheduler reads"
    if learned and sampling.variance != "learned":
        return "variance", "learned for a model that has one"
    if sampling.sampler not in ("ddpm", "ddim"):
        return "sampler", "ddpm or ddim"
    if sampling.spacing not in _SPACINGS.values():
        return "spacing", "uniform, leading or trailing"
    if sampling.sampler == "ddpm":
        if sampling.spacing == "trailing" and sampling.variance != "small":
            return "spacing", (
                f"uniform or leading with variance = {sampling.variance!r}: in trailing "
                "DDPMScheduler adds noise to the finished image"
            )
        return None
    if sampling.clip and sampling.rederive_eps:
        return "rederive_eps", "false (or clip false): DDIMPipeline keeps the network's ε̂"
    if sampling.landing == "next" and sampling.spacing != "leading":
        return "landing", "stride (or spacing leading): DDIMScheduler steps by T // steps"
    return None
